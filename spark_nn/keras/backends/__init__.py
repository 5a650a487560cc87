"""The backends that Keras runs on, and what differs between them: a room for each, imported only where it is the one.

This module is for driver and workers; the rooms import their framework, and are for processes that Keras runs in. Each
room has the same things in it:

``prepare``
    Imports what a training needs, without starting any of it.
``start``
    Readies a process that scores, and returns Keras's name of the device to use.
``Forward``
    A model that predicts blocks of rows.
``Step``
    A compiled model that measures batches.
``averager``
    What averages gradients over the ranks, and ``Averager`` the one that does so by the gang's own collective.
``Watch``
    Counts the steps up to the first whose loss is not finite.
``methods``
    Methods that make a model and its optimizers train in step.
``ready``
    Settings of a compiled model that several ranks need.
``buffers``
    What a model keeps besides Keras's variables, to be read and written as these are.
``random_state``, ``set_random_state``
    The state of the backend's own generators of random numbers, as arrays by names.
``TOGETHER``
    Whether it pays to run several steps in one call.
``dataset``, ``first``
    What ``fit`` takes for a feed, and its first batch.
``tensors``
    Arrays as the backend's tensors.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Literal

from spark_nn.errors import ClusterError

Backend = Literal["tensorflow", "jax", "torch"]
BACKENDS = ("tensorflow", "jax", "torch")
_CURES = {"jax": "pip install 'spark-nn[jax]'", "torch": "pip install 'spark-nn[torch]'"}


def environment(backend: str) -> dict[str, str]:
    """Variables that a process needs before it imports Keras, whatever the machine prefers."""
    return {"KERAS_BACKEND": backend}


def room(backend: str) -> Any:
    """The room of a backend.

    Raises
    ------
    ClusterError
        Its framework is not installed here.
    """
    try:
        return importlib.import_module(f"{__name__}.{backend}")
    except ModuleNotFoundError as error:
        if error.name != backend:
            raise
        raise ClusterError(
            f"backend={backend!r} needs the package {error.name!r}, which this worker's Python does not have: "
            f"{_CURES.get(backend, f'pip install {backend}')} for the executors"
        ) from error


def current() -> Any:
    """The room of the backend that Keras runs on in this process."""
    import keras

    return room(keras.backend.backend())


@contextlib.contextmanager
def replaced(owner: Any, name: str, attribute: Any) -> Iterator[None]:
    """Give an object an attribute of its own, such as a method, for the time of the block."""
    attributes = vars(owner)  # not by setattr, which Keras overrides
    before = attributes.get(name)
    attributes[name] = attribute
    try:
        yield
    finally:
        del attributes[name]
        if before is not None:
            attributes[name] = before
