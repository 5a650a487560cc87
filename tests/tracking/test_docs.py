"""The page on tracking, run as it stands, with Keras: what TensorBoard and MLflow then have."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from tests.keras import models
from tests.tracking.reading import check_told, found, operations
from tests.tracking.test_mlflow import client, database, told  # noqa: F401  (two are fixtures)

pytestmark = pytest.mark.timeout(240)
PAGE = Path(__file__).parent.parent.parent / "docs" / "tracking.md"


def build():
    return models.mlp(activation=None)


def test_the_examples_run_as_they_stand(spark, tmp_path, monkeypatch, capsys, client):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    df = spark.range(0, 300, 1, 2).select(F.rand(1).alias("a"), F.rand(2).alias("b")).withColumn("label", F.expr("a-b"))
    names = {"KerasEstimator": KerasEstimator, "build": build, "df": df}
    first, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(first, names)
    summary = names["model"].summary
    assert capsys.readouterr().out == f"{summary.logDir}\n"
    assert check_told(summary.logDir, summary.history) == pytest.approx({0: 0.01, 1: 0.01, 2: 0.01})
    assert {name for name in summary.history if "val" in name} == {"val_loss"}
    assert "MatMul" in operations(summary.logDir)
    (layers,) = found(f"{summary.logDir}/train").Tensors("keras")
    assert b'"class_name": "Dense"' in layers.tensor_proto.string_val[0]

    exec(second, names)
    model, run = names["model"], names["run"].info.run_id
    for name, values in model.summary.history.items():
        assert told(client, run, name) == list(enumerate(values))
    assert client.get_run(run).data.params["learningRate"] == "0.01"
    scores = [[row.prediction for row in each.transform(df).collect()] for each in (names["loaded"], model)]
    np.testing.assert_array_equal(*scores)
    assert scores[0][0] != scores[0][1]
