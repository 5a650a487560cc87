"""Executor side: the models that a Python worker has loaded, found again by what they are.

Spark keeps its Python workers from task to task. Whatever plan or function asks next for a model of the same content
gets the one that is there.
"""

from __future__ import annotations

import functools
import gc
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pyspark import SparkFiles

from spark_nn.columns import Arrays
from spark_nn.dataset import memory
from spark_nn.errors import ModelFileError
from spark_nn.share import Share
from spark_nn.store import digest

# However small they are: each has a graph and traces of its own beside its weights.
_MOST = 8
# Bytes of models that are worth a search for what nobody refers to any more, which takes a good part of a second.
_LARGE = 64 << 20


class Predictor(Protocol):
    """A framework's model that predicts."""

    @property
    def rows(self) -> int:
        """Rows that go through it at once with good speed and little memory; it takes any number."""

    def __call__(self, inputs: Arrays) -> Arrays:
        """Predict a block of rows: of each input and of each output an array, of shape ``(rows,) + shape``."""


# Of a local path and a task's share: what a file is loaded as, such as a Predictor.
Load = Callable[[str, Share], Any]
Loader = Callable[[str, Share], Predictor]


class Kept:
    """Models in the memory of this process, those used last.

    All of them together may take a share of the memory that is free, and the one that is asked for is always kept.

    Parameters
    ----------
    most : int
        How many are kept.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._models: OrderedDict[tuple[Load, str, Share], tuple[Any, int]] = OrderedDict()

    def get(self, load: Load, path: Path, sha256: str, share: Share) -> Any:
        """The model of this content, loaded from its file where it is not there.

        Parameters
        ----------
        load : callable
            The loader, equal to any other that would load the same.
        path : Path
            The local file.
        sha256 : str
            Its digest.
        share : Share
            What it may use.

        Raises
        ------
        ModelFileError
            The file has another digest.
        """
        key = (load, sha256, share)
        if key in self._models:
            self._models.move_to_end(key)
            return self._models[key][0]
        if (found := digest(path)) != sha256:
            raise ModelFileError(f"the model file {path.name} arrived changed: its SHA-256 is {found}, not {sha256}")
        size = path.stat().st_size
        self._make_room(size, share)
        model = load(str(path), share)
        self._models[key] = model, size
        return model

    def _make_room(self, size: int, share: Share) -> None:
        """Forget models that were used longest ago, until one more may come."""
        workers = max(1, (os.cpu_count() or 1) // share.cpus)
        known = memory.free_bytes() > 0
        dropped = 0
        while self._models:
            size_of_all = size + sum(kept for _, kept in self._models.values())
            if len(self._models) < self._most and (not known or memory.fits(size_of_all, workers)):
                break
            dropped += self._models.popitem(last=False)[1][1]
        if dropped > _LARGE:
            gc.collect()  # the layers of a network refer to each other


@functools.cache
def _kept() -> Kept:
    """Those of this Python worker."""
    return Kept()


def fetched(load: Load, file: str, sha256: str) -> Any:
    """What a loader makes of a model file that was shipped, for the task that this is called in."""
    return _kept().get(load, Path(SparkFiles.get(file)), sha256, Share.ofTask())
