"""What a fit costs beside its training: `python benchmarks/fit.py`.

One table: plain Keras on the rows in memory, in a process of its own, and `KerasEstimator` on the same rows with one
and two workers, by phase, in seconds. "first" is the first fit of a session, for which Spark starts its Python and the
framework is imported; "next" the one right after it, on other rows of the same kind. Every line is the median of three
rounds, measured in turn, each with a session of its own. Ratios travel between machines, seconds do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np
from peers import apart
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from spark_nn.doctor import requireJava
from spark_nn.gang.worker import child_environment
from spark_nn.keras.training import KerasTrainer

FEATURES = 20
PHASES = ("check", "materialize", "start", "import", "build", "trace", "train", "publish", "finish")


def builder():
    """The function that returns the model: nested, so that it travels by value from whatever process this is."""

    def build():
        import keras

        layers = [keras.layers.Dense(128, "relu"), keras.layers.Dense(64, "relu"), keras.layers.Dense(1)]
        return keras.Sequential(layers)

    return build


def plain(rows: int, epochs: int) -> dict[str, float]:
    """Keras alone, in a process like a rank's: what there would be to do if the rows fitted into one machine."""
    began = time.monotonic()

    imported = time.monotonic()
    draw = np.random.default_rng(1)
    x = draw.standard_normal((rows, FEATURES), np.float32)
    y = x[:, 0] * x[:, 1] + x[:, 2]
    model = builder()()
    model.compile("adam", "mse")
    model(x[:1])
    built = time.monotonic()
    model.fit(x[:256], y[:256], batch_size=256, verbose=0)
    traced = time.monotonic()
    model.fit(x, y, batch_size=256, epochs=epochs, verbose=0)
    ended = time.monotonic()
    phases = {"import": imported - began, "build": built - imported, "trace": traced - built, "train": ended - traced}
    return {**phases, "total": ended - began}


def rows_of(spark: SparkSession, rows: int, seed: int) -> DataFrame:
    """Rows in memory, on the executors."""
    columns = [F.randn(seed + number).alias(f"x{number}") for number in range(FEATURES)]
    df = spark.range(rows).select(*columns).withColumn("label", F.expr("x0 * x1 + x2")).cache()
    df.count()
    return df


def fitted(df: DataFrame, epochs: int, workers: int) -> dict[str, float]:
    """The estimator, by phase."""
    estimator = KerasEstimator(
        model=builder(),
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
    return {**seconds, "total": time.monotonic() - began}


def measured(rows: int, epochs: int, workers: int) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the next fit of a session."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    first, second = (rows_of(spark, rows, seed) for seed in (0, 100))
    found = fitted(first, epochs, workers), fitted(second, epochs, workers)
    spark.stop()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    requireJava()
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(arguments.rounds):
        ours = child_environment(os.environ, 1, []) | KerasTrainer.environment
        found = {"keras, 1 core": apart(plain, arguments.rows, arguments.epochs, environment=ours)}
        for workers in (1, 2):
            first, second = apart(measured, arguments.rows, arguments.epochs, workers)
            found |= {f"{workers} workers, first": first, f"{workers} workers, next": second}
        rounds.append(found)
    print(f"\n{arguments.rows:,} rows x {FEATURES}, {arguments.epochs} epochs, median of {arguments.rounds}, seconds")
    print(f"{'':>18}" + "".join(f"{title:>12}" for title in (*PHASES, "other", "total", "overhead")))
    for name in rounds[0]:
        middle = {
            phase: statistics.median(each[name].get(phase, 0.0) for each in rounds) for phase in (*PHASES, "total")
        }
        other = statistics.median(
            each[name]["total"] - sum(each[name].get(phase, 0.0) for phase in PHASES) for each in rounds
        )
        overhead = middle["total"] - middle["materialize"] - middle["train"]
        values = [*(middle[phase] for phase in PHASES), other, middle["total"], overhead]
        print(f"{name:>18}" + "".join(f"{value:12.2f}" for value in values))


if __name__ == "__main__":
    main()
