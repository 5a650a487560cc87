"""What Spark makes of a DataFrame that is scored: nothing more is run than is read."""

from __future__ import annotations

import functools

import numpy as np
import pyspark
import pytest
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from spark_nn.columns import features
from spark_nn.outputs import Output
from spark_nn.persistence import ModelFile
from spark_nn.scoring.plan import score, ship
from spark_nn.scoring.scorer import Scorer
from tests import toy

pytestmark = pytest.mark.timeout(120)


class Counting:
    """A predictor that notes, in a file, how many rows it is given."""

    rows = 100

    def __init__(self, predictor, mark):
        self.predictor = predictor
        self.mark = mark

    def __call__(self, inputs):
        with open(self.mark, "a") as file:
            file.write(f"{len(inputs)}\n")
        return self.predictor(inputs)


def load(path, share, mark):
    return Counting(toy.load(path, share), mark)


@pytest.fixture
def counted(spark, tmp_path):
    """Adds predictions, 2 a - 3 b + 1, and tells the numbers of rows that went through the model."""
    file, mark = ModelFile(".npy"), tmp_path / "mark"
    np.save(file.path, [2.0, -3.0, 1.0])
    file = file.sealed()

    def transform(df, **settings):
        tensor = features(df.schema, "inputCols", ["a", "b"])
        loader = functools.partial(load, mark=str(mark))
        outputs = {"": Output("regression", (1,))}
        scorer = Scorer(ship(spark, file.path), file.sha256, loader, (tensor,), outputs, ("predictionCol",), **settings)
        mark.write_text("")
        return score(df, scorer, {"predictionCol": "prediction"})

    transform.seen = lambda: [int(line) for line in mark.read_text().split()]
    return transform


def rows(spark, count=1000, partitions=2):
    return spark.range(0, count, 1, partitions).select("id", F.col("id").alias("a"), F.lit(1.0).alias("b"))


def test_a_prediction_that_nobody_reads_is_not_made(spark, counted):
    scored = counted(rows(spark))
    assert scored.select("id").distinct().count() == 1000
    assert scored.where("id > 10").groupBy("b").count().collect()[0]["count"] == 989
    assert counted.seen() == []
    assert scored.agg(F.sum("prediction")).first()[0] == sum(2 * i - 2 for i in range(1000))
    assert sorted(counted.seen()) == [100] * 10


@pytest.mark.parametrize("invalid", ["error", "skip", "keep"])
def test_a_limit_lets_at_most_one_batch_of_each_task_be_predicted(spark, counted, invalid):
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 100)
    try:
        scored = counted(rows(spark, 100_000), invalid=invalid).limit(10)
        assert [row.prediction for row in scored.collect()] == [2.0 * i - 2 for i in range(10)]
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")
    seen = counted.seen()
    if invalid == "skip":  # whether a row is left out only the model's input tells: Spark stops after ten that are not
        assert sum(seen) < 100_000
    else:
        assert len(seen) <= 2
        assert sum(seen) <= 20


def test_a_filter_on_other_columns_goes_before_the_model(spark, counted):
    scored = counted(rows(spark)).where("id < 30")
    assert len(scored.collect()) == 30
    assert sum(counted.seen()) == 30


@pytest.mark.parametrize("nested", [False, True])
def test_vectors_in_a_parquet_file_may_be_carried_along(spark, counted, tmp_path, nested):
    df = rows(spark).withColumn("vector", array_to_vector(F.array("a", "b")))
    df = df.withColumn("vector", F.array("vector")) if nested else df
    df.write.parquet(str(tmp_path / "rows"))
    found = counted(spark.read.parquet(str(tmp_path / "rows"))).where("id < 500")
    assert found.agg(F.sum("prediction")).first()[0] == sum(2 * i - 2 for i in range(500))
    assert sum(counted.seen()) == 500
    assert found.select("vector").count() == 500


def test_a_model_is_given_to_the_executors_once(spark, counted):
    counted(rows(spark))
    before = spark.sparkContext.listFiles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(spark), "addArtifacts", lambda *_, **__: pytest.fail("Spark would warn of it"))
        assert counted(rows(spark)).count() == 1000
    assert spark.sparkContext.listFiles == before


def test_planning_starts_no_job(spark, counted):
    broken = rows(spark).withColumn("a", F.expr("if(id >= 0, raise_error('read'), 0)").cast("double"))
    spark.sparkContext.setJobGroup("planned", "")
    scored = counted(broken)
    assert scored.columns == ["id", "a", "b", "prediction"]
    assert not spark.sparkContext.statusTracker().getJobIdsForGroup("planned")
    spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
@pytest.mark.parametrize("rows_at_once", [None, 7])
def test_rows_that_cannot_be_used_are_kept_with_a_null(spark, counted, monkeypatch, kind, rows_at_once):
    if kind == "pandas":
        monkeypatch.setattr(pyspark, "__version__", "4.0.1")
    broken = rows(spark).withColumn("a", F.expr("if(id % 3 = 1 or id < 100, null, a)"))
    found = counted(broken, invalid="keep", rows=rows_at_once).collect()
    assert [row.id for row in found] == list(range(1000))
    usable = [i >= 100 and i % 3 != 1 for i in range(1000)]
    assert [row.prediction for row in found] == [2.0 * i - 2 if used else None for i, used in enumerate(usable)]
    assert sum(counted.seen()) == sum(usable)
    assert max(counted.seen()) <= (rows_at_once or 100)


def test_a_stream_is_scored_batch_by_batch(spark, counted, tmp_path):
    rows(spark, 500, 5).write.parquet(str(tmp_path / "in"))
    reader = spark.readStream.schema("id long, a long, b double").option("maxFilesPerTrigger", 1)
    scored = counted(reader.parquet(str(tmp_path / "in")))
    query = (
        scored.writeStream.format("parquet")
        .option("checkpointLocation", str(tmp_path / "state"))
        .trigger(availableNow=True)
        .start(str(tmp_path / "out"))
    )
    assert query.awaitTermination(90)
    found = spark.read.parquet(str(tmp_path / "out")).orderBy("id").collect()
    assert [(row.id, row.prediction) for row in found] == [(i, 2.0 * i - 2) for i in range(500)]
    assert counted.seen() == [100] * 5
