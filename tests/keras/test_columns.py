"""Every kind of column that a Keras model can be given, against plain Keras on the same rows."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import OneHotEncoder
from pyspark.ml.linalg import DenseVector, SparseVector, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_nn import KerasEstimator
from spark_nn.errors import ColumnError, ParamError, TrainingError
from tests.keras import models

pytestmark = pytest.mark.timeout(240)

ROWS = 203
WORDS = ["red", "green", "blue"]
LOSSES = {"price": "mse", "kind": "sparse_categorical_crossentropy"}


def rows():
    chance = np.random.default_rng(3)
    for number in range(ROWS):
        words = chance.choice([*WORDS, "grey"], 4)
        yield {
            "id": number,
            "image": chance.random((6, 5)).astype(float).tolist(),
            "word": str(words[0]),
            "text": " ".join(words),
            "x": float(chance.random()),
            "flag": bool(chance.random() < 0.5),
            "weight": float(chance.random() + 0.5),
            "price": float(chance.random()),
            "kind": int(chance.integers(3)),
            "bytes": chance.integers(0, 256, 4, dtype=np.uint8).tobytes(),
        }


SCHEMA = (
    "id long, image array<array<double>>, word string, text string, x double, flag boolean, weight double, "
    "price double, kind int, bytes binary"
)
INPUTS = {"image": "image", "word": "word", "text": "text", "numbers": ["x", "flag"]}


@pytest.fixture
def df(spark):
    return (
        spark.createDataFrame([tuple(row.values()) for row in rows()], SCHEMA)
        .repartition(3, "id")
        .sortWithinPartitions("id")
    )


def arrays(df):
    found = df.collect()
    x = {
        "image": np.array([row.image for row in found], np.float32),
        "word": np.array([[row.word] for row in found], object),
        "text": np.array([[row.text] for row in found], object),
        "numbers": np.array([[row.x, row.flag] for row in found], np.float32),
    }
    y = {"price": np.array([row.price for row in found], np.float32), "kind": np.array([row.kind for row in found])}
    return x, y, np.array([row.weight for row in found], np.float32)


def plain(df, build, compiled, epochs=2, **kwargs):
    """Keras alone, on the rows in their order."""
    import keras
    import tensorflow as tf

    x, y, weight = arrays(df)
    keras.utils.set_random_seed(4)
    model = build()
    model.compile(**compiled)
    # Keras takes arrays of Python strings as tensors only.
    x = {name: tf.convert_to_tensor(values) for name, values in x.items()}
    labels = [y["price"], y["kind"]]
    model.fit(x, labels, sample_weight=weight, batch_size=20, epochs=epochs, shuffle=False, verbose=0)
    return model, x


def estimator(store, **kwargs):
    settings = {"batchSize": 20, "epochs": 2, "seed": 4, "shuffle": False, "verbose": 0, "storeUrl": store, **kwargs}
    return KerasEstimator(**settings)


def test_several_inputs_of_all_kinds_and_several_outputs(spark, store, df, tmp_path):
    given = {"model": models.several, "modelParams": {"vocabulary": WORDS}, "loss": LOSSES, "optimizer": "adam"}
    columns = {"inputs": INPUTS, "labels": {"kind": "kind", "price": "price"}, "weightCol": "weight"}
    stage = estimator(store, **given, **columns, predictionCol="guess")
    fitted = Pipeline(stages=[stage]).fit(df)
    compiled = {"optimizer": "adam", "loss": LOSSES}
    expected, x = plain(df, lambda: models.several(WORDS), compiled)
    assert models.relative(fitted.stages[0].model.get_weights(), expected.get_weights()) < 1e-5

    path = str(tmp_path / "model")
    fitted.save(path)
    price, kind = expected.predict(x, verbose=0)
    ids = [row.id for row in df.collect()]
    for model in (fitted, PipelineModel.load(path)):
        scored = model.transform(df)
        added = ["guess_price", "rawPrediction_kind", "probability_kind", "guess_kind"]
        assert sorted(set(scored.columns) - set(df.columns)) == sorted(added)
        found = {row.id: row for row in scored.repartition(4).collect()}
        np.testing.assert_allclose([found[i].guess_price for i in ids], price[:, 0], atol=1e-5)
        np.testing.assert_allclose([found[i].probability_kind.toArray() for i in ids], kind, atol=1e-5)
        assert [found[i].guess_kind for i in ids] == kind.argmax(axis=1).tolist()
    assert RegressionEvaluator(predictionCol="guess_price", labelCol="price").evaluate(scored) < 2
    assert 0 <= MulticlassClassificationEvaluator(predictionCol="guess_kind", labelCol="kind").evaluate(scored) <= 1
    with pytest.raises(ColumnError, match="the model was trained with the inputs 'features:image', .* and its params"):
        bad = fitted.stages[0].copy()
        bad.clear(bad.inputs)
        bad.setInputCols(["x"]).transform(df)
    with pytest.raises(ColumnError, match="column 'word' holds float32 values of 1 dim.*trained with string"):
        fitted.transform(df.withColumn("word", F.lit(1.0)))


def test_outputs_have_columns_weights_and_kinds_of_their_own(spark, store, df):
    given = {"model": models.several, "modelParams": {"vocabulary": WORDS}, "loss": LOSSES, "optimizer": "adam"}
    columns = {"inputs": INPUTS, "labels": {"kind": "kind", "price": "price"}, "weightCol": "weight"}
    weights = {"price": 0.25, "kind": 2.0}
    stage = estimator(store, **given, **columns, lossWeights=weights, outputCols={"price": "cost", "kind": ""})
    model = stage.fit(df)
    compiled = {"optimizer": "adam", "loss": LOSSES, "loss_weights": weights}
    expected, x = plain(df, lambda: models.several(WORDS), compiled)
    assert models.relative(model.model.get_weights(), expected.get_weights()) < 1e-5
    scored = model.transform(df)
    assert scored.columns == [*df.columns, "cost"]
    np.testing.assert_allclose(
        [row.cost for row in scored.collect()], expected.predict(x, verbose=0)[0][:, 0], atol=1e-5
    )
    # Only what is named, where the param that names the others is empty.
    bare = model.copy({model.predictionCol: "", model.probabilityCol: "", model.rawPredictionCol: ""})
    assert bare.transform(df).columns == [*df.columns, "cost"]
    raw = model.copy({model.outputKind: {"kind": "raw"}, model.outputCols: {"kind": "chances"}})
    found = raw.transform(df).select("chances").collect()
    np.testing.assert_allclose([row.chances for row in found], expected.predict(x, verbose=0)[1], atol=1e-5)
    with pytest.raises(ParamError, match="outputCols names the outputs 'size', and labels 'kind', 'price'"):
        stage.copy({stage.outputCols: {"size": "s"}}).fit(df)


def test_two_workers_train_several_inputs_alike(spark, store, df):
    given = {"model": models.several, "modelParams": {"vocabulary": WORDS}, "loss": LOSSES, "inputs": INPUTS}
    metrics = {"price": ["mae"], "kind": ["accuracy"]}
    labels = {"kind": "kind", "price": "price"}
    model = estimator(store, **given, labels=labels, metrics=metrics, numWorkers=2, shuffle=True).fit(df)
    assert {"loss", "price_loss", "kind_loss", "price_mae", "kind_accuracy"} <= set(model.summary.history)
    assert model.summary.rows == ROWS


def test_class_weights_are_those_of_keras(spark, store, df):
    import keras

    x, y, weight = arrays(df)
    counts = {0: 2.0, 2: 0.25}
    head = {"outputs": 3, "activation": "softmax"}
    model = estimator(
        store,
        model=models.mlp,
        modelParams=head,
        loss="sparse_categorical_crossentropy",
        optimizer="sgd",
        inputCols=["x", "flag"],
        labelCol="kind",
        weightCol="weight",
        classWeights=counts,
    ).fit(df)
    keras.utils.set_random_seed(4)
    expected = models.mlp(**head)
    expected(x["numbers"][:1])
    expected.compile("sgd", "sparse_categorical_crossentropy")
    weights = weight * np.array([2.0, 1.0, 0.25], np.float32)[y["kind"]]
    settings = {"batch_size": 20, "epochs": 2, "shuffle": False, "verbose": 0}
    history = expected.fit(x["numbers"], y["kind"], sample_weight=weights, **settings).history
    assert models.relative(model.model.get_weights(), expected.get_weights()) < 1e-5
    np.testing.assert_allclose(model.summary.history["loss"], history["loss"], rtol=1e-5)


def test_sparse_and_dense_vectors_may_stand_in_one_column(spark, store):
    vectors = [SparseVector(4, {1: 2.0, 3: 1.0}) if n % 2 else DenseVector([n / 50, 0, 1, 0]) for n in range(50)]
    schema = T.StructType([T.StructField("features", VectorUDT()), T.StructField("label", T.DoubleType())])
    df = spark.createDataFrame([(v, float(v.toArray().sum())) for v in vectors], schema).coalesce(1)
    model = estimator(store, model=models.mlp, modelParams={"activation": None}, loss="mse").fit(df)
    table = np.array([v.toArray() for v in vectors], np.float32)
    expected = model.model.predict(table, verbose=0)[:, 0]
    np.testing.assert_allclose([row.prediction for row in model.transform(df).collect()], expected, atol=1e-6)


def test_binary_columns_go_to_layers_that_take_bytes(spark, store, df):
    model = estimator(store, model=models.hashing, loss="mse", featuresCol="bytes", labelCol="price").fit(df)
    import tensorflow as tf

    found = model.transform(df).collect()
    expected = model.model.predict(tf.constant([[bytes(row.bytes)] for row in found]), verbose=0)[:, 0]
    np.testing.assert_allclose([row.prediction for row in found], expected, atol=1e-6)
    assert len(set(expected.tolist())) > 1


def test_encoded_categories_train_from_a_pipeline(spark, store):
    df = spark.range(300).select(F.expr("id % 7").alias("c")).withColumn("label", F.expr("double(c = 3)"))
    encoder = OneHotEncoder(inputCol="c", outputCol="features", dropLast=False)
    net = estimator(store, model=models.mlp, loss="binary_crossentropy", epochs=30, learningRate=0.05)
    scored = Pipeline(stages=[encoder, net]).fit(df).transform(df)
    assert scored.where("prediction != label").count() == 0


def test_rows_that_cannot_be_used_are_skipped_in_training_and_in_scoring(spark, store):
    df = spark.range(400).select("id", (F.col("id") / 400).alias("a"), F.lit(0.5).alias("b"))
    df = df.withColumn("label", F.col("a") + F.col("b"))
    bad = {"a": F.expr("CASE id % 10 WHEN 0 THEN NULL WHEN 1 THEN double('NaN') WHEN 2 THEN double('inf') ELSE a END")}
    broken = df.withColumns(bad)
    settings = {"model": models.mlp, "modelParams": {"activation": None}, "loss": "mse", "inputCols": ["a", "b"]}
    model = estimator(store, **settings, handleInvalid="skip").fit(broken)
    assert (model.summary.rows, model.summary.skippedRows) == (280, 120)
    again = estimator(store, **settings).fit(broken.where("a is not null and not isnan(a) and a < 9"))
    assert models.relative(model.model.get_weights(), again.model.get_weights()) < 1e-6
    scored = model.transform(broken)
    found = {row.id: row.prediction for row in scored.collect()}
    expected = {row.id: row.prediction for row in model.transform(df).collect() if row.id % 10 > 2}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-6)
    assert scored.count() == 280
    with pytest.raises(Exception, match="column 'a' is null in"):
        model.copy({model.handleInvalid: "error"}).transform(broken).collect()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputCols": ["word", "text"]}, r"does not take the input that the columns make \(the input: string \(2,\)"),
        (
            {"model": models.two_outputs, "inputCols": ["x", "flag", "price"]},
            "the model has 2 outputs.*labelCol is for models of one",
        ),
        (
            {"inputCols": ["x"], "labels": {"a": "kind", "b": "price"}},
            "the model has one output, and labels names 'a', 'b'",
        ),
    ],
)
def test_a_model_that_does_not_fit_its_columns_is_told_so(spark, store, df, settings, message):
    given = {"model": models.mlp, "loss": "mse", **({} if "labels" in settings else {"labelCol": "price"}), **settings}
    with pytest.raises(TrainingError, match=f"ParamError: .*{message}"):
        estimator(store, **given).fit(df)


def test_an_instance_is_asked_for_its_inputs_on_the_driver():
    model = models.several(WORDS)
    with pytest.raises(
        ParamError, match="model has the inputs 'image', 'word', 'text', 'numbers', and inputs names none"
    ):
        KerasEstimator(model=model, loss=LOSSES)._check()
    with pytest.raises(ParamError, match="model has the outputs 'price', 'kind', and labels names 'price'"):
        KerasEstimator(model=model, loss=LOSSES, inputs=INPUTS, labels={"price": "price"})._check()
