"""Executor side of scoring: a Keras model on TensorFlow that predicts.

The driver imports this module to name the loader; Keras and TensorFlow are imported only on the executor.
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
from spark_nn.errors import SparkNNError
from spark_nn.keras import codec
from spark_nn.keras.customs import Find
from spark_nn.keras.describe import by_name
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


def start_tensorflow(share: Share) -> str:
    """Import Keras on TensorFlow, quietly, for a task's share of the machine; return TensorFlow's name of its device.

    Of GPUs all are seen that this process may see, and their memory is taken as it is needed: Spark hands a Python
    worker from task to task, and each of these has a GPU of its own. Where tasks have none, none is seen.

    Raises
    ------
    SparkNNError
        The process has imported Keras on another backend before.
    """
    if "keras" not in sys.modules:
        # The model's file does not depend on the backend, but what runs it here does.
        os.environ["KERAS_BACKEND"] = "tensorflow"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        with _stderr_muted():
            import tensorflow as tf

            tf.config.list_physical_devices()
    import keras
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        raise SparkNNError(
            f"this Python worker has imported Keras on {keras.backend.backend()} before, and scoring needs it on "
            "tensorflow: set KERAS_BACKEND=tensorflow for the executors (spark.executorEnv.KERAS_BACKEND)"
        )
    cards = tf.config.list_physical_devices("GPU")
    # TensorFlow takes these once per process: a worker that scores again keeps the first ones.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(share.cpus)
        tf.config.threading.set_inter_op_parallelism_threads(share.cpus)
        if share.gpu is None:
            tf.config.set_visible_devices([], "GPU")
        for card in cards:
            tf.config.experimental.set_memory_growth(card, True)
    return _device(share, len(tf.config.get_visible_devices("GPU")))


def _device(share: Share, cards: int) -> str:
    """The task's GPU, or the CPU where it has none or TensorFlow, which can use so many, cannot."""
    return f"/GPU:{share.card(cards)}" if share.gpu is not None and cards else "/CPU:0"


def rows_at_once(model: Any) -> int:
    """Rows that go through a model at once with good speed and little memory."""
    return rows_for(max((_elements(tensor) for tensor in _tensors(model)), default=1))


def load_predictor(path: str, share: Share, find: Find = codec.nothing) -> KerasPredictor:
    """The predictor of a ``.keras`` file.

    Parameters
    ----------
    path : str
        A local file.
    share : Share
        What it may use of the machine: TensorFlow gets as many threads as the task has cores.
    find : callable
        Finds custom objects by their names.
    """
    device = start_tensorflow(share)
    import tensorflow as tf

    with tf.device(device):
        return KerasPredictor(codec.load_model(path, find), device)


class KerasPredictor:
    """Predicts blocks of rows by one graph, whatever number of rows a block has.

    Parameters
    ----------
    model : keras.Model
        The model.
    device : str
        TensorFlow's name of the device to run it on.

    Attributes
    ----------
    rows : int
        Rows that go through it at once with good speed and little memory.
    """

    def __init__(self, model: Any, device: str) -> None:
        import tensorflow as tf

        self.rows = rows_at_once(model)
        self._device = device
        # A model's Input may name a batch size. Few mean it: what was built by calling it has that of the call.
        self._named = next((int(each.shape[0]) for each in getattr(model, "inputs", None) or () if each.shape[0]), None)
        self._fixed: int | None = None
        self._graphs: dict[Any, Any] = {}

        # Without autograph, which would leave generated files in the temporary directory: Keras layers need none.
        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def forward(block: Any) -> Any:
            return by_name(model, model(block, training=False))

        self._forward = forward

    def __call__(self, inputs: Arrays) -> Arrays:
        """Predict a block of rows."""
        if self._named is None or self._fixed is not None:
            return self._predict(inputs)
        try:
            return self._predict(inputs)
        except Exception:  # noqa: BLE001  (whatever comes of another number of rows; if it was not that, it comes again)
            self._fixed = self._named
            return self._predict(inputs)

    def _predict(self, inputs: Arrays) -> Arrays:
        import tensorflow as tf

        named = isinstance(inputs, dict)
        arrays: dict[str, np.ndarray] = inputs if isinstance(inputs, dict) else {"": inputs}
        total = len(next(iter(arrays.values())))
        pieces = []
        with tf.device(self._device):
            for start in range(0, total, self._fixed or total):
                part = {name: tf.convert_to_tensor(self._cut(array, start)) for name, array in arrays.items()}
                found = self._graph(part, named)(part if named else part[""])
                pieces.append({name: tensor.numpy() for name, tensor in found.items()})
        outputs = {name: np.concatenate([each[name] for each in pieces])[:total] for name in pieces[0]}
        return outputs.get("", outputs)

    def _cut(self, array: np.ndarray, start: int) -> np.ndarray:
        """The rows that go through at once; where it must be so many, the last one stands in for those that lack."""
        if self._fixed is None:
            return array
        part = array[start : start + self._fixed]
        return np.concatenate([part, np.repeat(part[-1:], self._fixed - len(part), axis=0)])

    def _graph(self, part: dict[str, Any], named: bool) -> Any:
        """The graph for inputs of such shapes and kinds, of any number of rows: a number is no reason to trace."""
        import tensorflow as tf

        specs = {name: tf.TensorSpec((self._fixed, *each.shape[1:]), each.dtype) for name, each in part.items()}
        key = tuple(specs.items())
        if key not in self._graphs:
            self._graphs[key] = self._forward.get_concrete_function(specs if named else specs[""])
        return self._graphs[key]


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
