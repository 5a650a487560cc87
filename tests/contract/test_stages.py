"""What Spark ML expects of a stage, checked for every public one, and for the toy's."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from pyspark.ml.param import Param
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ModelFileError
from spark_nn.estimator import NeuralEstimator
from tests.keras.models import mlp
from tests.toy import ToyEstimator, ToyModel

pytestmark = pytest.mark.timeout(180)

ESTIMATORS = [KerasEstimator, ToyEstimator]
MODELS = [KerasModel, ToyModel]
STAGES = [*ESTIMATORS, *MODELS]

# A value other than the default for every param, as a user would give it.
VALUES = {
    "featuresCol": "f",
    "inputCols": ["a", "b"],
    "inputs": {"x": "a", "z": ["b", "c"]},
    "labelCol": "y",
    "labels": {"out": "y"},
    "handleInvalid": "skip",
    "classWeights": {0: 1.0, 3: 2.5},
    "cache": "disk",
    "weightCol": "w",
    "predictionCol": "p",
    "probabilityCol": "q",
    "rawPredictionCol": "r",
    "validationFraction": 0.5,
    "validationIndicatorCol": "v",
    "epochs": 7,
    "batchSize": 96,
    "numWorkers": 3,
    "shuffle": False,
    "seed": 17,
    "learningRate": 0.125,
    "storeUrl": "file:///nowhere",
    "verbose": 2,
    "model": mlp,
    "modelParams": {"units": 3},
    "customObjects": {"mlp": mlp},
    "optimizer": "sgd",
    "loss": "mse",
    "metrics": ["mae"],
    "callbacks": mlp,
    "nonFiniteLoss": "ignore",
    "timeout": 12.5,
    "maxRetries": 1,
    "checkpointInterval": 9,
    "collective": "ring",
    "useGpu": False,
    "stepsPerEpoch": 11,
    "lossWeights": 0.5,
    "outputKind": "raw",
    "threshold": 0.75,
    "outputCols": {"out": "p"},
    "failRank": 1,
    "stepSeconds": 0.5,
    "failingWrites": 2,
    "ballast": 3,
}
# The toy's own, which no user sets.
TOYS = ("failRank", "stepSeconds", "failingWrites", "ballast")


def name_of(stage):
    return stage.__name__


def params(instance):
    """A stage's params, but for one that takes a fitted model, which has tests of its own."""
    return [param for param in instance.params if param.name != "initialModel"]


def upper(name):
    return name[0].upper() + name[1:]


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_every_param_is_documented_gettable_and_settable(stage):
    instance = stage()  # loading a stage makes it without arguments first
    assert instance.explainParams()
    assert instance.uid.startswith(f"{stage.__name__}_")
    for param in params(instance):
        assert len(param.doc) > 10
        assert instance.hasParam(param.name)
        instance._set(**{param.name: VALUES[param.name]})
        assert instance.getOrDefault(param) == VALUES[param.name]
        if param.name in TOYS:
            continue
        assert getattr(instance, f"get{upper(param.name)}")() == VALUES[param.name]
        if hasattr(instance, f"set{upper(param.name)}") or issubclass(stage, NeuralEstimator):
            assert getattr(instance, f"set{upper(param.name)}")(VALUES[param.name]) is instance
    assert not instance.hasParam("nonsense")


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_defaults_fit_in_json(stage):
    defaults = {param.name: value for param, value in stage()._defaultParamMap.items()}
    assert json.loads(json.dumps(defaults)) == defaults


@pytest.mark.parametrize("stage", STAGES, ids=name_of)
def test_copies_are_independent_and_share_the_uid(stage):
    original = stage()
    extra = {original.predictionCol: "other", Param(stage(), "foreign", "of another stage"): 1}
    copy = original.copy(extra)
    assert copy.uid == original.uid
    assert copy.getPredictionCol() == "other"
    assert original.getPredictionCol() == "prediction"


@pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)
def test_the_constructor_takes_every_param_by_keyword(stage):
    values = {param.name: VALUES[param.name] for param in params(stage())}
    instance = stage(**values)
    assert {param.name: instance.getOrDefault(param) for param in params(instance)} == values
    with pytest.raises(TypeError, match="forces keyword arguments|positional"):
        stage(3)


@pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)
def test_an_estimator_loads_as_it_was_saved(spark, tmp_path, stage):
    path = str(tmp_path / "stage")
    values = {param.name: VALUES[param.name] for param in params(stage())}
    saved = stage(**values)
    saved.save(path)
    with pytest.raises(Exception, match="already exists"):
        saved.save(path)
    saved.write().overwrite().save(path)
    loaded = stage.load(path)
    assert loaded.uid == saved.uid
    assert {param.name: loaded.getOrDefault(param) for param in params(loaded)} == values
    assert {p.name: v for p, v in loaded._defaultParamMap.items()} == {
        p.name: v for p, v in saved._defaultParamMap.items()
    }
    other = next(each for each in STAGES if each is not stage)
    with pytest.raises(ModelFileError, match=f"not a .*{other.__name__}: load it with its own class"):
        other.load(path)


def fit(stage, spark, store, **kwargs):
    df = spark.range(200).select("id", F.rand(1).alias("a"), F.rand(2).alias("b"))
    df = df.withColumn("label", F.expr("a + b"))
    settings = {"inputCols": ["a", "b"], "storeUrl": store, "verbose": 0, **kwargs}
    if stage is KerasEstimator:
        settings.update(model=mlp, modelParams={"activation": None}, loss="mse")
    return stage(**settings), df


@pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)
def test_a_model_takes_uid_and_params_of_its_estimator(spark, store, stage):
    estimator, df = fit(stage, spark, store, predictionCol="guess", labelCol="label")
    model = estimator.fit(df, {estimator.epochs: 2})
    assert model.uid == estimator.uid
    assert model.getPredictionCol() == "guess"
    assert model.summary.epochs == 2
    assert estimator.getEpochs() == 1
    # What CrossValidator does: grid values reach the model by the estimator's params.
    assert model.transform(df, {estimator.predictionCol: "other"}).columns[-1] == "other"


@pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)
def test_fit_with_a_list_of_maps_gives_a_model_for_each(spark, store, stage):
    estimator, df = fit(stage, spark, store)
    slow, fast = estimator.fit(df, [{estimator.learningRate: 1e-6}, {estimator.learningRate: 0.05}])
    assert slow.summary.history["loss"][-1] > fast.summary.history["loss"][-1]


SCRIPT = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession
from tests.contract.test_stages import MODELS
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
stage = next(each for each in MODELS if each.__name__ == sys.argv[1])
scored = stage.load(sys.argv[2]).transform(spark.read.parquet(sys.argv[3]))
scored.coalesce(1).write.parquet(sys.argv[4])
"""


@pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)
def test_a_model_scores_alike_in_a_fresh_process(spark, store, stage, tmp_path):
    estimator, df = fit(stage, spark, store)
    model = estimator.fit(df)
    paths = [str(tmp_path / name) for name in ("model", "rows", "scored")]
    model.save(paths[0])
    df.write.parquet(paths[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, type(model).__name__, *paths], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = {row.id: row.prediction for row in spark.read.parquet(paths[2]).collect()}
    here = {row.id: row.prediction for row in model.transform(df).collect()}
    assert there.keys() == here.keys()
    np.testing.assert_allclose([there[i] for i in here], list(here.values()), rtol=1e-6)
