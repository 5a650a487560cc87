"""Worker side: what a model's loss and metrics have counted, as numbers that add up over rows wherever they are.

Keras metrics keep sums and counts; doubles hold both exactly enough.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def tally(model: keras.Model) -> np.ndarray:
    """The variables of a model's loss and metrics, one after the other, as an array of doubles of its own."""
    arrays = [array_of(variable) for variable in model.metrics_variables]
    return np.concatenate([np.zeros(0), *map(np.ravel, arrays)], dtype=np.float64)


def settle(model: keras.Model, total: np.ndarray, parts: int) -> None:
    """Give a model's loss and metrics the sum of so many tallies of the same model."""
    start = 0
    for variable in model.metrics_variables:
        array = array_of(variable)
        part = total[start : start + array.size].reshape(array.shape)
        start += array.size
        # A metric may say that a variable of its is no sum.
        if variable.aggregation == "mean":
            part = part / parts
        variable.assign(part.astype(array.dtype))


def results(model: keras.Model) -> dict[str, Any]:
    """The values of a model's loss and metrics, by name."""
    return {name: plain(value) for name, value in model.get_metrics_result().items()}


def array_of(variable: Any) -> np.ndarray:
    """A variable's value as an array of its own."""
    return np.array(keras.ops.convert_to_numpy(variable.value))


def plain(value: Any) -> Any:
    """A metric's value as JSON can hold it; some have a value per class."""
    array = np.asarray(keras.ops.convert_to_numpy(value), np.float64)
    return float(array.item()) if array.size == 1 else array.tolist()
