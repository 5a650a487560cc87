"""Spark's own evaluators and meta-estimators on a KerasModel, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.ml.classification import OneVsRest, OneVsRestModel
from pyspark.ml.evaluation import (
    BinaryClassificationEvaluator,
    ClusteringEvaluator,
    MulticlassClassificationEvaluator,
    MultilabelClassificationEvaluator,
    RankingEvaluator,
    RegressionEvaluator,
)
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, KerasModel
from tests.keras import models

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def df(spark):
    rows = spark.range(0, 150, 1, 2).select("id", F.rand(1).alias("a"), F.rand(2).alias("b"), F.rand(3).alias("c"))
    rows = rows.withColumn("kind", F.expr("double(id % 3)")).withColumn("yes", F.expr("double(a + 0.3 * b > 0.6)"))
    return VectorAssembler(inputCols=["a", "b", "c"], outputCol="features").transform(rows)


def scored(df, loss, **kwargs):
    """The rows with the predictions of a network that knows little."""
    import keras

    keras.utils.set_random_seed(2)
    native = models.mlp(**kwargs)
    native(np.zeros((1, 3)))
    native.compile("sgd", loss)
    frame = KerasModel.fromKeras(native).transform(df).localCheckpoint()
    return frame, frame.collect()


def test_regression(df):
    frame, rows = scored(df, "mse", activation=None)
    p, y, w = (np.array([row[name] for row in rows]) for name in ("prediction", "yes", "a"))
    centred = ((y - y.mean()) ** 2).sum()
    expected = {
        "rmse": np.sqrt(((p - y) ** 2).mean()),
        "mae": np.abs(p - y).mean(),
        "r2": 1 - ((p - y) ** 2).sum() / centred,
        "var": ((p - y.mean()) ** 2).mean(),
    }
    for name, value in expected.items():
        found = RegressionEvaluator(labelCol="yes", metricName=name).evaluate(frame)
        assert found == pytest.approx(value, rel=1e-9), name
    weighted = RegressionEvaluator(labelCol="yes", metricName="mse", weightCol="a").evaluate(frame)
    assert weighted == pytest.approx((w * (p - y) ** 2).sum() / w.sum(), rel=1e-9)


def test_binary(df):
    frame, rows = scored(df, "binary_crossentropy")
    p, y = np.array([row.probability[1] for row in rows]), np.array([row.yes for row in rows])
    # The area under ROC is how often a positive row has the higher probability.
    higher = (p[y == 1][:, None] > p[y == 0][None]) + 0.5 * (p[y == 1][:, None] == p[y == 0][None])
    for column in ("rawPrediction", "probability"):
        found = BinaryClassificationEvaluator(labelCol="yes", rawPredictionCol=column, numBins=0).evaluate(frame)
        assert found == pytest.approx(higher.mean(), rel=1e-9)
    guess = (p > 0.5).astype(float)
    found = MulticlassClassificationEvaluator(labelCol="yes", metricName="accuracy").evaluate(frame)
    assert found == pytest.approx((guess == y).mean(), rel=1e-12)
    found = MulticlassClassificationEvaluator(labelCol="yes", metricName="logLoss").evaluate(frame)
    assert found == pytest.approx(-np.log(np.where(y == 1, p, 1 - p)).mean(), rel=1e-6)


def test_multiclass_and_clustering(df):
    frame, rows = scored(df, "sparse_categorical_crossentropy", outputs=3, activation="softmax")
    p, y = np.array([row.probability.toArray() for row in rows]), np.array([int(row.kind) for row in rows])
    guess = p.argmax(axis=1)
    assert [row.prediction for row in rows] == guess.tolist()
    table = np.array([[((y == i) & (guess == j)).sum() for j in range(3)] for i in range(3)])
    hit, real, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    f1 = 2 * hit / (real + said)
    expected = {
        "accuracy": hit.sum() / len(y),
        "f1": (f1 * real).sum() / len(y),
        "weightedRecall": hit.sum() / len(y),
        "hammingLoss": 1 - hit.sum() / len(y),
        "logLoss": -np.log(p[np.arange(len(y)), y]).mean(),
    }
    for name, value in expected.items():
        found = MulticlassClassificationEvaluator(labelCol="kind", metricName=name).evaluate(frame)
        assert found == pytest.approx(value, rel=1e-6), name
    # A class is as good as a cluster: the silhouette of the squared distances, from all pairs of rows.
    x = np.array([row.features.toArray() for row in rows])
    apart = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    kinds = np.unique(guess)
    assert len(kinds) > 1
    values = []
    for row, own in enumerate(guess):
        means = {k: apart[row, guess == k].sum() / ((guess == k).sum() - (k == own)) for k in kinds}
        inside, outside = means.pop(own), min(means.values())
        values.append((outside - inside) / max(inside, outside))
    assert ClusteringEvaluator().evaluate(frame) == pytest.approx(np.mean(values), rel=1e-6)


def test_multilabel_and_ranking_on_the_raw_output(df):
    """Outputs of several labels are arrays; one expression makes of them the lists that these evaluators take."""
    frame, rows = scored(df, "hinge", outputs=3, activation="sigmoid")
    p = np.array([row.prediction for row in rows])
    assert p.shape == (150, 3)
    real = "filter(array(0D, 1D, 2D), k -> (id + k) % 2 = 0)"
    said = "filter(array(0D, 1D, 2D), k -> prediction[int(k)] > 0.5)"
    lists = frame.select(F.expr(real).alias("label"), F.expr(said).alias("prediction"))
    y = np.array([[(row.id + k) % 2 == 0 for k in range(3)] for row in rows])
    g = p > 0.5
    found = MultilabelClassificationEvaluator(metricName="hammingLoss").evaluate(lists)
    assert found == pytest.approx((y != g).sum() / (3 * len(y)), rel=1e-9)
    found = MultilabelClassificationEvaluator(metricName="microF1Measure").evaluate(lists)
    both = (y & g).sum()
    assert found == pytest.approx(2 * both / (2 * both + (y != g).sum()), rel=1e-9)
    order = (
        "transform(array_sort(transform(sequence(0, 2), k -> struct(-prediction[k] AS p, double(k) AS k))), s -> s.k)"
    )
    ranked = frame.select(F.expr(order).alias("prediction"), F.expr(real).alias("label"))
    first = np.argmax(p, axis=1)
    found = RankingEvaluator(metricName="precisionAtK", k=1).evaluate(ranked)
    assert found == pytest.approx(y[np.arange(len(y)), first].mean(), rel=1e-9)


def test_one_vs_rest(spark, store, df, tmp_path):
    classifier = KerasEstimator(
        model=models.mlp, loss="binary_crossentropy", epochs=1, seed=4, verbose=0, storeUrl=store, batchSize=50
    )
    search = OneVsRest(classifier=classifier, labelCol="kind", predictionCol="guess")
    fitted = search.fit(df)
    assert [type(model) for model in fitted.models] == [KerasModel] * 3
    x = np.array([row.features.toArray() for row in df.collect()], np.float32)
    margins = np.concatenate([model.model.predict(x, verbose=0) for model in fitted.models], axis=1)
    fitted.save(str(tmp_path / "rest"))
    found = OneVsRestModel.load(str(tmp_path / "rest")).transform(df)
    assert fitted.transform(df).columns == found.columns
    assert found.columns[-2:] == ["rawPrediction", "guess"]
    rows = found.collect()
    np.testing.assert_allclose([row.rawPrediction.toArray() for row in rows], margins, rtol=1e-6)
    assert [row.guess for row in rows] == margins.argmax(axis=1).tolist()
