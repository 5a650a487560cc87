from __future__ import annotations

import json

import numpy as np
import pytest
from pyspark.sql import types as T

from spark_nn import KerasEstimator
from spark_nn.errors import ColumnError, ParamError
from spark_nn.keras import codec


def estimator(**kwargs):
    return KerasEstimator(model=lambda: None, loss="mse", **kwargs)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("epochs", np.int64(3), 3),
        ("epochs", 3.0, 3),
        ("batchSize", np.int32(64), 64),
        ("learningRate", np.float32(0.5), 0.5),
        ("learningRate", 1, 1.0),
        ("validationFraction", np.float64(0.25), 0.25),
        ("shuffle", np.bool_(False), False),
        ("verbose", np.int64(2), 2),
        (
            "modelParams",
            {"units": np.int64(8), "rates": (0.1, np.float64(0.5))},
            {"units": 8, "rates": [0.1, 0.5]},
        ),
    ],
)
def test_converters_take_numpy_scalars_and_keep_plain_values(name, given, kept):
    value = estimator(**{name: given}).getOrDefault(name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("epochs", 0, ParamError, "epochs=0: must be at least 1"),
        ("epochs", 2.5, TypeError, 'param "epochs".*whole number, not 2.5'),
        ("epochs", True, TypeError, "whole number, not True"),
        ("epochs", "two", TypeError, "whole number, not 'two'"),
        ("learningRate", 0, ParamError, "learningRate=0.0: must be above 0"),
        ("learningRate", float("nan"), ParamError, "learningRate=nan"),
        ("learningRate", float("inf"), ParamError, "must be finite"),
        ("validationFraction", 1.0, ParamError, "validationFraction=1.0: must be below 1"),
        ("verbose", 3, ParamError, "verbose=3: must be one of 0, 1, 2"),
        ("shuffle", 1, TypeError, "True or False, not 1"),
        ("modelParams", {"f": print}, TypeError, r"modelParams\['f'\] is <built-in function print>"),
        ("modelParams", {1: 2}, TypeError, "modelParams"),
        ("model", 3, TypeError, "a keras.Model or a function that returns one, not 3"),
        ("optimizer", 3, TypeError, "optimizer takes what keras.Model.compile takes"),
        ("callbacks", [3], TypeError, "callbacks takes a list of keras.callbacks.Callback"),
    ],
)
def test_refused_values_name_the_param_the_value_and_what_is_allowed(name, given, error, message):
    with pytest.raises(error, match=message):
        KerasEstimator(**{name: given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batchSize": 2, "numWorkers": 3}, "batchSize=2 is smaller than numWorkers=3.*Set batchSize to 3"),
        ({"batchSize": 100, "numWorkers": 3}, "batchSize=100 is not a multiple of numWorkers=3.*99 or 102"),
        (
            {"validationFraction": 0.1, "validationIndicatorCol": "held"},
            "validationFraction=0.1 and validationIndicatorCol='held' are both set",
        ),
    ],
)
def test_params_that_contradict_each_other(given, message):
    with pytest.raises(ParamError, match=message):
        estimator(**given).checkTrainingParams()


SCHEMA = T.StructType([T.StructField(name, T.DoubleType()) for name in ("a", "b", "features", "label")])


def test_columns_are_named_in_one_way_only():
    with pytest.raises(ParamError, match="featuresCol='f' and inputCols=.*both set"):
        estimator(featuresCol="f", inputCols=["a"]).inputTensors(SCHEMA)
    with pytest.raises(ParamError, match="inputCols=.* and inputs=.*both set"):
        estimator(inputs={"x": "a"}, inputCols=["a"]).inputTensors(SCHEMA)
    with pytest.raises(ParamError, match="labelCol='b' and labels=.*both set"):
        estimator(labelCol="b", labels={"x": "a"}).labelTensors(SCHEMA)
    with pytest.raises(ParamError, match=r"inputCols=\[\]"):
        estimator(inputCols=[]).inputTensors(SCHEMA)


def test_tensors_have_the_names_that_the_model_knows():
    def names(tensors):
        return {tensor.name: tensor.columns for tensor in tensors}

    assert names(estimator().inputTensors(SCHEMA)) == {"features": ("features",)}
    assert names(estimator(inputCols=["a", "b"]).inputTensors(SCHEMA)) == {"features": ("a", "b")}
    several = estimator(inputs={"x": ["a", "b"], "y": "b"}, labels={"p": "a", "q": "label"})
    assert names(several.inputTensors(SCHEMA)) == {"features:x": ("a", "b"), "features:y": ("b",)}
    assert names(several.labelTensors(SCHEMA)) == {"label:p": ("a",), "label:q": ("label",)}
    with pytest.raises(ColumnError, match=r"inputs\['x'\]='nope': the DataFrame has no such column"):
        estimator(inputs={"x": "nope"}).inputTensors(SCHEMA)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": {}}, "inputs takes a dict with at least one entry"),
        ({"inputs": {"x": []}}, r"inputs\['x'\] takes a column's name or a non-empty list"),
        ({"inputs": {"x:y": "a"}}, "without ':'"),
        ({"labels": {"x": ["a"]}}, r"labels\['x'\] takes a column's name, not"),
        ({"classWeights": {"one": 1}}, "classWeights' class takes a whole number"),
        ({"classWeights": {0: -1.0}}, "classWeights' weight=-1.0: must be at least 0"),
        ({"cache": "yes"}, "cache='yes': must be one of 'auto', 'memory', 'disk', 'none'"),
        ({"metrics": "mae"}, "metrics takes a list, such as"),
        ({"metrics": [3]}, "metrics takes what keras.Model.compile takes"),
        ({"optimizer": ["adam"]}, "optimizer takes what keras.Model.compile takes"),
        ({"handleInvalid": "drop"}, "handleInvalid='drop': must be one of 'error', 'skip', 'keep'"),
    ],
)
def test_columns_weights_and_cache_are_checked(given, message):
    with pytest.raises((TypeError, ParamError), match=message):
        estimator(**given)


def test_class_weights_come_back_from_json_as_they_were():
    stage = estimator(classWeights={0: 1, np.int64(2): np.float32(0.5)})
    assert stage.getClassWeights() == {0: 1.0, 2: 0.5}
    assert estimator(classWeights=json.loads(json.dumps(stage.getClassWeights()))).getClassWeights() == {0: 1.0, 2: 0.5}


def test_positional_arguments_and_unknown_names_are_refused():
    with pytest.raises(TypeError, match="forces keyword arguments"):
        KerasEstimator(lambda: None)
    with pytest.raises(TypeError, match="nonsense"):
        KerasEstimator(nonsense=1)


def test_the_seed_is_the_same_in_every_process():
    assert estimator().getSeed() == 0


def test_settings_of_several_outputs_are_taken_and_can_be_saved():
    import keras

    given = {"a": keras.losses.BinaryCrossentropy(from_logits=True), "b": "mse"}
    stage = KerasEstimator(model=lambda: None, loss=given, metrics={"a": ["mae"], "b": [keras.metrics.AUC()]})
    json.dumps([stage.getLoss(), stage.getMetrics()])
    assert codec.restore(stage.getLoss())["a"].get_config()["from_logits"] is True
    assert estimator(metrics=[["mae"], ["auc"]]).getMetrics() == [["mae"], ["auc"]]
    assert KerasEstimator(loss=["mse", "mae"]).getLoss() == ["mse", "mae"]
    with pytest.raises(TypeError, match="loss takes what keras.Model.compile takes"):
        KerasEstimator(loss={"a": 3})
