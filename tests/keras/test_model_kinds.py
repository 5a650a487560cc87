"""In what ways a model can be given; each is fitted, scores, and is saved and loaded, or refused with the cure."""

from __future__ import annotations

import json
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ParamError
from tests.keras import models
from tests.keras.test_fit import arrays, data, estimator

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def layers():
    from tests.keras import layers

    cloudpickle.register_pickle_by_value(layers)
    yield layers
    cloudpickle.unregister_pickle_by_value(layers)


def a_lambda(layers):
    return {"model": lambda: models.mlp(4, None)}, "model is the function .*<lambda>.*top level of a module"


def a_function_of_a_module(layers):
    return {"model": models.mlp, "modelParams": {"units": 4, "activation": None}}, None


def an_instance(layers):
    model = models.mlp(4, None)
    model(np.zeros((1, 3)))
    return {"model": model}, None


def an_instance_of_a_subclass(layers):
    model = layers.Net(5)
    model(np.zeros((1, 3)))
    return {"model": model, "customObjects": {"Net": layers.Net, **layers.OBJECTS}}, None


def a_subclass(layers):
    return {
        "model": layers.Net,
        "modelParams": {"units": 5},
        "customObjects": {"Net": layers.Net, **layers.OBJECTS},
    }, None


def a_local_function(layers):
    def build():
        return models.mlp(4, None)

    return {"model": build}, "model is the function .*<locals>.build.*top level of a module"


KINDS = [a_lambda, a_function_of_a_module, an_instance, an_instance_of_a_subclass, a_subclass, a_local_function]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_can_be_given_as(spark, store, tmp_path, layers, kind):
    given, refusal = kind(layers)
    df = data(spark, 96)
    x, _, _ = arrays(df)
    path = str(tmp_path / "estimator")
    stage = estimator(store, loss="mse", epochs=1, **given)
    fitted = stage.fit(df)
    predicted = fitted.model.predict(x, verbose=0)[:, 0]
    assert [row.prediction for row in fitted.transform(df).collect()] == pytest.approx(predicted, abs=1e-6)
    fitted.save(str(tmp_path / "model"))
    loaded = KerasModel.load(str(tmp_path / "model"), given.get("customObjects"))
    assert [row.prediction for row in loaded.transform(df).collect()] == pytest.approx(predicted, abs=1e-6)
    if refusal:
        with pytest.raises(ParamError, match=refusal):
            stage.save(path)
        return
    stage.save(path)
    again = KerasEstimator.load(path)
    assert again.getCustomObjects() == given.get("customObjects", {})
    if callable(given["model"]) and not hasattr(given["model"], "get_weights"):
        assert again.getModel() is given["model"]
    weights = again.fit(df).model.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(weights, fitted.model.get_weights(), strict=True))


SCRIPT = """
import json, os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
import keras
import numpy as np
from pyspark.sql import SparkSession, functions as F
from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ModelFileError, ParamError

class Halved(keras.layers.Layer):
    def call(self, x):
        return x / 2

def build(units):
    return keras.Sequential([keras.layers.Dense(units, "relu"), Halved(), keras.layers.Dense(1)])

def refused(kind, call, *args):
    try:
        call(*args)
    except kind as error:
        return str(error)

if __name__ == "__main__":
    folder = sys.argv[1]
    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    df = spark.range(64).select(F.rand(1).alias("a"), F.rand(2).alias("label"))
    estimator = KerasEstimator(
        model=build, modelParams={"units": 3}, customObjects={"Halved": Halved}, loss="mse", inputCols=["a"],
        verbose=0, storeUrl=folder + "/store",
    )
    model = estimator.fit(df)
    rows = model.transform(df).collect()
    told = {"scored": [row.prediction for row in rows]}
    x = np.array([[row.a] for row in rows], np.float32)
    told["native"] = model.model.predict(x, verbose=0)[:, 0].tolist()
    told["estimator"] = refused(ParamError, estimator.save, folder + "/estimator")
    model.save(folder + "/model")
    told["without"] = refused(ModelFileError, KerasModel.load, folder + "/model")
    loaded = KerasModel.load(folder + "/model", customObjects={"Halved": Halved})
    told["loaded"] = [row.prediction for row in loaded.transform(df).collect()]
    print(json.dumps(told))
"""


def test_a_model_can_be_given_as_a_function_of_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    store = tmp_path / "store"
    store.mkdir()
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["scored"]) == 64
    assert told["scored"] == pytest.approx(told["native"], abs=1e-6)
    assert told["loaded"] == told["scored"]
    assert "function __main__:build, which another process could not import" in told["estimator"]
    assert "Halved (__main__:Halved): module not allowed" in told["without"]
    assert list(store.iterdir()) == [], "the end of the interpreter removes everything"
