"""The whole house, driven by the framework of NumPy: estimator, dataset, gang, scoring, persistence."""

from __future__ import annotations

import numpy as np
import pyspark
import pytest
from pyspark.sql import functions as F

from spark_nn.errors import ClusterError, ColumnError, DatasetError, ParamError, SparkNNError, StoreError
from spark_nn.gang.launch import Gang
from spark_nn.scoring.udf import pandas_kind
from spark_nn.store import RunDir
from tests import toy
from tests.toy import ToyEstimator, ToyModel

pytestmark = pytest.mark.timeout(180)


def data(spark, rows=1000, partitions=2):
    return (
        spark.range(0, rows, 1, partitions)
        .select("id", F.rand(1).alias("a"), F.rand(2).alias("b"), F.lit("kept").alias("other"))
        .withColumn("label", F.expr("2*a - 3*b + 1"))
    )


def estimator(store, **kwargs):
    settings = {"inputCols": ["a", "b"], "batchSize": 50, "verbose": 0, "storeUrl": store, **kwargs}
    return ToyEstimator(**settings)


def reference(rows, world, epochs, batch, rate=0.1):
    """The same training in one process, on the batches that the ranks have together."""
    x = np.array([[row.a, row.b] for row in rows], np.float32).astype(np.float64)
    y = np.array([row.label for row in rows], np.float32).astype(np.float64)
    total, local = len(x), batch // world
    share = -(-total // world)
    starts = [rank * total // world for rank in range(world)]
    model = toy.Toy(np.zeros(3))
    for _ in range(epochs):
        for first in range(0, share, local):
            taken = np.concatenate([np.arange(s + first, s + min(first + local, share)) for s in starts])
            model.weights -= rate * model.gradient(x[taken], y[taken])
    return model.weights


@pytest.mark.parametrize("world", [1, 2])
def test_the_gang_trains_as_one_process_would_on_the_global_batches(spark, store, world):
    df = data(spark, rows=1013)
    model = estimator(store, numWorkers=world, epochs=3, shuffle=False).fit(df)
    expected = reference(df.collect(), world, 3, 50)
    np.testing.assert_allclose(np.load(model.fitted.file.path), expected, rtol=1e-12)
    share = -(-1013 // world)
    assert model.summary.history["rows"] == [share * world] * 3
    assert (model.summary.rows, model.summary.numWorkers, model.summary.epochs) == (1013, world, 3)
    assert model.summary.rowsPerSecond > 0


def test_shuffled_training_repeats_to_the_bit_with_the_same_seed(spark, store):
    df = data(spark)

    def weights(seed):
        model = estimator(store, numWorkers=2, epochs=2, seed=seed).fit(df)
        return np.load(model.fitted.file.path)

    first, again, other = weights(3), weights(3), weights(-4)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("partitions", [1, 7])
def test_partitions_need_not_match_the_workers(spark, store, partitions):
    df = data(spark, 500, partitions).where("id < 300 or id > 420")  # some partitions are smaller, or empty
    model = estimator(store, numWorkers=2, epochs=1).fit(df)
    assert model.summary.rows == 379


def test_transform_keeps_rows_and_columns_and_is_lazy(spark, store):
    df = data(spark, 100)
    model = estimator(store).fit(df)
    scored = model.transform(df)
    assert scored.columns == ["id", "a", "b", "other", "label", "prediction"]
    weights = np.load(model.fitted.file.path)
    for row in scored.collect():
        expected = np.dot(np.float32([row.a, row.b]).astype(float), weights[:2]) + weights[2]
        assert row.prediction == pytest.approx(expected, rel=1e-12)
    assert scored.count() == 100


def test_rows_stay_with_their_prediction_when_the_source_is_not_deterministic(spark, store):
    model = estimator(store, epochs=5).fit(data(spark))
    w = np.load(model.fitted.file.path)
    unstable = spark.range(5000).select(F.rand().alias("a"), F.rand().alias("b")).repartition(3)
    for row in model.transform(unstable).collect():
        expected = np.dot(np.float32([row.a, row.b]).astype(float), w[:2]) + w[2]
        assert row.prediction == pytest.approx(expected, rel=1e-12)


def test_an_unused_prediction_is_never_computed(spark, store):
    model = estimator(store).fit(data(spark))
    broken = data(spark).withColumn("a", F.lit(None).cast("double"))
    assert model.transform(broken).select("id").count() == 1000
    with pytest.raises(Exception, match="column 'a' is null in"):
        model.transform(broken).collect()


def test_the_pandas_udf_of_older_spark_gives_the_same(spark, store):
    from spark_nn.columns import expression, features
    from spark_nn.scoring.scorer import Scorer

    df = data(spark, 300)
    fitted = (model := estimator(store).fit(df)).fitted
    expected = [row.prediction for row in model.transform(df).collect()]
    found = features(df.schema, "inputCols", ["a", "b"])
    scorer = Scorer(fitted.file.path.name, fitted.file.sha256, toy.load, (found,), fitted.outputs, ("predictionCol",))
    udf = pandas_kind(scorer, "struct<predictionCol:double>")
    got = df.select(udf(expression(found)).alias("s")).select("s.predictionCol").collect()
    assert [row.predictionCol for row in got] == expected


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
def test_rows_that_cannot_be_used_are_skipped_by_either_udf(spark, store, monkeypatch, kind):
    if kind == "pandas":
        monkeypatch.setattr(pyspark, "__version__", "4.0.1")
    df = data(spark, 300, partitions=3)
    model = estimator(store, handleInvalid="skip").fit(df)
    broken = df.withColumn("a", F.expr("if(id % 3 = 1 or id < 100, null, a)"))  # one partition holds nothing else
    found = {row.id: row.prediction for row in model.transform(broken).collect()}
    expected = {row.id: row.prediction for row in model.transform(df).collect() if row.id >= 100 and row.id % 3 != 1}
    assert found == expected


def test_columns_that_do_not_fit_what_was_trained_on_are_refused(spark, store):
    df = data(spark, 100)
    model = estimator(store).fit(df)
    with pytest.raises(ColumnError, match=r"make an input of shape \(1,\), and .* trained with \(2,\) from 'a', 'b'"):
        model.copy({model.inputCols: ["a"]}).transform(df)
    arrays = df.select("label", F.expr("array(int(a * 9), int(b * 9))").alias("features"))
    model = ToyEstimator(storeUrl=store, verbose=0).fit(arrays)
    with pytest.raises(ColumnError, match="'features' holds float32 values .* trained with int32"):
        model.transform(arrays.withColumn("features", F.expr("array(0.5, 0.5)")))
    longs = arrays.withColumn("features", F.expr("transform(features, x -> bigint(x))"))
    assert model.transform(longs).collect()[0].prediction == model.transform(arrays).collect()[0].prediction


def test_the_validation_column_decides_the_split(spark, store):
    df = data(spark).withColumn("held", F.expr("id % 10 = 0"))
    model = estimator(store, validationIndicatorCol="held", numWorkers=2).fit(df)
    assert (model.summary.rows, model.summary.validationRows) == (900, 100)


def test_output_columns_by_name(spark, store):
    df = data(spark, 100)
    model = estimator(store, predictionCol="guess").fit(df)
    assert model.transform(df).columns[-1] == "guess"
    assert model.copy({model.predictionCol: ""}).transform(df).columns == df.columns
    with pytest.raises(ColumnError, match="predictionCol='LABEL': there already is such a column"):
        model.copy({model.predictionCol: "LABEL"}).transform(df)
    with pytest.raises(ColumnError, match="no such column"):
        model.transform(df.drop("b"))


def jobs(spark):
    return len(spark.sparkContext.statusTracker().getJobIdsForGroup())


def test_errors_that_are_raised_before_any_job(spark, store, tmp_path):
    df = data(spark)
    before = jobs(spark)
    blocked = tmp_path / "file"
    blocked.write_text("a file where a directory should be")
    cases = [
        (estimator(store, labelCol="nope"), df, ColumnError, "labelCol='nope'"),
        (estimator(store, inputCols=["a", "nope"]), df, ColumnError, "inputCols='nope'"),
        (estimator(store, inputCols=["a", "other"]), df, ColumnError, "inputCols='other' has type string"),
        (estimator(store, labelCol="other"), df, ColumnError, "labelCol='other' has type string.*StringIndexer"),
        (estimator(store, batchSize=1, numWorkers=2), df, ParamError, "batchSize=1 is smaller than numWorkers=2"),
        (estimator(store, numWorkers=5), df, ClusterError, "numWorkers=5, but the cluster .* runs 2 tasks"),
        (estimator(str(blocked / "x")), df, StoreError, "cannot be written"),
        (estimator("nosuch://x"), df, StoreError, "nosuch"),
    ]
    for stage, frame, error, message in cases:
        with pytest.raises(error, match=message):
            stage.fit(frame)
    assert jobs(spark) == before
    df.count()
    assert jobs(spark) > before  # the count can tell


def test_errors_that_only_the_rows_can_show_are_raised_before_training(spark, store, monkeypatch):
    monkeypatch.setattr(Gang, "run", lambda *args, **kwargs: pytest.fail("a gang was started"))
    df = data(spark)
    some = F.expr("id % 100 = 7")
    cases = [
        (df.withColumn("label", F.when(~some, F.col("label"))), {}, "column 'label' is null in 10 rows"),
        (df.withColumn("a", F.when(~some, F.col("a"))), {}, "column 'a' is null in 10 rows"),
        (df.withColumn("b", F.when(some, float("nan")).otherwise(0.5)), {}, "column 'b' is NaN in 10 rows"),
        (df.withColumn("w", F.lit(-1.0)), {"weightCol": "w"}, "column 'w' is negative in 1,000 rows"),
    ]
    for frame, params, message in cases:
        with pytest.raises(ColumnError, match=message):
            estimator(store, **params).fit(frame)
    arrays = df.withColumn("f", F.expr("if(id = 3, array(a), array(a, b))"))
    with pytest.raises(ColumnError, match="column 'f' is empty, or not .* or leave such rows out with handleInvalid="):
        ToyEstimator(featuresCol="f", storeUrl=store, verbose=0).fit(arrays)
    by_partition = df.withColumn("f", F.expr("if(id < 500, array(a), array(a, b))"))
    with pytest.raises(ColumnError, match="column 'f' has rows of differing length, among them 1, 2"):
        ToyEstimator(featuresCol="f", storeUrl=store, verbose=0).fit(by_partition)
    empty = df.withColumn("f", F.expr("slice(array(a), 1, 0)"))
    with pytest.raises(ColumnError, match="column 'f' is empty, or not of the length expected .* in 1,000 rows"):
        ToyEstimator(featuresCol="f", storeUrl=store, verbose=0).fit(empty)
    images = df.withColumn("y", F.expr("array(array(a, b))"))
    with pytest.raises(ParamError, match="classWeights=.*a label in column 'y' has 2 dimensions"):
        estimator(store, labelCol="y", classWeights={0: 1.0}).fit(images)
    for rows, workers in ((0, 1), (1, 2)):
        with pytest.raises(DatasetError, match=f"has {rows} training row.* for numWorkers={workers}"):
            estimator(store, numWorkers=workers).fit(df.limit(rows))
    with pytest.raises(DatasetError, match="has 0 validation rows"):
        estimator(store, validationFraction=1e-9).fit(df)


def test_a_store_that_executors_do_not_share_is_named(spark, store, monkeypatch):
    monkeypatch.setattr(RunDir, "mkdir", lambda self, name: None)  # made on the driver's machine, as it were
    with pytest.raises(StoreError, match="an executor does not find the directory .*Set storeUrl to storage"):
        estimator(store).fit(data(spark))


def test_an_empty_model_says_what_to_do():
    with pytest.raises(SparkNNError, match="this ToyModel is empty: get one from an estimator's fit"):
        ToyModel().transform(None)
