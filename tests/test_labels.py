"""Labels are held against the loss, before a network learns from numbers that mean nothing to it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import torch
from pyspark.sql import functions as F
from torch.nn import functional

from spark_nn import KerasEstimator, TorchEstimator
from spark_nn.columns import Tensor
from spark_nn.dataset.extent import Extent, label_extents, together
from spark_nn.errors import ColumnError, ParamError, TrainingError
from spark_nn.keras import describe
from spark_nn.labels import check_values
from spark_nn.torch import losses

pytestmark = pytest.mark.timeout(120)


def rows(values, shape=()):
    """A manifest of rows with such labels."""
    label = Tensor("label", ("y",), "array" if shape else "scalar", "float32", len(shape), shape)
    extent = Extent.of(np.asarray(values, np.float32))
    return SimpleNamespace(role=lambda role: (label,), labels={"label": extent})


def check(takes, manifest, weights=None):
    check_values({"": takes}, manifest, weights or {})


def put_out(*shape):
    return SimpleNamespace(shape=(1, *shape))


def of_keras(loss, shape):
    return describe._taken(put_out(*shape), keras.losses.get(loss))


def of_torch(loss, shape):
    return losses.takes({"": put_out(*shape)}, loss)[""]


class OfOnesOwn(keras.losses.BinaryCrossentropy):
    pass


def of_ones_own(output, target):
    return functional.binary_cross_entropy(output, target / 5)


SPARSE = keras.losses.SparseCategoricalCrossentropy


@pytest.mark.parametrize(
    ("takes", "shape", "labels", "label_shape"),
    [
        (of_keras("binary_crossentropy", (1,)), (1,), [0, 0.3, 1], ()),
        (of_keras(keras.losses.BinaryCrossentropy(from_logits=True), (3,)), (3,), [0, 1], (3,)),
        (of_keras("sparse_categorical_crossentropy", (3,)), (3,), [0, 1, 2], ()),
        (of_keras("sparse_categorical_crossentropy", (4, 3)), (4, 3), [0, 2], (4,)),
        (of_keras(SPARSE(ignore_class=-1), (3,)), (3,), [-1, 2], ()),
        (of_keras(SPARSE(ignore_class=255), (3,)), (3,), [0, 255], ()),
        (of_keras("categorical_crossentropy", (3,)), (3,), [0, 0.5], (3,)),
        (of_keras("mse", (1,)), (1,), [-7, 1e9], ()),
        (of_keras("poisson", (1,)), (1,), [0, 12.5], ()),
        (of_keras("bce", (1,)), (1,), [-1e-7, 1 + 1e-6], ()),
        (of_keras("squared_hinge", (1,)), (1,), [-1, 1], ()),
        (of_keras(SPARSE(axis=1), (3, 4)), (3, 4), [0, 2], (4,)),
        (of_torch("soft_margin_loss", (1,)), (1,), [-1, 1], ()),
        (of_torch(torch.binary_cross_entropy_with_logits, (1,)), (1,), [0, 5], ()),
        (of_keras(OfOnesOwn(), (1,)), (1,), [0, 5], ()),
        (of_torch("binary_cross_entropy_with_logits", (1,)), (1,), [0, 1], ()),
        (of_torch(torch.nn.CrossEntropyLoss(), (3,)), (3,), [-100, 0, 2], ()),
        (of_torch(functional.cross_entropy, (3,)), (3,), [0.2, 0.8], (3,)),
        (of_torch("cross_entropy", (3, 4)), (3, 4), [0, 2], (4,)),
        (of_torch("mse_loss", (2,)), (2,), [-1, 1], (2,)),
        (of_torch(of_ones_own, (1,)), (1,), [0, 5], ()),
    ],
)
def test_what_a_loss_takes_passes(takes, shape, labels, label_shape):
    check(takes, rows(labels, label_shape))


@pytest.mark.parametrize(
    ("takes", "labels", "label_shape", "message"),
    [
        (
            of_keras("binary_crossentropy", (1,)),
            [0, 5],
            (),
            "^label column 'y' has values from 0 to 5, .* from 0 to 1: recode",
        ),
        (of_keras("bce", (1,)), [-1, 1], (), "values from -1 to 1, and the loss binary_crossentropy takes"),
        (
            of_keras(SPARSE(), (3,)),
            [0, 3],
            (),
            "values from 0 to 3, .* SparseCat.* of a class, 0 to 2, as",
        ),
        (of_keras(SPARSE(ignore_class=-1), (3,)), [-2, 2], (), "values from -2 to 2"),
        (of_keras(SPARSE(ignore_class=255), (3,)), [0, 7, 255], (), "values from 0 to 7, .* class, 0 to 2"),
        (
            of_keras("sparse_categorical_crossentropy", (3,)),
            [0, 1.5],
            (),
            "values from 0 to 1.5, not all",
        ),
        (
            of_keras("sparse_categorical_crossentropy", (1,)),
            [0, 1],
            (),
            r"by one unit for each, .* shape \(1,\)",
        ),
        (of_keras("categorical_crossentropy", (1,)), [0, 1], (), "categorical_crossentropy tells classes apart by one"),
        (of_keras("hinge", (1,)), [0, 2], (), "values from 0 to 2, .* numbers from -1 to 1"),
        (of_keras("categorical_crossentropy", (3,)), [0, 2], (), r"one number for each row, .* 3 numbers .* \(3,\)"),
        (of_keras("mse", (1,)), [0, 9], (3,), "3 numbers for each row, .* mean_squared_error compares one number"),
        (of_keras("poisson", (1,)), [-1, 3], (), "values from -1 to 3, .* takes no negative ones"),
        (of_torch("binary_cross_entropy", (1,)), [0, 2], (), "values from 0 to 2, and the loss binary_cross_entropy"),
        (of_torch(torch.nn.CrossEntropyLoss(), (3,)), [1, 3], (), "values from 1 to 3, and the loss CrossEntropyLoss"),
        (of_torch("cross_entropy", (3,)), [0, 2], (2,), "2 numbers for each row, and .* compares one number with"),
        (of_torch("cross_entropy", (1,)), [0, 9], (), "cross_entropy tells classes apart by one unit for each"),
        (of_torch("soft_margin_loss", (1,)), [0, 1], (), r"values from 0 to 1, .* takes -1 and 1: .*2 \* label - 1"),
        (of_torch(functional.nll_loss, (3,)), [-1, 2], (), "values from -1 to 2, and the loss nll_loss takes"),
        (of_torch(torch.nn.MSELoss(), (2,)), [0, 9], (), "one number for each row, and the loss MSELoss compares 2"),
    ],
)
def test_what_it_does_not_take_is_told(takes, labels, label_shape, message):
    with pytest.raises((ColumnError, ParamError), match=message):
        check(takes, rows(labels, label_shape))


def test_what_does_not_count_may_have_any_label():
    sparse = of_keras("sparse_categorical_crossentropy", (3,))
    with pytest.raises(ColumnError, match="values from 0 to 3"):
        check(sparse, rows([0, 3]), {1: 2.0})
    check(sparse, rows([0, 3]), {3: 0.0})
    tokens = keras.Input((4,), dtype="int32")
    tags = keras.layers.Dense(2, "sigmoid")(keras.layers.Embedding(9, 3, mask_zero=True)(tokens))
    model = keras.Model(tokens, tags)
    padded = describe._taken(model(np.ones((1, 4), np.int32)), keras.losses.get("bce"))
    check(padded, rows([-1, 1], (4, 2)))
    with pytest.raises(ColumnError, match="4 numbers for each row, and .* compares 8"):
        check(padded, rows([-1, 1], (4,)))
    model.compile(loss="bce", loss_weights={"head": 0})
    assert [describe._weight_of(model, name, ["head", "tail"]) for name in ("head", "tail")] == [0, 1]
    model.compile(loss="bce", loss_weights=[1, 0])
    assert [describe._weight_of(model, name, ["head", "tail"]) for name in ("head", "tail")] == [1, 0]


def test_a_model_that_computes_its_own_loss_is_left_alone():
    class Own(keras.Model):
        def train_step(self, data):
            raise NotImplementedError

    assert describe._own_step(Own())
    patched = keras.Sequential([keras.layers.Dense(1)])
    patched.compute_loss = lambda *_, **__: 0.0
    assert describe._own_step(patched)
    assert not describe._own_step(keras.Sequential([keras.layers.Dense(1)]))


def test_extents_are_those_of_all_parts_but_of_no_row_that_weighs_nothing():
    first = {"label": np.float32([3, 1]), "features": np.float32([[9], [9]])}
    second = {"label": np.float32([-2, 0.5, 7]), "weight": np.float32([1, 2, 0])}
    nothing = {"label": np.float32([50]), "weight": np.float32([0])}
    extents = [label_extents(block) for block in (first, second, nothing)]
    assert extents == [{"label": Extent(1, 3, True, 3, 1)}, {"label": Extent(-2, 0.5, False, 0.5, -2)}, {}]
    total = together(together(extents[0], extents[1]), extents[2])
    assert total == {"label": Extent(-2, 3, False, 0.5, 1)}
    assert (total["label"].but(3), total["label"].but(-2), total["label"].but(9)) == ((-2, 1), (0.5, 3), (-2, 3))
    assert Extent.fromDict(json.loads(json.dumps(total["label"].toDict()))) == total["label"]


def test_extents_of_parts_are_those_of_the_whole():
    draw = np.random.default_rng(1)
    for _ in range(200):
        values = draw.integers(-3, 4, draw.integers(2, 9)).astype(np.float32)
        cut = draw.integers(1, len(values))
        assert Extent.of(values[:cut]) | Extent.of(values[cut:]) == Extent.of(values), values


@pytest.mark.parametrize("framework", ["keras", "torch"])
def test_a_fit_ends_before_its_first_step(spark, store, framework):
    def network():
        return keras.Sequential([keras.layers.Dense(1, "sigmoid")])

    def module():
        return torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sigmoid())

    # The 2 is in one of the partitions only.
    df = spark.range(0, 100, 1, 4).select(F.rand(1).alias("x"), F.expr("if(id = 99, 2, id % 2)").alias("y"))
    given = {"inputCols": ["x"], "labelCol": "y", "batchSize": 10, "storeUrl": store, "verbose": 0}
    if framework == "keras":
        stage = KerasEstimator(model=network, loss="binary_crossentropy", numWorkers=2, **given)
    else:
        stage = TorchEstimator(model=module, loss="binary_cross_entropy", **given)
    with pytest.raises(TrainingError, match=r"label column 'y' has values from 0 to 2, .* takes numbers from 0 to 1"):
        stage.fit(df)
    if framework == "torch":
        assert len(stage.fit(df.where("y < 2")).summary.history["loss"]) == 1
