"""Executor side of scoring: a Keras model that predicts.

The driver imports this module to name the loader; Keras and its backend are imported only on the executor.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spark_nn.columns import Arrays
from spark_nn.errors import ModelFileError
from spark_nn.keras import backends, codec
from spark_nn.keras.customs import Find
from spark_nn.scoring.batches import rows_for
from spark_nn.share import Share


@contextlib.contextmanager
def _stderr_muted() -> Iterator[None]:
    """Keep native code from writing to standard error: TensorFlow greets there whatever its log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def start(backend: str, share: Share) -> str:
    """Import Keras, quietly, for a task's share of the machine; return its name of the device to use.

    A process holds one backend, and Spark hands a Python worker from job to job. Where Keras is there already, its
    backend is used: a model's file does not depend on it.

    Parameters
    ----------
    backend : {"tensorflow", "jax", "torch"}
        The one that is wanted.
    share : Share
        What the task may use of the machine.

    Raises
    ------
    ClusterError
        The backend is not installed here.
    """
    if "keras" in sys.modules:
        return str(backends.current().start(share))
    os.environ.update(backends.environment(backend))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _stderr_muted():
        return str(backends.room(backend).start(share))


@contextlib.contextmanager
def own_backend(wanted: str) -> Iterator[None]:
    """Say what an error in the block may come of where Keras does not run on the backend that was wanted.

    Raises
    ------
    ModelFileError
        An error was raised, on another backend.
    """
    import keras

    try:
        yield
    except Exception as error:
        if (found := keras.backend.backend()) == wanted:
            raise
        raise ModelFileError(
            f"the model wants backend={wanted!r}, and this Python worker had imported Keras on {found!r} before, where "
            f"the model does not run: {type(error).__name__}: {error}. Score models of different backends in sessions "
            "of their own, or set spark.python.worker.reuse=false"
        ) from error


def rows_at_once(model: Any) -> int:
    """Rows that go through a model at once with good speed and little memory."""
    return rows_for(max((_elements(tensor) for tensor in _tensors(model)), default=1))


def load_predictor(path: str, share: Share, backend: str = "tensorflow", find: Find = codec.nothing) -> KerasPredictor:
    """The predictor of a ``.keras`` file.

    Parameters
    ----------
    path : str
        A local file.
    share : Share
        What it may use of the machine: the backend gets as many threads as the task has cores.
    backend : {"tensorflow", "jax", "torch"}
        What to run it on, where Keras is not there yet.
    find : callable
        Finds custom objects by their names.
    """
    device = start(backend, share)
    import keras

    with own_backend(backend), keras.device(device):
        return KerasPredictor(codec.load_model(path, find), device, backend)


class KerasPredictor:
    """Predicts blocks of rows, whatever number of rows a block has.

    Parameters
    ----------
    model : keras.Model
        The model.
    device : str
        Keras's name of the device to run it on.
    backend : {"tensorflow", "jax", "torch"}
        The one that was wanted.

    Attributes
    ----------
    rows : int
        Rows that go through it at once with good speed and little memory.
    """

    def __init__(self, model: Any, device: str, backend: str = "tensorflow") -> None:
        self.rows = rows_at_once(model)
        self._wanted = backend
        # A model's Input may name a batch size. Few mean it: what was built by calling it has that of the call.
        self._named = next((int(each.shape[0]) for each in getattr(model, "inputs", None) or () if each.shape[0]), None)
        self._fixed: int | None = None
        self._forward = backends.current().Forward(model, device)

    def __call__(self, inputs: Arrays) -> Arrays:
        """Predict a block of rows."""
        with own_backend(self._wanted):
            if self._named is None or self._fixed is not None:
                return self._predict(inputs)
            try:
                return self._predict(inputs)
            except Exception:  # noqa: BLE001  (whatever comes of another number of rows; else it comes again)
                self._fixed = self._named
                return self._predict(inputs)

    def _predict(self, inputs: Arrays) -> Arrays:
        named = isinstance(inputs, dict)
        arrays: dict[str, np.ndarray] = inputs if isinstance(inputs, dict) else {"": inputs}
        total = len(next(iter(arrays.values())))
        pieces: list[dict[str, np.ndarray]] = []
        for start in range(0, total, self._fixed or total):
            part = {name: self._cut(array, start) for name, array in arrays.items()}
            pieces.append(self._forward(part, named, self._fixed))
        outputs = {name: np.concatenate([each[name] for each in pieces])[:total] for name in pieces[0]}
        return outputs.get("", outputs)

    def _cut(self, array: np.ndarray, start: int) -> np.ndarray:
        """The rows that go through at once; where it must be so many, the last one stands in for those that lack."""
        if self._fixed is None:
            return array
        part = array[start : start + self._fixed]
        return np.concatenate([part, np.repeat(part[-1:], self._fixed - len(part), axis=0)])


def _tensors(model: Any) -> Iterator[Any]:
    """What goes into a network and what its layers put out, as far as Keras knows it before it runs."""
    import keras

    yield from getattr(model, "inputs", None) or ()
    for layer in getattr(model, "layers", ()):
        yield from _tensors(layer)
        outputs: Any = ()
        with contextlib.suppress(AttributeError, ValueError):  # it was never called, or more than once
            outputs = layer.output
        yield from (each for each in keras.tree.flatten(outputs) if hasattr(each, "shape"))


def _elements(tensor: Any) -> int:
    return int(np.prod([size or 1 for size in tensor.shape[1:]]))
