"""How fast a model scores a DataFrame: `python benchmarks/score.py`.

A small MLP over 100 floats and a small CNN over 28 x 28 pixels, each from Parquet to Spark's noop sink on two cores, by
spark_nn (images as raw bytes, and as arrays of floats), and beside it by whatever else one would write:
`predict_batch_udf` as Spark's documentation has it and with large batches, a pandas UDF, `mapInArrow`, and one row at a
time over an RDD. Every line is thousands of rows per second, the median of three rounds, measured in turn, each in a
session of its own, after a pass that loads the model and warms up Spark. Those that would take hours score fewer rows.

What limits them stands below: the same network over arrays in memory, in one process of two threads and in two of one
each; the bare scan of the same columns; and a UDF of Arrow that takes the same column and returns zeros, which is what
Spark asks for handing rows to Python and back. "to it" is by how much ours is faster; ratios travel between machines,
rows per second do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from in_step import network
from peers import apart, session, together
from pyspark import cloudpickle
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType

from spark_nn import KerasModel
from spark_nn.doctor import requireJava

WIDTHS = {"mlp": 100, "cnn": 784}
KINDS = {"mlp": "regression", "cnn": "multiclass"}
# What ours scores, and what is scanned; the others take arrays of floats.
COLUMNS = {"mlp": "features", "cnn": "image"}
OURS, ARRAYS = "spark_nn", "spark_nn, from arrays"
MEMORY = ("in memory, 1 process of 2 threads", "in memory, 2 processes of 1")
SCAN, ZEROS = "bare scan", "UDF that returns zeros"


def native(name: str) -> Any:
    """The network, which takes a row of numbers."""
    import keras

    model, _ = network(name)
    if name == "cnn":
        pixels = keras.Input((784,))
        image = keras.layers.Reshape((28, 28, 1))(keras.layers.Rescaling(1 / 255)(pixels))
        model = keras.Model(pixels, model(image))
    return model


def write(name: str, rows: int, folder: str) -> None:
    """Rows in eight files of the same size, and the network's file."""
    spark, width = session(), WIDTHS[name]

    def draw(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            generator = np.random.default_rng(batch.column(0)[0].as_py())
            if name == "mlp":
                x = generator.standard_normal((batch.num_rows, width), np.float32)
                images = pa.nulls(batch.num_rows, pa.binary())
            else:
                pixels = generator.integers(0, 256, (batch.num_rows, width), np.uint8)
                x = pixels.astype(np.float32)
                images = pa.array([row.tobytes() for row in pixels])
            offsets = pa.array(np.arange(0, x.size + 1, width, dtype=np.int32))
            lists = pa.ListArray.from_arrays(offsets, pa.array(x.reshape(-1)))
            yield pa.RecordBatch.from_arrays([batch.column(0), lists, images], ["id", "features", "image"])

    drawn = spark.range(0, rows, 1, 8).mapInArrow(draw, "id long, features array<float>, image binary")
    drawn.write.parquet(f"{folder}/rows")
    native(name).save(f"{folder}/model.keras")


def single(name: str, predicted: Any) -> np.ndarray:
    """A number per row: the prediction, or the class."""
    found: np.ndarray = predicted[:, 0] if name == "mlp" else predicted.argmax(axis=1)
    return found.astype(np.float64)


def scored(name: str, folder: str, column: str | None = None) -> Callable[[DataFrame], DataFrame]:
    """By spark_nn."""
    import keras

    column = column or COLUMNS[name]
    model = KerasModel.fromKeras(
        keras.saving.load_model(f"{folder}/model.keras"),
        outputKind=KINDS[name],
        featuresCol=column,
        probabilityCol="",
        rawPredictionCol="",
    )
    return lambda df: model.transform(df.select("id", column))


def scored_from_arrays(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """By spark_nn, where images are arrays of floats."""
    return scored(name, folder, "features")


def batched(name: str, folder: str, batch: int = 100) -> Callable[[DataFrame], DataFrame]:
    """As the documentation of predict_batch_udf has it."""
    from pyspark.ml.functions import predict_batch_udf

    def make() -> Any:
        import tensorflow as tf

        model = tf.keras.models.load_model(f"{folder}/model.keras")

        def predict(inputs: np.ndarray) -> np.ndarray:
            return single(name, model.predict(inputs, batch_size=len(inputs), verbose=0))

        return predict

    udf = predict_batch_udf(make, return_type=DoubleType(), batch_size=batch, input_tensor_shapes=[[WIDTHS[name]]])
    return lambda df: df.select("id", "features", udf("features").alias("prediction"))


def batched_well(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """The same with batches of thousands."""
    return batched(name, folder, 4096 if name == "mlp" else 256)


def in_pandas(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """By a pandas UDF over batches."""

    def predict(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        import keras

        model = keras.saving.load_model(f"{folder}/model.keras")
        for batch in batches:
            yield pd.Series(single(name, model.predict(np.stack(batch), batch_size=1024, verbose=0)))

    udf: Any = F.pandas_udf(predict, "double")
    return lambda df: df.select("id", "features", udf("features").alias("prediction"))


def in_arrow(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """By mapInArrow, every column handed through."""

    def predict(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import keras

        model = keras.saving.load_model(f"{folder}/model.keras")
        for batch in batches:
            x = batch.column("features").flatten().to_numpy().reshape(batch.num_rows, -1)
            found = single(name, model.predict(x, batch_size=1024, verbose=0))
            yield pa.RecordBatch.from_arrays([*batch.columns, pa.array(found)], [*batch.schema.names, "prediction"])

    rows = "id long, features array<float>, prediction double"
    return lambda df: df.select("id", "features").mapInArrow(predict, rows)


def by_row(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """A row at a time."""

    def predict(rows: Iterator[Any]) -> Iterator[Any]:
        import keras

        model = keras.saving.load_model(f"{folder}/model.keras")
        for row in rows:
            yield row.id, row.features, float(single(name, model(np.float32([row.features])).numpy())[0])

    return lambda df: df.rdd.mapPartitions(predict).toDF("id long, features array<float>, prediction double")


def scan(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """No model at all."""
    return lambda df: df.select("id", COLUMNS[name])


def zeros(name: str, folder: str) -> Callable[[DataFrame], DataFrame]:
    """Rows to Python and back."""

    def nothing(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        for batch in batches:
            yield pa.array(np.zeros(len(batch)))

    functions: Any = F
    udf = functions.arrow_udf(nothing, "double")
    return lambda df: df.select("id", COLUMNS[name], udf(COLUMNS[name]).alias("prediction"))


# Each way, and the share of the rows that it scores.
WAYS: dict[str, tuple[Callable[[str, str], Callable[[DataFrame], DataFrame]], float]] = {
    OURS: (scored, 1.0),
    ARRAYS: (scored_from_arrays, 1.0),
    "predict_batch_udf as documented": (batched, 0.05),
    "predict_batch_udf, large batches": (batched_well, 1.0),
    "pandas UDF": (in_pandas, 1.0),
    "mapInArrow": (in_arrow, 1.0),
    "a row at a time": (by_row, 0.002),
    SCAN: (scan, 1.0),
    ZEROS: (zeros, 1.0),
}


def rows_of(spark: SparkSession, folder: str, share: float) -> DataFrame:
    """The rows, or a share of them."""
    df = spark.read.parquet(f"{folder}/rows")
    if share == 1.0:
        return df
    few = f"{folder}/rows-{share}"
    if not Path(few).exists():
        df.sample(share, seed=1).repartition(2).write.parquet(few)
    return spark.read.parquet(few)


def measured(way: str, name: str, folder: str) -> float:
    """Thousand rows per second of the second pass."""
    # Spark's Python workers do not find this file: its functions travel by value.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    make, share = WAYS[way]
    spark = session()
    df = rows_of(spark, folder, share)
    rows = df.count()
    frame = make(name, folder)(df)
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        frame.write.format("noop").mode("overwrite").save()
        seconds.append(time.monotonic() - began)
    spark.stop()
    return rows / 1000 / seconds[-1]


def in_memory(name: str, folder: str, threads: int, seconds: float = 4.0) -> float:
    """Thousand rows per second over arrays in memory, by one graph, in blocks of the size that suits the network."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    model = keras.saving.load_model(f"{folder}/model.keras")
    block = 4096 if name == "mlp" else 64
    x = np.random.default_rng(1).random((32 * block, WIDTHS[name]), np.float32)
    forward = tf.function(lambda rows: model(rows, training=False), autograph=False, reduce_retracing=True)
    done, began = 0, 0.0
    for number in range(1_000_000):
        start = number % 32 * block
        forward(tf.convert_to_tensor(x[start : start + block])).numpy()
        if number == 32:
            began = time.monotonic()
        done += block * (number > 32)
        if number > 32 and time.monotonic() - began > seconds:
            break
    return done / 1000 / (time.monotonic() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the MLP; the CNN scores a twentieth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *MEMORY])
    arguments = parser.parse_args()
    requireJava()
    for name in arguments.networks:
        rows = arguments.rows if name == "mlp" else arguments.rows // 20
        with tempfile.TemporaryDirectory(prefix="spark_nn-") as folder:
            apart(write, name, rows, folder)
            ways = [way for way in arguments.ways if way != ARRAYS or name == "cnn"]
            found: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way, figures in found.items():
                    if way == MEMORY[0]:
                        figures.append(apart(in_memory, name, folder, 2))
                    elif way == MEMORY[1]:
                        figures.append(sum(together(in_memory, [(name, folder, 1)] * 2)))
                    else:
                        figures.append(apart(measured, way, name, folder))
        print(f"\n{name}, {rows:,} rows x {WIDTHS[name]}, thousand rows per second, median of {arguments.rounds}")
        for way, figures in found.items():
            ratio = statistics.median(ours / other for ours, other in zip(found[OURS], figures, strict=True))
            spread = f"{min(figures):.2f} to {max(figures):.2f}"
            print(f"{way:>36} {statistics.median(figures):12.2f} {ratio:10.2f} to it    ({spread})", flush=True)


if __name__ == "__main__":
    main()
