"""A Keras model that is cut over the ranks, where something goes wrong or takes long; two processes are a gang."""

from __future__ import annotations

import pytest

from spark_nn.keras.sharded import ShardedTrainer
from spark_nn.keras.sharding import Sharding
from spark_nn.keras.training import Recipe
from spark_nn.trainer import Schedule
from tests.keras import models
from tests.torch import ranks

pytestmark = pytest.mark.timeout(280)

CUT = {"mesh": {"model": 2}, "layout": {".*first/kernel": [None, "model"]}}


@pytest.fixture(autouse=True)
def jax(monkeypatch):
    """What the ranks' processes take over."""
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
