"""Gradients averaged by TensorFlow's own operations: two processes on the loopback, without Spark."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spark_nn.gang.ring import Ring, listen

pytestmark = pytest.mark.timeout(120)

WORLD = 2
TIMEOUT = 8.0
STEPS = 6


def data():
    draw = np.random.default_rng(3)
    x = draw.standard_normal((STEPS * 32, 10)).astype(np.float32)
    return x, (x[:, :1] > 0).astype(np.float32)


def model():
    import keras

    keras.utils.set_random_seed(5)
    made = keras.Sequential([keras.Input((10,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    made.compile(keras.optimizers.Adam(0.01), "mse")
    made.optimizer.build(made.trainable_variables)
    return made


def member(order):
    """One rank: train on its share of every batch, leave its weights, or the error that ended it."""
    import keras
    import tensorflow as tf

    from spark_nn.keras import native
    from spark_nn.keras.sync import Synchroniser

    rank = order["rank"]
    ring = Ring.connect(
        rank=rank,
        addresses=[tuple(address) for address in order["addresses"]],
        listener=socket.socket(fileno=order["listener"]),
        secret=bytes.fromhex(order["secret"]),
        timeout=TIMEOUT,
    )
    averager = native.averager("native", ring, "127.0.0.1", TIMEOUT)
    assert isinstance(averager, native.NativeAverager)
    made = model()
    sync = Synchroniser(made, ring, rank, averager)
    sync.start_alike()
    made.steps_per_execution = order["together"]
    x, y = (part.reshape(STEPS, WORLD, -1, part.shape[-1])[:, rank] for part in data())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).repeat(order["repeat"])
    news = Path(order["folder"]) / f"{rank}"
    began = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: news.with_suffix(".began").touch())
    try:
        with sync.averaged_gradients():
            made.fit(batches, epochs=2, verbose=0, callbacks=[sync.callback(), began])
    except Exception as error:  # noqa: BLE001
        news.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    else:
        np.savez(news.with_suffix(".npz"), *made.get_weights())
        ring.barrier()
        ring.close()
    os._exit(0)


class Ranks:
    """The ranks, each in a process; whatever happens, none is left."""

    def __init__(self, folder, together=1, repeat=1):
        listeners = [listen("127.0.0.1") for _ in range(WORLD)]
        shared = {
            "addresses": [listener.getsockname() for listener in listeners],
            "secret": secrets.token_hex(16),
            "folder": str(folder),
            "together": together,
            "repeat": repeat,
        }
        env = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.processes = []
        for rank, listener in enumerate(listeners):
            order = {**shared, "rank": rank, "listener": listener.fileno()}
            command = [sys.executable, "-m", "tests.keras.test_native", json.dumps(order)]
            self.processes.append(subprocess.Popen(command, env=env, pass_fds=[listener.fileno()]))
            listener.close()

    def __enter__(self):
        return self.processes

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("together", [1, 3])
def test_two_ranks_equal_one_process_and_each_other(tmp_path, together):
    with Ranks(tmp_path, together) as processes:
        for process in processes:
            assert process.wait(timeout=90) == 0
    for error in tmp_path.glob("*.error"):
        raise AssertionError(error.read_text())
    ours, theirs = (list(np.load(tmp_path / f"{rank}.npz").values()) for rank in range(WORLD))
    expected = model()
    x, y = data()
    expected.fit(x, y, batch_size=32, epochs=2, verbose=0, shuffle=False)
    for one, other, alone in zip(ours, theirs, expected.get_weights(), strict=True):
        assert one.tobytes() == other.tobytes()
        assert np.abs(one - alone).max() <= 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other(tmp_path, victim):
    with Ranks(tmp_path, together=4, repeat=100_000) as processes:
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("*.began"))) < WORLD:
            assert time.monotonic() < until
            time.sleep(0.1)
        os.kill(processes[victim].pid, signal.SIGKILL)
        processes[1 - victim].wait(timeout=15)
    assert f"PeerLost: rank {victim} " in (tmp_path / f"{1 - victim}.error").read_text()


@pytest.mark.parametrize(
    ("engine", "cards", "expected"),
    [
        ("auto", [1, 1, 2], "native"),
        ("auto", [1, 0], "ring"),
        ("auto", [0, 0], "ring"),
        ("native", [0, 1], "native"),
        ("ring", [1, 1], "ring"),
    ],
)
def test_the_engine_follows_the_cards(engine, cards, expected):
    from spark_nn.gang.collective import engine_for

    assert engine_for(engine, cards) == expected


if __name__ == "__main__":
    member(json.loads(sys.argv[1]))
