"""What MLflow shows of fits, with the package itself and a store on the local disk; the toy trains."""

from __future__ import annotations

import re
import sys
import warnings
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.tuning import CrossValidator
from pyspark.sql import functions as F

from spark_nn.tracking.mlflow import Run, _scalars
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """Made once, which takes its time."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"


@pytest.fixture
def client(database, tmp_path):
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(database)
    client = mlflow.MlflowClient()
    mlflow.set_experiment(
        experiment_id=client.create_experiment(tmp_path.name, artifact_location=f"file://{tmp_path}/artifacts")
    )
    yield client
    mlflow.set_tracking_uri(before)


def data(spark):
    df = spark.range(0, 300, 1, 2).select(F.rand(1).alias("a"), F.rand(2).alias("b"))
    return df.withColumn("label", F.expr("2*a - 3*b + 1"))


def estimator(store, **kwargs):
    settings = {"inputCols": ["a", "b"], "batchSize": 50, "epochs": 2, "verbose": 0, "storeUrl": store, **kwargs}
    return ToyEstimator(tracking="mlflow", **settings)


def told(client, run, name):
    return [(each.step, each.value) for each in client.get_metric_history(run, name)]


def test_fits_in_a_run_are_logged_with_a_model_that_scores_alike(spark, store, client):
    df = data(spark)
    stage = estimator(store, logDir="memory://me:secret@logs")
    with mlflow.start_run() as run:
        mlflow.log_param("epochs", 2)  # the user's own, to the same effect
        model = stage.fit(df)
        again = stage.fit(df, {stage.epochs: 3})
        mlflow.log_metric("mine", 1.0)  # the run is still the user's
    (only,) = client.search_runs([run.info.experiment_id])
    assert only.info.status == "FINISHED"
    params = only.data.params
    assert (params["epochs"], params["inputCols"], params["handleInvalid"]) == ("2", '["a", "b"]', "error")
    assert (params["learningRate"], params["fit-2.epochs"]) == ("0.1", "3")
    assert params["logDir"] == "memory://logs"
    assert re.fullmatch(rf"memory://logs/[\d.-]+-{stage.uid}", model.summary.logDir)
    for prefix, fitted in (("", model), ("fit-2.", again)):
        for name, values in fitted.summary.history.items():
            assert told(client, run.info.run_id, f"{prefix}{name}") == list(enumerate(values))
    loaded = mlflow.spark.load_model(f"runs:/{run.info.run_id}/fit-2-model")
    scores = [[row.prediction for row in each.transform(df).collect()] for each in (loaded, again)]
    np.testing.assert_array_equal(*scores)
    signature = mlflow.models.get_model_info(f"runs:/{run.info.run_id}/model").signature
    assert [(each.name, each.type.name) for each in signature.inputs] == [("a", "double"), ("b", "double")]
    assert [(each.name, each.type.name) for each in signature.outputs] == [("prediction", "double")]


def test_maps_have_runs_below_the_active_one_whose_model_is_the_best(spark, store, client):
    df = data(spark)
    stage = estimator(store)
    maps = [{stage.learningRate: 0.1}, {stage.learningRate: 0.2}]
    with mlflow.start_run() as run:
        best = CrossValidator(
            estimator=stage, estimatorParamMaps=maps, evaluator=RegressionEvaluator(), numFolds=2
        ).fit(df)
    runs = client.search_runs([run.info.experiment_id])
    (own,) = [each for each in runs if each.info.run_id == run.info.run_id]
    below = [each for each in runs if each.data.tags.get("mlflow.parentRunId") == run.info.run_id]
    assert len(runs) == 5
    assert sorted(each.info.run_name for each in below) == sorted(["learningRate=0.1", "learningRate=0.2"] * 2)
    for each in below:
        assert each.info.run_name == f"learningRate={each.data.params['learningRate']}"
        assert [step for step, _ in told(client, each.info.run_id, "loss")] == [0, 1]
        assert (each.info.status, client.list_artifacts(each.info.run_id)) == ("FINISHED", [])
    assert own.data.params["learningRate"] == "0.2"
    assert told(client, own.info.run_id, "loss") == list(enumerate(best.bestModel.summary.history["loss"]))


def test_each_map_says_whether_it_is_logged(spark, store, client, monkeypatch):
    monkeypatch.setattr("spark_nn.estimator.Fits", lambda dataset, fits: fits)
    df = data(spark)
    stage = estimator(store)
    off = stage.copy({stage.tracking: "none"})
    with mlflow.start_run():
        for each, maps in ((stage, [{}, {stage.tracking: "none"}]), (off, [{stage.tracking: "mlflow"}, {}])):
            assert [fit.told is not None for fit in each.fitMultiple(df, maps)] == [True, False]


def test_what_mlflow_refuses_costs_nothing_else(client, caplog, monkeypatch):
    params = [(SimpleNamespace(name="epochs"), 2)]
    fitted = SimpleNamespace(summary=SimpleNamespace(history={"<lambda>": [1.0, 2.0], "loss": [0.5, 0.25]}))
    stage = SimpleNamespace(uid="toy", extractParamMap=lambda: SimpleNamespace(items=lambda: params))
    with mlflow.start_run() as run:
        Run.active().log_map(stage, {}, fitted)
        monkeypatch.setattr(mlflow.MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        Run.active().log_map(stage, {}, fitted)
    below = client.search_runs([run.info.experiment_id], "tags.mlflow.parentRunId != ''", order_by=["start_time"])
    assert [each.info.status for each in below] == ["FINISHED", "FAILED"]
    assert below[0].data.params == {"epochs": "2"}
    assert below[0].data.metrics == {"loss": 0.25}
    assert len(re.findall("could not be logged.*<lambda>", caplog.text)) == 1


def test_without_a_run_and_with_a_store_that_fails_the_fit_goes_on(spark, store, client, monkeypatch, caplog):
    df = data(spark)
    experiments = [mlflow.get_experiment_by_name(store.split("/")[-2]).experiment_id]
    with pytest.warns(UserWarning, match="no MLflow run is active in this thread: the fit is not logged"):
        assert estimator(store).fit(df).summary.epochs == 2
    assert client.search_runs(experiments) == []
    with mlflow.start_run(), warnings.catch_warnings():
        warnings.filterwarnings("error", "tracking=", UserWarning)
        log = mlflow.MlflowClient.log_batch

        def refuse(*args, **entries):
            assert not any(each.key == "epochs" for each in entries.get("params", ())), "no params today"
            return log(*args, **entries)

        monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
        assert estimator(store).fit(df).summary.epochs == 2
    assert "something of the fit could not be logged to the run" in caplog.text
    (run,) = client.search_runs(experiments)
    assert (run.data.params, [step for step, _ in told(client, run.info.run_id, "loss")]) == ({}, [0, 1])
    assert mlflow.models.get_model_info(f"runs:/{run.info.run_id}/model").signature is not None
    assert "AssertionError: no params today" in caplog.text
    monkeypatch.delitem(sys.modules, "mlflow")
    with pytest.warns(UserWarning, match="no MLflow run is active"):
        estimator(store, epochs=1).fit(df)
    assert "mlflow" not in sys.modules


def test_an_epoch_that_has_none_of_several_values_is_left_out():
    found = list(_scalars({"recall": [np.nan, [0.5, 1.0]], "auc": [np.nan, 0.25]}))
    assert found[:2] == [("recall/0", 1, 0.5), ("recall/1", 1, 1.0)]
    np.testing.assert_array_equal([value for _, _, value in found[2:]], [np.nan, 0.25])
