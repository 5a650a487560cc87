"""`run`: the user's own function on a gang."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

import spark_nn
from spark_nn import cluster
from spark_nn.errors import ClusterError, ColumnError, DatasetError, ParamError, TrainingError
from tests.failure.processes import no_rank_is_left

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def four(sessions):
    yield sessions.get("local[4]")
    no_rank_is_left()


def waiting_for(ctx, name):
    """What another rank keeps under a name, once it is there."""
    until = time.monotonic() + 60
    while (found := ctx.checkpoints.restore(name)) is None:
        assert time.monotonic() < until
        time.sleep(0.1)
    return json.loads(found)


def sees(ctx, greeting):
    """What each rank finds; rank 0 gathers it."""
    batches = ctx.batches(10, epochs=2)
    assert len(batches) == 2 * batches.steps
    ids = []
    for epoch in range(2):
        blocks = list(batches.epoch(epoch))
        assert all((x[:, 0] * 2 == y).all() and (x[:, 0] + 1 == weight).all() for x, y, weight in blocks)
        ids.append([x[:, 0].astype(int).tolist() for x, _, _ in blocks])
        ctx.report(loss=0.5 + epoch)
    own = {
        "role": [ctx.role, ctx.index, ctx.rank, ctx.world, ctx.localRank],
        "config": json.loads(os.environ["TF_CONFIG"]),
        "backend": os.environ["KERAS_BACKEND"],
        "spec": ctx.clusterSpec,
        "ids": ids,
        "steps": batches.steps,
    }
    ctx.checkpoints.save(json.dumps(own).encode(), f"rank_{ctx.rank}")
    if ctx.rank:
        return None
    ranks = [waiting_for(ctx, f"rank_{rank}") for rank in range(ctx.world)]
    return {"greeting": greeting, "ranks": ranks, "array": np.eye(2), "nothing": None}


def test_what_a_rank_sees(four, store, capfd):
    df = four.range(40).selectExpr("double(id) AS a", "double(2 * id) AS label", "id + 1 AS weight")
    found = spark_nn.run(
        sees,
        "hello",
        numWorkers=2,
        evaluator=True,
        dataset=df,
        inputCols=["a"],
        weightCol="weight",
        storeUrl=store,
        verbose=2,
    )
    assert found["greeting"] == "hello"
    np.testing.assert_array_equal(found["array"], np.eye(2))
    chief, worker, evaluator = found["ranks"]
    assert [each["role"] for each in (chief, worker, evaluator)] == [
        ["chief", 0, 0, 3, 0],
        ["worker", 0, 1, 3, 1],
        ["evaluator", 0, 2, 3, 2],
    ]
    assert chief["spec"].keys() == {"chief", "worker", "evaluator"}
    assert chief["spec"] == worker["spec"] == evaluator["spec"]
    assert all(address.startswith("127.0.0.1:") for some in chief["spec"].values() for address in some)
    assert chief["config"]["cluster"] == {role: chief["spec"][role] for role in ("chief", "worker")}
    assert evaluator["config"]["task"] == {"type": "evaluator", "index": 0}
    assert chief["backend"] == "tensorflow"
    # Ten rows of a step over both of those that train; every row once per epoch, in another order each time.
    for epoch in range(2):
        rows = [row for each in (chief, worker) for block in each["ids"][epoch] for row in block]
        assert sorted(rows) == list(range(40))
        assert [[len(block) for block in each["ids"][epoch]] for each in (chief, worker)] == [[5] * 4] * 2
    assert chief["ids"][0] != chief["ids"][1]
    assert chief["steps"] == worker["steps"] == 4
    assert sorted(row for block in evaluator["ids"][0] for row in block) == list(range(40))
    assert evaluator["ids"][0] == evaluator["ids"][1]
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("report")] == ["report 1  loss 0.5000", "report 2  loss 1.5000"]
    assert "TF_CONFIG" not in os.environ


def breaks(ctx):
    import torch.distributed as dist

    ctx.initialize()
    if ctx.rank == 1:
        print("printed before")  # noqa: T201
        raise ValueError("broken on purpose")
    dist.barrier()


def test_an_error_of_the_function_names_rank_and_host_and_is_not_tried_again(four, store):
    with pytest.raises(TrainingError, match="broken on purpose") as caught:
        spark_nn.run(breaks, numWorkers=3, framework="torch", storeUrl=store, spark=four, verbose=0)
    error = caught.value
    assert error.rank == 1
    assert f"failed on rank 1 (host {error.host}) in phase 'function'" in str(error)
    assert 'raise ValueError("broken on purpose")' in error.workerTraceback
    assert "printed before" in str(error)
    assert not error.restarts


def killed_once(ctx):
    """Add up ones over the ranks, and lose one of them half-way."""
    import torch
    import torch.distributed as dist

    ctx.initialize()
    found = ctx.checkpoints.restore()
    step, total = (0, 0.0) if found is None else json.loads(found)
    began = step
    while step < 6:
        if ctx.attempt == 0 and step == 4 and ctx.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        value = torch.ones(1)
        dist.all_reduce(value)
        step, total = step + 1, total + value.item()
        if ctx.rank == 0:
            ctx.checkpoints.save(json.dumps([step, total]).encode())
    return [ctx.attempt, began, total, os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]]


def test_a_rank_that_is_killed_is_begun_again_from_what_was_kept(four, store, caplog):
    found = spark_nn.run(killed_once, numWorkers=3, framework="torch", storeUrl=store, spark=four, verbose=0)
    assert found == [1, 4, 18.0, "3", "127.0.0.1"]
    (told,) = [record.getMessage() for record in caplog.records if "Trying again" in record.getMessage()]
    assert "rank 2" in told
    assert "killed by SIGKILL" in told


def serves(ctx):
    import tensorflow as tf

    tf.distribute.ParameterServerStrategy(tf.distribute.cluster_resolver.TFConfigClusterResolver())
    ctx.checkpoints.save(b"here")
    time.sleep(100)


def test_a_parameter_server_that_is_killed_ends_the_gang(four, store):
    from tests.failure.processes import Later, rank_process

    def kill():
        process = rank_process(3)
        until = time.monotonic() + 60
        while not any(name.startswith("checkpoint") for _, _, names in os.walk(store) for name in names):
            assert time.monotonic() < until
            time.sleep(0.1)
        process.kill()

    with pytest.raises(TrainingError, match="killed by SIGKILL") as caught, Later(kill):
        options = {"storeUrl": store, "spark": four, "verbose": 0, "maxRetries": 0}
        spark_nn.run(serves, numWorkers=2, parameterServers=1, **options)
    assert caught.value.rank == 3
    assert caught.value.phase == "serving"
    assert caught.value.transient


def nothing(ctx):
    """Is never run."""


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"function": 3}, ParamError, "function=3: must be a function"),
        ({"args": [threading.Lock()]}, ParamError, "cannot be sent to the workers .*make sessions, locks"),
        ({"framework": "mxnet"}, ParamError, "framework='mxnet': must be one of 'tensorflow', 'torch', 'jax'"),
        ({"framework": "torch", "parameterServers": 1}, ParamError, "parameterServers=1 with framework='torch'"),
        ({"framework": "jax", "evaluator": True}, ParamError, "evaluator=True with framework='jax'"),
        ({"parameterServers": -1}, ParamError, "parameterServers=-1: must be at least 0"),
        ({"numWorkers": 0}, ParamError, "numWorkers=0: must be at least 1"),
        ({"numWorkers": 5}, ClusterError, "numWorkers=5, but the cluster"),
        (
            {"numWorkers": 3, "parameterServers": 1},
            ClusterError,
            "numWorkers=3 and 2 more .* runs 4 tasks at a time: use 2 or",
        ),
        ({"timeout": 0.0}, ParamError, "timeout=0.0: must be above 0"),
        ({"dataset": 40, "featuresCol": "nowhere", "labelCol": None}, ColumnError, "nowhere"),
        ({"dataset": 40, "labelCol": None}, ColumnError, "featuresCol='features'.* It has id. Name .* or inputs"),
        ({"dataset": 40, "inputCols": ["id"]}, ColumnError, "labelCol='label'.* It has id. .*labelCol=None reads none"),
        ({"dataset": 1, "inputCols": ["id"], "numWorkers": 2, "labelCol": None}, DatasetError, "1 training row for"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(four, store, given, kind, message):
    given = dict(given)
    function, args = given.pop("function", nothing), given.pop("args", [])
    if "dataset" in given:
        given["dataset"] = four.range(given["dataset"])
    with pytest.raises(kind, match=message):
        spark_nn.run(function, *args, storeUrl=store, spark=four, verbose=0, **given)


@pytest.mark.parametrize(("invalid", "skip"), [("error", False), ("skip", True), ("keep", True)])
def test_rows_that_cannot_be_used_are_left_out_where_they_may_be(spark, invalid, skip):
    df = spark.createDataFrame([(1.0, 2.0)], "features double, label double")
    params = cluster._RunParams()._set(handleInvalid=invalid)
    assert params.spec(df.schema, labelled=True).skip is skip
