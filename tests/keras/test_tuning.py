"""Tuning: `CrossValidator` over a Pipeline against a loop written by hand, in one process, on the same folds."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import StandardScaler, VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from tests.keras import models

pytestmark = pytest.mark.timeout(280)

NAMES = ["a", "b", "c"]


def data(spark):
    columns = [
        (F.randn(seed) * scale).alias(name)
        for seed, (name, scale) in enumerate(zip(NAMES, (1, 10, 0.1), strict=True), 1)
    ]
    df = spark.range(0, 450, 1, 2).select("id", *columns)
    df = df.withColumn("label", F.expr("cast(a * b / 10 + 10 * c > 0 as int)"))
    return df.withColumn("fold", F.expr("cast(id % 2 as int)")).cache()


def area_under_roc(scores, labels):
    """Share of pairs of a positive and a negative that the scores put in order; ties count half."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    above = (positive[:, None] > negative[None, :]).mean()
    return above + 0.5 * (positive[:, None] == negative[None, :]).mean()


def by_hand(rows, rates, units):
    """The mean metric of each map over the folds, with Keras alone."""
    import keras

    x = np.array([[row[name] for name in NAMES] for row in rows])
    y = np.array([row.label for row in rows])
    fold = np.array([row.fold for row in rows])
    means = []
    for rate in rates:
        for each in units:
            found = []
            for held in range(2):
                train, test = fold != held, fold == held
                mean, deviation = x[train].mean(axis=0), x[train].std(axis=0, ddof=1)
                scaled = ((x - mean) / deviation).astype(np.float32)
                keras.utils.set_random_seed(7)
                model = models.mlp(units=each)
                model.compile(keras.optimizers.SGD(rate), "binary_crossentropy")
                model.fit(scaled[train], y[train], batch_size=30, epochs=3, shuffle=False, verbose=0)
                found.append(area_under_roc(model.predict(scaled[test], verbose=0)[:, 0], y[test]))
            means.append(float(np.mean(found)))
    return means


def test_cross_validation_of_a_pipeline_finds_what_a_loop_by_hand_finds(spark, store):
    df = data(spark)
    rates, units = [0.01, 0.5], [4, 16]
    stage = KerasEstimator(
        model=models.mlp,
        featuresCol="scaled",
        optimizer="sgd",
        loss="binary_crossentropy",
        batchSize=30,
        epochs=3,
        shuffle=False,
        seed=7,
        storeUrl=store,
        verbose=0,
    )
    assembler = VectorAssembler(inputCols=NAMES, outputCol="joined")
    scaler = StandardScaler(inputCol="joined", outputCol="scaled", withMean=True)
    grid = ParamGridBuilder().addGrid(stage.learningRate, np.array(rates))
    grid = grid.addGrid(stage.modelParams, [{"units": each} for each in units]).build()
    found = CrossValidator(
        estimator=Pipeline(stages=[assembler, scaler, stage]),
        estimatorParamMaps=grid,
        evaluator=BinaryClassificationEvaluator(),
        numFolds=2,
        foldCol="fold",
        parallelism=2,
    ).fit(df)
    expected = by_hand(df.collect(), rates, units)
    np.testing.assert_allclose(found.avgMetrics, expected, atol=2e-4)
    best = int(np.argmax(expected))
    assert np.argmax(found.avgMetrics) == best
    assert sorted(expected)[-1] - sorted(expected)[-2] > 1e-3  # no tie that chance would decide
    assert found.bestModel.stages[-1].getOrDefault("predictionCol") == "prediction"
    fitted = found.bestModel.stages[-1].model
    assert fitted.layers[0].units == units[best % 2]
    assert float(fitted.optimizer.learning_rate.numpy()) == pytest.approx(rates[best // 2])
    df.unpersist()


def test_a_grid_of_keras_models_gives_those_of_separate_fits(spark, store):
    df = data(spark)
    stage = KerasEstimator(
        model=models.mlp, loss="binary_crossentropy", inputCols=NAMES, batchSize=30, storeUrl=store, verbose=0
    )
    maps = [{stage.optimizer: "sgd", stage.epochs: 2}, {stage.modelParams: {"units": 5}, stage.batchSize: 50}]
    for world in (1, 2):
        stage.setNumWorkers(world)
        grid = dict(stage.fitMultiple(df, maps))
        for place, each in enumerate(maps):
            alone = stage.fit(df, each)
            for ours, theirs in zip(grid[place].model.get_weights(), alone.model.get_weights(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert grid[place].summary.history == alone.summary.history
    df.unpersist()
