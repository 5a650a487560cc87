"""What Spark ML does with a stage, checked for every public one and the toy's, in classic sessions and on Connect."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import StandardScaler, VectorAssembler
from pyspark.ml.tuning import (
    CrossValidator,
    CrossValidatorModel,
    ParamGridBuilder,
    TrainValidationSplit,
    TrainValidationSplitModel,
)
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, TorchEstimator
from spark_nn.dataset.lease import shelf
from spark_nn.errors import ModelFileError
from tests.contract.stages import ESTIMATORS, FITTED, STAGES, name_of, values
from tests.keras.models import mlp
from tests.torch.models import line
from tests.toy import ToyEstimator, ToyModel

pytestmark = pytest.mark.timeout(300)

every_estimator = pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)


def data(spark, rows=200):
    df = spark.range(0, rows, 1, 1).select("id", F.rand(1).alias("a"), F.rand(2).alias("b"))
    return df.withColumn("label", F.expr("a + b"))


def estimator(stage, store, **kwargs):
    settings = {"inputCols": ["a", "b"], "storeUrl": store, "verbose": 0, **kwargs}
    if stage is KerasEstimator:
        settings = {"model": mlp, "modelParams": {"activation": None}, "loss": "mse", **settings}
    if stage is TorchEstimator:
        settings = {"model": line, "loss": "mse_loss", "optimizer": "sgd", "learningRate": 0.1, **settings}
    return stage(**settings)


class Fits:
    """Models of two workers, fitted once for all tests that only look at them."""

    def __init__(self, folder):
        self.folder = folder
        self.models = {}

    def get(self, stage, spark):
        if stage not in self.models:
            settings = {"predictionCol": "guess", "numWorkers": 2, "epochs": 2}
            self.models[stage] = estimator(stage, str(self.folder), **settings).fit(data(spark))
        return self.models[stage]


@pytest.fixture(scope="module")
def fits(kind, tmp_path_factory):
    yield Fits(tmp_path_factory.mktemp("fits"))
    shelf().clear()


def held(stage):
    """What a stage's params hold, a fitted model by its file."""
    return {
        param.name: value.fitted.file.sha256 if param.name in FITTED else value
        for param, value in stage.extractParamMap().items()
    }


def defaults(stage):
    return {param.name: value for param, value in stage._defaultParamMap.items()}


def predictions(df, column="prediction"):
    return {row["id"]: row[column] for row in df.collect()}


def other_than(stage):
    return next(each for each in STAGES if each is not stage)


@every_estimator
@pytest.mark.parametrize("given", [False, True], ids=["as made", "every param"])
def test_an_estimator_loads_as_it_was_saved(spark, tmp_path, stage, given):
    path = str(tmp_path / "a stage")
    saved = stage(**values(stage)) if given else stage()
    saved.save(path)
    with pytest.raises(Exception, match="already exists"):
        saved.save(path)
    saved.write().overwrite().save(path)
    loaded = stage.load(path)
    assert type(loaded) is stage
    assert (loaded.uid, held(loaded), defaults(loaded)) == (saved.uid, held(saved), defaults(saved))
    other = other_than(stage)
    with pytest.raises(ModelFileError, match=f"not a .*{other.__name__}: load it with its own class"):
        other.load(path)


@every_estimator
def test_a_model_loads_as_it_was_saved_and_scores_alike(spark, fits, tmp_path, stage):
    df = data(spark)
    model = fits.get(stage, spark)
    path = str(tmp_path / "a stage")
    model.save(path)
    with pytest.raises(Exception, match="already exists"):
        model.save(path)
    again = model.copy({model.predictionCol: "again"})
    assert again.fitted is model.fitted
    again.write().overwrite().save(path)
    loaded = type(model).load(path)
    assert type(loaded) is type(model)
    assert (loaded.uid, held(loaded), defaults(loaded)) == (model.uid, held(again), defaults(model))
    assert loaded.summary == model.summary
    assert (loaded.fitted.file.sha256, loaded.fitted.inputs, loaded.fitted.outputs) == (
        model.fitted.file.sha256,
        model.fitted.inputs,
        model.fitted.outputs,
    )
    assert predictions(loaded.transform(df), "again") == predictions(model.transform(df), "guess")
    other = other_than(type(model))
    with pytest.raises(ModelFileError, match=f"not a .*{other.__name__}: load it with its own class"):
        other.load(path)


