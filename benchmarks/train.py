"""How fast Keras trains when its batches come from disk: `python benchmarks/train.py`.

One table: rows per second of one process that trains a small network, fed by Keras from memory, by our stream, by
Petastorm, and by nothing at all, which is the limit. Every line is the median of three rounds, measured in turn, each
in a fresh process on the same cores, of which its fastest epoch counts; but never the first, in which Keras compiles
and caches fill.
Ratios travel between machines, rows per second do not.

Ours run in the environment that a fit gives its workers' processes, which among other things keeps the C library from
returning memory to the kernel at every step. One line shows what that alone does for Keras.

With `--workers N` it is another table: samples per second of N processes with a core each that train in step, as a
share of what N times one core would reach if they had nothing to tell each other. All lines train the same networks on
the same batch in memory, with one thread to compute and as many steps per call; the batch is that of one worker.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from peers import BATCH, FEATURES, apart, made, opened, session, show, stock_reader, together, written

from spark_nn.doctor import requireJava
from spark_nn.gang.collective import Collective, Ring, listen
from spark_nn.gang.worker import child_environment

MEMORY = "keras, in memory"
ALONE = "one worker, one core"
HOST = "127.0.0.1"
TIMEOUT = 60.0


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


@dataclass(frozen=True)
class Gang:
    """One rank's view of a measurement with several workers.

    Parameters
    ----------
    network : str
        What to train, see :func:`network`.
    together : int
        Steps that run in one call.
    epochs : int
        How often to measure; the first time does not count.
    secret : bytes
        Known to the ranks of this measurement.
    addresses : list of (host, port)
        Where the ranks of our ring listen.
    ports : list of int
        Free for a server of a peer's, one per rank.
    listener : socket.socket or None
        This rank's own.
    rank : int
        This rank, and its core.
    """

    network: str
    together: int
    epochs: int
    secret: bytes = b""
    addresses: tuple[Any, ...] = ()
    ports: tuple[int, ...] = ()
    listener: Any = None
    rank: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of a worker's batch, and steps of an epoch: about a second's work for one core, or less."""
        batch, steps = {"mlp": (256, 800), "cnn": (64, 96), "large": (256, 32)}[self.network]
        return batch, -(-steps // self.together) * self.together

    def settle(self) -> None:
        """Keep to this rank's core; before TensorFlow counts them."""
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[self.rank % len(cores)]})

    def join(self) -> Collective:
        """Form our ring."""
        return Ring.connect(
            rank=self.rank,
            addresses=self.addresses,
            listener=self.listener,
            secret=self.secret,
            timeout=TIMEOUT,
        )

    def rate(self, seconds: float) -> float:
        """Samples per second of one worker whose epoch took so long."""
        batch, steps = self.shape
        return batch * steps / seconds


def network(name: str) -> tuple[Any, Any]:
    """A network of Keras's, compiled, and one batch for it."""
    import keras

    layers = keras.layers
    draw = np.random.default_rng(1)
    keras.utils.set_random_seed(1)
    if name == "cnn":
        stack = [keras.Input((28, 28, 1))]
        for filters in (32, 64):
            stack += [layers.Conv2D(filters, 3, activation="relu"), layers.MaxPooling2D()]
        model = keras.Sequential([*stack, layers.Flatten(), layers.Dense(10, "softmax")])
        model.compile("adam", "sparse_categorical_crossentropy")
        return model, (draw.random((64, 28, 28, 1), np.float32), draw.integers(0, 10, 64))
    widths = {"mlp": (256, 128), "large": (2048, 2048)}[name]
    model = keras.Sequential(
        [keras.Input((FEATURES,)), *(layers.Dense(width, "relu") for width in widths), layers.Dense(1)]
    )
    model.compile("adam", "mse")
    return model, (draw.standard_normal((256, FEATURES), np.float32), draw.standard_normal(256, np.float32))


def fitted(gang: Gang, model: Any, batch: Any, callbacks: Sequence[Any] = ()) -> float:
    """Let Keras train, and return the samples per second of this rank's fastest epoch but the first."""
    import keras
    import tensorflow as tf

    _, steps = gang.shape
    model.steps_per_execution = gang.together
    model.jit_compile = False
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    dataset = tf.data.Dataset.from_tensors(batch).repeat(steps)
    model.fit(dataset, epochs=gang.epochs, verbose=0, shuffle=False, callbacks=[*callbacks, clock])
    return gang.rate(min(np.diff(ends)))


def alone(gang: Gang) -> float:
    """One worker on one core."""
    gang.settle()
    return fitted(gang, *network(gang.network))


def unsynchronised(gang: Gang) -> float:
    """Workers that start together, and share nothing but the machine."""
    gang.settle()
    model, batch = network(gang.network)
    with contextlib.closing(gang.join()) as ring:
        ring.barrier()
        return fitted(gang, model, batch)


