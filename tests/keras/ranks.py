"""A gang without Spark: processes that import Keras once and train many small cases, alone or in step.

Started with ``python -m tests.keras.ranks DESCRIPTOR``; the descriptor is one end of a pipe to the test. The cases
are functions of `tests.keras.test_sync`, named by the test.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import secrets
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "NPROC": "1",
}
BATCH = 12  # what 2 and 3 ranks share evenly, as they do the last, smaller batch
ROWS = 5 * BATCH + 6
SILENCE = 60.0  # seconds that a rank may keep the others waiting


@dataclass
class Case:
    """What to fit, and on what."""

    model: Any  # compiled
    x: Any  # an array, or a dict of arrays
    y: Any
    weight: Any = None
    validation: Any = None  # the same, as a tuple
    epochs: int = 2
    callbacks: list[Any] = field(default_factory=list)
    probe: Any = None  # called with the model after the fit, for what else to compare
    sync: dict[str, Any] = field(default_factory=dict)  # settings of the synchroniser
    first_step: int = 0


@dataclass
class Outcome:
    """What a fit gave on one rank."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    optimizer: list[np.ndarray] = field(default_factory=list)
    digest: bytes = b""
    history: dict[str, list[Any]] = field(default_factory=dict)
    probe: Any = None
    error: str = ""  # its traceback


# ---------------------------------------------------------------- in the rank's process


