from __future__ import annotations

import numpy as np

from spark_nn.columns import Tensor
from spark_nn.dataset.buffers import Buffers

TENSORS = (
    Tensor("features", ("x",), "array", "float32", 2, (3, 2)),
    Tensor("label", ("y",), "scalar", "int64", 0, ()),
    Tensor("flag", ("f",), "scalar", "bool", 0, ()),
    Tensor("word", ("w",), "scalar", "string", 0, ()),
)


def address(array):
    return array.ctypes.data


def test_blocks_have_the_shapes_asked_for_and_begin_where_tensorflow_wants_them():
    block = Buffers(TENSORS, 5).take()
    found = {name: (array.shape, array.dtype) for name, array in block.items()}
    assert found == {
        "features": ((5, 3, 2), np.float32),
        "label": ((5,), np.int64),
        "flag": ((5,), np.bool_),
        "word": ((5,), np.dtype(object)),
    }
    for name in ("features", "label", "flag"):
        assert address(block[name]) % 64 == 0
        block[name][...] = 1  # none lies in another
    assert block["features"].sum() == 30
    assert block["label"].sum() == 5


def test_memory_is_used_again_only_when_nobody_holds_it():
    buffers = Buffers(TENSORS, 5)
    first = buffers.take()
    where = address(first["features"])
    view = first["label"][1:3].reshape(2, 1)
    second = buffers.take()
    assert address(second["features"]) != where
    del first
    third = buffers.take()
    assert address(third["features"]) not in (where, address(second["features"]))
    del view
    assert address(buffers.take()["features"]) == where


def test_a_list_of_all_blocks_keeps_them_apart():
    buffers = Buffers(TENSORS, 4)
    blocks = [buffers.take() for _ in range(20)]
    for number, block in enumerate(blocks):
        block["label"][:] = number
    assert [int(block["label"].mean()) for block in blocks] == list(range(20))