def test_a_stage_whose_files_were_lost_or_changed_is_refused(spark, fits, tmp_path):
    model = fits.get(ToyEstimator, spark)
    model.save(str(tmp_path / "stage"))
    file = tmp_path / "stage" / "model" / "model.npy"
    saved = file.read_bytes()
    file.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    with pytest.raises(ModelFileError, match=r"model/model\.npy was changed since it was saved"):
        ToyModel.load(str(tmp_path / "stage"))
    file.unlink()
    with pytest.raises(ModelFileError, match=r"model/model\.npy does not exist: the stage is incomplete"):
        ToyModel.load(str(tmp_path / "stage"))
    (tmp_path / "stage" / "manifest.json").unlink()
    with pytest.raises(ModelFileError, match=r"manifest\.json does not exist: the stage is incomplete"):
        ToyModel.load(str(tmp_path / "stage"))


@every_estimator
def test_a_list_of_maps_gives_models_with_uid_and_params_of_their_estimator(spark, store, stage):
    df = data(spark)
    untrained = estimator(stage, store, predictionCol="guess", labelCol="label")
    slow, fast = untrained.fit(
        df, [{untrained.learningRate: 1e-6, untrained.epochs: 2}, {untrained.learningRate: 0.05}]
    )
    assert slow.uid == fast.uid == untrained.uid
    assert slow.getPredictionCol() == "guess"
    assert (slow.summary.epochs, fast.summary.epochs, untrained.getEpochs()) == (2, 1, 1)
    assert slow.summary.history["loss"][-1] > fast.summary.history["loss"][-1]
    # What CrossValidator does: grid values reach the model by the estimator's params.
    assert slow.transform(df, {untrained.predictionCol: "other"}).columns[-1] == "other"


def pipeline(store):
    """A pipeline with the toy at its end, and a grid over its learning rate: the second value is the better one."""
    toy = estimator(ToyEstimator, store, featuresCol="features", batchSize=25)
    toy.clear(toy.inputCols)
    stages = [VectorAssembler(inputCols=["a", "b"], outputCol="features"), toy]
    return Pipeline(stages=stages), ParamGridBuilder().addGrid(toy.learningRate, [1e-6, np.float64(0.1)]).build()


def saved_twice(stage, path):
    stage.save(path)
    with pytest.raises(Exception, match="already exists"):
        stage.save(path)
    stage.write().overwrite().save(path)
    return type(stage).load(path)


def alike(stage, other):
    return [(each.uid, held(each)) for each in stage.getStages()] == [
        (each.uid, held(each)) for each in other.getStages()
    ]


def test_pipelines_save_load_and_overwrite(spark, store, tmp_path):
    df = data(spark)
    untrained, _ = pipeline(store)
    loaded = saved_twice(untrained, str(tmp_path / "pipeline"))
    assert alike(loaded, untrained)
    model = loaded.fit(df)
    again = saved_twice(model, str(tmp_path / "model"))
    assert isinstance(again, PipelineModel)
    assert predictions(again.transform(df)) == predictions(model.transform(df))


@pytest.fixture(scope="session")
def one_by_one():
    """The metrics of a search that fits one model after the other, of the first kind of session to make it."""
    return []


def test_cross_validation_finds_the_best_and_saves_loads_and_overwrites(spark, store, tmp_path, one_by_one):
    df = data(spark)
    untrained, grid = pipeline(store)
    evaluator = RegressionEvaluator(metricName="rmse")
    search = CrossValidator(
        estimator=untrained,
        estimatorParamMaps=grid,
        evaluator=evaluator,
        numFolds=2,
        seed=1,
        parallelism=2,
        collectSubModels=True,
    )
    loaded = saved_twice(search, str(tmp_path / "search"))
    assert alike(loaded.getEstimator(), untrained)
    assert [list(map_.values()) for map_ in loaded.getEstimatorParamMaps()] == [[1e-6], [0.1]]
    model = loaded.fit(df)
    assert model.avgMetrics[1] < model.avgMetrics[0]
    assert [len(fold) for fold in model.subModels] == [2, 2]
    if not one_by_one:
        one_by_one.extend(loaded.copy().setParallelism(1).setCollectSubModels(False).fit(df).avgMetrics)
    assert model.avgMetrics == one_by_one
    again = saved_twice(model, str(tmp_path / "model"))
    assert isinstance(again, CrossValidatorModel)
    assert again.avgMetrics == model.avgMetrics
    assert [len(fold) for fold in again.subModels] == [2, 2]
    assert predictions(again.transform(df)) == predictions(model.transform(df))
    (_, best), (_, loaded) = model.bestModel.stages, again.bestModel.stages
    assert best.uid == loaded.uid == untrained.getStages()[1].uid
    assert best.summary == loaded.summary
    # Whatever Spark makes of the loaded list, each fold's files are there.
    for fold, models in enumerate(model.subModels):
        path = str(tmp_path / "model" / "subModels" / f"fold{fold}" / "1")
        assert PipelineModel.load(path).stages[1].fitted.file.sha256 == models[1].stages[1].fitted.file.sha256


