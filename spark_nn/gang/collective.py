"""What the ranks of a gang exchange: the interface that training code sees, whatever the engine."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spark_nn.errors import CollectiveError

TYPES = [np.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
CODES = {dtype: code for code, dtype in enumerate(TYPES)}
# Combines what the ranks give, here the first arrays, into what is to be filled, the second.
Average = Callable[[Sequence[NDArray[Any]], Sequence[NDArray[Any]]], None]
Engine = Literal["auto", "ring", "native"]
OPS = ["sum", "mean", "max", "min"]


def engine_for(engine: Engine, cards: Sequence[int]) -> Literal["ring", "native"]:
    """The engine to use, where so many GPUs are visible to each rank.

    On CPUs the ring is faster than the frameworks' own operations. With a GPU here and none there, the slow ranks set
    the pace, and the ring is right for them.
    """
    if engine == "auto":
        return "native" if cards and all(cards) else "ring"
    return engine


class Collective(ABC):
    """What the ranks of a gang exchange: the interface that training code sees, whatever the engine.

    All ranks call the same methods in the same order. An error breaks the collective for good: what is in the
    buffer of the failed call is undefined, and every later call raises the error again.

    Attributes
    ----------
    rank : int
        This process, from 0.
    world : int
        The number of processes.
    error : CollectiveError or None
        What every later call will raise; ``None`` as long as the collective can be used.
    """

    rank: int
    world: int
    error: CollectiveError | None = None

    @abstractmethod
    def mark(self, epoch: int, step: int) -> None:
        """Say where the training stands: ranks that meet at different places raise `OutOfStep`."""

    @abstractmethod
    def all_reduce(self, buffer: NDArray[Any], op: str = "sum", source: NDArray[Any] | None = None) -> None:
        """Combine the ranks' buffers element by element, in place; all ranks end with the same bits.

        Parameters
        ----------
        buffer : numpy.ndarray
            C-contiguous, of any shape; float16, float32, float64 or an integer type. The same type and size
            on all ranks.
        op : {"sum", "mean", "max", "min"}
            How to combine; `"mean"` takes floats only. NaN and infinities come out as NumPy has them.
        source : numpy.ndarray, optional
            What this rank gives, where that is not in the buffer; of the same type and size, and left as it is.
        """

    def mean(self, given: Sequence[NDArray[Any]], filled: Sequence[NDArray[Any]]) -> None:
        """Average several arrays of one type over the ranks in one exchange.

        Parameters
        ----------
        given : sequence of numpy.ndarray
            What this rank gives: floats, the same type and sizes on all ranks.
        filled : sequence of numpy.ndarray
            Where the means go: as many arrays of the same sizes, perhaps the same ones; C-contiguous.
        """
        if len(given) != len(filled):
            raise ValueError(f"{len(given)} arrays are given, and {len(filled)} are to be filled")
        flats = [flattened(each, "mean") for each in filled]
        parts = [matching(*both) for both in zip(flats, given, strict=True)]
        if len({each.dtype for each in flats}) != 1:
            raise ValueError("arrays that are averaged together must be at least one, and of one type")
        self.averaging(flats[0].dtype, tuple(each.size for each in flats))(parts, flats)

    @abstractmethod
    def averaging(self, dtype: np.dtype[Any], sizes: tuple[int, ...]) -> Average:
        """`mean` for arrays of one dimension, of that type and these sizes: what every step asks, nothing checks again.

        Parameters
        ----------
        dtype : numpy.dtype
            A type of floats.
        sizes : tuple of int
            Elements of each array, the same on all ranks.
        """

    @abstractmethod
    def broadcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        """Overwrite the buffer with the root's, in place."""

    @abstractmethod
    def all_gather(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes, ordered by rank; their lengths may differ."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Do in the block what takes long, while the others wait in their next operation and have none to do."""
        yield

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Tell all ranks that this one has failed: each raises `PeerLost` with the rank and the reason."""

    @abstractmethod
    def close(self) -> None:
        """Leave in good order, after the last operation."""


class Alone(Collective):
    """The gang of one: there is nothing to exchange, but what is handed over is checked as elsewhere."""

    rank = 0
    world = 1

    def mark(self, epoch: int, step: int) -> None:
        """See `Collective.mark`."""

    def all_reduce(self, buffer: NDArray[Any], op: str = "sum", source: NDArray[Any] | None = None) -> None:
        """See `Collective.all_reduce`."""
        flat = flattened(buffer, op)
        np.copyto(flat, matching(flat, source))

    def averaging(self, dtype: np.dtype[Any], sizes: tuple[int, ...]) -> Average:
        """See `Collective.averaging`."""

        def average(given: Sequence[NDArray[Any]], filled: Sequence[NDArray[Any]]) -> None:
            for part, whole in zip(given, filled, strict=True):
                np.copyto(whole, part)

        return average

    def broadcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        """See `Collective.broadcast`."""
        flattened(buffer)
        check_root(root, self.world)

    def all_gather(self, data: bytes) -> list[bytes]:
        """See `Collective.all_gather`."""
        return [bytes(data)]

    def barrier(self) -> None:
        """See `Collective.barrier`."""

    def abort(self, reason: str) -> None:
        """See `Collective.abort`."""

    def close(self) -> None:
        """See `Collective.close`."""


class Apart(Alone):
    """A gang whose ranks have nothing to exchange with each other: each is alone, whatever their number."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world

    def broadcast(self, buffer: NDArray[Any], root: int = 0) -> None:
        """See `Collective.broadcast`."""
        flattened(buffer)


def flattened(buffer: NDArray[Any], op: str | None = None) -> NDArray[Any]:
    """Return the buffer as one dimension of the same memory, if it is one that can be exchanged."""
    if buffer.dtype not in CODES:
        raise ValueError(f"cannot exchange {buffer.dtype}, only {', '.join(map(str, TYPES))}")
    if not (buffer.flags.c_contiguous and buffer.flags.writeable):
        raise ValueError("the buffer, changed in place, must be C-contiguous and writable: pass a copy")
    if op is not None and op not in OPS:
        raise ValueError(f"cannot reduce by {op!r}, only by {', '.join(OPS)}")
    if op == "mean" and buffer.dtype.kind != "f":
        raise ValueError(f"the mean of {buffer.dtype} is not {buffer.dtype}: reduce floats, or take the sum")
    return buffer.reshape(-1)


def matching(flat: NDArray[Any], source: NDArray[Any] | None) -> NDArray[Any]:
    """What this rank gives, in one dimension."""
    if source is None:
        return flat
    if source.dtype != flat.dtype or source.size != flat.size:
        raise ValueError(f"the source holds {source.size} {source.dtype}, and the buffer {flat.size} {flat.dtype}")
    return source.reshape(-1)


def check_root(root: int, world: int) -> None:
    """Raise ValueError where the root of a broadcast is none of the ranks."""
    if not 0 <= root < world:
        raise ValueError(f"root {root} is not a rank: they go from 0 to {world - 1}")
