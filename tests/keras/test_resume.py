"""Fits that are killed and go on, fits that go on from a fitted model, and fits that end at once, with Keras."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from spark_nn.checkpoint import Place
from spark_nn.errors import ParamError, TrainingError
from spark_nn.keras.training import _parts
from tests.failure.processes import no_rank_is_left
from tests.keras import models
from tests.keras.test_fit import arrays, data, estimator
from tests.tracking.reading import check_told, operations

pytestmark = pytest.mark.timeout(240)


def bits(model):
    return [weight.tobytes() for weight in model.model.get_weights()]


def rows(spark):
    df = data(spark, 1500)
    return df.withColumn("held", F.expr("id % 5 = 1"))


def disturbed(store, mark, rank, step, **kwargs):
    settings = {
        "model": models.remembering,
        "validationIndicatorCol": "held",
        "numWorkers": 2,
        "epochs": 4,
        "batchSize": 40,
        "shuffle": True,
        "checkpointInterval": 7,
        "callbacks": models.killed_once(str(mark), rank, step),
        **kwargs,
    }
    made = estimator(store, **settings)
    made.clear(made.loss)
    return made


@pytest.fixture(scope="module")
def undisturbed(sessions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    model = disturbed(str(folder), folder / "mark", 0, -1).fit(rows(sessions.get("local[2]")))
    assert not model.summary.restarts
    assert model.summary.epochs == 4
    return bits(model), model.summary.history


# 30 steps an epoch: before the first checkpoint; amid an epoch; just before its end; after the third one.
@pytest.mark.parametrize(("rank", "step"), [(1, 3), (0, 17), (1, 29), (0, 30), (1, 104)])
def test_a_rank_that_is_killed_changes_no_bit(spark, store, undisturbed, tmp_path, rank, step):
    model = disturbed(store, tmp_path / "mark", rank, step, logDir=str(tmp_path / "logs")).fit(rows(spark))
    assert (tmp_path / "mark").exists()
    (reason,) = model.summary.restarts
    assert f"rank {rank} " in reason
    assert "SIGKILL" in reason
    assert model.summary.history == undisturbed[1]
    assert bits(model) == undisturbed[0]
    rates = check_told(model.summary.logDir, model.summary.history)
    assert list(rates) == [0, 1, 2, 3]
    assert "MatMul" in operations(model.summary.logDir)
    assert len(model.summary.epochSeconds) == 4
    no_rank_is_left()


def test_callbacks_that_turn_the_rate_go_on_as_they_were(spark, store, tmp_path):
    """With a plain rate, as a plateau's callback wants it; killed when it has been turned down once."""
    df = rows(spark)

    def fit(mark, step):
        settings = {"modelParams": {"dropout": 0.2, "batch_norm": True}, "model": models.mlp, "optimizer": "rmsprop"}
        callbacks = models.killed_once(str(mark), 1, step, early=False)
        made = disturbed(store, mark, 1, step, **settings, callbacks=callbacks, epochs=5, learningRate=0.05)
        return made.setLoss("binary_crossentropy").fit(df)

    alone = fit(tmp_path / "none", -1)
    for number, step in enumerate((92, 110)):  # beyond the first batches of an epoch, and of another one
        again = fit(tmp_path / f"mark-{number}", step)
        assert len(again.summary.restarts) == 1
        assert again.summary.history == alone.summary.history
        assert bits(again) == bits(alone)
    rates = alone.summary.history["learning_rate"]
    assert rates[0] > rates[-1]


def test_callbacks_of_the_first_worker_alone_change_no_worker_s_pace(spark, store, tmp_path):
    import keras

    path = tmp_path / "best.keras"
    callbacks = [keras.callbacks.ModelCheckpoint(str(path), monitor="loss", save_best_only=True)]
    model = estimator(store, numWorkers=2, batchSize=8, callbacks=callbacks).fit(data(spark))
    assert model.summary.epochs == 2
    assert path.exists()


