"""Fits with Keras on JAX and PyTorch, against plain Keras in this process, and what their models do."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ColumnError, ParamError, TrainingError
from spark_nn.keras.sharding import Sharding
from tests.keras import models
from tests.keras.test_fit import arrays, data, estimator
from tests.keras.test_resume import bits, disturbed, rows

pytestmark = pytest.mark.timeout(280)

COMPILED = {"optimizer": "sgd", "loss": "binary_crossentropy"}
CUT = {"mesh": {"model": 2}, "layout": {".*kernel": [None, "model"]}}


@pytest.fixture(scope="module", autouse=True)
def workers_of_its_own(sessions):
    """Spark's Python workers keep the backend that they have scored with, which is not for other files."""
    yield
    sessions.stop()


def begun():
    """A network with its first weights: by a seed, every backend would draw others."""
    import keras

    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(8, "relu", name="first"), keras.layers.Dense(1, "sigmoid", name="second")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(**COMPILED)
    return model


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_two_workers_on_another_backend_equal_one_process_and_score_alike(spark, store, tmp_path, backend):
    df = data(spark).withColumn("held", F.expr("id % 4 = 1"))
    x, y, w = arrays(df.where("not held"))
    settings = {"model": begun(), "numWorkers": 2, "backend": backend, "weightCol": "w", "metrics": ["auc"]}
    fitted = estimator(store, **settings, validationIndicatorCol="held").fit(df)
    expected = models.single_process(begun, None, x, y, 2, 32, 2, 11, weight=w)
    assert models.relative(fitted.model.get_weights(), expected.get_weights()) < 1e-5
    held, labels, weights = arrays(df.where("held"))
    values = fitted.model.evaluate(held, labels, sample_weight=weights, verbose=0, return_dict=True)
    history = fitted.summary.history
    for name, value in values.items():
        assert history[f"val_{name}"][-1] == pytest.approx(value, rel=1e-5)

    # What it scores with is its own; whatever the worker has imported before, the predictions are the same.
    assert fitted.getBackend() == backend
    fitted.save(str(tmp_path / "model"))
    loaded = KerasModel.load(str(tmp_path / "model"))
    assert loaded.getBackend() == backend
    every, _, _ = arrays(df)
    order = [row.id for row in df.collect()]
    for model in (loaded, fitted.copy().setBackend("tensorflow")):
        by_id = {row.id: row.probability[1] for row in model.transform(df.repartition(3)).collect()}
        np.testing.assert_allclose([by_id[i] for i in order], expected.predict(every, verbose=0)[:, 0], atol=1e-5)
    found = loaded.evaluate(df.where("held"))
    assert found == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_rank_that_is_killed_changes_no_bit_on_another_backend(spark, store, tmp_path, backend):
    alone, again = (
        disturbed(store, tmp_path / name, 1, step, backend=backend, epochs=2).fit(rows(spark))
        for name, step in (("none", -1), ("mark", 17))
    )
    assert not alone.summary.restarts
    assert len(again.summary.restarts) == 1
    assert again.summary.history == alone.summary.history
    assert bits(again) == bits(alone)


@pytest.mark.parametrize("mesh", [{"model": 2}, {"data": 2}])
def test_a_model_that_is_cut_over_two_workers_equals_one_that_is_not(spark, store, mesh):
    df = data(spark)
    x, y, _ = arrays(df)
    (axis,) = mesh
    # Along the axis of the data, variables may be cut as well.
    cut = {"mesh": mesh, "layout": {".*first/kernel": [None, axis], ".*first/bias": [axis]}}
    fitted = estimator(store, model=begun(), numWorkers=2, backend="jax", modelParallel=cut, metrics=["auc"]).fit(df)
    # Where both work on the same rows, a batch is cut from the line of all rows.
    expected = models.single_process(begun, None, x, y, mesh.get("data", 1), 32, 2, 11)
    assert models.relative(fitted.model.get_weights(), expected.get_weights()) < 1e-5
    assert fitted.summary.history["loss"][1] < fitted.summary.history["loss"][0]
    assert fitted.transform(df).count() == df.count()


def test_a_pattern_that_no_variable_matches_is_refused_with_their_paths(spark, store):
    cut = {"mesh": {"model": 2}, "layout": {"kernel": [None, "model"]}}
    stage = estimator(store, numWorkers=2, backend="jax", modelParallel=cut, maxRetries=0)
    with pytest.raises(
        TrainingError, match=r"'kernel', which matches none of the model's variables.* sequential/dense"
    ):
        stage.fit(data(spark))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "jax", "collective": "native"}, "collective='native' with backend='jax'.* use 'ring'"),
        ({"backend": "torch", "parameterServers": 1}, "parameterServers=1 with backend='torch'.*backend='tensorflow'"),
        ({"modelParallel": CUT, "numWorkers": 2}, "modelParallel with backend='tensorflow'.* set backend='jax'"),
        ({"backend": "jax", "modelParallel": CUT}, "a mesh of 1 x 2 = 2 ranks, and numWorkers=1"),
        (
            {"backend": "jax", "modelParallel": CUT, "numWorkers": 2, "checkpointInterval": 5},
            "checkpointInterval=5 with modelParallel: no checkpoints",
        ),
        (
            {
                "backend": "jax",
                "modelParallel": {**CUT, "mesh": {"data": 2, "model": 1}},
                "numWorkers": 2,
                "validationFraction": 0.5,
            },
            "validationFraction=0.5 with modelParallel",
        ),
        ({"backend": "jax", "modelParallel": {"mesh": {"model": 2}}}, "must have a mesh and a layout"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_on_the_driver(spark, store, settings, message):
    with pytest.raises(ParamError, match=message):
        estimator(store, **settings).fit(data(spark))


def test_strings_are_for_tensorflow_alone(spark, store):
    df = data(spark).withColumn("word", F.lit("a"))
    stage = KerasEstimator(model=models.hashing, loss="mse", featuresCol="word", backend="jax", storeUrl=store)
    with pytest.raises(ColumnError, match="column 'word' holds string values.*set backend='tensorflow'"):
        stage.fit(df)


def test_a_sharding_knows_which_rows_a_rank_takes_and_what_cannot_be_cut():
    sharding = Sharding.of({"mesh": {"data": 2, "model": 3}, "layout": {".*kernel": [None, "model"]}})
    assert [sharding.place(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    turned = Sharding.of({"mesh": {"model": 3, "data": 2}, "layout": {".*kernel": [None, "model"]}})
    assert [turned.place(rank) for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    sharding.checkVariable("dense/kernel", (4, 9), ".*kernel")
    with pytest.raises(
        ParamError, match=r"'dense/kernel' of shape \(4, 8\) into 3 along 'model', and 8 is no multiple"
    ):
        sharding.checkVariable("dense/kernel", (4, 8), ".*kernel")
    with pytest.raises(ParamError, match="give an axis or None for each dimension"):
        sharding.checkVariable("conv/kernel", (3, 3, 9), ".*kernel")
    with pytest.raises(ParamError, match="along 'modle', and the mesh has the axes 'model'"):
        Sharding.of({"mesh": {"model": 2}, "layout": {".*kernel": [None, "modle"]}})
    with pytest.raises(ParamError, match="'\\*kernel', which is no regular expression: nothing to repeat"):
        Sharding.of({"mesh": {"model": 2}, "layout": {"*kernel": [None, "model"]}})
    with pytest.raises(ParamError, match="batchSize=9 cannot be cut along the axis 'data'"):
        sharding.check(6, 9)
