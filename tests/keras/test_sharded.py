"""A Keras model that is cut over the ranks, where something goes wrong or takes long; two processes are a gang."""

from __future__ import annotations

import numpy as np
import pytest

from spark_nn.keras.sharded import ShardedTrainer
from spark_nn.keras.sharding import Sharding
from spark_nn.keras.training import INITIAL_MODEL, Recipe
from spark_nn.trainer import Schedule
from tests.keras import models
from tests.torch import ranks

pytestmark = pytest.mark.timeout(280)

CUT = {"mesh": {"model": 2}, "layout": {".*first/kernel": [None, "model"]}}


@pytest.fixture(autouse=True)
def jax(monkeypatch):
    """What the ranks' processes take over, and this one does not."""
    import keras  # noqa: F401

    for name, value in {"KERAS_BACKEND": "jax", "NPROC": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ranks.dataset(tmp_path_factory.mktemp("rows"), [96, 96])


def trainer(function, arguments=None, **recipe):
    """What an estimator would send."""
    settings = {
        **{"function": function, "instance": False, "continued": False, "arguments": arguments or {}},
        **{"optimizer": None, "loss": None, "lossWeights": None, "metrics": None, "learningRate": None},
        **{"callbacks": None, "backend": "jax", **recipe},
    }
    return ShardedTrainer(Schedule(2, 32, 11, False), Recipe(**settings), Sharding.of(CUT))


def test_ranks_that_lose_another_say_so(data, tmp_path):
    """Whoever outlives it meets a failure of Gloo's, and may be the first to tell of one: it must be told as none."""
    killed = trainer(models.two_layers, callbacks=models.Killed(str(tmp_path / "mark"), 1, 2))
    (outcome,) = ranks.train(data, [(tmp_path / "run", 0, killed)])
    assert "died" in outcome.errors
    (survivor,) = (each for each in outcome.errors if each != "died")
    assert survivor.splitlines()[-1].startswith("spark_nn.errors.PeerLost: rank 1")


def test_a_fit_goes_on_with_the_optimizers_state_and_saves_no_model_of_ranks_that_differ(data, tmp_path):
    before = models.two_layers("adam")
    before.fit(np.random.default_rng(1).random((64, 3), np.float32), np.arange(64) % 2, verbose=0)
    run = tmp_path / "run"
    run.mkdir()
    before.save(run / INITIAL_MODEL)
    going_on = trainer(models.two_layers, {"optimizer": "adam"}, continued=True, callbacks=models.Looking(str(run)))
    (outcome,) = ranks.train(data, [(run, 0, going_on)])
    assert len(outcome.errors) == 2
    for error in outcome.errors:
        assert "SparkNNError: after training the ranks hold different weights" in error, error
    for rank in range(2):
        with np.load(run / f"rank-{rank}.npz") as found:
            assert len(found.files) == len(before.optimizer.variables)
            for variable, name in zip(before.optimizer.variables, found.files, strict=True):
                value = np.asarray(variable)
                if value.shape == (3, 8):
                    value = value[:, 4 * rank : 4 * rank + 4]
                np.testing.assert_array_equal(found[name], value, err_msg=variable.path)
    assert abs(np.asarray(before.optimizer.variables[-1])).max() > 0


def test_a_function_that_makes_other_first_values_in_each_process_is_told(data, tmp_path):
    (outcome,) = ranks.train(data, [(tmp_path / "run", 0, trainer(models.two_layers, {"seed": "process"}))])
    for error in outcome.errors:
        assert error.splitlines()[-1].startswith(
            "spark_nn.errors.ParamError: modelParallel needs the same first values on every worker"
        )
    assert len(outcome.errors) == 2
