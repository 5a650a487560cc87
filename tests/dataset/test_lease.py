"""Each dataset is written once, found again by its content, and removed; driven by the framework of NumPy."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F

from spark_nn.dataset import lease
from spark_nn.dataset.lease import IDLE_CONF, shelf
from spark_nn.errors import ColumnError, ParamError
from spark_nn.store import TTL
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(180)


def data(spark, rows=600, partitions=2):
    return (
        spark.range(0, rows, 1, partitions)
        .select("id", F.rand(1).alias("a"), F.rand(2).alias("b"))
        .withColumn("label", F.expr("2*a - 3*b + 1"))
    )


def estimator(store, **kwargs):
    return ToyEstimator(**{"inputCols": ["a", "b"], "batchSize": 50, "verbose": 0, "storeUrl": store, **kwargs})


def weights(stage, df):
    model = stage.fit(df)
    return np.load(model.fitted.file.path).tobytes()


def files(store):
    return {path.name: path.stat().st_mtime_ns for path in Path(store).rglob("*.parquet")}


@pytest.fixture
def written(monkeypatch):
    """How many datasets were written, one element each."""
    calls = []
    original = lease.materialize

    def counting(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(lease, "materialize", counting)
    return calls


def test_a_second_fit_on_the_same_rows_writes_nothing(spark, store, written):
    df = data(spark)
    first = estimator(store).fit(df)
    there = files(store)
    assert there
    again = estimator(store, epochs=2, batchSize=30).fit(df)
    assert files(store) == there
    assert (first.summary.rows, again.summary.rows, len(written)) == (600, 600, 1)
    # What matters is what the rows hold, not which DataFrame says so, nor the order of its rows.
    estimator(store).fit(data(spark).repartition(3))
    assert files(store) == there


@pytest.mark.parametrize(
    "change",
    [
        lambda df: df.withColumn("a", F.when(F.col("id") == 77, 0.5).otherwise(F.col("a"))),
        lambda df: df.where("id != 5"),
        lambda df: df.unionByName(df.where("id = 5").unionByName(df.where("id = 5"))),
        lambda df: df.withColumns({"a": F.col("b"), "b": F.col("a")}),
    ],
    ids=["a value", "a row fewer", "a row three times", "columns swapped"],
)
def test_other_rows_are_written_anew_and_the_old_ones_go(spark, store, written, change):
    df = data(spark)
    estimator(store).fit(df)
    before = files(store)
    changed = change(df)
    model = estimator(store).fit(changed)
    assert len(written) == 2
    assert model.summary.rows == changed.count()
    assert not before.keys() & files(store).keys()


def test_a_table_that_changed_under_the_same_plan_is_not_read_stale(spark, store, written, tmp_path):
    path = str(tmp_path / "table")
    schema = "id bigint, a double, b double, label double"
    for rows in (300, 400):
        data(spark, rows).write.mode("overwrite").parquet(path)
        assert estimator(store).fit(spark.read.schema(schema).parquet(path)).summary.rows == rows
    # With a column that has another type the tensors differ, and nothing is looked for.
    data(spark, 400).withColumn("label", F.col("label").cast("long")).write.mode("overwrite").parquet(path)
    model = estimator(store).fit(spark.read.parquet(path))
    assert model.summary.rows == 400
    assert len(written) == 3


def test_where_the_order_is_kept_it_is_part_of_the_content(spark, store, written):
    df = data(spark)
    plain = estimator(store, shuffle=False)
    first = weights(plain, df)
    assert weights(plain, df) == first
    assert len(written) == 1
    assert weights(plain, df.orderBy(F.desc("id"))) != first
    assert len(written) == 2


def test_what_is_wanted_of_the_rows_decides_too(spark, store, written):
    df = data(spark)
    for settings in ({}, {"seed": 5}, {"validationFraction": 0.2}, {"labelCol": "b"}, {"handleInvalid": "skip"}):
        estimator(store, **settings).fit(df)
    assert len(written) == 5


def test_several_maps_share_one_dataset_without_looking_again(spark, store, written, monkeypatch):
    monkeypatch.setattr(lease, "look", lambda *_: pytest.fail("the rows of one call are the same"))
    df = data(spark)
    stage = estimator(store)
    maps = [{stage.learningRate: rate, stage.epochs: 2} for rate in (1e-3, 1e-2, 1e-1)]
    models = stage.fit(df, [*maps, {stage.seed: 9}])
    assert len(written) == 2  # the seed mixes the rows otherwise
    losses = [model.summary.history["loss"][-1] for model in models]
    assert losses[0] > losses[1] > losses[2]


def grid(stage):
    return ParamGridBuilder().addGrid(stage.learningRate, [1e-3, 0.1]).build()


@pytest.mark.parametrize(("inside", "parallelism"), [("alone", 2), ("pipeline", 1)])
def test_cross_validation_writes_each_fold_once(spark, store, written, inside, parallelism):
    """Alone because the maps of a fold are fitted by one call; in a Pipeline because the content is found again."""
    stage = estimator(store)
    if inside == "pipeline":
        stage.clear(stage.inputCols)
        search = Pipeline(stages=[VectorAssembler(inputCols=["a", "b"], outputCol="features"), stage])
    else:
        search = stage
    validator = CrossValidator(
        estimator=search,
        estimatorParamMaps=grid(stage),
        evaluator=RegressionEvaluator(),
        numFolds=2,
        seed=7,  # not that of a column, which the folds would then go by
        parallelism=parallelism,
    )
    best = validator.fit(data(spark))
    assert np.argmin(best.avgMetrics) == 1
    assert len(written) == 3  # two folds, and all rows for the final fit
    assert len({call[2].url for call in written}) == 3
    assert len(list(Path(store).iterdir())) <= 1 + (inside == "alone") * 2
    shelf().clear()
    assert list(Path(store).iterdir()) == []


def test_a_dataset_goes_when_it_has_been_idle(spark, store):
    try:
        spark.conf.set(IDLE_CONF, "0.5")
        estimator(store).fit(data(spark))
        assert files(store)
        deadline = time.monotonic() + 20
        while list(Path(store).iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(Path(store).iterdir()) == []
        spark.conf.set(IDLE_CONF, "0")
        estimator(store).fit(data(spark))
        assert list(Path(store).iterdir()) == []
        spark.conf.set(IDLE_CONF, "soon")
        with pytest.raises(ParamError, match=f"{IDLE_CONF}='soon': must be a number of seconds"):
            estimator(store).fit(data(spark))
    finally:
        spark.conf.unset(IDLE_CONF)


def test_an_abandoned_grid_and_a_failed_write_leave_nothing(spark, store):
    stage = estimator(store)
    fits = stage.fitMultiple(data(spark), [{stage.learningRate: 0.1}, {stage.learningRate: 0.2}])
    next(fits)
    shelf().clear()
    assert files(store), "the second map still has its lease"
    del fits
    shelf().clear()
    assert list(Path(store).iterdir()) == []
    with pytest.raises(ColumnError, match="column 'a' is null"):
        stage.fit(data(spark).withColumn("a", F.lit(None).cast("double")))
    assert list(Path(store).iterdir()) == []


def test_a_garbage_collection_may_end_a_lease_anywhere(spark, store):
    stage = estimator(store)
    fits = stage.fitMultiple(data(spark), [{stage.learningRate: 0.1}, {stage.learningRate: 0.2}])
    next(fits)
    fits.itself = fits  # as the traceback of an exception would refer to it
    del fits
    with shelf()._lock:
        gc.collect()
    shelf().clear()
    assert list(Path(store).iterdir()) == []


def test_a_dataset_that_somebody_removed_is_written_again(spark, store, written):
    df = data(spark)
    estimator(store).fit(df)
    (folder,) = Path(store).glob("data-*")
    folder.rename(folder.with_name("gone"))
    assert estimator(store).fit(df).summary.rows == 600
    assert len(written) == 2
    os.rename(Path(store) / "gone", folder)
    subprocess.run(["rm", "-r", str(folder)], check=True)


SCRIPT = """
import os, sys, time
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession
from tests.dataset.test_lease import data, estimator
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
estimator(sys.argv[1]).fit(data(spark))
print("fitted", flush=True)
time.sleep(600)
"""


def test_what_a_killed_driver_left_goes_at_the_next_start_when_it_is_old(spark, store):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, store], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "fitted\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    (left,) = Path(store).iterdir()
    estimator(store).fit(data(spark))
    assert left.exists(), "it may be somebody's who is still at work"
    old = float((left / "alive").read_text()) - TTL - 1
    (left / "alive").write_text(str(old))
    estimator(store).fit(data(spark, 500))
    assert not left.exists()
