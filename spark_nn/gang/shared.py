"""Memory that the ranks of one machine share, for exchanges of small buffers.

Through a socket a buffer is copied twice, and a frame that says no more than "I have come" takes as long as adding up
what a small network learns in a step. Here each rank writes its buffer where all others read it, and, where every rank
has a core of its own to watch the memory from, what it has come for. The ring's frames still tell who is lost.

The memory has no name. Rank 0 makes it, the others open it through its process, and it is gone with the last of them.
"""

from __future__ import annotations

import functools
import mmap
import os
import platform
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spark_nn.gang.wire import Position

_TOKEN = 32
_LINE = 64  # bytes, of a processor's cache
_PAGE = 4096
_KEPT = 16  # layouts of arrays: more than a step of any training has
# Where what one core has written, others see in the same order: there, who sees the mark sees what it stands for.
_IN_ORDER = {"x86_64", "AMD64"}


class Places:
    """The arrays that lie one after the other in each rank's area of a memory.

    Parameters
    ----------
    memory : buffer
        Whose it is.
    world : int
        How many ranks there are.
    room : int
        Bytes that all areas may take together.
    start : int, default 0
        Where in the memory they begin.
    """

    def __init__(self, memory: Any, world: int, room: int, start: int = 0) -> None:
        step = _step(world, room)
        self.areas = [np.frombuffer(memory, np.uint8, step, start + rank * step) for rank in range(world)]
        # Training asks for the same at every step.
        self._made: dict[tuple[np.dtype[Any], tuple[int, ...]], list[list[NDArray[Any]]]] = {}

    def of(self, dtype: np.dtype[Any], sizes: tuple[int, ...]) -> list[list[NDArray[Any]]]:
        """For each area, the arrays of so many elements in it; they take `room` bytes."""
        made = self._made.get((dtype, sizes))
        if made is None:
            if len(self._made) >= _KEPT:
                self._made.clear()
            made = [[] for _ in self.areas]
            start = 0
            for size in sizes:
                for area, arrays in zip(self.areas, made, strict=True):
                    arrays.append(area[start : start + size * dtype.itemsize].view(dtype))
                start += _whole_lines(size * dtype.itemsize)
            self._made[dtype, sizes] = made
        return made


class Shared:
    """Two places for each rank's buffer, used in turn.

    A rank that fills a place again has met all others once more since it filled it the last time, so that they have
    read what was there.

    Parameters
    ----------
    memory : mmap.mmap
        The same on all ranks.
    rank, world : int
        This rank, of how many.
    room : int
        Bytes that all their buffers may take together.
    watched : bool
        Whether ranks see in the memory who has come, by `arrive` and `all_at`; the same on all of them.
    """

    def __init__(self, memory: mmap.mmap, rank: int, world: int, room: int, watched: bool) -> None:
        self.watched = watched
        self._memory = memory
        self._rank = rank
        self._world = world
        self._turn = 0
        starts = (_start(world), _start(world) + world * _step(world, room))
        self._places = [Places(memory, world, room, start) for start in starts]

    @classmethod
    def form(
        cls, rank: int, world: int, room: int, gather: Callable[[bytes], list[bytes]], watch: bool = False
    ) -> Shared | None:
        """Make and open the memory; None on all ranks where one of them cannot, being on another machine.

        Parameters
        ----------
        rank, world : int
            This rank, of how many.
        room : int
            Bytes that all buffers may take together.
        gather : callable
            Every rank's bytes from this one's, in the order of ranks.
        watch : bool
            Whether this rank can spare the time of its core to watch the memory.
        """
        size = _start(world) + 2 * world * _step(world, room)
        token = secrets.token_bytes(_TOKEN)
        made = _made(token, size) if rank == 0 else -1
        try:
            path, token = _offer(made, token, gather)
            memory = _opened(path, token, size)
            # Nobody closes what another still has to open, and all use it or none.
            able = watch and platform.machine() in _IN_ORDER
            answers = gather(b"" if memory is None else b"watch" if able else b"open")
        finally:
            if made >= 0:
                os.close(made)
        if memory is None or not all(answers):
            return None
        return cls(memory, rank, world, room, watched=set(answers) == {b"watch"})

    def places(self, dtype: np.dtype[Any], sizes: tuple[int, ...]) -> list[list[NDArray[Any]]]:
        """Every rank's place for the next exchange, in which lie arrays of so many elements."""
        self._turn = 1 - self._turn
        return self._places[self._turn].of(dtype, sizes)

    def arrive(self, position: bytes) -> None:
        """Let the others see that this rank has come, and has filled its place of this turn."""
        start = self._line(self._rank)
        self._memory[start : start + len(position)] = position

    def all_at(self, position: bytes) -> bool:
        """Whether all ranks have come to the same position."""
        memory, length = self._memory, len(position)
        for rank in range(self._world):
            start = self._line(rank)
            if memory[start : start + length] != position:
                return False
        return True

    def stray(self, position: bytes) -> tuple[int, Position] | None:
        """A rank that has come for something else, and what that is; to be looked at twice, as it may be writing."""
        ours = Position.unpack(position)
        for rank in range(self._world):
            start = self._line(rank)
            theirs = Position.unpack(self._memory[start : start + len(position)])
            if theirs != ours and theirs.sequence >= ours.sequence:
                return rank, theirs
        return None

    def _line(self, rank: int) -> int:
        """Where a rank says that it has come; as the places, one for each turn."""
        return _LINE * (1 + self._turn * self._world + rank)


@functools.lru_cache(maxsize=_KEPT)  # training asks for the same at every step
def room(dtype: np.dtype[Any], sizes: tuple[int, ...]) -> int:
    """Bytes that arrays take one after the other, each from the start of a line on: there, vectors are fast."""
    return sum(_whole_lines(size * dtype.itemsize) for size in sizes)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


def _start(world: int) -> int:
    """Where the places begin, after the token and the ranks' lines."""
    return -(-_LINE * (1 + 2 * world) // _PAGE) * _PAGE


def _step(world: int, room: int) -> int:
    """Bytes from one rank's place to the next one's."""
    return room // world // _LINE * _LINE  # what arrays take is whole lines, too


def _made(token: bytes, size: int) -> int:
    """Memory without a name that begins with a token, as a file descriptor; -1 where the system gives none."""
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        made = os.memfd_create("spark_nn")
    except OSError:
        return -1
    os.ftruncate(made, size)
    os.pwrite(made, token, 0)
    return made


def _offer(made: int, token: bytes, gather: Callable[[bytes], list[bytes]]) -> tuple[str, bytes]:
    """Where rank 0's memory is to be opened, and what it begins with."""
    offer = gather(token + f"/proc/{os.getpid()}/fd/{made}".encode() if made >= 0 else b"")[0]
    return offer[_TOKEN:].decode(), offer[:_TOKEN]


def _opened(path: str, token: bytes, size: int) -> mmap.mmap | None:
    if not path:
        return None
    try:
        with open(path, "r+b") as file:  # noqa: PTH123  (a descriptor's path cannot be resolved)
            if os.fstat(file.fileno()).st_size != size:
                return None
            memory = mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        return None
    # On another machine, the same path may be another process's.
    return memory if memory[:_TOKEN] == token else None