def test_a_model_function_that_gives_another_model_is_told(spark, store, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    settings = {"model": models.another_each_time, "modelParams": {"folder": str(folder)}}
    stage = disturbed(store, folder / "mark", 0, 17, **settings)
    with pytest.raises(TrainingError, match="CheckpointError: cannot go on from a checkpoint whose model is") as caught:
        stage.setLoss("binary_crossentropy").fit(rows(spark))
    assert len(caught.value.restarts) == 1


def test_the_calls_of_fit_that_a_training_takes():
    assert _parts(Place(0, 0), 3) == [(0, 3, 0)]
    assert _parts(Place(1, 0), 3) == [(1, 3, 0)]
    assert _parts(Place(1, 5), 3) == [(1, 2, 5), (2, 3, 0)]
    assert _parts(Place(2, 5), 3) == [(2, 3, 5)]


@pytest.mark.parametrize("given", ["nothing else", "the function", "another optimizer"])
def test_training_goes_on_from_a_fitted_model(spark, store, given):
    """Two fits of an epoch each, against one process that goes through the rows twice."""
    df = data(spark)
    x, y, _ = arrays(df)
    first = estimator(store, numWorkers=2, epochs=1, optimizer="adam").fit(df)
    stage = estimator(store, numWorkers=2, epochs=1, initialModel=first)
    if given == "nothing else":
        stage.clear(stage.model)
        stage.clear(stage.loss)
    elif given == "the function":
        stage.setOptimizer("adam")
    else:
        stage.setOptimizer("sgd")
    second = stage.fit(df)
    compiled = {"optimizer": "adam", "loss": "binary_crossentropy"}
    expected = models.single_process(models.mlp, compiled, x, y, 2, 32, 1 if given == "another optimizer" else 2, 11)
    if given == "another optimizer":
        expected.compile("sgd", "binary_crossentropy")
        for batch in models.global_batches(x, y, 2, 32):
            expected.train_on_batch(*batch)
    assert models.relative(second.model.get_weights(), expected.get_weights()) < 1e-5
    assert models.relative(first.model.get_weights(), second.model.get_weights()) > 1e-3


def test_a_fitted_model_to_go_on_from_is_saved_with_the_estimator(spark, store, tmp_path):
    first = estimator(store, epochs=1).fit(data(spark))
    stage = KerasEstimator(initialModel=first, epochs=3)
    stage.save(str(tmp_path / "stage"))
    loaded = KerasEstimator.load(str(tmp_path / "stage"))
    assert loaded.getEpochs() == 3
    assert bits(loaded.getInitialModel()) == bits(first)
    assert loaded.getInitialModel().summary == first.summary


def test_a_model_of_other_layers_is_refused(spark, store):
    first = estimator(store, epochs=1).fit(data(spark))
    for params, message in [
        ({"units": 5}, r"has shape \(3, 5\), and initialModel's \(3, 8\): both must have the same layers"),
        ({"batch_norm": True}, "initialModel has 4 weights, and the network of the param model 8"),
    ]:
        with pytest.raises(TrainingError, match=message):
            estimator(store, initialModel=first, modelParams=params).fit(data(spark))
    with pytest.raises(TypeError, match="initialModel takes a fitted KerasModel, not 3"):
        KerasEstimator(initialModel=3)
    with pytest.raises(ParamError, match="model is not set"):
        KerasEstimator(loss="mse").fit(data(spark))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_no_number_ends_the_fit_and_names_the_step(spark, store, workers):
    df = data(spark, 600).withColumn("label", F.expr("if(id = 500, 1e38, 0.0)"))
    settings = {"loss": "mse", "numWorkers": workers, "optimizer": "sgd", "learningRate": 0.25, "maxRetries": 2}
    with pytest.raises(TrainingError, match="NonFiniteLoss") as caught:
        estimator(store, **settings).fit(df)
    # Row 500 is in the 16th batch of 32 rows, or in the 13th of the second worker's half.
    step = 16 if workers == 1 else 13
    assert f"the loss is NaN or infinite in epoch 1 at step {step}, with learning rate 0.25" in str(caught.value)
    assert caught.value.restarts == []
    model = estimator(store, **settings, nonFiniteLoss="ignore").fit(df)
    assert not np.isfinite(model.summary.history["loss"]).all()


def test_the_frameworks_own_exchange_gives_the_same_weights(spark, store):
    df = data(spark)
    ring, native = (
        estimator(store, numWorkers=2, optimizer="adam", collective=engine).fit(df) for engine in ("ring", "native")
    )
    assert models.relative(native.model.get_weights(), ring.model.get_weights()) < 1e-5
