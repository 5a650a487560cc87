"""What a user sees when a rank fails, and what is left of it: real errors, and processes really killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import tempfile
import threading
import time

import pytest
from pyspark.sql import functions as F

from spark_nn.errors import TrainingError
from spark_nn.gang.launch import Gang
from spark_nn.gang.worker import Home
from spark_nn.store import RunDir
from tests.failure.processes import Later, no_rank_is_left, rank_process, ranks
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    no_rank_is_left()


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
    place = f"rank {rank} (host {error.host}) in phase 'training, epoch 1, step 3'"
    assert f"training failed on {place}: ValueError" in str(error)
    assert error.phase == "training, epoch 1, step 3"
    assert not error.transient
    assert not error.restarts
    assert 'raise ValueError("the toy broke on purpose")' in error.workerTraceback
    # What is left for the driver says it all: Spark, which prints the traces of jobs that fail, knows of none.
    tracker = spark.sparkContext.statusTracker()
    assert tracker.getJobInfo(max(tracker.getJobIdsForGroup(None))).status == "SUCCEEDED"
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
        outcome = Gang(spark, 2).run(answers, run, home=Home({"GREETING": "hello"}))
        assert outcome.value == {"rank": 0, "world": 2, "cpus": 1, "greeting": "hello"}
    assert "GREETING" not in os.environ


def test_a_module_that_the_workers_lack_is_named_with_the_cure(spark, store, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def answer(context):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here

    with RunDir.open(f"file://{store}") as run:
        message = (
            r"needs the module 'only_here', which this worker does not have: .*addArtifacts\('only_here.py', pyfile"
        )
        with pytest.raises(TrainingError, match=message):
            Gang(spark, 1).run(only_here.answer, run)


def task():
    """The process of the Spark task that guards this one: who is at the other end of its connection."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if pid not in (0, os.getpid()):
                return pid
    raise AssertionError("there is no task")


def waits(context):
    context.progress.update(phase="waiting")
    context.run.write(f"pid-{context.rank}", str(task()).encode())
    time.sleep(100)


def meets(context):
    context.progress.update(phase="meeting")
    context.run.write(f"pid-{context.rank}", str(task()).encode())
    while True:
        context.collective.barrier()


def wait_for_all(run, world=2):
    deadline = time.monotonic() + 60
    while any(run.read(f"pid-{rank}") is None for rank in range(world)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("function", [waits, meets])
@pytest.mark.parametrize("what", ["child", "task"])
def test_a_kill_in_mid_flight_ends_the_gang(spark, store, what, function):
    """A rank's process, or the Spark Python worker above it, is killed from outside."""
    with RunDir.open(f"file://{store}") as run:
        killed = []

        def kill():
            wait_for_all(run)
            os.kill(rank_process(1).pid if what == "child" else int(run.read("pid-1")), signal.SIGKILL)
            killed.append(time.monotonic())

        with pytest.raises(TrainingError) as caught, Later(kill):
            Gang(spark, 2).run(function, run)
        assert time.monotonic() - killed[0] < 15
        error = caught.value
        assert error.transient
        if what == "child":
            assert error.rank == 1
            assert "SIGKILL" in str(error)
        if function is meets:
            assert error.rank == 1
            assert error.host in str(error)
            assert error.phase.startswith("meeting") or what == "task"


def test_a_rank_that_is_stopped_ends_the_gang_within_the_timeout(spark, store):
    with RunDir.open(f"file://{store}") as run:

        def stop():
            wait_for_all(run)
            rank_process(1).send_signal(signal.SIGSTOP)

        with pytest.raises(TrainingError, match=r"no sign of life for 3 s|kept silent for 3 s") as caught, Later(stop):
            began = time.monotonic()
            Gang(spark, 2, timeout=3.0).run(meets, run)
        assert caught.value.transient
        assert "rank 1" in str(caught.value)
        assert time.monotonic() - began < 25
    no_rank_is_left(10)


def test_a_lone_rank_that_is_stopped_is_noticed_too(spark, store):
    with RunDir.open(f"file://{store}") as run:

        def stop():
            wait_for_all(run, world=1)
            rank_process(0).send_signal(signal.SIGSTOP)

        message = "on rank 0 .* in phase 'waiting': the process gave no sign of life for 3 s"
        with pytest.raises(TrainingError, match=message), Later(stop):
            Gang(spark, 1, timeout=3.0).run(waits, run)


@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_who_cancels_the_job_ends_the_ranks_within_five_seconds(spark, store, how):
    """As Ctrl-C in the driver does, or the button in Spark's UI."""

    with RunDir.open(f"file://{store}") as run:
        ended = []

        def cancel():
            wait_for_all(run)
            began = time.monotonic()
            if how == "interrupt":
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            else:
                spark.sparkContext.cancelAllJobs()
            while ranks():
                assert time.monotonic() - began < 20
                time.sleep(0.05)
            ended.append(time.monotonic() - began)

        expected = KeyboardInterrupt if how == "interrupt" else TrainingError
        with pytest.raises(expected) as caught, Later(cancel):
            Gang(spark, 2, retries=3).run(waits, run)
        assert ended[0] < 5
        if how == "cancel":
            assert "the training's Spark job was cancelled" in str(caught.value)
            assert not run.names("attempt-1")
