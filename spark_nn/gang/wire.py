"""What travels between two neighbours of a ring, and how they come to trust each other.

The first half is the frame: a fixed header that says where in the training its sender stands, then bytes.
The second half forms the ring: every rank calls the next one and answers the one before it, and both ends
prove with an HMAC that they know the run's secret and are the ranks they claim to be. Nothing is ever
unpickled.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from spark_nn.errors import CollectiveError, PeerLost

Address = tuple[str, int]

_MAGIC = b"snnR"
_FRAME = struct.Struct("<4sB3xI")  # magic, kind, bytes that follow the header
_POSITION = struct.Struct("<BBHQqqQ")  # the fields of Position, in their order
_TEXT_LIMIT = 1000
_SEND_BUFFER = 256 * 1024  # bytes: more would leave the cache; what to receive into, the kernel tunes better

_HELLO = struct.Struct("<8sHHH")  # magic with the format's version, world, caller, answerer
_NONCE = 32
_PROOF = 32
_WELCOME = b"welcome\n"
INTRODUCTION_LIMIT = 5.0  # seconds a caller has to prove itself


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


def listen(host: str = "") -> socket.socket:
    """Open the socket on which a rank awaits its neighbour.

    Parameters
    ----------
    host : str
        The address of this machine to listen on; all IPv4 addresses where empty.

    Returns
    -------
    socket.socket
        Listening on a free port. Advertise `getsockname()` and hand this very socket to `Ring.connect`:
        whoever closes it and binds the port again may find it taken.
    """
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0] if host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def form(
    rank: int, addresses: Sequence[Address], listener: socket.socket, secret: bytes, timeout: float
) -> tuple[socket.socket, socket.socket]:
    """Connect a rank with the ones before and after it; the listener is closed in any case.

    Returns
    -------
    tuple of socket.socket
        Non-blocking connections: answered from the rank before, called to the rank after.

    Raises
    ------
    PeerLost
        A neighbour did not come within `timeout` seconds. The neighbour that did come is told.
    """
    # The caller's thread may be running an event loop of its own, and only one fits into a thread.
    with listener, ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, _form(rank, addresses, listener, secret, timeout)).result()


class StrangerError(Exception):
    """Whoever is at the other end could not prove to be the neighbour."""


@dataclass(frozen=True)
class Pledge:
    """What the two ends of one connection know beforehand and prove to each other.

    A proof covers both ranks, both nonces and the role: it cannot be replayed, sent back or used elsewhere.
    """

    secret: bytes = field(repr=False)
    world: int
    caller: int
    answerer: int

    @property
    def hello(self) -> bytes:
        """What the caller begins with."""
        return _HELLO.pack(b"snnRing1", self.world, self.caller, self.answerer)

    def proof(self, role: bytes, nonces: bytes) -> bytes:
        """What shows that an end knows the secret, in its role and after these nonces."""
        return hmac.digest(self.secret, role + self.hello + nonces, "sha256")

    async def call(self, sock: socket.socket) -> None:
        """Introduce this rank, and have the answerer prove itself first."""
        loop = asyncio.get_running_loop()
        nonce = secrets.token_bytes(_NONCE)
        await loop.sock_sendall(sock, self.hello + nonce)
        reply = await _read_exactly(sock, _NONCE + _PROOF)
        nonces = nonce + reply[:_NONCE]
        if not hmac.compare_digest(reply[_NONCE:], self.proof(b"answerer", nonces)):
            raise StrangerError("it does not know the run's secret")
        await loop.sock_sendall(sock, self.proof(b"caller", nonces))
        if await _read_exactly(sock, len(_WELCOME)) != _WELCOME:
            raise StrangerError("it gave no welcome")

    @classmethod
    async def of_caller(cls, sock: socket.socket, secret: bytes, world: int) -> Pledge:
        """Hear out whoever calls rank 0, and prove both; the pledge names the caller."""
        hello = await _read_exactly(sock, _HELLO.size)
        pledge = cls(secret, world, _HELLO.unpack(hello)[2], 0)
        if not 0 < pledge.caller < world:
            raise StrangerError("it is no rank")
        await pledge.answer(sock, hello)
        return pledge

    async def answer(self, sock: socket.socket, hello: bytes = b"") -> None:
        """Hear a caller out and prove this rank, then have the caller prove itself."""
        loop = asyncio.get_running_loop()
        hello = hello or await _read_exactly(sock, len(self.hello))
        if hello != self.hello:
            raise StrangerError("it is not the rank expected")
        nonces = await _read_exactly(sock, _NONCE) + secrets.token_bytes(_NONCE)
        await loop.sock_sendall(sock, nonces[_NONCE:] + self.proof(b"answerer", nonces))
        proof = await _read_exactly(sock, _PROOF)
        if not hmac.compare_digest(proof, self.proof(b"caller", nonces)):
            raise StrangerError("it does not know the run's secret")
        await loop.sock_sendall(sock, _WELCOME)


async def _form(
    rank: int, addresses: Sequence[Address], listener: socket.socket, secret: bytes, timeout: float
) -> tuple[socket.socket, socket.socket]:
    world = len(addresses)
    before, after = (rank - 1) % world, (rank + 1) % world
    trouble: list[str] = []
    answering = asyncio.create_task(_answer(listener, Pledge(secret, world, before, rank)))
    calling = asyncio.create_task(call(addresses[after], Pledge(secret, world, rank, after), trouble))
    done, missing = await asyncio.wait((answering, calling), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
    for task in missing:
        task.cancel()
    await asyncio.gather(*missing, return_exceptions=True)
    failed = next((task for task in done if task.exception()), None)
    if not missing and not failed:
        return answering.result(), calling.result()
    complaints = []
    if answering in missing:
        complaints.append(f"rank {before} at {place(addresses[before])} did not call")
    if calling in missing:
        why = f" ({trouble[0]})" if trouble else ""
        complaints.append(f"rank {after} at {place(addresses[after])} did not answer{why}")
    text = f"the ring did not form: {' and '.join(complaints)} within {timeout:g} s, says rank {rank}"
    for task in done - {failed}:
        Outlet(task.result()).say(text_frame(Kind.LOST, text))
        hang_up(task.result())
    if failed:
        failed.result()
    raise PeerLost(text)


async def call(address: Address, pledge: Pledge, trouble: list[str]) -> socket.socket:
    """Call the next rank until it answers as it should: it may not listen yet, or something else may."""
    loop = asyncio.get_running_loop()
    for attempt in itertools.count():
        try:
            places = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
            family, kind, protocol, _, target = places[attempt % len(places)]
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
                async with asyncio.timeout(INTRODUCTION_LIMIT):  # better call again than wait on a lost packet
                    await loop.sock_connect(sock, target)
                await pledge.call(sock)  # without a limit: the kernel connects before the peer can answer
            except BaseException:
                sock.close()
                raise
            return sock
        except (OSError, EOFError, StrangerError) as error:
            trouble[:] = [str(error) or type(error).__name__]
        await asyncio.sleep(min(0.01 * (attempt + 1), 0.25))
    raise AssertionError("unreachable")


async def _answer(listener: socket.socket, pledge: Pledge) -> socket.socket:
    """Hear all callers at once, so that no silent one keeps the neighbour waiting; return the neighbour."""
    loop = asyncio.get_running_loop()
    neighbour: asyncio.Future[socket.socket] = loop.create_future()
    callers: dict[asyncio.Task[None], socket.socket] = {}

    def admit() -> None:
        with suppress(OSError):  # it has hung up already, or there is no descriptor left for the moment
            sock, _ = listener.accept()
            task = asyncio.create_task(hear(sock))
            callers[task] = sock
            task.add_done_callback(callers.pop)

    async def hear(sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(INTRODUCTION_LIMIT):
                await pledge.answer(sock)
        except (OSError, EOFError, StrangerError):
            sock.close()
        else:
            if neighbour.done():
                sock.close()
            else:
                neighbour.set_result(sock)

    listener.setblocking(False)
    loop.add_reader(listener, admit)
    try:
        return await neighbour
    finally:
        loop.remove_reader(listener)
        strangers = {task: sock for task, sock in callers.items() if not task.done()}
        for task in strangers:
            task.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        for sock in strangers.values():
            sock.close()


async def _read_exactly(sock: socket.socket, length: int) -> bytes:
    """Read as many bytes as the next message has, and never more than that."""
    loop = asyncio.get_running_loop()
    message = b""
    while len(message) < length:
        piece = await loop.sock_recv(sock, length - len(message))
        if not piece:
            raise EOFError("it hung up")
        message += piece
    return message


def hang_up(sock: socket.socket) -> None:
    """Close a connection; empty it first, as closing over unread bytes takes back what is on its way."""
    with suppress(OSError):
        while sock.recv(_SEND_BUFFER):
            pass
    sock.close()


def place(address: Address) -> str:
    """Return an address as people write it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
