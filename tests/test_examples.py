"""The examples under docs/examples, held to NumPy: gradient descent on the whole batch, or the closed form."""

from __future__ import annotations

import importlib.util
import runpy
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.failure.processes import no_rank_is_left
from tests.ranks.test_pieces import outside, reaches

pytestmark = pytest.mark.timeout(240)
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def four(sessions):
    yield sessions.get("local[4]")
    no_rank_is_left()


def example(name):
    """What it runs, with a look at the ranks' ports before they end; its functions travel by value."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]
    main.__globals__["train"] = closed_to_strangers(main.__globals__["train"])
    return main


def closed_to_strangers(train):
    """The function, followed by an error where the gang's ports can be reached from the machine's other addresses."""

    def trained(ctx, *args):
        found = train(ctx, *args)
        own = {each.laddr.port for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"}
        given = {int(address.rpartition(":")[2]) for some in ctx.clusterSpec.values() for address in some}
        assert any(reaches("127.0.0.1", port) for port in own | given), "nothing listens"
        for host, _, *rest in outside():
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            open_to = [port for port in own | given if reaches(host, port, family, rest)]
            assert not open_to, f"{host} reaches {open_to}"
        return found

    return trained


def descended(spark, rate=0.3, epochs=10, batch=1000, workers=2):
    """The weights that a single process comes to, with the batches that the ranks share."""
    rows = spark.range(4000).selectExpr("rand(1) AS a", "rand(2) AS b", "rand(3) AS noise")
    table = rows.selectExpr("a", "b", "2 * a - 3 * b + noise AS label").toPandas().to_numpy(np.float64)
    shares = table.reshape(workers, -1, batch // workers, 3)
    weights = np.zeros(3)
    for _ in range(epochs):
        for step in range(shares.shape[1]):
            x, y = np.split(shares[:, step].reshape(-1, 3), [2], axis=1)
            x = np.column_stack([x, np.ones(len(x))])
            weights -= rate * 2 / len(x) * x.T @ (x @ weights - y[:, 0])
    return weights


def needing(name, module):
    missing = importlib.util.find_spec(module) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{module} is not installed"))


@pytest.mark.parametrize("name", ["mwms", needing("torch_ddp", "torch"), needing("jax_distributed", "jax")])
def test_ranks_in_step_train_as_one_process_on_all_rows(four, name):
    found = example(name)(four)
    flat = np.concatenate([np.ravel(part) for part in found]) if isinstance(found, list) else found
    np.testing.assert_allclose(flat, descended(four), rtol=2e-5)


def test_asynchronous_training_comes_to_the_closed_form(four):
    np.testing.assert_allclose(example("parameter_server")(four), [2, -3, 1], atol=0.02)
