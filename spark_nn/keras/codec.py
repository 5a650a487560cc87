"""Keras objects <-> JSON and files: what travels, and what may be loaded.

Nothing here unpickles, and Keras's own ``safe_mode`` stays on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spark_nn.errors import SparkNNError

SUFFIX = ".keras"


def is_model(value: Any) -> bool:
    """Whether a value is a Keras model; does not import Keras to find out."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def plain(value: Any) -> Any:
    """A Keras object (an optimizer, a loss, a metric) as the dict that Keras can make it from again.

    Strings, dicts and functions stay what they are.
    """
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "get_config") and not isinstance(value, type):
        import keras

        return keras.saving.serialize_keras_object(value)
    return value


def restore(value: Any) -> Any:
    """The Keras object that :func:`plain` turned into a dict."""
    if isinstance(value, list):
        return [restore(item) for item in value]
    if isinstance(value, dict) and "class_name" in value:
        import keras

        return keras.saving.deserialize_keras_object(value, safe_mode=True)
    return value


def load_model(path: str, *, compiled: bool = False) -> Any:
    """The Keras model in a ``.keras`` file."""
    import keras

    return keras.saving.load_model(path, compile=compiled, safe_mode=True)


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


def load_predictor(path: str, cpus: int) -> Callable[[np.ndarray], np.ndarray]:
    """Executor side of scoring: the function that predicts a block of rows.

    Parameters
    ----------
    path : str
        A local ``.keras`` file.
    cpus : int
        Cores of the task; TensorFlow gets as many threads.

    Returns
    -------
    callable
        Takes an array of shape ``(rows,) + input shape``, returns one of shape ``(rows,) + output shape``.
    """
    if "keras" not in sys.modules:
        # The model's file does not depend on the backend, but this function does.
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
    # TensorFlow takes its thread counts once per process: a worker that scores again keeps the first ones.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(cpus)
        tf.config.threading.set_inter_op_parallelism_threads(cpus)
    model = load_model(path)

    @tf.function(reduce_retracing=True)  # type: ignore[untyped-decorator]
    def forward(block: Any) -> Any:
        return model(block, training=False)

    def predict(block: np.ndarray) -> np.ndarray:
        result: np.ndarray = forward(tf.convert_to_tensor(block)).numpy()
        return result

    return predict
