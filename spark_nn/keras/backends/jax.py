"""Keras on JAX: a step is compiled in two halves, and between them the gradients are averaged by Python.

One function with a call of Python in its midst would wait for itself where there is one core, and not be fused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from spark_nn.columns import Tensor
from spark_nn.errors import ParamError
from spark_nn.gang.collective import Collective, Engine
from spark_nn.keras.backends import replaced
from spark_nn.keras.backends.host import TOGETHER, Averager, Watch, check_range, dataset, first
from spark_nn.keras.backends.plain import buffers, random_state, set_random_state
from spark_nn.keras.describe import by_name
from spark_nn.keras.rate import learning_rate
from spark_nn.share import Share

__all__ = [
    "TOGETHER",
    "Averager",
    "Forward",
    "Step",
    "Watch",
    "averager",
    "buffers",
    "dataset",
    "first",
    "methods",
    "prepare",
    "random_state",
    "ready",
    "set_random_state",
    "start",
    "tensors",
]


def prepare() -> None:
    """Everything is imported with this room."""


def start(share: Share) -> str:
    """Ready a process that scores for a task's share of the machine; return Keras's name of its device.

    JAX takes these settings when it first computes: a worker that scores again keeps the first ones.
    """
    os.environ.setdefault("NPROC", str(share.cpus))  # what XLA takes for the number of cores
    if share.gpu is None:
        _no_cards()
        return "cpu:0"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return f"gpu:{share.card(len(jax.devices()))}" if jax.default_backend() == "gpu" else "cpu:0"


def _no_cards() -> None:
    """Let JAX look for none: it would try one kind after the other."""
    jax.config.update("jax_platforms", "cpu")


def tensors(arrays: Any) -> Any:
    """Arrays as tensors."""
    return keras.tree.map_structure(jnp.asarray, arrays)


def check_block(tensors: Sequence[Tensor], block: Mapping[str, np.ndarray]) -> None:
    """Refuse rows of a dataset with whole numbers that JAX, which drops their upper halves, would take for others."""
    for tensor in tensors:
        names = ", ".join(map(repr, tensor.columns))
        what = f"column {names}" if len(tensor.columns) == 1 else f"one of the columns {names}"
        _check_range(what, block[tensor.name])


def _check_parts(kind: str, parts: Any) -> None:
    """The same for a model's inputs, or its labels: one array, or several by name or in order."""
    several = dict(enumerate(parts)) if isinstance(parts, (tuple, list)) else parts
    for name, array in (several if isinstance(several, dict) else {"": several}).items():
        _check_range(f"the model's only {kind}" if name == "" else f"the model's {kind} {name!r}", array)


def _check_range(what: str, array: np.ndarray) -> None:
    check_range(what, array, jax.dtypes.canonicalize_dtype(array.dtype) if array.dtype.kind in "iu" else array.dtype)


