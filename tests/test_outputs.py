from __future__ import annotations

import numpy as np
import pytest

from spark_nn.errors import ParamError
from spark_nn.outputs import Choice, Output, columns_of


def test_regression():
    values = Output("regression", (1,)).values(np.array([[1.5], [-2]], np.float32))
    assert values["predictionCol"].dtype == np.float64
    assert values["predictionCol"].tolist() == [1.5, -2.0]


def test_binary_from_probabilities():
    values = Output("binary", (1,)).values(np.array([[0.25], [0.75], [0.5]], np.float32))
    assert values["probabilityCol"].tolist() == [[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]
    assert values["rawPredictionCol"].tolist() == [[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]
    assert values["predictionCol"].tolist() == [0.0, 1.0, 0.0]


def test_binary_from_logits():
    logits = np.array([[0.0], [2.0], [-800.0]])
    values = Output("binary", (1,), logits=True).values(logits)
    assert values["rawPredictionCol"].tolist() == [[0, 0], [-2, 2], [800, -800]]
    np.testing.assert_allclose(values["probabilityCol"][:, 1], [0.5, 1 / (1 + np.exp(-2.0)), 0], atol=1e-12)
    assert values["predictionCol"].tolist() == [0.0, 1.0, 0.0]


def test_multiclass_from_probabilities_and_logits():
    table = np.array([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    values = Output("multiclass", (3,)).values(table)
    assert values["probabilityCol"].tolist() == table.tolist()
    assert values["predictionCol"].tolist() == [1.0, 0.0]
    values = Output("multiclass", (3,), logits=True).values(np.log(table) + 7)
    np.testing.assert_allclose(values["probabilityCol"], table, rtol=1e-12)
    np.testing.assert_allclose(values["rawPredictionCol"], np.log(table) + 7)


@pytest.mark.parametrize(("shape", "sql"), [((), "float"), ((3,), "array<float>"), ((2, 3), "array<array<float>>")])
def test_anything_else_keeps_its_shape(shape, sql):
    output = Output("raw", shape)
    assert output.fields == {"predictionCol": sql}
    block = np.arange(2 * int(np.prod(shape)), dtype=np.float32).reshape(2, *shape)
    np.testing.assert_array_equal(output.values(block)["predictionCol"], block)


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass", "raw"])
def test_no_rows_give_no_values(kind):
    shape = (3,) if kind in ("multiclass", "raw") else (1,)
    values = Output(kind, shape).values(np.zeros((0, *shape), np.float32))
    assert {len(each) for each in values.values()} == {0}


def test_several_outputs_have_keys_of_their_own():
    outputs = {"price": Output("regression", (1,)), "kind": Output("binary", (1,))}
    assert columns_of(outputs) == {
        "predictionCol:price": ("predictionCol", "price"),
        "rawPredictionCol:kind": ("rawPredictionCol", "kind"),
        "probabilityCol:kind": ("probabilityCol", "kind"),
        "predictionCol:kind": ("predictionCol", "kind"),
    }
    assert columns_of({"": outputs["price"]}) == {"predictionCol": ("predictionCol", "")}


def test_round_trip():
    output = Output("raw", (2, 3), logits=True)
    assert Output.fromDict(output.toDict()) == output


ONE, TWO = Output("raw", (1,)), Output("multiclass", (2,))


@pytest.mark.parametrize(
    ("outputs", "choice", "expected"),
    [
        ({"": ONE}, Choice(), {"": ONE}),
        ({"": ONE}, Choice("binary"), {"": Output("binary", (1,))}),
        ({"": Output("binary", (1,), logits=True)}, Choice("regression"), {"": Output("regression", (1,), True)}),
        ({"": TWO}, Choice("raw"), {"": Output("raw", (2,))}),
        ({"a": ONE, "b": TWO}, Choice({"a": "regression"}), {"a": Output("regression", (1,)), "b": TWO}),
        ({"a": ONE, "b": TWO}, Choice({"a": "binary"}, 0.25), {"a": Output("binary", (1,), False, 0.25), "b": TWO}),
    ],
)
def test_the_user_may_say_what_an_output_is(outputs, choice, expected):
    resolved = choice.of(outputs)
    assert {name: (each.kind, each.shape, each.logits) for name, each in resolved.items()} == {
        name: (each.kind, each.shape, each.logits) for name, each in expected.items()
    }
    assert all(
        each.threshold == choice.threshold for each in resolved.values() if each.kind == "binary" and choice.threshold
    )


@pytest.mark.parametrize(
    ("outputs", "choice", "message"),
    [
        (
            {"": TWO},
            Choice("binary"),
            r"outputKind='binary' needs a single element, .*shape \(2,\) for a row: set outputKind"
            " to 'multiclass' or 'raw'",
        ),
        ({"": ONE}, Choice("multiclass"), "outputKind='multiclass' needs one element per class"),
        ({"a": ONE, "b": TWO}, Choice({"c": "raw"}), "no output 'c'; it has 'a', 'b'"),
        ({"": ONE}, Choice({"c": "raw"}), "no output 'c'; it has one, without a name"),
        ({"": ONE}, Choice(columns={"c": "x"}), "outputCols=.*no output 'c'"),
        ({"": TWO}, Choice(threshold=0.25), "threshold=0.25: only outputs of kind 'binary' have one, .*'multiclass'"),
    ],
)
def test_what_does_not_suit_an_output_is_refused(outputs, choice, message):
    with pytest.raises(ParamError, match=message):
        choice.of(outputs)


@pytest.mark.parametrize("logits", [False, True])
def test_the_threshold_decides_between_two_classes(logits):
    probabilities = np.array([[0.25], [0.5], [0.75], [0.8]])
    given = np.log(probabilities / (1 - probabilities)) if logits else probabilities
    values = Output("binary", (1,), logits=logits, threshold=0.6).values(given)
    assert values["predictionCol"].tolist() == [0.0, 0.0, 1.0, 1.0]
    np.testing.assert_allclose(values["probabilityCol"][:, 1], probabilities[:, 0])
    assert Output("binary", (1,), threshold=0.75).values(probabilities)["predictionCol"].tolist() == [0, 0, 0, 1]
