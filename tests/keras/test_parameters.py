"""Asynchronous training: a rank holds the weights, and workers push gradients and pull weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from spark_nn.errors import ClusterError, ParamError, TrainingError
from tests.failure.processes import Later, no_rank_is_left, rank_process
from tests.tracking.reading import check_told, operations

pytestmark = pytest.mark.timeout(240)
ROWS, BATCH, WORKERS = 2000, 80, 2
STEPS = ROWS // BATCH  # of either worker in an epoch


@pytest.fixture
def four(sessions):
    yield sessions.get("local[4]")
    no_rank_is_left()


@pytest.fixture
def rows(four):
    return four.range(ROWS).select(F.rand(1).alias("a"), F.rand(2).alias("b")).withColumn("label", F.expr("2*a-3*b+1"))


def build(normalised=False):
    import keras

    layers = [keras.layers.BatchNormalization()] if normalised else []
    return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(1)])


def estimator(store, **params):
    given = {"optimizer": "adam", "learningRate": 0.02, "loss": "mse", "batchSize": BATCH, "numWorkers": WORKERS}
    given |= {"model": build, "parameterServers": 1, "inputCols": ["a", "b"], "storeUrl": store, "verbose": 0}
    return KerasEstimator(**{**given, **params})


def saved(model):
    import keras

    return keras.models.load_model(model.fitted.file.path)


def test_every_update_counts_and_the_weights_come_to_the_closed_form(rows, store, tmp_path):
    model = estimator(store, epochs=30, logDir=str(tmp_path / "logs")).fit(rows)
    check_told(model.summary.logDir, model.summary.history)
    assert "MatMul" in operations(model.summary.logDir)
    history = model.summary.history
    assert history["updates"][-1] == 30 * STEPS * WORKERS
    assert history["workers"] == [WORKERS] * 30
    assert history["loss"][-1] < 1e-3 < history["loss"][0]
    assert model.summary.numWorkers == WORKERS
    network = saved(model)
    assert int(network.optimizer.iterations) == 30 * STEPS * WORKERS
    kernel, bias = network.get_weights()
    np.testing.assert_allclose([*kernel[:, 0], *bias], [2, -3, 1], atol=0.02)


def test_what_layers_track_is_the_mean_over_the_workers(rows, store):
    network = saved(estimator(store, epochs=8, modelParams={"normalised": True}).fit(rows))
    found = network.layers[0].moving_mean.numpy()
    average = np.array(rows.agg(F.avg("a"), F.avg("b")).first())
    # Begun at 0, each of a worker's steps has moved it by a hundredth of the way.
    np.testing.assert_allclose(found, average * (1 - 0.99 ** (8 * STEPS)), atol=0.02)


def test_a_worker_that_is_killed_is_outlived(rows, store):
    epochs = 150
    killed = []

    def kill():
        process = rank_process(2)
        until = time.monotonic() + 120
        while not killed:
            assert time.monotonic() < until
            for path in Path(store).glob("run-*/attempt-0/progress.json"):
                if json.loads(path.read_text())["epoch"] >= 2:
                    process.kill()
                    killed.append(process.pid)
            time.sleep(0.02)

    with Later(kill):
        model = estimator(store, epochs=epochs).fit(rows)
    history = model.summary.history
    assert model.summary.restarts == []
    assert history["workers"][0] == 2
    assert history["workers"][-1] == 1
    assert epochs * STEPS < history["updates"][-1] < epochs * STEPS * WORKERS
    network = saved(model)
    assert int(network.optimizer.iterations) == history["updates"][-1]
    kernel, bias = network.get_weights()
    np.testing.assert_allclose([*kernel[:, 0], *bias], [2, -3, 1], atol=0.02)


def test_an_error_of_a_worker_is_no_loss_but_ends_the_fit(rows, store):
    spoilt = rows.withColumn("label", F.when(F.rand(5) < 0.1, 1e30).otherwise(F.col("label")))
    with pytest.raises(TrainingError, match="the loss is NaN or infinite in epoch 1 at step") as caught:
        estimator(store, epochs=2).fit(spoilt)
    assert caught.value.rank in (1, 2)
    assert not caught.value.transient


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"validationFraction": 0.5}, "validationFraction=0.5 with parameterServers=1: workers end their epochs"),
        ({"callbacks": list}, "callbacks=.* with parameterServers=1: callbacks would act on"),
        ({"checkpointInterval": 5}, "checkpointInterval=5 with parameterServers=1: no checkpoints"),
        ({"collective": "ring"}, "collective='ring' with parameterServers=1: workers exchange nothing"),
    ],
)
def test_what_workers_that_do_not_wait_cannot_do_is_refused(rows, store, params, message):
    with pytest.raises(ParamError, match=message):
        estimator(store, **params).fit(rows)
    with pytest.raises(ParamError, match="parameterServers=2: must be one of 0, 1"):
        KerasEstimator(parameterServers=2)
    with pytest.raises(ClusterError, match="numWorkers=4 and 1 more .* runs 4 tasks at a time: use 3 or fewer"):
        estimator(store, numWorkers=4).fit(rows)


def scaled():
    import keras

    keras.config.set_dtype_policy("mixed_float16")
    return build()


def test_a_scale_of_the_loss_for_each_worker_is_refused(rows, store):
    with pytest.raises(TrainingError, match="optimizer that scales the loss, .* use mixed_bfloat16"):
        estimator(store, model=scaled, maxRetries=0).fit(rows)
