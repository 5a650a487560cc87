"""Networks that no estimator fitted: scored, saved, loaded and measured as fitted ones are."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.ml import PipelineModel
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ParamError, SparkNNError
from tests.keras import models

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def df(spark):
    rows = spark.range(0, 50, 1, 2).select("id", F.rand(1).alias("a"), F.rand(2).alias("b"), F.rand(3).alias("c"))
    return rows.withColumn("label", F.expr("cast(a + b > c as int)"))


def x_of(df):
    return np.array([[row.a, row.b, row.c] for row in df.collect()], np.float32)


def network(**kwargs):
    native = models.mlp(**kwargs)
    native(np.zeros((1, 3)))
    return native


def test_a_compiled_network_scores_saves_loads_and_goes_on_learning(spark, store, tmp_path, df):
    native = network()
    native.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
    model = KerasModel.fromKeras(native, inputCols=["a", "b", "c"], predictionCol="guess", rawPredictionCol=None)
    assert not model.hasSummary
    for ask in (lambda: model.summary, model.getHistory):
        with pytest.raises(SparkNNError, match="has no summary, because no estimator fitted it: ask hasSummary"):
            ask()
    path = str(tmp_path / "model")
    PipelineModel([model]).save(path)
    loaded = PipelineModel.load(path).stages[0]
    assert (loaded.uid, loaded.hasSummary) == (model.uid, False)
    expected = native.predict(x_of(df), verbose=0)[:, 0]
    for each in (model, loaded):
        scored = each.transform(df)
        assert scored.columns[-3:] == ["rawPrediction", "probability", "guess"]
        np.testing.assert_allclose([row.probability[1] for row in scored.collect()], expected, rtol=1e-6)
    stage = KerasEstimator(initialModel=loaded, inputCols=["a", "b", "c"], verbose=0, storeUrl=store, learningRate=1e-9)
    again = stage.fit(df)
    assert again.hasSummary
    for found, given in zip(again.model.get_weights(), native.get_weights(), strict=True):
        np.testing.assert_allclose(found, given, atol=1e-6)


def test_the_loss_decides_the_columns_and_no_loss_gives_the_raw_output(df):
    rows = df.select(F.array("a", "b", "c").alias("x"))
    given = {"featuresCol": "x"}
    raw = KerasModel.fromKeras(network(outputs=2), **given)
    native = network(outputs=2)
    native.compile("sgd", "categorical_crossentropy")
    classes = KerasModel.fromKeras(native, **given)
    native = network(activation=None)
    native.compile("sgd", "mse")
    number = KerasModel.fromKeras(native, **given)
    kinds = [model.transform(rows).dtypes[1:] for model in (raw, classes, number)]
    assert kinds == [
        [("prediction", "array<float>")],
        [("rawPrediction", "vector"), ("probability", "vector"), ("prediction", "double")],
        [("prediction", "double")],
    ]
    expected = raw.model.predict(x_of(df), verbose=0)
    np.testing.assert_allclose([row.prediction for row in raw.transform(rows).collect()], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "bool", "float16"])
def test_inputs_of_other_types_are_cast_by_keras(df, dtype):
    import keras

    inputs = keras.Input((2,), dtype=dtype)
    native = keras.Model(inputs, keras.layers.Dense(1)(keras.ops.cast(inputs, "float32")))
    rows = df.select("id", F.expr("array(int(id % 2), int(a * 2))").alias("features"))
    model = KerasModel.fromKeras(native)
    x = np.array([row.features for row in rows.collect()]).astype(dtype)
    found = [row.prediction for row in model.transform(rows).collect()]
    np.testing.assert_allclose(found, native.predict(x, verbose=0), rtol=1e-6)


def test_whole_numbers_come_as_columns_or_as_arrays(df):
    import keras

    one, two = keras.Input((1,), dtype="int32", name="one"), keras.Input((2,), dtype="int64", name="two")
    table = keras.layers.Embedding(9, 2)
    joined = keras.layers.Flatten()(keras.layers.Concatenate(axis=1)([table(one), table(two)]))
    native = keras.Model([one, two], keras.layers.Dense(1)(joined))
    rows = df.select("id", F.expr("id % 9").alias("p"), F.expr("int(id % 4)").alias("q"))
    rows = rows.withColumn("pair", F.expr("array(p, q)"))
    found = [[row.p, row.q] for row in rows.collect()]
    x = {"one": np.array(found)[:, :1], "two": np.array(found)}
    expected = native.predict(x, verbose=0)
    for inputs in ({"one": "p", "two": ["p", "q"]}, {"one": "p", "two": "pair"}):
        scored = KerasModel.fromKeras(native, inputs=inputs).transform(rows).collect()
        np.testing.assert_allclose([row.prediction for row in scored], expected, rtol=1e-6)


def test_networks_that_cannot_score_are_refused():
    import keras

    wide = keras.Input((None, None, 3), name="wide")
    several = keras.Model([a := keras.Input((3,), name="n"), b := keras.Input((2,), name="m")], [a, b])
    scalar = keras.Input((), name="scalar")
    cases = [
        (models.mlp(), {}, "does not know its inputs: begin it with keras.Input"),
        (
            keras.Model(wide, keras.layers.GlobalMaxPooling2D()(wide)),
            {},
            r"input 'wide' has the shape \(None, None, 3\)",
        ),
        (keras.Model(scalar, keras.ops.expand_dims(scalar, 1)), {}, "input 'scalar' has no dimension but the batch's"),
        (several, {}, "inputs 'n', 'm', and inputs names none: set inputs to a dict of each input's name"),
        (several, {"inputs": {"n": "a", "k": "b"}}, "inputs 'n', 'm', and inputs names 'n', 'k'"),
        (several, {"inputs": {"n": ["a", "b"], "m": "c"}}, r"makes an input of shape \(2,\), and .* 'n' has \(3,\)"),
        (network(), {"inputCols": ["a", "b"]}, r"makes an input of shape \(2,\), and .* has \(3,\): name as many"),
        (network(), {"inputs": {"x": "a", "y": "b"}}, "has the input .*, and inputs names 'x', 'y'.*or featuresCol in"),
        (network(), {"epochs": 3}, "a KerasModel has no param 'epochs': it has backend, customObjects, featuresCol,"),
        (
            network(),
            {"input_cols": ["a"]},
            r"no param 'input_cols' \(did you mean 'inputCols'\?\): it has backend, customObjects,",
        ),
        (network(), {"featuresCol": "a", "inputCols": ["b"]}, "are both set, but name the same thing"),
    ]
    lambdas = models.with_lambda()
    lambdas(np.zeros((1, 3)))
    cases.append((lambdas, {}, "a Lambda, which is code"))
    for native, params, message in cases:
        with pytest.raises(ParamError, match=message):
            KerasModel.fromKeras(native, **params)
    with pytest.raises(TypeError, match="model takes a keras.Model, not 3"):
        KerasModel.fromKeras(3)
    with pytest.raises(SparkNNError, match="this KerasModel is empty: get one from an estimator's fit"):
        KerasModel().getHistory()