@every_estimator
def test_a_train_validation_split_finds_the_best_and_saves_loads_and_overwrites(spark, store, tmp_path, stage):
    df = data(spark)
    untrained = estimator(stage, store)
    search = TrainValidationSplit(
        estimator=untrained,
        estimatorParamMaps=ParamGridBuilder().addGrid(untrained.learningRate, [1e-6, 0.05]).build(),
        evaluator=RegressionEvaluator(metricName="rmse"),
        seed=1,
        collectSubModels=True,
    )
    model = search.fit(df)
    assert model.validationMetrics[1] < model.validationMetrics[0]
    again = saved_twice(model, str(tmp_path / "model"))
    assert isinstance(again, TrainValidationSplitModel)
    assert again.validationMetrics == model.validationMetrics
    assert predictions(again.transform(df)) == predictions(model.transform(df))
    assert [held(each) for each in again.subModels] == [held(each) for each in model.subModels]
    if (
        stage is ToyEstimator
    ):  # what a search holds of a function is an import path, which is the estimator's own matter
        loaded = saved_twice(search, str(tmp_path / "search"))
        assert held(loaded.getEstimator()) == held(untrained)


# With nothing but pyspark.ml: Spark finds the class by what was saved.
SCRIPT = """
import os, sys
from pathlib import Path
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.ml import PipelineModel
from pyspark.sql import SparkSession
builder = SparkSession.builder
if "SPARK_REMOTE" not in os.environ:
    builder = builder.master("local[1]").config("spark.ui.enabled", "false")
spark = builder.getOrCreate()
spark.conf.set("spark.nn.allowedModules", "tests.torch")
rows, *folders = sys.argv[1:]
for folder in folders:
    model = PipelineModel.load(folder + "/model")
    scored = model.transform(spark.read.parquet(rows))
    scored.select("id", "prediction").coalesce(1).write.parquet(folder + "/scored")
    print(*[type(stage).__name__ for stage in model.stages])
spark.stop()  # a Connect client that still holds the pipeline may hang at its end otherwise
"""


def test_pipelines_score_equal_to_the_bit_in_a_fresh_process(spark, kind, sessions, store, tmp_path):
    rows = str(tmp_path / "rows")
    data(spark).coalesce(1).write.parquet(rows)
    df = spark.read.parquet(rows)
    models = {}
    for stage in ESTIMATORS:
        last = estimator(stage, store, featuresCol="scaled")
        last.clear(last.inputCols)
        stages = [
            VectorAssembler(inputCols=["a", "b"], outputCol="features"),
            StandardScaler(inputCol="features", outputCol="scaled", withMean=True),
            last,
        ]
        folder = str(tmp_path / stage.__name__)
        models[folder] = Pipeline(stages=stages).fit(df)
        models[folder].save(f"{folder}/model")
    environment = {name: value for name, value in os.environ.items() if name != "SPARK_LOCAL_REMOTE"}
    if kind == "connect":  # a client of the same server
        environment["SPARK_REMOTE"] = sessions.address
    command = [sys.executable, "-c", SCRIPT, rows, *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert told == [" ".join(type(each).__name__ for each in model.stages) for model in models.values()]
    for folder, model in models.items():
        there = predictions(spark.read.parquet(f"{folder}/scored"))
        assert len(there) == 200
        assert there == predictions(model.transform(df))


def test_what_a_classic_session_saved_loads_on_connect_and_the_other_way_round(sessions, fits, kind, tmp_path_factory):
    """The first kind to run leaves a model for the second."""
    spark = sessions.get("local[2]", kind)
    folder = tmp_path_factory.getbasetemp() / "of both kinds"
    model = fits.get(ToyEstimator, spark)
    mine, theirs = ((folder / name) for name in (("a", "b") if kind == "classic" else ("b", "a")))
    model.save(str(mine))
    if theirs.exists():
        loaded = ToyModel.load(str(theirs))
        assert np.load(loaded.fitted.file.path).tolist() == np.load(model.fitted.file.path).tolist()
        manifests = [json.loads((each / "manifest.json").read_text()) for each in (mine, theirs)]
        assert manifests[0] == manifests[1]
