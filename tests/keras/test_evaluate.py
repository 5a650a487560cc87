"""The values of loss and metrics over a DataFrame against Keras in one process on all rows at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pyspark.ml import PipelineModel
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ColumnError, ModelFileError, ParamError
from tests.keras import models

pytestmark = pytest.mark.timeout(180)

ROWS = 1013
SHARED = {"inputCols": ["a", "b", "c"], "labelCol": "label"}


@pytest.fixture
def df(spark):
    """Rows in five partitions, one of them empty."""
    rows = spark.range(0, ROWS, 1, 5).where("id < 600 or id >= 820")
    rows = rows.select("id", *(F.rand(seed).alias(name) for seed, name in enumerate("abc", 1)))
    return (
        rows.withColumn("w", F.expr("0.5 + id % 3"))
        .withColumn("label", F.expr("cast(a * a + b > 0.8 as int)"))
        .withColumn("kind", F.expr("cast(id * 7 % 5 as int)"))
    )


def column(df, *names):
    rows = df.select(*names).collect()
    return np.array([list(row) for row in rows]).squeeze()


def compiled(loss, metrics, **kwargs):
    """A small network, and so its metrics are far from trivial."""
    import keras

    keras.utils.set_random_seed(3)
    layers = [keras.Input((3,)), keras.layers.Dense(8, "tanh", kernel_regularizer="l2")]
    native = keras.Sequential([*layers, keras.layers.Dense(**kwargs)])
    native.compile("sgd", loss, metrics=metrics[0], weighted_metrics=metrics[1])
    return native


def close(found, expected, rtol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_binary_classifier(df, weighted):
    import keras

    metrics = ["accuracy", "auc", keras.metrics.Precision(0.4), keras.metrics.Recall(0.4)]
    others = [keras.metrics.AUC(curve="PR", name="pr"), keras.metrics.SensitivityAtSpecificity(0.5, name="sens")]
    native = compiled("binary_crossentropy", (metrics, others), units=1, activation="sigmoid")
    model = KerasModel.fromKeras(native, **SHARED, weightCol="w" if weighted else None)
    given = {"sample_weight": column(df, "w").astype(float)} if weighted else {}
    x, y = column(df, "a", "b", "c").astype("float32"), column(df, "label")
    expected = native.evaluate(x, y, **given, batch_size=len(x), return_dict=True, verbose=0)
    assert 0.1 < expected["auc"] < 0.9
    close(model.evaluate(df), expected)
    close(model.evaluate(df.coalesce(1)), expected)


def test_several_classes_and_metrics_with_a_value_for_each(df):
    import keras

    metrics = [
        "sparse_categorical_accuracy",
        keras.metrics.SparseTopKCategoricalAccuracy(2, name="top"),
        keras.metrics.MeanIoU(5, sparse_y_pred=False, name="iou"),
    ]
    native = compiled("sparse_categorical_crossentropy", (metrics, []), units=5, activation="softmax")
    model = KerasModel.fromKeras(native, **{**SHARED, "labelCol": "kind"})
    x, y = column(df, "a", "b", "c").astype("float32"), column(df, "kind")
    expected = native.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0)
    assert 0 < expected["iou"] < 0.5
    close(model.evaluate(df), expected)

    hot = df.withColumn("hot", F.expr("transform(sequence(0, 4), k -> cast(k = kind as float))"))
    metrics = ["categorical_accuracy", keras.metrics.F1Score(name="f1")]
    native.compile("sgd", "categorical_crossentropy", metrics=metrics)
    expected = native.evaluate(x, np.eye(5)[y], batch_size=len(x), return_dict=True, verbose=0)
    found = KerasModel.fromKeras(native, **{**SHARED, "labelCol": "hot"}).evaluate(hot)
    assert len(found["f1"]) == 5
    close(found, expected)


def test_a_regression_with_values_that_single_precision_counts_badly(df):
    import keras

    native = compiled("mse", (["mae", "r2_score", keras.metrics.RootMeanSquaredError(name="rmse")], []), units=1)
    model = KerasModel.fromKeras(native, **{**SHARED, "labelCol": "far"})
    far = df.withColumn("far", F.expr("1000 * a + 10 * id"))
    x, y = column(df, "a", "b", "c").astype("float32"), column(far, "far").astype("float32")
    expected = native.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0)
    close(model.evaluate(far), expected)


@pytest.mark.parametrize("put_out", ["list", "dict"])
def test_several_inputs_and_outputs(spark, df, put_out):
    import keras

    keras.utils.set_random_seed(5)
    word, numbers = keras.Input((1,), dtype="string", name="word"), keras.Input((3,), name="numbers")
    index = keras.layers.StringLookup(vocabulary=["red", "green"])(word)
    joined = keras.layers.Concatenate()([keras.layers.Flatten()(keras.layers.Embedding(3, 2)(index)), numbers])
    price = keras.layers.Dense(1, name="price")(joined)
    kind = keras.layers.Dense(5, "softmax", name="kind")(joined)
    outputs = [price, kind] if put_out == "list" else {"price": price, "kind": kind}
    native = keras.Model([word, numbers], outputs)
    native.compile(
        "sgd",
        {"price": "mse", "kind": "sparse_categorical_crossentropy"},
        loss_weights={"price": 0.25, "kind": 2.0},
        metrics={"price": ["mae"], "kind": ["accuracy"]},
    )
    df = df.withColumn("word", F.expr("element_at(array('red', 'green', 'grey'), cast(id % 3 as int) + 1)"))
    df = df.withColumn("price", F.expr("a + 2 * b"))
    import tensorflow as tf

    x = {"word": tf.constant(column(df, "word")[:, None]), "numbers": column(df, "a", "b", "c").astype("float32")}
    y = {"price": column(df, "price").astype("float32"), "kind": column(df, "kind")}
    given = [y["price"], y["kind"]] if put_out == "list" else y
    expected = native.evaluate(
        x, given, sample_weight=column(df, "w").astype(float), batch_size=ROWS, return_dict=True, verbose=0
    )
    inputs = {"numbers": ["a", "b", "c"], "word": "word"}
    labels = {"kind": "kind", "price": "price"}
    model = KerasModel.fromKeras(native, inputs=inputs, labels=labels, weightCol="w")
    assert "kind_accuracy" in expected
    close(model.evaluate(df), expected)
    with pytest.raises(ParamError, match="2 outputs, .*, and labels names 'kind': name a column for each output"):
        model.copy({model.labels: {"kind": "kind"}}).evaluate(df)


def test_a_fitted_model_knows_its_columns_also_after_it_was_loaded(spark, store, tmp_path, df):
    stage = KerasEstimator(
        model=models.mlp,
        loss="binary_crossentropy",
        metrics=["auc"],
        weightCol="w",
        storeUrl=store,
        verbose=0,
        **SHARED,
    )
    model = stage.fit(df)
    x, y, w = column(df, "a", "b", "c").astype("float32"), column(df, "label"), column(df, "w").astype(float)
    expected = model.model.evaluate(x, y, sample_weight=w, batch_size=len(x), return_dict=True, verbose=0)
    PipelineModel([model]).save(str(tmp_path / "model"))
    loaded = PipelineModel.load(str(tmp_path / "model")).stages[0]
    assert loaded.getWeightCol() == "w"
    close(loaded.evaluate(df), expected)
    loaded.clear(loaded.weightCol)
    plain = model.model.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0)
    assert plain["loss"] != pytest.approx(expected["loss"], rel=1e-3)
    close(loaded.evaluate(df.drop("w")), plain)


def test_what_cannot_be_measured_is_refused_before_a_job_is_started(spark, df, monkeypatch):
    native = compiled("mse", ([], []), units=1)
    model = KerasModel.fromKeras(native, **SHARED)
    monkeypatch.setattr(type(df), "mapInArrow", lambda *args, **kwargs: pytest.fail("a job was planned"))
    with pytest.raises(ColumnError, match="labelCol='nope': the DataFrame has no such column"):
        model.copy({model.labelCol: "nope"}).evaluate(df)
    with pytest.raises(ColumnError, match="weightCol='nope': the DataFrame has no such column"):
        model.copy({model.weightCol: "nope"}).evaluate(df)
    with pytest.raises(ColumnError, match="inputCols='c': the DataFrame has no such column"):
        model.evaluate(df.drop("c"))
    with pytest.raises(ParamError, match="one output, and labels names 'p', 'q': name one column, with labelCol"):
        bare = model.copy()
        bare.clear(bare.labelCol)
        bare.setLabels({"p": "label", "q": "label"}).evaluate(df)
    with pytest.raises(ModelFileError, match="not compiled, so there is no loss to evaluate: compile the native model"):
        KerasModel.fromKeras(models_built(), **SHARED).evaluate(df)


def models_built():
    native = models.mlp()
    native(np.zeros((1, 3)))
    return native


def test_what_a_file_does_not_hold_is_told(spark, df):
    def own(y, p):
        import keras

        return keras.ops.mean((y - p) ** 2, -1)

    native = models_built()
    native.compile("sgd", own)
    with pytest.raises(
        ModelFileError, match=r"that its file does not hold: give it as customObjects, or compile .*own"
    ):
        KerasModel.fromKeras(native, **SHARED).evaluate(df)
    x, y = column(df, "a", "b", "c").astype("float32"), column(df, "label").astype("float32")
    found = KerasModel.fromKeras(native, customObjects={"own": own}, **SHARED).evaluate(df)
    close(found, native.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0))
    native.compile("sgd", models.summed_loss())
    with pytest.raises(ModelFileError, match="MeanSquaredError has reduction='sum'.*would depend on how the rows"):
        KerasModel.fromKeras(native, **SHARED).evaluate(df)


def test_an_error_of_another_backend_is_not_laid_on_the_model_s_file(monkeypatch):
    import keras

    from spark_nn.keras import codec
    from spark_nn.keras.measure import load_measure
    from spark_nn.share import Share

    def load(*_, **__):
        raise ValueError("no such operation")

    monkeypatch.setattr(codec, "load_model", load)
    own = keras.backend.backend()
    with pytest.raises(ModelFileError, match=f"wants backend='torch', and .* on '{own}' before.* no such operation"):
        load_measure("model.keras", Share(), "torch")
    with pytest.raises(ModelFileError, match=r"that its file does not hold.*\(no such operation\)"):
        load_measure("model.keras", Share(), own)


def test_nothing_but_arrays_and_json_crosses(spark, df):
    """The state of a measure: a line of JSON and little-endian doubles, which add up in any order."""
    from spark_nn.keras.measure import load_measure
    from spark_nn.share import Share

    native = compiled("mse", (["mae"], []), units=1)
    model = KerasModel.fromKeras(native, **SHARED)
    path = str(model.fitted.file.path)
    x, y = column(df, "a", "b", "c").astype("float32"), column(df, "label").astype("float32")
    one, two = load_measure(path, Share()), load_measure(path, Share())
    one.add(x[:100], y[:100], None)
    for start in (100, 200, 300):  # the first by itself, the others by a graph
        two.add(x[start : start + 100], y[start : start + 100], None)
    two.add(x[400:], y[400:], None)
    states = [one.state(), two.state()]
    line, _, data = states[0].partition(b"\n")
    names = [name for name, _, _ in json.loads(line)["variables"]]
    assert names.count("total") == names.count("count") == 2
    assert np.frombuffer(data, "<f8")[names.index("count")] == 100
    for order in (states, states[::-1]):
        two.reset()
        for state in order:
            two.merge(state)
        close(two.results(), native.evaluate(x, y, batch_size=len(x), return_dict=True, verbose=0))
    with pytest.raises(ModelFileError, match="every executor needs the same version of Keras"):
        two.merge(states[0].replace(b"total", b"other"))
