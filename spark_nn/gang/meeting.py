"""How the ranks of a ring find their neighbours and come to trust each other.

Every rank calls the next one and answers the one before it, and both ends prove with an HMAC that they know the run's
secret and are the ranks they claim to be. Nothing is ever unpickled.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from spark_nn.errors import PeerLost
from spark_nn.gang import wire
from spark_nn.gang.wire import Address, Kind, Outlet, hang_up, place, text_frame

_HELLO = struct.Struct("<8sHHH")  # magic with the format's version, world, caller, answerer
_NONCE = 32
_PROOF = 32
_WELCOME = b"welcome\n"
INTRODUCTION_LIMIT = 5.0  # seconds a caller has to prove itself


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
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wire.SEND_BUFFER)
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
