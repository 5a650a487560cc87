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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pyspark import SparkFiles, TaskContext

from spark_nn.columns import Arrays
from spark_nn.dataset import memory
from spark_nn.errors import ModelFileError
from spark_nn.store import digest

# However small they are: each has a graph and traces of its own beside its weights.
_MOST = 8


@dataclass(frozen=True)
class Share:
    """What a task may use of its machine.

    Parameters
    ----------
    cpus : int, default 1
        Its cores.
    gpu : str or None
        The address of its GPU, where Spark has assigned one. A Python worker serves one task after the other, and the
        next one's may be another.
    """

    cpus: int = 1
    gpu: str | None = None

    @classmethod
    def ofTask(cls) -> Share:
        """The share of the task that this is called in."""
        context = TaskContext.get()
        if context is None:
            return cls()
        resources = context.resources()
        addresses = resources["gpu"].addresses if "gpu" in resources else []
        return cls(context.cpus(), addresses[0] if addresses else None)

    def card(self, cards: int) -> int:
        """The number of the task's GPU, as a framework counts those, so many, that this process sees.

        Spark's addresses are the cards' own numbers, and CUDA_VISIBLE_DEVICES may let a process see only some.
        """
        seen = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        address = self.gpu or "0"
        return (seen.index(address) if address in seen else int(address) if address.isdigit() else 0) % cards


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
        dropped = False
        while self._models:
            size_of_all = size + sum(kept for _, kept in self._models.values())
            if len(self._models) < self._most and (not known or memory.fits(size_of_all, workers)):
                break
            self._models.popitem(last=False)
            dropped = True
        if dropped:
            gc.collect()  # the layers of a network refer to each other


@functools.cache
def _kept() -> Kept:
    """Those of this Python worker."""
    return Kept()


def fetched(load: Load, file: str, sha256: str) -> Any:
    """What a loader makes of a model file that was shipped, for the task that this is called in."""
    return _kept().get(load, Path(SparkFiles.get(file)), sha256, Share.ofTask())
