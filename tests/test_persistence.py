from __future__ import annotations

import os

import pytest

from spark_nn.errors import ParamError
from spark_nn.persistence import decode, encode
from tests.keras import models


class Builder:
    def __init__(self, units):
        self.units = units

    def build(self):
        return self.units

    @staticmethod
    def plain():
        return 1


@pytest.mark.parametrize(
    "value",
    [None, 1, 0.5, "x", True, [1, "a", None], {"a": [1, {"b": 2}]}, models.mlp, [models.mlp, "mae"], Builder.plain],
)
def test_values_come_back_as_they_were(value):
    assert decode(encode("param", value)) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: None, "param is the function .*<lambda>.*could not import: define it at the top level"),
        (Builder(3).build, "param is the function .*Builder.build"),
        (object(), "param holds a object, which cannot be saved without pickling"),
        ([object()], "param holds a object"),
        (os.system, "param is posix:system, which is Python's own and would not be loaded again"),
        ({"a": eval}, "param is builtins:eval, which is Python's own"),
        (str.join, "param is builtins:str.join, which is Python's own"),
    ],
)
def test_what_another_process_could_not_make_again_is_refused(value, message):
    with pytest.raises(ParamError, match=message):
        encode("param", value)


def test_a_dict_that_looks_like_an_import_is_data_where_functions_have_no_place():
    from spark_nn import KerasEstimator

    assert "modelParams" not in KerasEstimator.functionParams
