"""Predictions against Keras's own, for every kind of input and output and partitions of any size."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from operator import itemgetter

import numpy as np
import pyspark
import pytest
from pyspark import TaskContext
from pyspark.ml.linalg import DenseVector, SparseVector, VectorUDT
from pyspark.resource import ResourceInformation
from pyspark.sql import functions as F

from spark_nn import KerasModel
from spark_nn.keras import predict
from spark_nn.share import Share

pytestmark = pytest.mark.timeout(240)

SIZES = (0, 1, 7, 10_000, 10_001)


@pytest.fixture(scope="module")
def keras():
    import keras

    keras.utils.set_random_seed(3)
    return keras


def partitions(spark):
    """Rows in partitions of these sizes."""
    ends = np.cumsum([0, *SIZES])
    parts = [spark.range(int(start), int(end), 1, 1) for start, end in itertools.pairwise(ends)]
    df = functools.reduce(lambda left, right: left.union(right), parts)
    return df.select("id", *(F.sin(F.col("id") * (k + 1)).alias(f"x{k}") for k in range(6)))


def numbers():
    """The same numbers, as the model gets them."""
    rows = np.arange(sum(SIZES))
    return np.sin(rows[:, None] * np.arange(1, 7)).astype(np.float32)


def words():
    return np.array([["red", "green", "blue", "?"][i % 4] for i in range(sum(SIZES))])


def vectors(df, sparse):
    """Vectors of the columns."""

    def vector(*x):
        return SparseVector(6, [0, 2, 5], [x[0], x[2], x[5]]) if sparse else DenseVector(x)

    return df.select("id", F.udf(vector, VectorUDT())(*(f"x{k}" for k in range(6))).alias("features"))


def mlp(keras, units=1, activation=None, loss="mse", shape=(6,)):
    layers = keras.layers
    model = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(16, "tanh")])
    model.add(layers.Dense(units, activation))
    model.compile("sgd", loss)
    return model


def several(keras):
    """Numbers and a word in, a number and probabilities out."""
    layers = keras.layers
    x, word = keras.Input((6,), name="x"), keras.Input((1,), dtype="string", name="word")
    looked_up = layers.StringLookup(vocabulary=["red", "green", "blue"], output_mode="one_hot")(word)
    joined = layers.Dense(8, "tanh")(layers.Concatenate()([x, looked_up]))
    return keras.Model(
        {"x": x, "word": word},
        {"price": layers.Dense(1, name="price")(joined), "kind": layers.Dense(3, "softmax", name="kind")(joined)},
    )


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def rows_of(scored):
    rows = sorted(scored.collect(), key=itemgetter(0))
    assert [row.id for row in rows] == list(range(sum(SIZES)))
    return rows


@pytest.mark.parametrize("kind", ["array", "doubles", "columns", "dense", "sparse", "nested"])
def test_inputs_of_every_kind_give_what_keras_gives(spark, keras, kind):
    df, x = partitions(spark), numbers()
    names = [f"x{k}" for k in range(6)]
    shape = (3, 2) if kind == "nested" else (6,)
    given = {"inputCols": names} if kind == "columns" else {}
    if kind in ("array", "doubles"):
        df = df.select(
            "id", F.array(*names).cast("array<float>" if kind == "array" else "array<double>").alias("features")
        )
    elif kind == "nested":
        df = df.select("id", F.array(*(F.array(f"x{k}", f"x{k + 1}") for k in (0, 2, 4))).alias("features"))
    elif kind != "columns":
        df = vectors(df, kind == "sparse")
    if kind == "sparse":
        x = x * np.float32([1, 0, 1, 0, 0, 1])
    native = mlp(keras, shape=shape)
    rows = rows_of(KerasModel.fromKeras(native, **given).transform(df).select("id", "prediction"))
    close([row.prediction for row in rows], native.predict(x.reshape(-1, *shape), verbose=0)[:, 0])


@pytest.mark.parametrize("kind", ["arrow", "pandas"])
def test_bytes_are_numbers_to_a_model_that_takes_numbers(spark, keras, monkeypatch, kind):
    if kind == "pandas":
        monkeypatch.setattr(pyspark, "__version__", "4.0.1")
    layers = keras.layers
    image = keras.Input((4, 8, 1))
    native = keras.Model(image, layers.Dense(3, "softmax")(layers.Flatten()(layers.Rescaling(1 / 255)(image))))
    df = spark.range(0, 500, 1, 3).select("id", F.sha2(F.col("id").cast("string"), 256).alias("hex"))
    df = df.select("id", F.when(F.col("id") % 50 != 3, F.unhex("hex")).alias("features"))
    df = df.withColumn(
        "features", F.when(F.col("id") == 7, F.col("features").substr(1, 5)).otherwise(F.col("features"))
    )
    model = KerasModel.fromKeras(native, outputKind="multiclass", handleInvalid="keep")
    rows = sorted(model.transform(df).collect(), key=itemgetter(0))
    wrong = [row.id for row in rows if row.probability is None]
    assert wrong == [3, 7, *range(53, 500, 50)]
    usable = [row for row in rows if row.probability is not None]
    x = np.stack([np.frombuffer(row.features, np.uint8).reshape(4, 8, 1) for row in usable]).astype(np.float32)
    close([row.probability.toArray() for row in usable], native.predict(x, verbose=0))
    with pytest.raises(Exception, match="'features' is null in .* row.*'features' is empty, or not of the length"):
        model.copy({model.handleInvalid: "error"}).transform(df.coalesce(1)).collect()


@pytest.mark.parametrize("dtype", ["int", "bigint"])
def test_whole_numbers_stay_whole(spark, keras, dtype):
    df = partitions(spark).select(
        "id", F.array(F.col("id") % 50, F.col("id") % 7).cast(f"array<{dtype}>").alias("features")
    )
    tokens = keras.Input((2,), dtype="int32" if dtype == "int" else "int64")
    native = keras.Model(tokens, keras.layers.Dense(1)(keras.layers.Flatten()(keras.layers.Embedding(50, 4)(tokens))))
    rows = rows_of(KerasModel.fromKeras(native, outputKind="regression").transform(df).select("id", "prediction"))
    x = np.stack([np.arange(len(rows)) % 50, np.arange(len(rows)) % 7], axis=1)
    close([row.prediction for row in rows], native.predict(x, verbose=0)[:, 0])


def test_several_inputs_strings_and_several_outputs(spark, keras):
    df = partitions(spark).withColumn(
        "word", F.expr("case id % 4 when 0 then 'red' when 1 then 'green' when 2 then 'blue' else '?' end")
    )
    native = several(keras)
    model = KerasModel.fromKeras(
        native,
        inputs={"x": [f"x{k}" for k in range(6)], "word": "word"},
        outputKind={"price": "regression", "kind": "multiclass"},
    )
    expected = native({"x": numbers(), "word": words()[:, None]}, training=False)
    expected = {name: np.asarray(each) for name, each in expected.items()}
    rows = rows_of(model.transform(df).select("id", "prediction_price", "probability_kind", "prediction_kind"))
    close([row.prediction_price for row in rows], expected["price"][:, 0])
    close([row.probability_kind.toArray() for row in rows], expected["kind"])
    assert [row.prediction_kind for row in rows] == expected["kind"].argmax(axis=1).tolist()


def test_outputs_of_every_kind(spark, keras):
    df, x = partitions(spark).cache(), numbers()
    given = {"inputCols": [f"x{k}" for k in range(6)]}

    def rows(native, **params):
        return rows_of(KerasModel.fromKeras(native, **given, **params).transform(df).drop(*given["inputCols"]))

    binary = mlp(keras, 1, "sigmoid", "binary_crossentropy")
    close([row.probability[1] for row in rows(binary)], binary.predict(x, verbose=0)[:, 0])
    logits = mlp(keras, 1, None, keras.losses.BinaryCrossentropy(from_logits=True))
    found = rows(logits)
    put_out = logits.predict(x, verbose=0)[:, 0].astype(np.float64)
    close([row.rawPrediction[1] for row in found], put_out)
    close([row.probability[1] for row in found], 1 / (1 + np.exp(-put_out)))
    classes = mlp(keras, 4, "softmax", "sparse_categorical_crossentropy")
    close([row.probability.toArray() for row in rows(classes)], classes.predict(x, verbose=0))
    shaped = mlp(keras, 6)
    shaped = keras.Model(shaped.inputs, keras.layers.Reshape((3, 2))(shaped.outputs[0]))
    close([row.prediction for row in rows(shaped, outputKind="raw")], shaped.predict(x, verbose=0))
    df.unpersist()


def test_a_model_that_takes_a_fixed_number_of_rows_gets_it(spark, keras):
    df, x = partitions(spark).where("id < 10100"), numbers()[:10100]
    rows = keras.Input((6,), batch_size=32)
    native = keras.Model(rows, keras.layers.Dense(1)(keras.ops.reshape(keras.layers.Dense(2)(rows), (32, 2))))
    model = KerasModel.fromKeras(
        native, inputCols=[f"x{k}" for k in range(6)], outputKind="regression", predictBatchSize=100
    )
    found = [row.prediction for row in sorted(model.transform(df).select("id", "prediction").collect())]
    padded = np.concatenate([x, np.zeros((-len(x) % 32, 6), np.float32)])
    close(found, native.predict(padded, batch_size=32, verbose=0)[: len(x), 0])


def test_blocks_are_as_large_as_the_widest_layer_allows(keras):
    layers = keras.layers
    assert predict.rows_at_once(mlp(keras)) == 4096
    wide = keras.Sequential([keras.Input((6,)), layers.Dense(4096), layers.Dense(1)])
    assert predict.rows_at_once(wide) == 512
    image = keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(64, 3), layers.GlobalMaxPooling2D()])
    assert predict.rows_at_once(image) == 32
    nested = keras.Sequential([keras.Input((28, 28, 1)), image, layers.Dense(2)])
    assert predict.rows_at_once(nested) == 32


def test_layers_with_several_outputs_by_name_count_too(keras):
    layers = keras.layers
    x = keras.Input((6,))
    backbone = keras.Model(x, {"wide": layers.Dense(2048)(x), "narrow": layers.Dense(2)(x)})
    assert predict.rows_at_once(keras.Model(x, layers.Dense(1)(backbone(x)["wide"]))) == 1024


def test_a_model_does_not_see_rows_that_it_cannot_take(spark, keras):
    word = keras.Input((1,), dtype="string")
    looked_up = keras.layers.StringLookup(vocabulary=["a", "b"], num_oov_indices=0, output_mode="one_hot")(word)
    native = keras.Model(word, keras.layers.Dense(1)(looked_up))
    df = spark.range(0, 40, 1, 2).select("id", F.expr("if(id < 20, null, if(id % 2 = 0, 'a', 'b'))").alias("features"))
    model = KerasModel.fromKeras(native, outputKind="regression", handleInvalid="keep")
    found = [row.prediction for row in sorted(model.transform(df).select("id", "prediction").collect())]
    a, b = (float(each) for each in native(np.array([["a"], ["b"]]))[:, 0])
    assert found[:20] == [None] * 20
    close(found[20:], [a, b] * 10)


def test_a_model_that_was_built_by_a_call_takes_any_number_of_rows_at_once(keras):
    native = keras.Sequential([keras.layers.Dense(4, "relu"), keras.layers.Dense(1)])
    native(np.zeros((1, 6), np.float32))
    predictor = predict.KerasPredictor(native, "/CPU:0")
    x = numbers()[:5000]
    close(predictor(x), native.predict(x, verbose=0))
    assert predictor._fixed is None
    assert predictor._forward._forward.experimental_get_tracing_count() == 1


def test_one_graph_serves_blocks_of_any_number_of_rows(keras):
    native = mlp(keras)
    predictor = predict.KerasPredictor(native, "/CPU:0")
    x = numbers()
    for rows in (1, 7, 4096, 4095, 30):
        close(predictor(x[:rows]), native.predict(x[:rows], verbose=0))
    assert predictor._forward._forward.experimental_get_tracing_count() == 1


class Task:
    """A task of Spark's that has been assigned a GPU."""

    def cpus(self):
        return 3

    def resources(self):
        return {"gpu": ResourceInformation("gpu", ["2"])}


