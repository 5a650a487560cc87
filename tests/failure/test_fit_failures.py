"""A fit goes on after a machine's failure as if nothing had happened, or says what happened; nothing is left behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from pyspark.sql import functions as F

from spark_nn.errors import ClusterError, TrainingError
from spark_nn.store import RunDir
from tests.failure.processes import Later, named, no_rank_is_left, rank_process, servers, wait_for
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    no_rank_is_left()


def data(spark):
    columns = [F.rand(seed).alias(name) for seed, name in enumerate("ab")]
    return spark.range(0, 2000, 1, 2).select(*columns).withColumn("label", F.expr("2 * a - b"))


def estimator(store, **kwargs):
    settings = {
        "inputCols": ["a", "b"],
        "batchSize": 40,
        "epochs": 2,
        "numWorkers": 2,
        "storeUrl": store,
        "verbose": 0,
        "checkpointInterval": 7,
        **kwargs,
    }
    return ToyEstimator(**settings)


def fitted(spark, store, **kwargs):
    model = estimator(store, **kwargs).fit(data(spark))
    return np.load(model.fitted.file.path), model.summary


@pytest.fixture(scope="module")
def undisturbed(sessions, tmp_path_factory):
    """What the training comes to where nothing happens."""
    weights, summary = fitted(sessions.get("local[2]"), str(tmp_path_factory.mktemp("store")))
    assert not summary.restarts
    return weights.tobytes(), summary.history


def run_of(store):
    """The run directory of the fit under way."""
    return RunDir(f"file://{wait_for(lambda: next(iter(Path(store).glob('run-*')), None), 60, 'run')}")


def checkpoint(run, attempt=0, count=1):
    """Wait for so many checkpoints."""
    folder = f"attempt-{attempt}/checkpoints"
    return wait_for(
        lambda: [each for each in run.names(folder) if each.endswith(".json")][count - 1 :], 60, "checkpoint"
    )


def test_an_error_of_the_users_is_not_tried_again(spark, store):
    with pytest.raises(TrainingError, match="the toy broke on purpose") as caught:
        fitted(spark, store, failRank=1)
    assert caught.value.restarts == []


@pytest.mark.parametrize("what", ["rank 0", "rank 1", "server", "stopped rank 1"])
def test_a_killed_process_changes_no_bit_of_the_result(spark, store, undisturbed, what, caplog):
    def strike():
        checkpoint(run_of(store))
        if what == "server":
            for process in servers():
                process.kill()
        else:
            process = rank_process(int(what[-1]))
            process.send_signal(signal.SIGSTOP if what.startswith("stopped") else signal.SIGKILL)

    with Later(strike), caplog.at_level(logging.WARNING, "spark_nn"):
        weights, summary = fitted(spark, store, stepSeconds=0.05, timeout=4.0)
    assert (weights.tobytes(), summary.history) == undisturbed
    (reason,) = summary.restarts
    assert reason.startswith("training failed on rank ")
    assert any(reason in record.message and "(1 of 3)" in record.message for record in caplog.records)


def test_executors_change_no_bit_of_the_result_killed_or_not(cluster, store, undisturbed):
    with pytest.raises(ClusterError, match="numWorkers=3, but the cluster .* runs 2 tasks at a time: use 2"):
        estimator(store, numWorkers=3, batchSize=60).fit(data(cluster))
    weights, summary = fitted(cluster, store)
    assert (weights.tobytes(), summary.history) == undisturbed

    def strike():
        run = run_of(store)
        checkpoint(run)
        rank = rank_process(1)
        jvm = next(each for each in all_executors() if each.pid == guardian(rank))
        jvm.kill()

    with Later(strike):
        again, disturbed = fitted(cluster, store, stepSeconds=0.05)
    assert again.tobytes() == weights.tobytes()
    assert disturbed.history == summary.history
    assert len(disturbed.restarts) == 1


def all_executors():
    return [process for process in named("java") if "CoarseGrainedExecutorBackend" in " ".join(process.cmdline())]


def guardian(rank):
    """The executor that a rank belongs to: its working directory is the executor's."""
    folder = os.readlink(f"/proc/{rank.pid}/cwd")
    return next(each.pid for each in all_executors() if os.readlink(f"/proc/{each.pid}/cwd") == folder)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(spark, store, undisturbed, caplog):
    def strike():
        run = run_of(store)
        newest = checkpoint(run, count=2)[-1]
        os.kill(rank_process(0).pid, signal.SIGKILL)
        newest = max(run.names("attempt-0/checkpoints"))  # one more may have been written
        run.fs.pipe_file(run.path(f"attempt-0/checkpoints/{newest.partition('.')[0]}.npz"), b"not what it was")

    with Later(strike):
        weights, summary = fitted(spark, store, stepSeconds=0.05)
    assert (weights.tobytes(), summary.history) == undisturbed
    assert len(summary.restarts) == 1