def share(tree: Any, rank: int, world: int, batch: int = BATCH) -> Any:
    """This rank's slice of every global batch, one after the other."""
    import keras

    def of(array: np.ndarray) -> np.ndarray:
        batches = [array[first : first + batch] for first in range(0, len(array), batch)]
        return np.concatenate([each[rank * len(each) // world : (rank + 1) * len(each) // world] for each in batches])

    return keras.tree.map_structure(of, tree)


def fit(case: Case, collective: Any, rank: int, world: int) -> Outcome:
    """Fit as a worker does; where there is no collective, with plain Keras alone."""
    from spark_nn.keras import backends
    from spark_nn.keras.sync import Synchroniser
    from spark_nn.keras.tally import array_of

    model = case.model
    settings: dict[str, Any] = {"epochs": case.epochs, "verbose": 0, **batches(case, rank, world)}
    if collective is None:
        history = model.fit(**settings, callbacks=case.callbacks).history
    else:
        if world > 1:
            backends.current().ready(model)
        sync = Synchroniser(model, collective, rank, **case.sync)
        sync.first_step = case.first_step
        sync.start_alike()
        with sync.averaged_gradients():
            history = model.fit(**settings, callbacks=[sync.callback(), *case.callbacks]).history
    return Outcome(
        weights={weight.path: array_of(weight) for weight in model.weights},
        optimizer=[array_of(variable) for variable in model.optimizer.variables],
        digest=Synchroniser(model, collective, rank).digest(),
        history=history,
        probe=case.probe and case.probe(model),
    )


def batches(case: Case, rank: int, world: int) -> dict[str, Any]:
    """The rows as ``fit`` takes them on this process's backend."""
    import keras

    parts = (case.x, case.y, case.weight)
    if keras.backend.backend() != "tensorflow":
        x, y, weight = (part if part is None else share(part, rank, world) for part in parts)
        held = case.validation and tuple(share(case.validation, rank, world))
        return {
            **{"x": x, "y": y, "sample_weight": weight, "batch_size": BATCH // world, "shuffle": False},
            **({} if held is None else {"validation_data": held, "validation_batch_size": BATCH // world}),
        }
    import tensorflow as tf

    def dataset(parts: tuple[Any, ...]) -> tf.data.Dataset:
        parts = tuple(part for part in parts if part is not None)
        return tf.data.Dataset.from_tensor_slices(share(parts, rank, world)).batch(BATCH // world)

    return {"x": dataset(parts), "validation_data": case.validation and dataset(case.validation)}


def build(name: str, arguments: dict[str, Any]) -> Case:
    """The case, the same on every rank."""
    import keras

    from tests.keras import test_backends, test_sync

    keras.backend.clear_session(free_memory=False)  # to look for garbage would take as long as to train
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(7)
    case: Case = getattr(test_sync if hasattr(test_sync, name) else test_backends, name)(**arguments)
    if not case.model.built:
        case.model(keras.tree.map_structure(lambda array: array[:1], case.x))
    optimizer = case.model.optimizer
    if not optimizer.built:
        optimizer.build(case.model.trainable_variables)
    return case


def by_hand(name: str, arguments: dict[str, Any], world: int) -> Outcome:
    """The ranks' computation, one after the other in one process and step by step.

    It is what a gang must agree with where one process on the global batch computes something else: layers that
    normalise over the batch, and halves, whose sums over the batch are rounded.
    """
    import keras
    import tensorflow as tf

    cases = [build(name, arguments) for _ in range(world)]
    models, first = [case.model for case in cases], cases[0]
    parts = [share((first.x, first.y), rank, world) for rank in range(world)]

    @tf.function
    def gradients(rank: int, x: Any, y: Any) -> list[Any]:
        model = models[rank]
        with tf.GradientTape() as tape:
            loss = model.optimizer.scale_loss(model.compute_loss(x, y, model(x, training=True)))
        return tape.gradient(loss, model.trainable_weights)

    for _ in range(first.epochs):
        for start in range(0, len(parts[0][0]), BATCH // world):
            step = slice(start, start + BATCH // world)
            every = [gradients(rank, x[step], y[step]) for rank, (x, y) in enumerate(parts)]
            mean = [np.mean([np.asarray(grad) for grad in grads], axis=0) for grads in zip(*every, strict=True)]
            for model in models:
                model.optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in mean], model.trainable_weights)
        for variables in zip(*(model.non_trainable_weights for model in models), strict=True):
            value = np.mean([np.array(variable) for variable in variables], axis=0)
            for variable in variables:
                variable.assign(value)
    return Outcome(
        weights={weight.path: np.array(weight) for weight in models[0].weights},
        optimizer=[np.array(variable) for variable in models[0].optimizer.variables],
        probe=first.probe and first.probe(models[0]),
    )


def serve(pipe: Connection) -> None:
    """Train what the test asks for until it hangs up."""
    import spark_nn.keras.sync  # noqa: F401  # and with it all that takes long
    from spark_nn.gang.collective import Alone
    from spark_nn.gang.ring import Ring, listen

    gc.freeze()
    while True:
        try:
            way, name, arguments, rank, world = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        collective: Any = Alone() if way == "gang" else None
        if way == "gang" and world > 1:
            listener = listen("127.0.0.1")
            pipe.send(listener.getsockname())
            addresses, secret = pipe.recv()
            collective = Ring.connect(rank=rank, addresses=addresses, listener=listener, secret=secret, timeout=SILENCE)
        try:
            if way == "hand":
                outcome = by_hand(name, arguments, world)
            else:
                outcome = fit(build(name, arguments), collective, rank, world)
            pipe.send(outcome)
        except Exception as error:  # noqa: BLE001
            if collective is not None:
                collective.abort(repr(error))
            pipe.send(Outcome(error=traceback.format_exc()))
        if collective is not None:
            with contextlib.suppress(Exception):
                collective.close()


# ---------------------------------------------------------------- in the test's process


class Ranks:
    """Three processes: two or all of them are a gang, any of them a single process to compare with.

    Or as many as are asked for, with Keras on another backend.
    """

    def __init__(self, backend: str = "tensorflow", processes: int = 3) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.trained: dict[tuple[str, str], Outcome] = {}
        for _ in range(processes):
            ours, theirs = multiprocessing.Pipe()
            with theirs:
                command = [sys.executable, "-m", "tests.keras.ranks", str(theirs.fileno())]
                environment = {**os.environ, **ENVIRONMENT, "KERAS_BACKEND": backend}
                self.processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment))
            self.pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.wait()

    def gang(self, world: int, case: str, /, **arguments: Any) -> list[Outcome]:
        """What the case gives on each rank of a gang, errors included."""
        pipes = self.pipes[:world]
        for rank, pipe in enumerate(pipes):
            pipe.send(("gang", case, arguments, rank, world))
        if world > 1:
            addresses, secret = self._receive(pipes), secrets.token_bytes(16)
            for pipe in pipes:
                pipe.send((addresses, secret))
        return self._receive(pipes)

    def alike(self, world: int, case: str, /, **arguments: Any) -> list[Outcome]:
        """The same, where all ranks must end with the same bits."""
        outcomes = self.gang(world, case, **arguments)
        for outcome in outcomes:
            assert not outcome.error, outcome.error
            assert outcome.digest == outcomes[0].digest
            for one, other in zip(outcome.optimizer, outcomes[0].optimizer, strict=True):
                assert one.tobytes() == other.tobytes()
        return outcomes

    def single(self, case: str, /, **arguments: Any) -> Outcome:
        """What plain Keras gives in one process on the global batches; asked for again, it is not trained again."""
        key = case, repr(sorted(arguments.items()))
        if key not in self.trained:
            self.trained[key] = self._one("single", case, arguments, 1)
        return self.trained[key]

    def both(self, world: int, case: str, /, **arguments: Any) -> tuple[list[Outcome], Outcome]:
        """A gang and a single process on the same case; at the same time where there is a process left."""
        key = case, repr(sorted(arguments.items()))
        if world == len(self.pipes) or key in self.trained:
            return self.alike(world, case, **arguments), self.single(case, **arguments)
        self.pipes[-1].send(("single", case, arguments, 0, 1))
        try:
            outcomes = self.alike(world, case, **arguments)
        finally:
            (self.trained[key],) = self._receive(self.pipes[-1:])
        assert not self.trained[key].error, self.trained[key].error
        return outcomes, self.trained[key]

    def by_hand(self, world: int, case: str, /, **arguments: Any) -> Outcome:
        """What the ranks' computations give when one process makes them in turn."""
        return self._one("hand", case, arguments, world)

    def _one(self, way: str, case: str, arguments: dict[str, Any], world: int) -> Outcome:
        self.pipes[-1].send((way, case, arguments, 0, world))
        (outcome,) = self._receive(self.pipes[-1:])
        assert not outcome.error, outcome.error
        return outcome

    def _receive(self, pipes: list[Connection], seconds: float = 110.0) -> list[Any]:
        """One message of each, within the time limit."""
        until, found = time.monotonic() + seconds, {}
        while len(found) < len(pipes):
            ready = wait([pipe for pipe in pipes if pipe not in found], max(0.0, until - time.monotonic()))
            assert ready, f"{len(pipes) - len(found)} of {len(pipes)} processes gave no answer in {seconds:g} s"
            found.update({pipe: pipe.recv() for pipe in ready})
        return [found[pipe] for pipe in pipes]


if __name__ == "__main__":
    from tests.keras import ranks  # what it sends is of the module that the test imports, not of __main__

    ranks.serve(Connection(int(sys.argv[1])))
