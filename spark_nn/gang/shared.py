"""Memory that the ranks of one machine share, for exchanges of small buffers.

Through a socket a buffer is copied twice; here each rank writes its own where all others read it. Only the data goes
this way: the ring's frames still tell who has written what, who is out of step and who is lost.

The memory has no name. Rank 0 makes it, the others open it through its process, and it is gone with the last of them.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOKEN = 32
_LINE = 64
_START = 4096  # where the places begin: vectors are slow across the borders of a cache's lines


class Shared:
    """Two places for each rank's buffer, used in turn.

    A rank that fills a place again has met all others once more since it filled it the last time, so that they have
    read what was there.

    Parameters
    ----------
    memory : mmap.mmap
        The same on all ranks.
    world : int
        How many they are.
    room : int
        Bytes that all their buffers may take together.
    """

    def __init__(self, memory: mmap.mmap, world: int, room: int) -> None:
        self._memory = memory
        self._world = world
        self._step = _step(world, room)
        self._turn = 0

    @classmethod
    def form(cls, rank: int, world: int, room: int, gather: Callable[[bytes], list[bytes]]) -> Shared | None:
        """Make and open the memory; None on all ranks where one of them cannot, being on another machine.

        Parameters
        ----------
        rank, world : int
            This rank, of how many.
        room : int
            Bytes that all buffers may take together.
        gather : callable
            Every rank's bytes from this one's, in the order of ranks.
        """
        size = _START + 2 * world * _step(world, room)
        token = secrets.token_bytes(_TOKEN)
        made = _made(token, size) if rank == 0 else -1
        try:
            path, token = _offer(made, token, gather)
            memory = _opened(path, token, size)
            # Nobody closes what another still has to open, and all use it or none.
            everybody = all(gather(b"" if memory is None else b"1"))
        finally:
            if made >= 0:
                os.close(made)
        return cls(memory, world, room) if everybody and memory is not None else None

    def places(self, dtype: np.dtype[Any], size: int) -> list[NDArray[Any]]:
        """Every rank's place for the next exchange of buffers of so many elements."""
        self._turn = 1 - self._turn
        start = _START + self._turn * self._world * self._step
        return [np.frombuffer(self._memory, dtype, size, start + rank * self._step) for rank in range(self._world)]


def _step(world: int, room: int) -> int:
    """Bytes from one rank's place to the next one's."""
    return -(-room // world // _LINE) * _LINE


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
