"""Executor side of an evaluation: a compiled Keras model that counts what its loss and metrics need.

The driver imports this module to name the loader, and to see whether a model's file is compiled; Keras and its backend
are imported only on the executor.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from spark_nn.columns import Arrays
from spark_nn.errors import ModelFileError
from spark_nn.keras import backends, codec, predict
from spark_nn.keras.customs import Find
from spark_nn.keras.describe import by_name, other_reduction
from spark_nn.scoring.batches import slices
from spark_nn.share import Share

_CURE = (
    "compile the native model (the property `model`) with what its file can hold, a loss and metrics by their names or "
    "of Keras's own classes, and measure with KerasModel.fromKeras(native)"
)


def check_compiled(file: Path) -> None:
    """Driver side: refuse a model file that names no loss.

    Raises
    ------
    ModelFileError
        The model was saved without having been compiled.
    """
    with zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read("config.json"))
    compiled = config.get("compile_config") or {}
    # What a class of the user's own keeps of its compile(), Keras alone can read.
    if not compiled or compiled.get("loss", "unknown") is None:
        raise ModelFileError(f"the model is not compiled, so there is no loss to evaluate: {_CURE}")


def load_measure(path: str, share: Share, backend: str = "tensorflow", find: Find = codec.nothing) -> KerasMeasure:
    """The measure of a ``.keras`` file.

    Parameters
    ----------
    path : str
        A local file.
    share : Share
        What it may use of the machine.
    backend : {"tensorflow", "jax", "torch"}
        What to run it on, where Keras is not there yet.
    find : callable
        Finds custom objects by their names.

    Raises
    ------
    ModelFileError
        The file does not hold the loss or a metric, or the loss is not a mean over rows.
    """
    device = predict.start(backend, share)
    import keras

    with predict.own_backend(backend), keras.device(device):
        try:
            model = codec.load_model(path, find, compiled=True)
        except (TypeError, ValueError, ModelFileError) as error:
            if keras.backend.backend() != backend:
                raise  # of the other backend, more likely than of the file
            raise ModelFileError(
                "the model's loss or one of its metrics is a function or class that its file does not hold: give it "
                f"as customObjects, or {_CURE} "
                f"({error})"
            ) from error
    if (found := other_reduction(model.loss)) is not None:
        raise ModelFileError(
            f"the model's loss {found}, and its value would depend on how the rows are partitioned: use "
            f"'sum_over_batch_size' (Keras's default). For that, {_CURE}"
        )
    return KerasMeasure(model, device, backend)


class KerasMeasure:
    """Counts rows by a model's own ``test_step``.

    Parameters
    ----------
    model : keras.Model
        Compiled.
    device : str
        Keras's name of the device to run it on.
    backend : {"tensorflow", "jax", "torch"}
        The one that was wanted.
    """

    def __init__(self, model: Any, device: str, backend: str = "tensorflow") -> None:
        self._model = model
        self._device = device
        self._wanted = backend
        self._rows = predict.rows_at_once(model)
        self._step: Any = None
        self._sizes: set[int] = set()
        self._outputs: tuple[str, ...] | None = None
        self._total: np.ndarray | None = None
        self._parts = 0

    def reset(self) -> None:
        """Forget what was counted."""
        self._model.reset_metrics()
        self._total, self._parts = None, 0

    def add(self, inputs: Arrays, labels: Arrays, weights: np.ndarray | None) -> None:
        """Count rows."""
        import keras

        from spark_nn.keras.tally import tally

        total = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        with predict.own_backend(self._wanted), keras.device(self._device):
            self._prepare(inputs)
            for rows in slices(total, self._rows):
                data = [_cut(inputs, rows), self._ordered(_cut(labels, rows))]
                if weights is not None:
                    data.append(_cut(weights, rows))
                self._step(tuple(data), self._known(min(rows.stop, total) - rows.start))
        # Taken out as doubles, and often: what counts in single precision loses small numbers beside large ones.
        self._take(tally(self._model), 1)
        self._model.reset_metrics()

    def state(self) -> bytes:
        """What was counted: a line of JSON that describes the variables, then little-endian doubles."""
        from spark_nn.keras.tally import tally

        total = tally(self._model) if self._total is None else self._total
        header = {"variables": self._variables(), "parts": self._parts}
        return json.dumps(header).encode() + b"\n" + total.astype("<f8").tobytes()

    def merge(self, state: bytes) -> None:
        """Count what another process has counted.

        Raises
        ------
        ModelFileError
            It has counted other things.
        """
        line, _, data = state.partition(b"\n")
        header = json.loads(line)
        if header["variables"] != self._variables():
            raise ModelFileError(
                f"the model counts {self._variables()} here, and {header['variables']} elsewhere: every executor needs "
                "the same version of Keras"
            )
        self._take(np.frombuffer(data, "<f8"), header["parts"])

    def results(self) -> dict[str, Any]:
        """The values of loss and metrics over all that was counted."""
        from spark_nn.keras.tally import results, settle

        if self._total is not None:
            settle(self._model, self._total, self._parts)
        return results(self._model)

    def _take(self, total: np.ndarray, parts: int) -> None:
        self._total = total if self._total is None else self._total + total
        self._parts += parts

    def _variables(self) -> list[list[Any]]:
        """Name, shape and dtype of each variable that counts."""
        return [[each.name, list(each.shape), str(each.dtype)] for each in self._model.metrics_variables]

    def _prepare(self, inputs: Any) -> None:
        """Find out, when the first rows are there, how the model takes labels."""
        if self._step is not None:
            return
        backend = backends.current()
        put_out = self._model(backend.tensors(_cut(inputs, slice(0, 1))), training=False)
        names = tuple(by_name(self._model, put_out))
        if isinstance(put_out, (list, tuple)) and len(names) > 1:
            self._outputs = names
        self._step = backend.Step(self._model)

    def _known(self, rows: int) -> bool:
        """Whether so many rows have come before."""
        known = rows in self._sizes
        self._sizes.add(rows)
        return known

    def _ordered(self, labels: Any) -> Any:
        """Labels as Keras wants them: in the order of the outputs, where the model puts out a list."""
        return labels if self._outputs is None else tuple(labels[name] for name in self._outputs)


def _cut(arrays: Any, rows: slice) -> Any:
    """Rows of arrays."""
    return {name: array[rows] for name, array in arrays.items()} if isinstance(arrays, dict) else arrays[rows]
