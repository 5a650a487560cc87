"""Workers that train in step: `python benchmarks/train.py --workers 2`.

One table per network: samples per second of N processes with a core each, as a share of what N times one core would
reach if they had nothing to tell each other. All lines train the same network on the same batch in memory, with one
thread to compute and as many steps per call; the batch is that of one worker. Every line is the median of three rounds,
measured in turn, each in fresh processes, of which the fastest epoch but the first counts.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from peers import FEATURES, show, together

from spark_nn.gang.collective import Collective
from spark_nn.gang.ring import Ring, listen
from spark_nn.gang.worker import child_environment

ALONE = "one worker, one core"
HOST = "127.0.0.1"
TIMEOUT = 60.0


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
    spin : bool
        Whether it has that core to itself.
    """

    network: str
    together: int
    epochs: int
    secret: bytes = b""
    addresses: tuple[Any, ...] = ()
    ports: tuple[int, ...] = ()
    listener: Any = None
    rank: int = 0
    spin: bool = True

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
            spin=self.spin,
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


def repeated(batch: Any, steps: int) -> Any:
    """One batch again and again."""
    import tensorflow as tf

    # The thread that tunes pipelines, where there is but one core, is waited for at the end of an epoch: half a second.
    options = tf.data.Options()
    options.autotune.enabled = False
    return tf.data.Dataset.from_tensors(batch).repeat(steps).with_options(options)


def fitted(gang: Gang, model: Any, batch: Any, callbacks: Sequence[Any] = ()) -> float:
    """Let Keras train, and return the samples per second of this rank's fastest epoch but the first."""
    import keras

    _, steps = gang.shape
    model.steps_per_execution = gang.together
    model.jit_compile = False
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    dataset = repeated(batch, steps)
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
    dataset = repeated(batch, steps)

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


def each_rank(line: Callable[[Gang], Any], gang: Gang, workers: int) -> list[Any]:
    """What a line returns on each of so many ranks."""
    # A pool of one thread holds up what TensorFlow's own strategies run; a user of theirs would leave it as it is.
    environment = dict(os.environ) if line is mirrored else child_environment(os.environ, 1, [])
    if line is alone:
        return together(line, [(gang,)], environment)
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
        return together(line, calls, environment)


def measured(line: Callable[[Gang], float], gang: Gang, workers: int) -> float:
    """Samples per second of all workers together."""
    return float(sum(each_rank(line, gang, workers)))


def one_thread() -> None:
    """Let the processes that are started from now on compute with one thread, on CPUs."""
    threads = ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    os.environ.update(dict.fromkeys(threads, "1"), KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="")


def in_step(arguments: argparse.Namespace) -> None:
    """Measure workers in step, and print a table per network."""
    one_thread()
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
