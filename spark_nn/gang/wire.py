"""What travels between two neighbours of a ring.

That is the frame: a fixed header that says where in the training its sender stands, then bytes. Nothing is ever
unpickled.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

from spark_nn.errors import CollectiveError

Address = tuple[str, int]

_MAGIC = b"snnR"
_FRAME = struct.Struct("<4sB3xI")  # magic, kind, bytes that follow the header
_POSITION = struct.Struct("<BBHQqqQ")  # the fields of Position, in their order
_TEXT_LIMIT = 1000
SEND_BUFFER = 256 * 1024  # bytes: more would leave the cache; what to receive into, the kernel tunes better


class Kind(IntEnum):
    """What a frame is."""

    BLOCK = 1  # a piece of an operation's data
    WAITING = 2  # "alive, and waiting for others myself"
    FINISHED = 3  # closed in good order; the position is that of the last operation
    LOST = 4  # a rank failed; a text follows
    OUT_OF_STEP = 5  # two ranks met at different places; a text follows


class Operation(IntEnum):
    """What the ranks do together."""

    NOTHING = 0
    ALL_REDUCE = 1
    BROADCAST = 2
    ALL_GATHER = 3
    BARRIER = 4


class Position(NamedTuple):
    """Where a rank stands: equal on all ranks while they are in step, and part of every frame.

    Attributes
    ----------
    operation : int
        An `Operation`.
    dtype : int
        The element type, as the index in the caller's table of types.
    argument : int
        The kind of reduction, or the root of a broadcast.
    sequence : int
        How many operations the ring has begun.
    epoch, step : int
        The training's own place, as last marked.
    nbytes : int
        The bytes of the whole operation.
    """

    operation: int = 0
    dtype: int = 0
    argument: int = 0
    sequence: int = 0
    epoch: int = 0
    step: int = 0
    nbytes: int = 0

    def pack(self) -> bytes:
        """Return the bytes that stand in a header."""
        return _POSITION.pack(*self)

    @classmethod
    def unpack(cls, packed: bytes | bytearray, start: int = 0) -> Position:
        """Return the position that was packed there."""
        return cls(*_POSITION.unpack_from(packed, start))


def header(kind: Kind, position: bytes, length: int) -> bytes:
    """Return a frame's header: the kind, the length of what follows, the sender's packed position."""
    return _FRAME.pack(_MAGIC, kind, length) + position


def text_frame(kind: Kind, text: str) -> bytes:
    """Return a whole frame that carries a text of bounded length."""
    body = text.encode("utf-8", "replace")[:_TEXT_LIMIT]
    return header(kind, Position().pack(), len(body)) + body


class Inlet:
    """Reads frames from a socket as they come, without ever blocking.

    `head` is valid once `head_came` has returned true; `body_came` then fills the caller's memory, and
    after it has returned true the next frame begins.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.head = bytearray(_FRAME.size + _POSITION.size)
        self._room = memoryview(self.head)
        self.read = 0  # bytes, in all
        self._filled = 0
        self._look = select.poll()
        self._look.register(sock, select.POLLIN)

    @property
    def between_frames(self) -> bool:
        """Whether nothing of a frame has been read yet."""
        return not self._filled

    def head_came(self) -> bool:
        """Read on until the header is whole; raise EOFError where the peer has closed."""
        missing = len(self.head) - self._filled
        return missing <= 0 or self._read(self._room[self._filled :], missing)

    def kind_and_length(self) -> tuple[Kind, int]:
        """Return the current header's kind and the number of bytes that follow it."""
        magic, kind, length = _FRAME.unpack_from(self.head)
        if magic != _MAGIC or kind not in list(Kind):
            raise CollectiveError(f"a neighbour sent bytes that are not a frame: {self.head.hex()}")
        return Kind(kind), length

    def position(self) -> Position:
        """Return the position in the current header."""
        return Position.unpack(self.head, _FRAME.size)

    def skip(self) -> None:
        """Go on to the next frame; the current one is a header alone."""
        self._filled = 0

    def comes_within(self, seconds: float) -> bool:
        """Whether there is something to read so soon; other threads and processes have the core in between."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            if self._look.poll(0):
                return True
            os.sched_yield()
        return False

    def wait(self, seconds: float) -> None:
        """Sleep until there is something to read, for so many seconds at most."""
        self._look.poll(max(0.0, seconds) * 1000)

    def body_came(self, body: memoryview) -> bool:
        """Read on until the body is whole."""
        got = self._filled - len(self.head)
        missing = len(body) - got
        if missing and not self._read(body[got:], missing):
            return False
        self._filled = 0
        return True

    def text(self, length: int) -> str:
        """Read the text after a header; it was sent together with it, so this may wait a little."""
        body = bytearray(min(length, _TEXT_LIMIT))
        self.socket.settimeout(1.0)
        with suppress(OSError):
            self.socket.recv_into(body, flags=socket.MSG_WAITALL)
        self.socket.setblocking(False)
        self._filled = 0
        return body.rstrip(b"\0").decode("utf-8", "ignore") or "a rank failed, and its reason was cut off"

    def _read(self, into: memoryview, missing: int) -> bool:
        try:
            count = self.socket.recv_into(into)
        except BlockingIOError:
            return False
        if not count:
            raise EOFError("closed the connection")
        self._filled += count
        self.read += count
        return count == missing


class Outlet:
    """Writes frames to a socket as it takes them, without ever blocking and without copying a block."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._parts: list[memoryview] = []  # what the kernel has not taken yet of the frame begun
        self._in_block = False

    def sent(self, position: bytes, block: memoryview) -> bool:
        """Send on, and say whether the block has gone whole; call again with the same block until it has."""
        if not self._in_block:
            if not self._gone():
                return False
            self._parts = [memoryview(header(Kind.BLOCK, position, len(block))), block]
            self._in_block = True
        self._in_block = not self._gone()
        return not self._in_block

    def say(self, frame: bytes, patience: float = 0) -> None:
        """Send a small frame between blocks: best effort, for news and signs of life.

        There is no waiting for room, unless `patience` grants some seconds.
        """
        if self._in_block:
            return
        with suppress(OSError):
            try:
                self.socket.settimeout(patience)
                if self._gone():  # what was left of an earlier one
                    self._parts = [memoryview(frame)]
                    self._gone()
            finally:
                self.socket.settimeout(0)

    def _gone(self) -> bool:
        if self._parts:
            try:
                count = self.socket.sendmsg(self._parts)
            except BlockingIOError:
                return False
            while self._parts and count >= len(self._parts[0]):
                count -= len(self._parts.pop(0))
            if self._parts:
                self._parts[0] = self._parts[0][count:]
        return not self._parts


def hang_up(sock: socket.socket) -> None:
    """Close a connection; empty it first, as closing over unread bytes takes back what is on its way."""
    with suppress(OSError):
        while sock.recv(SEND_BUFFER):
            pass
    sock.close()


def place(address: Address) -> str:
    """Return an address as people write it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