def test_a_store_that_refuses_once_is_asked_again(spark, store, undisturbed):
    weights, summary = fitted(spark, store, failingWrites=1)
    assert (weights.tobytes(), summary.history) == undisturbed
    assert not summary.restarts


def test_a_store_that_refuses_for_long_is_tried_as_often_as_asked_and_named(spark, store):
    with pytest.raises(TrainingError, match="cannot write '.*npz' in the store, file://.*bad day") as caught:
        fitted(spark, store, failingWrites=10**6, maxRetries=1)
    error = caught.value
    assert error.rank == 0
    assert f"(host {error.host}) in phase 'training, epoch 1, step 7'" in str(error)
    assert len(error.restarts) == 1
    assert "begun again 1 times" in error.__notes__[0]


def test_a_full_disk_is_told_at_once(spark, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes rights that this user does not have")
    try:
        spark.conf.set("spark.nn.datasetIdleSeconds", "0")
        began = time.monotonic()
        with pytest.raises(TrainingError, match="No space left on device.*make room") as caught:
            fitted(spark, str(folder), ballast=4 << 20)
        assert time.monotonic() - began < 40
        assert caught.value.rank == 0
        assert caught.value.phase == "training, epoch 1, step 7"
        assert caught.value.restarts == []
        assert not list(folder.glob("run-*"))
    finally:
        spark.conf.unset("spark.nn.datasetIdleSeconds")
        subprocess.run(["umount", folder], check=True)


def test_strangers_on_every_open_port_change_nothing(spark, store, undisturbed):
    """Garbage, silence and half a greeting, on every port that a rank or its task listens on, as long as it does."""
    stop = threading.Event()
    met = set()

    def pester():
        while not stop.is_set():
            for process in [*named("python"), *named("spark_nn")]:
                try:
                    ports = [each.laddr.port for each in process.net_connections("tcp") if each.status == "LISTEN"]
                except psutil.Error:
                    continue
                for port in ports:
                    for words in (b"GET / HTTP/1.0\r\n\r\n", b"\0" * 300, b"snnRing1", b""):
                        try:
                            with socket.create_connection(("127.0.0.1", port), 0.2) as sock:
                                sock.sendall(words)
                                met.add(port)
                        except OSError:
                            break
            time.sleep(0.01)

    pesterer = threading.Thread(target=pester, daemon=True)
    pesterer.start()
    try:
        weights, summary = fitted(spark, store, stepSeconds=0.01)
    finally:
        stop.set()
        pesterer.join(10)
    assert met
    assert (weights.tobytes(), summary.history) == undisturbed
    assert not summary.restarts


def test_two_fits_at_once_are_as_if_alone(spark, store, undisturbed):
    found = {}

    def fit(name, **kwargs):
        found[name] = fitted(spark, store, **kwargs)

    alone = fitted(spark, store, numWorkers=1)[0].tobytes()
    with Later(fit, "pair", numWorkers=2), Later(fit, "one", numWorkers=1), Later(fit, "other", numWorkers=1):
        pass
    assert found["pair"][0].tobytes() == undisturbed[0]
    assert found["one"][0].tobytes() == found["other"][0].tobytes() == alone


DRIVER = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession
from tests.failure.test_fit_failures import data, estimator
import cloudpickle
from tests import toy
cloudpickle.register_pickle_by_value(toy)
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
estimator(sys.argv[1], stepSeconds=0.2, epochs=100).fit(data(spark))
"""


def test_a_killed_driver_takes_its_processes_along_and_the_next_fit_is_none_the_worse(spark, store, undisturbed):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, store], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        checkpoint(run_of(store))
        assert len(named("spark_nn rank")) == 2
    finally:
        driver.kill()
        driver.wait(10)
    no_rank_is_left(10)
    assert fitted(spark, store)[0].tobytes() == undisturbed[0]
    # What it left behind goes when it has given no sign of life for an hour: let that hour pass.
    left = list(Path(store).glob("*-*"))
    assert left
    for each in left:
        if (each / "alive").exists():
            (each / "alive").write_text(str(time.time() - 4000))
    fitted(spark, store)
    assert not set(left) & set(Path(store).glob("run-*"))
