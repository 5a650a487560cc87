"""What a fit costs beside its training: `python benchmarks/fit.py`.

One table: plain Keras on the rows in memory, and `KerasEstimator` on the same rows with one and two workers,
by phase, in seconds. Every line is the median of three rounds, measured in turn. Ratios travel between
machines, seconds do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from spark_nn.doctor import requireJava

FEATURES = 20
PHASES = ("materialize", "start", "import", "train", "publish")


def build():
    """The model."""
    import keras

    layers = [keras.layers.Dense(128, "relu"), keras.layers.Dense(64, "relu"), keras.layers.Dense(1)]
    return keras.Sequential(layers)


def plain(df: DataFrame, epochs: int) -> dict[str, float]:
    """Keras alone, in this process: what there would be to do if the rows fitted into one machine."""
    import keras
    import numpy as np

    table = df.toPandas().to_numpy(np.float32)
    model = build()
    model.compile("adam", "mse")
    began = time.monotonic()
    model.fit(table[:, :FEATURES], table[:, FEATURES], batch_size=256, epochs=epochs, verbose=0)
    keras.backend.clear_session()
    return {"train": time.monotonic() - began}


def fitted(df: DataFrame, epochs: int, workers: int) -> dict[str, float]:
    """The estimator, by phase."""
    estimator = KerasEstimator(
        model=build,
        optimizer="adam",
        loss="mse",
        inputCols=df.columns[:FEATURES],
        epochs=epochs,
        batchSize=256,
        numWorkers=workers,
        verbose=0,
    )
    began = time.monotonic()
    seconds = dict(estimator.fit(df).summary.seconds)
    seconds["total"] = time.monotonic() - began
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    requireJava()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    columns = [F.randn(seed).alias(f"x{seed}") for seed in range(FEATURES)]
    df = spark.range(arguments.rows).select(*columns).withColumn("label", F.expr("x0 * x1 + x2"))
    df = df.cache()
    df.count()

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "keras in memory": lambda: plain(df, arguments.epochs),
        "1 worker": lambda: fitted(df, arguments.epochs, 1),
        "2 workers": lambda: fitted(df, arguments.epochs, 2),
    }
    rounds = [{name: way() for name, way in ways.items()} for _ in range(arguments.rounds)]
    print(f"{arguments.rows:,} rows x {FEATURES}, {arguments.epochs} epochs, median of {arguments.rounds}, seconds")
    print("".join(f"{title:>16}" for title in ("", *PHASES, "other", "total", "total/keras")))
    base = statistics.median(each["keras in memory"]["train"] for each in rounds)
    for name in ways:
        middle = {
            phase: statistics.median(each[name].get(phase, 0.0) for each in rounds) for phase in (*PHASES, "total")
        }
        known = sum(middle[phase] for phase in PHASES)
        total = middle["total"] or known
        values = [*(middle[phase] for phase in PHASES), max(0.0, total - known), total, total / base]
        print(f"{name:>16}" + "".join(f"{value:16.2f}" for value in values))


if __name__ == "__main__":
    main()
