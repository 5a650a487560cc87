"""A Keras model in the formats of other programs. It imports Keras, so it is called only where the user asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spark_nn.columns import Tensor, arrange
from spark_nn.errors import ParamError
from spark_nn.keras import codec
from spark_nn.keras.customs import Find

FORMATS = ("tf_saved_model", "onnx", "keras")
PACKAGES = {"onnx": ("tf2onnx", "onnx")}
CURE = "pip install 'spark-nn[onnx]'"


def write(file: Path, inputs: Sequence[Tensor], format: str, find: Find, target: Path) -> None:
    """Write a model in a format.

    Parameters
    ----------
    file : Path
        The ``.keras`` file.
    inputs : sequence of Tensor
        The model's inputs.
    format : {"tf_saved_model", "onnx", "keras"}
        What to write: a folder for TensorFlow Serving and ``tf.saved_model.load``; a file for ONNX runtimes; the
        native file.
    find : callable
        Finds custom objects by their names.
    target : Path
        A local path that does not exist.

    Raises
    ------
    ParamError
        The model cannot be written in this format.
    """
    if format == "keras":
        shutil.copyfile(file, target)
        return
    if format == "onnx" and (others := [each for each in inputs if not each.numeric]):
        raise ParamError(
            f"format='onnx' takes no strings, and the model's input {others[0].key or others[0].name!r} is one: export "
            "it as 'tf_saved_model'"
        )
    model = codec.load_model(str(file), find)
    if all(each.numeric for each in inputs):
        # A network that was never called does not know all that an export needs.
        model(arrange({each.name: np.zeros((1, *(each.shape or ())), each.numpy) for each in inputs}, "features"))
    model.export(target, format=format, verbose=False)
