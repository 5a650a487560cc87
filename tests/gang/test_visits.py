"""One rank that the others call, and strangers that knock."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from spark_nn.errors import PeerLost
from spark_nn.gang.context import Peers
from spark_nn.gang.meeting import listen
from spark_nn.gang.visits import Hall, Visit

pytestmark = pytest.mark.timeout(60)


def gang(rank, world, address, secret=b"secret", listener=None, timeout=20.0):
    return SimpleNamespace(rank=rank, world=world, timeout=timeout, peers=Peers(secret, address, listener))


@pytest.fixture
def hall(request):
    """A hall for two visitors that adds up what they send, and what has become of serving."""
    listener = listen("127.0.0.1")
    address = listener.getsockname()[:2]
    seen: list = []
    dead: list = []

    def answer(rank, kind, body):
        if kind == 9:
            raise ValueError("broken on purpose")
        seen.append((rank, kind, bytes(body)))
        return b"to %d: " % rank + body

    hall = Hall(gang(0, 3, address, listener=listener, timeout=getattr(request, "param", 5.0)), answer, limit=1000)
    ended = []

    def serve():
        try:
            hall.serve(lambda: {1} if dead else set())
            ended.append(None)
        except BaseException as error:  # noqa: BLE001
            ended.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    yield SimpleNamespace(hall=hall, address=address, seen=seen, ended=ended, thread=thread, dead=dead)
    thread.join(20)
    assert not thread.is_alive()


def test_requests_are_answered_and_who_leaves_badly_is_lost(hall):
    first, second = (Visit(gang(rank, 3, hall.address), 1000) for rank in (1, 2))
    assert bytes(first.ask(1, b"x")) == b"to 1: x"
    assert bytes(second.ask(2)) == b"to 2: "
    second._sock.close()
    until = time.monotonic() + 10
    while hall.hall.expected != {1}:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert bytes(first.ask(0, b"y" * 900)) == b"to 1: " + b"y" * 900
    first.close()
    hall.thread.join(10)
    assert hall.ended == [None]
    assert hall.hall.lost == {2}
    assert hall.seen == [(1, 1, b"x"), (2, 2, b""), (1, 0, b"y" * 900)]


def test_strangers_are_heard_by_nobody_and_who_never_comes_is_lost(hall):
    with pytest.raises(PeerLost, match="rank 0 did not answer within 1 s"):
        Visit(gang(1, 3, hall.address, secret=b"a guess", timeout=1.0), 1000)
    with socket.create_connection(hall.address) as sock:
        sock.sendall(b"snnV" + bytes(200))
        sock.settimeout(8)
        with contextlib.suppress(ConnectionResetError):  # it is hung up on over what nobody has read
            assert sock.recv(100) == b""
    own = Visit(gang(1, 3, hall.address), 1000)
    with pytest.raises(PeerLost, match="rank 0 is gone"):
        own.ask(1, b"z" * 2000)  # more than it takes
    hall.thread.join(10)
    assert hall.hall.lost == {1, 2}
    assert hall.seen == []


@pytest.mark.parametrize("hall", [50.0], indirect=True)
def test_who_is_known_to_have_died_is_not_waited_for(hall):
    hall.dead.append(1)
    second = Visit(gang(2, 3, hall.address), 1000)
    second.close()
    hall.thread.join(20)  # the timeout is longer
    assert not hall.thread.is_alive()
    assert hall.hall.lost == {1}


def test_an_error_of_the_answerer_ends_all(hall):
    first, second = (Visit(gang(rank, 3, hall.address), 1000) for rank in (1, 2))
    with pytest.raises(PeerLost):
        first.ask(9)
    with pytest.raises(PeerLost):
        while True:  # it may have been heard before the error was
            second.ask(1)
    hall.thread.join(10)
    assert str(hall.ended[0]) == "broken on purpose"
