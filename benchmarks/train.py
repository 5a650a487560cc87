"""How fast Keras trains when its batches come from disk: `python benchmarks/train.py`.

One table: rows per second of one process that trains a small network, fed by Keras from memory, by our stream, by
Petastorm, and by nothing at all, which is the limit. Every line is the median of three rounds, measured in turn, each
in a fresh process on the same cores, of which its fastest epoch counts; but never the first, in which Keras compiles
and caches fill.
Ratios travel between machines, rows per second do not.

Ours run in the environment that a fit gives its workers' processes, which among other things keeps the C library from
returning memory to the kernel at every step. One line shows what that alone does for Keras.

With `--workers N` it is another table, of workers in step: see `in_step.py`. With `--framework torch` it is PyTorch's:
see `with_torch.py`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from in_step import in_step
from peers import BATCH, FEATURES, apart, made, opened, session, show, stock_reader, written
from with_torch import with_torch

from spark_nn.doctor import requireJava
from spark_nn.gang.worker import child_environment

MEMORY = "keras, in memory"


@dataclass(frozen=True)
class Setting:
    """What all lines have in common.

    Parameters
    ----------
    source, url : str
        Where the rows lie as Spark wrote them, and as a fit does.
    rows, epochs : int
        Rows of an epoch, and epochs.
    together : int
        Steps that Keras runs in one call.
    threads : int
        Threads that read.
    """

    source: str
    url: str
    rows: int
    epochs: int
    together: int
    threads: int

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // BATCH)


def trained(setting: Setting, x: Any, y: Any = None, callbacks: Sequence[Any] = (), **options: Any) -> float:
    """Train, and return the thousand rows per second of the fastest epoch but the first.

    The fastest, as it is the one least disturbed: small steps suffer from whatever else the machine does for whole
    epochs, which can take half as long again.
    """
    import keras

    layers = [keras.layers.Dense(256, "relu"), keras.layers.Dense(128, "relu"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    model.compile("adam", "mse", steps_per_execution=setting.together)
    # From end to end: what a peer does between two epochs counts as well.
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    # Datasets come shuffled, and Keras warns of being asked to shuffle them.
    options.setdefault("shuffle", False)
    model.fit(x, y, epochs=setting.epochs, verbose=0, callbacks=[*callbacks, clock], **options)
    return setting.rows / 1000 / min(np.diff(ends))


def in_memory(setting: Setting) -> float:
    """Keras on arrays."""
    import pyarrow.parquet as pq

    table = pq.read_table(setting.source).combine_chunks()
    features = table.column("features").combine_chunks().flatten().to_numpy().reshape(-1, FEATURES)
    return trained(setting, features, table.column("label").to_numpy(), batch_size=BATCH, shuffle=True)


def streamed(setting: Setting, cache: str) -> float:
    """Our stream, fed to Keras as a fit does."""
    from spark_nn.keras.feed import Feed

    stream = opened(setting.url, setting.threads, cache)
    feed = Feed(stream)
    found = trained(setting, feed.dataset(), callbacks=[feed.callback()])
    stream.close()
    return found


def petastorm(setting: Setting) -> float:
    """Petastorm's dataset for TensorFlow, in single rows, shuffled and batched, as its documentation has it."""
    import tensorflow as tf

    # It does not like to be iterated twice, so all epochs are one iteration.
    with stock_reader(setting.source, setting.threads, epochs=None) as reader:
        from petastorm.tf_utils import make_petastorm_dataset

        rows = make_petastorm_dataset(reader).unbatch()
        dataset = rows.shuffle(50_000).batch(BATCH).prefetch(tf.data.AUTOTUNE)
        # The reader does not know how long its lists are, and Keras must.
        known = dataset.map(lambda row: (tf.ensure_shape(row.features, (None, FEATURES)), row.label))
        return trained(setting, known, steps_per_epoch=setting.steps)


def constant(setting: Setting) -> float:
    """One batch again and again: no input at all."""
    import tensorflow as tf

    draw = np.random.default_rng(1)
    batch = draw.standard_normal((BATCH, FEATURES), np.float32), draw.standard_normal(BATCH, np.float32)
    return trained(setting, tf.data.Dataset.from_tensors(batch).repeat(setting.steps))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps-per-execution", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="that read")
    parser.add_argument("--cores", type=int, default=2, help="for each line")
    parser.add_argument("--workers", type=int, default=1, help="with a core each, which train in step")
    parser.add_argument("--networks", nargs="+", default=["mlp", "cnn", "large"], help="that workers in step train")
    parser.add_argument("--only", default="", help="lines of workers in step whose name holds this")
    parser.add_argument("--framework", choices=["keras", "torch"], default="keras")
    arguments = parser.parse_args()
    if arguments.framework == "torch":
        with_torch(arguments)
        return
    if arguments.workers > 1:
        in_step(arguments)
        return
    requireJava()
    with tempfile.TemporaryDirectory() as folder:
        spark = session()
        source = made(spark, arguments.rows, f"{folder}/source")
        url = f"file://{folder}/ours"
        written(spark.read.parquet(source), url)
        spark.stop()
        setting = Setting(
            source, url, arguments.rows, arguments.epochs, arguments.steps_per_execution, arguments.threads
        )
        share(arguments.cores)
        environment = child_environment(os.environ, arguments.cores, [])
        rounds = [
            {
                MEMORY: apart(in_memory, setting),
                f"{MEMORY}, our environment": apart(in_memory, setting, environment=environment),
                "ours, from memory": apart(streamed, setting, "memory", environment=environment),
                "ours, from disk": apart(streamed, setting, "none", environment=environment),
                "stock petastorm": apart(petastorm, setting),
                "no input": apart(constant, setting),
            }
            for _ in range(arguments.rounds)
        ]
    title = f"Training on {arguments.rows:,} rows x {FEATURES} in batches of {BATCH}"
    title += f", {arguments.steps_per_execution} steps per call, {arguments.cores} cores"
    show(title, "thousand rows/s", rounds, MEMORY)


def share(cores: int) -> None:
    """Give the processes that are started from now on so many cores."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(cores)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


if __name__ == "__main__":
    main()
