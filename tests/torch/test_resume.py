"""Fits that are killed and go on, and fits that end early, with PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn import TorchEstimator
from spark_nn.errors import TrainingError
from tests.failure.processes import no_rank_is_left
from tests.keras.test_resume import rows
from tests.torch import models
from tests.torch.test_fit import data, estimator
from tests.tracking.reading import check_told, operations

pytestmark = pytest.mark.timeout(240)


def disturbed(store, mark, rank, step, collective="ring", **kwargs):
    """With batch normalisation, dropout, moments, a scheduler, clipping and metrics of which an epoch holds a part."""
    return estimator(
        store,
        model=models.remembering,
        modelParams={"mark": str(mark), "rank": rank, "step": step},
        optimizer="adamw",
        learningRate=0.02,
        lrScheduler=models.decay,
        clipGradNorm=0.5,
        metrics=["auroc", "accuracy"],
        validationIndicatorCol="held",
        numWorkers=2,
        epochs=4,
        batchSize=40,
        shuffle=True,
        checkpointInterval=7,
        collective=collective,
        timeout=60.0,
        **kwargs,
    )


def bits(model):
    return [each.tobytes() for each in models.weights(model.model)]


@pytest.fixture(scope="module")
def undisturbed(sessions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    model = disturbed(str(folder), folder / "mark", 0, -1).fit(rows(sessions.get("local[2]")))
    assert not model.summary.restarts
    return bits(model), model.summary.history


# 30 steps an epoch: amid one; in the last.
@pytest.mark.parametrize(("rank", "step"), [(1, 17), (0, 104)])
def test_a_rank_that_is_killed_changes_no_bit(spark, store, undisturbed, tmp_path, rank, step):
    model = disturbed(store, tmp_path / "mark", rank, step, logDir=str(tmp_path / "logs")).fit(rows(spark))
    (reason,) = model.summary.restarts
    assert f"rank {rank} " in reason
    assert "SIGKILL" in reason
    assert model.summary.history == undisturbed[1]
    assert bits(model) == undisturbed[0]  # which the tracing for TensorBoard does not change, either
    check_told(model.summary.logDir, model.summary.history)
    assert {"aten::linear", "aten::batch_norm"} <= operations(model.summary.logDir)
    no_rank_is_left()


def test_gloo_loses_a_rank_and_goes_on(spark, store, undisturbed, tmp_path):
    model = disturbed(store, tmp_path / "mark", 1, 40, "native").fit(rows(spark))
    assert len(model.summary.restarts) == 1
    for found, expected in zip(models.weights(model.model), undisturbed[0], strict=True):
        expected = np.frombuffer(expected, found.dtype).reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    no_rank_is_left()


def test_a_divided_network_that_loses_a_rank_has_the_bits_of_a_whole_one(spark, store, tmp_path):
    """But for clipping, whose norm the ranks add up in another order."""
    whole, divided = (disturbed(store, tmp_path / "mark", 1, step, "auto") for step in (-1, 47))
    for stage in (whole, divided):
        stage.clear(stage.clipGradNorm)
    expected = whole.fit(rows(spark))
    model = divided.setSharding("fsdp").fit(rows(spark))
    assert not expected.summary.restarts
    assert len(model.summary.restarts) == 1
    assert model.summary.history == expected.summary.history
    assert bits(model) == bits(expected)
    no_rank_is_left()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_no_number_ends_the_fit_and_names_the_step(spark, store, workers):
    df = data(spark, 600).withColumn("label", F.expr("if(id = 500, 3e38, 0.0)"))
    settings = {"loss": "mse_loss", "numWorkers": workers, "optimizer": "sgd", "learningRate": 0.25}
    with pytest.raises(TrainingError, match="NonFiniteLoss") as caught:
        estimator(store, **settings).fit(df)
    step = 16 if workers == 1 else 13
    assert f"the loss is NaN or infinite in epoch 1 at step {step}, with learning rate 0.25" in str(caught.value)
    assert caught.value.restarts == []
    model = estimator(store, **settings, nonFiniteLoss="ignore").fit(df)
    assert not np.isfinite(model.summary.history["loss"]).all()


def test_a_function_of_the_history_ends_training(spark, store):
    model = estimator(store, epochs=9, stopWhen=models.after_two, lrScheduler=models.decay).fit(data(spark))
    assert model.summary.epochs == 2
    np.testing.assert_allclose(model.summary.history["learning_rate"], [0.001, 0.0009])


def test_training_goes_on_from_a_fitted_model_which_is_saved_with_the_estimator(spark, store, tmp_path):
    """Two fits of an epoch each, by descent that keeps no state, against one of two epochs."""
    df = data(spark)
    settings = {"numWorkers": 2, "optimizer": "sgd", "learningRate": 0.1, "epochs": 1}
    first = estimator(store, **settings).fit(df)
    whole = estimator(store, **{**settings, "epochs": 2}).fit(df)
    stage = estimator(store, **settings, initialModel=first)
    stage.save(str(tmp_path / "stage"))
    loaded = TorchEstimator.load(str(tmp_path / "stage"))
    assert bits(loaded.getInitialModel()) == bits(first)
    stage.clear(stage.model)
    for each in (loaded, stage):
        assert bits(each.fit(df)) == bits(whole)
    with pytest.raises(TrainingError, match=r"initialModel holds the weight 0.weight of the shape \(8, 3\), and the"):
        estimator(store, **settings, initialModel=first, modelParams={"units": 5}).fit(df)
    with pytest.raises(TypeError, match="initialModel takes a fitted TorchModel, not 3"):
        TorchEstimator(initialModel=3)
