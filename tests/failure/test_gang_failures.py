"""What a user sees when a rank fails, and what is left of it: real errors, and processes really killed."""

from __future__ import annotations

import os
import signal
import tempfile
import time

import psutil
import pytest
from pyspark.sql import functions as F

from spark_nn.errors import TrainingError
from spark_nn.gang.launch import Gang
from spark_nn.store import RunDir
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(120)


def ranks():
    """The processes of ranks that this session's Spark has started, directly or not."""
    mark = os.environ["SPARK_WORKER_DIR"]  # a directory of this test session's own, inherited by all of them
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if "spark_nn.gang.child" in (process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("SPARK_WORKER_DIR") == mark
    ]


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    deadline = time.monotonic() + 20
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = {pid: psutil.Process(pid).as_dict(["ppid", "status", "create_time"]) for pid in ranks()}
    assert not left


def data(spark):
    return spark.range(2000).select(F.rand(1).alias("a")).withColumn("label", F.expr("2 * a"))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_reaches_the_driver_with_its_traceback(spark, store, rank):
    stage = ToyEstimator(inputCols=["a"], batchSize=20, numWorkers=2, failRank=rank, storeUrl=store, verbose=0)
    with pytest.raises(TrainingError, match="the toy broke on purpose") as caught:
        stage.fit(data(spark))
    error = caught.value
    assert error.rank == rank
    assert error.host in str(error)
    assert f"training failed on rank {rank} (host {error.host}): ValueError" in str(error)
    assert 'raise ValueError("the toy broke on purpose")' in error.workerTraceback
    # The next fit of the same session is none the worse.
    assert ToyEstimator(inputCols=["a"], numWorkers=2, storeUrl=store, verbose=0).fit(data(spark)).summary


def killed_at_the_start(context):
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context.collective.barrier()


def leaves(context):
    if context.rank == 0:
        os._exit(7)
    context.collective.barrier()


def answers(context):
    return {"rank": context.rank, "world": context.world, "cpus": context.cpus, "greeting": os.environ["GREETING"]}


def killed_with_a_folder(context):
    context.run.write("folder", tempfile.mkdtemp(prefix="spark_nn-").encode())
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_leaves_no_temporary_folder(spark, store):
    with RunDir.open(f"file://{store}") as run:
        with pytest.raises(TrainingError, match="killed by SIGKILL"):
            Gang(spark, 1).run(killed_with_a_folder, run)
        assert not os.path.exists(run.read("folder").decode())


def unserialisable(context):
    return object()


@pytest.mark.parametrize(
    ("function", "rank", "message"),
    [
        (killed_at_the_start, 1, "the process was killed by SIGKILL"),
        (leaves, 0, "the process ended with status 7 before it could say why"),
        (unserialisable, 0, "not JSON serializable"),
    ],
)
def test_a_process_that_dies_is_named(spark, store, function, rank, message):
    with RunDir.open(f"file://{store}") as run, pytest.raises(TrainingError, match=message) as caught:
        Gang(spark, 2).run(function, run)
    assert caught.value.rank == rank


def test_the_gang_returns_what_rank_0_returned(spark, store):
    with RunDir.open(f"file://{store}") as run:
        answer = Gang(spark, 2).run(answers, run, environment={"GREETING": "hello"})
        assert answer == {"rank": 0, "world": 2, "cpus": 1, "greeting": "hello"}
    assert "GREETING" not in os.environ


def names_itself_and_waits(context):
    context.run.write(f"pid-{context.rank}", str(os.getpid()).encode())
    time.sleep(100)


@pytest.mark.parametrize("what", ["child", "task"])
def test_a_kill_in_mid_flight_ends_the_gang(spark, store, what):
    """A rank's process, or the Spark Python worker above it, is killed from outside while all ranks wait."""
    from threading import Thread

    with RunDir.open(f"file://{store}") as run:

        def kill():
            while (pid := run.read("pid-1")) is None:
                time.sleep(0.05)
            process = psutil.Process(int(pid))
            (process if what == "child" else process.parent()).kill()

        killer = Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(TrainingError) as caught:
            Gang(spark, 2).run(names_itself_and_waits, run)
        killer.join(10)
    if what == "child":
        assert caught.value.rank == 1
        assert "SIGKILL" in str(caught.value)
