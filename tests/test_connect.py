"""What is different on Spark Connect: files, slots, errors of workers, cancelling; see contract/ for the rest."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyspark.sql import functions as F

import spark_nn
from spark_nn import disk
from spark_nn.disk import Disk
from spark_nn.errors import ClusterError, ModelFileError, TrainingError
from spark_nn.gang.launch import slots_of
from spark_nn.store import store_url
from tests.failure.processes import no_rank_is_left, rank_process
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(180)


def data(spark, rows=400):
    df = spark.range(rows).select("id", F.rand(1).alias("a"), F.rand(2).alias("b"))
    return df.withColumn("label", F.expr("2*a - 3*b + 1"))


def estimator(store, **kwargs):
    return ToyEstimator(**{"inputCols": ["a", "b"], "batchSize": 50, "verbose": 0, "storeUrl": store, **kwargs})


def saved(spark, path):
    """A path that holds metadata, as Spark leaves it."""
    spark.createDataFrame([("{}",)], ["value"]).coalesce(1).write.text(f"{path}/metadata")
    return path


def test_files_come_back_as_they_were_put_in_parts_too(connect, tmp_path, monkeypatch):
    path = saved(connect, str(tmp_path / "a path, 100% of it"))
    monkeypatch.setattr(disk, "_JOB_BYTES", 3000)  # of this process: the tasks bring as much as ever
    for name, content in {"empty": b"", "one": b"1", "many": os.urandom(10_000)}.items():
        (tmp_path / name).write_bytes(content)
        Disk.of(connect, path).put(tmp_path / name, f"model/{name}")
        assert (tmp_path / "a path, 100% of it" / "model" / name).read_bytes() == content
        Disk.of(connect, path).get(f"model/{name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
    left = {each.name for each in (tmp_path / "a path, 100% of it" / "model").iterdir()}
    assert left == {"empty", "one", "many"}


def test_a_task_brings_a_file_in_parts_from_any_place_on(tmp_path, monkeypatch):
    content = os.urandom(10_000)
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(disk, "_JOB_BYTES", 3000)
    monkeypatch.setattr(disk, "_ROW_BYTES", 1024)

    def brought(start):
        return [
            row["data"]
            for batch in disk._Get(f"file://{tmp_path}", "file", start)(iter(()))
            for row in batch.to_pylist()
        ]

    assert [len(part) for part in brought(0)] == [1024, 1024, 952]
    assert b"".join(part for start in (0, 3000, 6000, 9000) for part in brought(start)) == content
    assert brought(10_000) == []


def test_what_cannot_be_copied_is_told_with_the_cure(connect, tmp_path, monkeypatch):
    path = saved(connect, str(tmp_path / "stage"))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="stage/model/none does not exist: the stage is incomplete"):
        Disk.of(connect, path).get("model/none", tmp_path / "back")
    strange = Disk.of(connect, path)
    strange._url = "strange://somewhere/stage"
    with pytest.raises(ModelFileError, match="strange://somewhere/stage, which .* cannot reach: .*Install the file"):
        strange.put(tmp_path / "file", "model/file")
    with pytest.raises(ModelFileError, match="strange://somewhere/stage, which .* cannot reach: .*classic session"):
        strange.get("model/file", tmp_path / "back")
    elsewhere = Disk.of(connect, path)
    elsewhere._url = f"file://{tmp_path}/elsewhere"
    with pytest.raises(ModelFileError, match="does not find .*elsewhere/metadata.*Save to storage that they share"):
        elsewhere.put(tmp_path / "file", "model/file")
    assert not (tmp_path / "elsewhere").exists()


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "stage" / "metadata").mkdir(parents=True)
    (tmp_path / "shipped").write_bytes(b"x")

    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr(disk.SparkFiles, "get", lambda name: str(tmp_path / name))
    monkeypatch.setattr(LocalFileSystem, "mv", full)
    put = disk._Put(f"file://{tmp_path}/stage", "model/file", "shipped")
    with pytest.raises(OSError, match="no room"):
        put.copy()
    assert list((tmp_path / "stage" / "model").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(disk.SparkFiles, "get", lambda name: str(tmp_path / name))
    assert put.copy() is None
    assert (tmp_path / "stage" / "model" / "file").read_bytes() == b"x"


def test_hadoops_names_of_filesystems_become_fsspecs():
    class Spark:
        read = property(lambda self: self)

        def text(self, path):
            return self

        def inputFiles(self):
            return ["s3a://bucket/a%20b/metadata/c/metadata/part-00000"]

    assert disk._Connect(Spark(), "anything")._resolved() == "s3://bucket/a b/metadata/c"


@pytest.mark.parametrize(
    ("master", "cpus", "slots"),
    [
        ("local", 1, 1),
        ("local[2]", 1, 2),
        ("local[5]", 2, 2),
        ("local[4,3]", 1, 4),
        ("local-cluster[2,3,1024]", 2, 2),
        ("local[*]", 1, None),
        ("spark://host:7077", 1, None),
        ("yarn", 1, None),
        ("", 1, None),
    ],
)
def test_the_slots_that_a_masters_url_tells(master, cpus, slots):
    assert slots_of(master, cpus) == slots


def test_too_many_workers_are_an_error_at_once(connect, store):
    with pytest.raises(ClusterError, match=r"numWorkers=3, but the cluster \(master 'local\[2\]'\) runs 2 tasks"):
        estimator(store, numWorkers=3, batchSize=60).fit(data(connect))


def test_a_local_servers_store_needs_no_setting(connect):
    kept = connect.conf.get("spark.nn.storeUrl")
    connect.conf.unset("spark.nn.storeUrl")
    try:
        assert store_url(connect, None).startswith("file:///")
    finally:
        connect.conf.set("spark.nn.storeUrl", kept)


def test_an_error_of_a_worker_comes_with_rank_host_and_traceback(connect, store):
    with pytest.raises(TrainingError, match="failed on rank 1 .*ValueError: the toy broke on purpose") as caught:
        estimator(store, numWorkers=2, failRank=1).fit(data(connect))
    error = caught.value
    assert (error.rank, error.phase, error.transient) == (1, "training, epoch 1, step 3", False)
    assert error.host
    assert 'raise ValueError("the toy broke on purpose")' in error.workerTraceback


def test_a_rank_that_is_killed_does_not_end_the_fit(connect, store):
    def kill():
        rank_process(1).send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    model = estimator(store, numWorkers=2, stepSeconds=0.1, epochs=5).fit(data(connect))
    killer.join()
    assert len(model.summary.restarts) == 1
    assert model.summary.history["rows"] == [400.0] * 5


def test_ctrl_c_ends_the_ranks(connect, store):
    def interrupt():
        rank_process(1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        estimator(store, numWorkers=2, stepSeconds=0.2, epochs=1000).fit(data(connect))
    other.join()
    no_rank_is_left()


def counts(ctx):
    return [ctx.world, sum(len(x) for x, _ in ctx.batches(10)), np.ones(2)]


def test_a_function_of_ones_own_runs_on_a_gang(connect, store):

    rows = connect.range(40).selectExpr("double(id) AS a", "double(id) AS label")
    world, seen, array = spark_nn.run(
        counts, numWorkers=2, dataset=rows, inputCols=["a"], storeUrl=store, verbose=0, maxRetries=0
    )
    assert (world, seen) == (2, 20)
    assert array.tolist() == [1, 1]


def speaks(ctx):
    print(f"here is {ctx.rank}")  # noqa: T201
    ctx.report(loss=0.5)


def test_progress_and_what_ranks_print_come_to_the_client(connect, store, capsys):
    spark_nn.run(speaks, numWorkers=2, storeUrl=store, verbose=2, followLogs=True, spark=connect)
    lines = capsys.readouterr().err.splitlines()
    assert {"report 1  loss 0.5000", "[rank 0] here is 0", "[rank 1] here is 1"} <= set(lines)
    estimator(store, numWorkers=2, epochs=2, verbose=1).fit(data(connect))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("epoch", "["))]
    assert [line.partition("  ")[0] for line in told] == ["epoch 1/2", "epoch 2/2"]