class Forward:
    """A model that predicts blocks of rows, compiled once for each of few sizes.

    Parameters
    ----------
    model : keras.Model
        The model.
    device : str
        Keras's name of the device to run it on.
    """

    def __init__(self, model: Any, device: str) -> None:
        self._device = device
        self._full = 0
        self._state = [
            [variable.value for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        ]

        def forward(trained: Any, others: Any, block: Any) -> dict[str, Any]:
            outputs, _ = model.stateless_call(trained, others, block, training=False)
            return by_name(model, outputs)

        self._forward = jax.jit(forward)

    def __call__(self, part: dict[str, np.ndarray], named: bool, fixed: int | None) -> dict[str, np.ndarray]:
        """The outputs of some rows by their names; the only input and the only output have the empty one."""
        _check_parts("input", part)
        rows = len(next(iter(part.values())))
        size = fixed or self._size(rows)
        if size > rows:  # the last row stands in for those that lack
            part = {
                name: np.concatenate([array, np.repeat(array[-1:], size - rows, axis=0)])
                for name, array in part.items()
            }
        with keras.device(self._device):
            found = self._forward(*self._state, part if named else part[""])
            return {name: np.asarray(tensor)[:rows] for name, tensor in found.items()}

    def _size(self, rows: int) -> int:
        """To how many rows so many are filled up: to as many as came at most, or a power of two below."""
        self._full = max(self._full, rows)
        return int(min(self._full, 1 << (rows - 1).bit_length()))


class Step:
    """A compiled model that measures batches: its metrics take them in.

    Parameters
    ----------
    model : keras.Model
        Compiled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ready = False
        self._compiled = jax.jit(model.test_step)

    def __call__(self, data: tuple[Any, ...], known: bool) -> None:
        """Take in a batch; a number of rows that is not known may never come again, and is worth no compiling."""
        for kind, parts in zip(("input", "label"), data, strict=False):
            _check_parts(kind, parts)
        model = self._model
        if not self._ready:
            # Keras makes a metric's variables when it meets the first batch, and must not do so in the step.
            model.test_on_batch(*data)
            model.reset_metrics()
            self._ready = True
        places = (model.trainable_variables, model.non_trainable_variables, model.metrics_variables)
        state = tuple([variable.value for variable in variables] for variables in places)
        _, state = (self._compiled if known else model.test_step)(state, tensors(data))
        for variables, values in zip(places[1:], state[1:], strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def averager(engine: Engine, collective: Collective, address: str, timeout: float) -> Averager:
    """What averages the gradients; see the room of TensorFlow."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        _no_cards()
    return Averager(collective)


def methods(
    optimizers: Sequence[Any], model: keras.Model, averager: Averager | None, watch: Watch | None
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Objects, and the methods that they need for the time of a training: see the room of TensorFlow."""
    original = model.make_train_function

    def make_train_function(force: bool = False) -> None:
        if model.train_function is not None and not force:
            return
        if averager is not None:
            model.train_function = _repeated(model, _Halves(model, averager, watch))
        elif watch is not None:
            with replaced(model, "steps_per_execution", 1):  # so that every step is seen
                original(force)
            model.train_function = _repeated(model, _watched(model, model.train_function, watch))

    yield model, "make_train_function", make_train_function


def ready(model: keras.Model) -> None:
    """Settings of a compiled model that several ranks need: none."""


def _repeated(model: keras.Model, step: Callable[[Any, Any], Any]) -> Callable[[Any, Iterator[Any]], Any]:
    """A step as Keras calls it: as many times as the model was compiled for, or until there are no batches left."""

    def train_function(state: Any, batches: Iterator[Any]) -> Any:
        logs, state = step(state, next(batches))
        for _ in range(model.steps_per_execution - 1):
            batch = next(batches, None)
            if batch is None:
                break
            logs, state = step(state, batch)
        return logs, state

    return train_function


def _watched(model: keras.Model, original: Callable[..., Any], watch: Watch) -> Callable[[Any, Any], Any]:
    """A step of Keras's own, whose loss is looked at: its mean stays infinite once it is."""

    def step(state: Any, batch: Any) -> Any:
        logs, state = original(state, iter([batch]))
        bad = "loss" in logs and not np.isfinite(np.asarray(logs["loss"])).all()
        watch.note(bad, _rate(model.optimizer, state[2], 1) if bad else np.nan)
        return logs, state

    return step


class _Halves:
    """A step of a model in two halves: up to the gradients, and from their means over the ranks on.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    averager : Averager
        What averages between the two.
    watch : Watch or None
        What wants to know of losses that are not finite.
    """

    def __init__(self, model: keras.Model, averager: Averager, watch: Watch | None) -> None:
        self._model = model
        self._averager = averager
        self._watch = watch
        fused = model.jit_compile and not model.run_eagerly
        # Of a state that is handed on, the memory is used again.
        self._first = jax.jit(self._differentiated, donate_argnums=(2, 3)) if fused else self._differentiated
        self._second = jax.jit(self._applied, donate_argnums=(0, 1)) if fused else self._applied

    def __call__(self, state: Any, batch: Any) -> Any:
        """What Keras's own step returns: logs, and the next state."""
        trained, others, optimizer, metrics = state
        flat, logs, others, metrics = self._first(trained, optimizer, others, metrics, batch)
        given = np.asarray(flat)
        mean = np.empty_like(given)  # a new one: JAX may compute with it where it lies, and later
        self._averager.mean([given], [mean])
        if self._watch is not None:
            bad = bool(mean[-1] > 0)
            self._watch.note(bad, _rate(self._model.optimizer, optimizer, 0) if bad else np.nan)
        trained, optimizer = self._second(trained, optimizer, mean)
        return logs, (trained, others, optimizer, metrics)

    def _differentiated(self, trained: Any, optimizer: Any, others: Any, metrics: Any, batch: Any) -> Any:
        """Keras's step, or the user's, up to where it would apply the gradients; these, and the rest of the state."""
        caught: list[Any] = []

        def stateless_apply(optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
            caught.append(grads)
            return trainable_variables, optimizer_variables

        with replaced(self._model.optimizer, "stateless_apply", stateless_apply):
            logs, state = self._model.train_step((trained, others, optimizer, metrics), batch)
        left = all(
            one is other
            for given, found in ((trained, state[0]), (optimizer, state[2]))
            for one, other in zip(given, found, strict=True)
        )
        if len(caught) != 1 or not left:
            raise ParamError(
                "the model's train_step cannot be shared by several workers on JAX: it must call "
                "self.optimizer.stateless_apply once, and return the variables that this returns; or set "
                "backend='tensorflow' or 'torch', or numWorkers=1"
            )
        wide = self._wide(trained)
        # The news of a bad loss travels with the gradients, so that all ranks know it at the same step.
        bad = jnp.logical_not(jnp.all(jnp.isfinite(logs["loss"]))) if "loss" in logs else jnp.zeros((), bool)
        flat = jnp.concatenate([*(jnp.ravel(grad).astype(wide) for grad in caught[0]), bad.astype(wide)[None]])
        return flat, logs, state[1], state[3]

    def _applied(self, trained: Any, optimizer: Any, flat: Any) -> Any:
        """The weights and the optimizer's variables after a step by these gradients."""
        grads, start = [], 0
        for value in trained:
            grads.append(jnp.reshape(flat[start : start + value.size], value.shape).astype(value.dtype))
            start += value.size
        return self._model.optimizer.stateless_apply(optimizer, grads, trained)

    @staticmethod
    def _wide(values: Sequence[Any]) -> Any:
        """Halves add up in single precision; doubles stay doubles."""
        return jnp.float64 if any(value.dtype == jnp.float64 for value in values) else jnp.float32


def _rate(optimizer: Any, values: Sequence[Any], back: int) -> float:
    """The learning rate so many steps before the optimizer's variables had these values."""
    pairs = [
        (variable, value - back if variable is optimizer._iterations else value)
        for variable, value in zip(optimizer.variables, values, strict=True)
    ]
    with keras.StatelessScope(state_mapping=pairs):
        return learning_rate(optimizer)
