"""A model as a function of SQL, against what transform gives."""

from __future__ import annotations

import numpy as np
import pyspark
import pytest
from pyspark.ml import PipelineModel
from pyspark.ml.linalg import DenseVector, SparseVector, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql import types as T

from spark_nn import KerasModel
from spark_nn.errors import ColumnError, ParamError

pytestmark = pytest.mark.timeout(180)


def built(shape=(3,), units=1, activation="sigmoid", loss="binary_crossentropy"):
    import keras

    keras.utils.set_random_seed(8)
    native = keras.Sequential([keras.Input(shape), keras.layers.Flatten(), keras.layers.Dense(units, activation)])
    native.compile("sgd", loss)
    return native


@pytest.fixture(scope="module")
def model():
    return KerasModel.fromKeras(built())


@pytest.fixture
def vectors(spark):
    """Dense and sparse Vectors beside the same numbers in other forms, with a null and one that is too short."""
    rows = []
    for number in range(60):
        x = [float(number % 7), 0.0 if number % 2 else 0.5, number / 60]
        places = [place for place in range(3) if x[place]]
        vector = SparseVector(3, places, [x[place] for place in places]) if number % 2 else DenseVector(x)
        rows.append((number, vector, x, *x))
    fields = [("id", T.LongType()), ("features", VectorUDT()), ("list", T.ArrayType(T.DoubleType()))]
    fields += [(name, T.DoubleType()) for name in "abc"]
    schema = T.StructType([T.StructField(name, kind) for name, kind in fields])
    return spark.createDataFrame(rows, schema)


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
def test_vectors_arrays_and_columns_give_what_transform_gives(spark, vectors, model, tmp_path, monkeypatch, kind):
    if kind == "pandas":
        monkeypatch.setattr(pyspark, "__version__", "4.0.1")
    x = np.array([row.list for row in vectors.sort("id").collect()], np.float32)
    expected = model.model.predict(x, verbose=0)[:, 0]
    PipelineModel([model]).write().overwrite().save(str(tmp_path / "model"))
    loaded = PipelineModel.load(str(tmp_path / "model")).stages[0]
    spark.udf.register("score", loaded.udf())
    spark.udf.register("score_columns", loaded.copy({loaded.inputCols: ["a", "b", "c"]}).udf())
    vectors.createOrReplaceTempView("vectors")
    query = "SELECT score(features) v, score(list) l, score_columns(a, b, float(c)) c FROM vectors ORDER BY id"
    found = spark.sql(query)
    fields = "rawPrediction:array<double>,probability:array<double>,prediction:double"
    assert found.schema["v"].dataType.simpleString() == f"struct<{fields}>"
    rows = found.collect()
    scored = model.transform(vectors.drop("a", "b", "c")).sort("id").collect()
    for name in "vlc":
        np.testing.assert_allclose([row[name].probability[1] for row in rows], expected, rtol=1e-6)
        assert [row[name].prediction for row in rows] == [float(p > 0.5) for p in expected]
        assert [row[name].rawPrediction for row in rows] == [row.rawPrediction.toArray().tolist() for row in scored]


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
def test_rows_that_cannot_be_used(spark, vectors, model, monkeypatch, kind):
    if kind == "pandas":
        monkeypatch.setattr(pyspark, "__version__", "4.0.1")
    long = F.udf(lambda id, v: SparseVector(10**9, [5], [1.0]) if id == 5 else v, VectorUDT())
    bad = vectors.withColumn("features", long("id", F.expr("if(id % 10 = 3, null, features)")))
    skipping = model.copy({model.handleInvalid: "skip", model.rawPredictionCol: "", model.predictionCol: "guess"})
    rows = bad.select("id", skipping.udf()("features").alias("s")).collect()
    skipped = {row.id for row in rows if row.s is None or row.s.guess is None}
    assert skipped == {3, 5, 13, 23, 33, 43, 53}
    if kind == "arrow":
        assert all(row.s is None for row in rows if row.id in skipped)
    expected = {row.id: row.prediction for row in model.transform(vectors).collect()}
    assert {row.id: row.s.guess for row in rows if row.id not in skipped} == {
        i: p for i, p in expected.items() if i not in skipped
    }
    with pytest.raises(Exception, match="column 'features' is null in 6 rows"):
        bad.repartition(1).select(model.udf()("features")).collect()


def test_several_inputs_with_strings_and_images(spark):
    import keras

    image, word = keras.Input((2, 2), name="image"), keras.Input((1,), dtype="string", name="word")
    pair = keras.Input((2,), dtype="int32", name="pair")
    index = keras.layers.StringLookup(vocabulary=["red", "green"], output_mode="one_hot")(word)
    vectors = keras.layers.Flatten()(keras.layers.Embedding(9, 2)(pair))
    joined = keras.layers.Concatenate()([keras.layers.Flatten()(image), index, vectors])
    outputs = [keras.layers.Dense(1, name="one")(joined), keras.layers.Dense(2, name="two")(joined)]
    native = keras.Model([image, word, pair], outputs)
    native.compile("sgd", {"one": "mse", "two": "mse"})
    inputs = {"word": "word", "pair": "pair", "image": "image"}
    model = KerasModel.fromKeras(native, inputs=inputs)
    rows = spark.range(30).select(
        "id",
        F.expr("element_at(array('red', 'green', 'grey'), cast(id % 3 as int) + 1)").alias("word"),
        F.expr("array(id % 9, id % 4)").alias("pair"),
        F.expr("array(array(rand(1), 0.5), array(1, id))").alias("image"),
    )
    scored = {row.id: row for row in model.transform(rows).collect()}
    found = rows.select("id", model.udf()("word", "pair", "image").alias("s")).select("id", "s.*").collect()
    assert len(found) == len({row.prediction_one for row in found}) == 30
    for row in found:
        assert row.prediction_one == pytest.approx(scored[row.id].prediction_one, rel=1e-6)
        np.testing.assert_allclose(row.prediction_two, scored[row.id].prediction_two, rtol=1e-6)
    with pytest.raises(Exception, match=r"double.* for 'pair', which takes int32 values of 1 dim"):
        rows.select(model.udf()("word", F.expr("array(0.5D, 1D)"), "image")).collect()
    with pytest.raises(Exception, match=r"values of type list.* for 'word', which takes string values of 1 dim"):
        rows.select(model.udf()("image", "pair", "image")).collect()


def test_what_is_refused_when_the_function_is_made(spark, model):
    silent = model.copy({model.predictionCol: "", model.probabilityCol: "", model.rawPredictionCol: ""})
    with pytest.raises(ParamError, match="every output column has an empty name"):
        silent.udf()
    with pytest.raises(ParamError, match="'Same', 'probability', 'same' must have different names"):
        model.copy({model.predictionCol: "same", model.rawPredictionCol: "Same"}).udf()
    with pytest.raises(ColumnError, match=r"inputCols names 2 columns, and the model was trained with .* \(3,\)"):
        model.copy({model.inputCols: ["a", "b"]}).udf()
    with pytest.raises(ColumnError, match="its params now name 'features:x': name columns for the same ones"):
        model.copy({model.inputs: {"x": "a"}}).udf()