def ours(gang: Gang, engine: str) -> float:
    """Workers that a fit of ours keeps in step."""
    gang.settle()
    from spark_nn.keras import native
    from spark_nn.keras.sync import Synchroniser

    with contextlib.closing(gang.join()) as ring:
        averager = native.averager(engine, ring, HOST, TIMEOUT)
        model, batch = network(gang.network)
        model.optimizer.build(model.trainable_variables)
        sync = Synchroniser(model, ring, gang.rank, averager)
        sync.start_alike()
        with sync.averaged_gradients():
            return fitted(gang, model, batch, [sync.callback()])


def mirrored(gang: Gang) -> float:
    """MultiWorkerMirroredStrategy with a loop of one's own: Keras's `fit` does not run under it."""
    gang.settle()
    workers = [f"{HOST}:{port}" for port in gang.ports]
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": workers}, "task": {"type": "worker", "index": gang.rank}}
    )
    os.environ["TF_GRPC_REUSE_PORT"] = "true"  # for the port is kept for it
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model, batch = network(gang.network)
        model.optimizer.build(model.trainable_variables)
    _, steps = gang.shape
    dataset = tf.data.Dataset.from_tensors(batch).repeat(steps)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True)) / strategy.num_replicas_in_sync
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def several(iterator: Any) -> Any:
        # Unrolled, as the strategy's collective operations do not run inside a loop of the graph.
        for _ in range(gang.together):
            loss = strategy.run(step, next(iterator))
        return loss

    ends = []
    for _ in range(gang.epochs):
        iterator = iter(strategy.distribute_datasets_from_function(lambda _: dataset))
        for _ in range(steps // gang.together):
            several(iterator)
        ends.append(time.perf_counter())
    return gang.rate(min(np.diff(ends)))


def gloo(gang: Gang) -> float:
    """The hook of ours around Gloo, as PyTorch has it."""
    from datetime import timedelta

    gang.settle()
    import torch
    import torch.distributed as dist

    from spark_nn.keras.sync import Synchroniser

    torch.set_num_threads(1)
    with contextlib.closing(gang.join()) as ring:
        store = dist.TCPStore(HOST, gang.ports[0], len(gang.ports), gang.rank == 0, timedelta(seconds=TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=gang.rank, world_size=len(gang.ports))

        class Gloo(type(ring)):  # type: ignore[misc]
            def all_reduce(self, buffer: Any, op: str = "sum") -> None:
                dist.all_reduce(torch.from_numpy(buffer.reshape(-1)))
                if op == "mean":
                    buffer /= self.world

        ring.__class__ = Gloo
        model, batch = network(gang.network)
        model.optimizer.build(model.trainable_variables)
        sync = Synchroniser(model, ring, gang.rank)
        sync.start_alike()
        with sync.averaged_gradients():
            found = fitted(gang, model, batch, [sync.callback()])
        dist.destroy_process_group()
    return found


def measured(line: Callable[[Gang], float], gang: Gang, workers: int) -> float:
    """Samples per second of all workers together."""
    # A pool of one thread holds up what TensorFlow's own strategies run; a user of theirs would leave it as it is.
    environment = dict(os.environ) if line is mirrored else child_environment(os.environ, 1, [])
    if line is alone:
        return float(together(line, [(gang,)], environment)[0])
    with contextlib.ExitStack() as stack:
        listeners = [listen(HOST) for _ in range(workers)]
        # Bound, so that nobody else is given the port, but shared with the peer's server; and never listening.
        places = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for place in places:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            place.bind((HOST, 0))
        whole = replace(
            gang,
            secret=secrets.token_bytes(32),
            addresses=tuple(each.getsockname() for each in listeners),
            ports=tuple(each.getsockname()[1] for each in places),
        )
        calls = [(replace(whole, rank=rank, listener=listeners[rank]),) for rank in range(workers)]
        return float(sum(together(line, calls, environment)))


def in_step(arguments: argparse.Namespace) -> None:
    """Measure workers in step, and print a table per network."""
    one = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    os.environ.update(dict.fromkeys(one, "1"), KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="")
    workers = arguments.workers
    lines: dict[str, Callable[[Gang], float]] = {
        ALONE: alone,
        "not in step": unsynchronised,
        "ours, ring": functools.partial(ours, engine="ring"),
        "ours, TensorFlow's collectives": functools.partial(ours, engine="native"),
        "MultiWorkerMirroredStrategy, own loop": mirrored,
    }
    if importlib.util.find_spec("torch"):
        lines["Gloo in our hook"] = gloo
    chosen = {name: line for name, line in lines.items() if line is alone or arguments.only in name}
    for name in arguments.networks:
        gang = Gang(name, arguments.steps_per_execution, arguments.epochs)
        rounds = [{line: measured(run, gang, workers) for line, run in chosen.items()} for _ in range(arguments.rounds)]
        ideal = "ideal"
        for each in rounds:
            each[ideal] = workers * each[ALONE]
        title = f"{workers} workers x 1 core, {name}, batches of {gang.shape[0]} per worker"
        title += f", {arguments.steps_per_execution} steps per call"
        show(title, "samples/s", rounds, ideal)


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
    arguments = parser.parse_args()
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