def test_a_task_scores_on_the_gpu_that_it_was_assigned(monkeypatch):
    from spark_nn.keras.backends import tensorflow as room

    monkeypatch.setattr(TaskContext, "get", classmethod(lambda cls: Task()))
    share = Share.ofTask()
    assert share == Share(3, "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert room._device(share, 4) == "/GPU:2"
    assert room._device(share, 0) == "/CPU:0"
    assert room._device(Share(3), 4) == "/CPU:0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2")
    assert room._device(share, 2) == "/GPU:1"


# An executor with two GPUs, as a script says, and tasks of one each. What the model is loaded for, it puts out.
SCRIPT = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession
from spark_nn.columns import features
from spark_nn.outputs import Output
from spark_nn.persistence import ModelFile
from spark_nn.scoring.plan import score, ship
from spark_nn.scoring.scorer import Scorer
import numpy as np
(discover,) = sys.argv[1:]

class Told:
    rows = 10
    def __init__(self, share):
        self.share = share
    def __call__(self, inputs):
        import time
        time.sleep(1)  # so that the two tasks are on at the same time
        return np.full((len(inputs), 1), int(self.share.gpu) * 10 + self.share.cpus)

builder = SparkSession.builder.master("local-cluster[1,2,1024]").config("spark.ui.enabled", "false")
for side in ("worker", "executor"):
    builder.config(f"spark.{side}.resource.gpu.amount", 2)
    builder.config(f"spark.{side}.resource.gpu.discoveryScript", discover)
spark = builder.config("spark.task.resource.gpu.amount", 1).getOrCreate()
file = ModelFile(".npy")
np.save(file.path, [1.0])
file = file.sealed()
df = spark.range(0, 8, 1, 2)
scorer = Scorer(
    ship(spark, file.path), file.sha256, lambda path, share: Told(share),
    (features(df.schema, "inputCols", ["id"]),), {"": Output("regression", (1,))}, ("predictionCol",),
)
print(sorted({row.p for row in score(df, scorer, {"predictionCol": "p"}).collect()}))
spark.stop()
"""


def test_each_of_two_tasks_scores_on_a_gpu_of_its_own(tmp_path):
    discover = tmp_path / "discover.sh"
    discover.write_text("""echo '{"name": "gpu", "addresses": ["0", "1"]}'""")
    discover.chmod(0o755)
    command = [sys.executable, "-c", SCRIPT, str(discover)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "[1.0, 11.0]", done.stderr[-3000:]
