"""Evaluation without a framework: rows, columns, partitions, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn.errors import ColumnError, DatasetError, StoreError
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def df(spark):
    """Rows in five partitions, one of them empty."""
    rows = spark.range(0, 1000, 1, 5).where("id < 600 or id >= 800")
    rows = rows.select("id", F.rand(1).alias("a"), F.rand(2).alias("b"))
    return rows.withColumn("label", F.expr("2*a - 3*b + 1")).withColumn("w", F.expr("0.5 + id % 3"))


@pytest.fixture
def model(store, df):
    return ToyEstimator(inputCols=["a", "b"], batchSize=50, verbose=0, storeUrl=store, weightCol="w").fit(df)


def expected(model, rows, weighted):
    w = np.load(model.fitted.file.path)
    x = np.array([[row.a, row.b] for row in rows], np.float32).astype(float)
    y = np.array([row.label for row in rows], np.float32).astype(float)
    weights = np.array([float(row.w) for row in rows]) if weighted else 1.0
    return ((x @ w[:2] + w[2] - y) ** 2 * weights).mean()


def test_the_loss_over_all_rows_however_they_are_partitioned(spark, df, model):
    rows = df.collect()
    for frame in (df, df.coalesce(1), df.repartition(7)):
        found = model.evaluate(frame)
        assert found["rows"] == 800
        assert found["loss"] == pytest.approx(expected(model, rows, weighted=True), rel=1e-12)
    bare = model.copy()
    bare.clear(bare.weightCol)
    assert bare.evaluate(df.drop("w"))["loss"] == pytest.approx(expected(model, rows, weighted=False), rel=1e-12)


def test_rows_that_cannot_be_used(spark, df, model):
    broken = df.withColumn("label", F.expr("if(id % 10 = 0, null, label)"))
    broken = broken.withColumn("b", F.expr("if(id % 10 = 1, double('nan'), b)"))
    with pytest.raises(ColumnError, match=r"'b' is NaN in 80 rows.*'label' is null in 80 rows.*handleInvalid='skip'"):
        model.evaluate(broken)
    skipping = model.copy({model.handleInvalid: "skip"})
    found = skipping.evaluate(broken)
    assert found["rows"] == 640
    rows = df.where("id % 10 > 1").collect()
    assert found["loss"] == pytest.approx(expected(model, rows, weighted=True), rel=1e-12)
    with pytest.raises(DatasetError, match="no rows to evaluate the model on$"):
        model.evaluate(df.where("id < 0"))
    with pytest.raises(DatasetError, match="no rows to evaluate the model on$"):
        model.evaluate(spark.createDataFrame([], df.schema))
    with pytest.raises(DatasetError, match="all 800 were skipped, see handleInvalid"):
        skipping.evaluate(df.withColumn("label", F.lit(None).cast("int")))
    with pytest.raises(ColumnError, match="column 'w' is negative in 800 rows"):
        model.evaluate(df.withColumn("w", F.lit(-1)))


def test_labels_of_another_length_in_another_partition_are_found(spark, df, model):
    ragged = df.withColumn("label", F.expr("if(id < 600, array(0.5), array(0.5, 1))"))
    with pytest.raises(ColumnError, match="column 'label' has rows of differing length, among them 1, 2"):
        model.evaluate(ragged)


def test_columns_are_checked_before_a_job_is_planned(df, model, monkeypatch):
    monkeypatch.setattr(type(df), "mapInArrow", lambda *args, **kwargs: pytest.fail("a job was planned"))
    with pytest.raises(ColumnError, match="labelCol='nope': the DataFrame has no such column"):
        model.copy({model.labelCol: "nope"}).evaluate(df)
    with pytest.raises(ColumnError, match="weightCol='w': the DataFrame has no such column"):
        model.evaluate(df.drop("w"))
    with pytest.raises(ColumnError, match="inputCols='b': the DataFrame has no such column"):
        model.evaluate(df.drop("b"))


def test_history_and_the_best_epoch(spark, store, df, model):
    assert model.summary.bestEpoch == 1
    assert model.getHistory() == model.summary.history
    history = {"loss": [3.0, 1.0, 2.0], "val_loss": [5.0, 5.5, float("nan"), 4.0, 4.0]}

    def best(**history):
        return type(model.summary)(**{**model.summary.toDict(), "history": history}).bestEpoch

    assert best(**history) == 4
    assert best(loss=history["loss"]) == 2
    assert best(loss=[float("nan")]) is None
    assert best() is None


def test_an_export_appears_whole_or_not_at_all(tmp_path, model, monkeypatch):
    path = tmp_path / "folder" / "weights.npy"
    model.export(str(path), "npy")
    assert path.read_bytes() == model.fitted.file.path.read_bytes()
    with pytest.raises(StoreError, match="exists: choose another one, or replace it with overwrite=True"):
        model.export(str(path), "npy")
    path.write_bytes(b"old")
    model.export(f"file://{path}", "npy", overwrite=True)
    np.testing.assert_array_equal(np.load(path), np.load(model.fitted.file.path))
    with pytest.raises(StoreError, match="nosuch"):
        model.export("nosuch://x/y", "npy")
    import fsspec.implementations.local as local

    def full(*args, **kwargs):
        raise OSError(28, "no space left")

    monkeypatch.setattr(local.LocalFileSystem, "mv", full)
    with pytest.raises(StoreError, match="cannot write .*no space left"):
        model.export(str(path), "npy", overwrite=True)
    assert [each.name for each in path.parent.iterdir()] in ([], ["weights.npy"])


def test_the_function_of_sql_takes_the_columns_in_order(spark, df, model):
    expected = {row.id: row.prediction for row in model.transform(df).collect()}
    spark.udf.register("toy", model.udf())
    df.createOrReplaceTempView("toy_rows")
    found = spark.sql("SELECT id, toy(a, b).prediction AS p FROM toy_rows WHERE id % 2 = 0").collect()
    assert {row.id: row.p for row in found} == {i: p for i, p in expected.items() if i % 2 == 0}
    with pytest.raises(Exception, match="called with 1 arguments, and takes 2: a, b, in this order"):
        spark.sql("SELECT toy(a) FROM toy_rows").collect()
