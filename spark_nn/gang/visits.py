"""One rank that the others call: requests and answers over TCP, between ranks that prove to know the run's secret.

Nothing is ever unpickled: what travels are bytes, whose meaning both ends know.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from spark_nn.errors import PeerLost
from spark_nn.gang.context import GangContext
from spark_nn.gang.meeting import INTRODUCTION_LIMIT, Pledge, StrangerError, call

_FRAME = struct.Struct("<4sBQ")  # magic, kind, bytes that follow
_MAGIC = b"snnV"
_BYE = 255
# Seconds between two looks at who is still there.
_LOOK = 0.1
# And between two at who has died.
_LOOK_AFTER = 1.0

# Answers a request: the caller's rank, the kind of request (0 to 254) and its body.
Handler = Callable[[int, int, memoryview], bytes]


class Visit:
    """A caller's connection to rank 0; one request at a time.

    Parameters
    ----------
    gang : GangContext
        The caller's view of its gang, whose ranks have no collective.
    limit : int
        Bytes that an answer may have.

    Raises
    ------
    PeerLost
        Rank 0 did not answer in time. The methods raise it where it is gone.
    """

    def __init__(self, gang: GangContext, limit: int) -> None:
        assert gang.peers is not None
        pledge = Pledge(gang.peers.secret, gang.world, gang.rank, 0)
        trouble: list[str] = []
        address = gang.peers.address

        async def within() -> socket.socket:
            async with asyncio.timeout(gang.timeout):
                return await call(address, pledge, trouble)

        try:
            with ThreadPoolExecutor(max_workers=1) as thread:  # the caller's may be running an event loop of its own
                self._sock = thread.submit(asyncio.run, within()).result()
        except TimeoutError:
            raise PeerLost(f"rank 0 did not answer within {gang.timeout:g} s ({', '.join(trouble)})") from None
        _settle(self._sock)
        self._limit = limit

    def ask(self, kind: int, body: bytes | memoryview = b"") -> memoryview:
        """Send a request and return the answer."""
        try:
            _send(self._sock, kind, body)
            return _receive(self._sock, self._limit)[1]
        except (OSError, EOFError) as error:
            raise PeerLost(f"rank 0 is gone: {str(error) or type(error).__name__}") from error

    def close(self) -> None:
        """Leave in good order."""
        with contextlib.suppress(OSError):
            _send(self._sock, _BYE, b"")
        self._sock.close()


class Hall:
    """Where rank 0 receives the others, each in a thread of its own, until all have left or are lost.

    Parameters
    ----------
    gang : GangContext
        Rank 0's view of its gang, whose ranks have no collective.
    handler : callable
        Answers a request. It is called by several threads.
    limit : int
        Bytes that a request may have.

    Attributes
    ----------
    lost : set of int
        Ranks that did not leave in good order, or have not come within the gang's timeout.
    """

    def __init__(self, gang: GangContext, handler: Handler, limit: int) -> None:
        assert gang.peers is not None
        assert gang.peers.listener is not None
        self._gang = gang
        self._secret = gang.peers.secret
        self._listener = gang.peers.listener
        self._handler = handler
        self._limit = limit
        self._here: dict[int, socket.socket] = {}
        self._came: set[int] = set()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self.lost: set[int] = set()

    @property
    def expected(self) -> set[int]:
        """Ranks that are there or may still come."""
        others = set(range(1, self._gang.world))
        with self._lock:
            return {rank for rank in others - self.lost if rank in self._here or rank not in self._came}

    def serve(self, gone: Callable[[], set[int]] = set) -> None:
        """Serve until nobody is expected any more; raise what a handler has raised.

        Parameters
        ----------
        gone : callable
            Tells the ranks that are known to have died: they will not come any more.
        """
        until = time.monotonic() + self._gang.timeout
        looked = time.monotonic()
        self._listener.settimeout(_LOOK)
        try:
            while self.expected and self._error is None:
                try:
                    sock, _ = self._listener.accept()
                except TimeoutError:
                    pass
                except OSError:
                    time.sleep(_LOOK)  # a caller that has gone again, or too many of them at once
                else:
                    threading.Thread(target=self._receive, args=(sock,), daemon=True).start()
                now = time.monotonic()
                if now > until or now > looked + _LOOK_AFTER:
                    missing = set(range(1, self._gang.world)) if now > until else gone()
                    looked = now
                    with self._lock:
                        self.lost |= missing - self._came
        finally:
            self._listener.close()
            with self._lock:
                for sock in self._here.values():
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
        if self._error is not None:
            raise self._error

    def _receive(self, sock: socket.socket) -> None:
        """Hear out a caller, and answer it until it leaves."""
        with sock:
            try:
                sock.setblocking(False)
                rank = asyncio.run(self._introduced(sock))
            except (OSError, EOFError, StrangerError):
                return
            with self._lock:
                if rank in self._came:  # there is one of each
                    return
                self._came.add(rank)
                self._here[rank] = sock
            _settle(sock)
            well = False
            try:
                while True:
                    kind, body = _receive(sock, self._limit)
                    if kind == _BYE:
                        well = True
                        break
                    _send(sock, 0, self._handler(rank, kind, body))
            except (OSError, EOFError):
                pass  # it is gone, as is told below
            except BaseException as error:  # noqa: BLE001  (who serves raises it)
                self._error = error
            with self._lock:
                del self._here[rank]
                if not well:
                    self.lost.add(rank)

    async def _introduced(self, sock: socket.socket) -> int:
        async with asyncio.timeout(INTRODUCTION_LIMIT):
            return (await Pledge.of_caller(sock, self._secret, self._gang.world)).caller


def _settle(sock: socket.socket) -> None:
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _send(sock: socket.socket, kind: int, body: bytes | memoryview) -> None:
    sock.sendall(_FRAME.pack(_MAGIC, kind, len(body)))
    if len(body):
        sock.sendall(body)


def _receive(sock: socket.socket, limit: int) -> tuple[int, memoryview]:
    magic, kind, length = _FRAME.unpack(_exactly(sock, _FRAME.size))
    if magic != _MAGIC or length > limit:
        raise EOFError(f"a frame of {length} bytes came, where {limit} are the most")
    return kind, _exactly(sock, length)


def _exactly(sock: socket.socket, length: int) -> memoryview:
    body = memoryview(bytearray(length))
    filled = 0
    while filled < length:
        count = sock.recv_into(body[filled:])
        if not count:
            raise EOFError("it hung up")
        filled += count
    return body
