"""Executor side: the process of one rank, as the Spark task that guards it sees it."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from spark_nn.gang.forkserver import ForkServer

_LOG = logging.getLogger(__name__)
# Seconds that a process may take to give its first sign of life, at least: a server may still be importing.
_START_LIMIT = 120.0
# Seconds that a process which is told to go, and killed, may take to be gone.
_END_LIMIT = 10.0


class Silence(Exception):
    """The process gave no sign of life."""


@dataclass
class RankProcess:
    """A rank's process.

    Parameters
    ----------
    sock : socket.socket
        Connection to it. What it does is sent there; it sends signs of life, and dies where the connection ends.
    spawned : subprocess.Popen or None
        The process, where it is a child of this one and not a fork of the server's.
    phase : str
        What it last said it was doing.
    failure : str
        What it said of its failure.
    """

    sock: socket.socket
    spawned: subprocess.Popen[bytes] | None = None
    phase: str = "start"
    failure: str = ""
    _rest: bytes = field(default=b"", repr=False)

    def send(self, *parts: bytes) -> None:
        """Tell it what to do."""
        # A process that died while it started takes nothing; its status and its log say why.
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self.sock.sendall(struct.pack("!Q", len(part)) + part)

    def wait(self, patience: float) -> int:
        """Wait for its end and return its status, negative where a signal killed it.

        Parameters
        ----------
        patience : float
            Seconds it may go without a sign of life.

        Raises
        ------
        Silence
            It has given none for so long.
        """
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        limit = max(patience, _START_LIMIT)
        while True:
            if not poller.poll(limit * 1000):
                raise Silence(f"the process gave no sign of life for {limit:g} s")
            limit = patience
            try:
                data = self.sock.recv(4096)
            except ConnectionError:
                data = b""
            if not data:
                # Spawned, it is reaped here; else the server has died, and with it all its forks, by SIGKILL.
                return -9 if self.spawned is None else self.spawned.wait(_END_LIMIT)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # of a process that was killed while it wrote
                if "status" in message:
                    return int(message["status"])
                self.phase = message.get("phase", self.phase)
                self.failure = message.get("failure", self.failure)

    def end(self) -> None:
        """See to it that it is gone: hanging up has the server kill it."""
        if self.spawned is not None:
            self.spawned.kill()
            self.spawned.wait(_END_LIMIT)
        else:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
                self.sock.settimeout(_END_LIMIT)
                while self.sock.recv(4096):
                    pass
        self.sock.close()


@contextmanager
def started(
    server: ForkServer | None, environment: Mapping[str, str], listener: socket.socket, log: int
) -> Iterator[RankProcess]:
    """A rank's process, which is gone at the end of the block.

    Parameters
    ----------
    server : ForkServer or None
        Where to fork it; None to start it from nothing.
    environment : mapping
        Its environment, where it is started from nothing.
    listener : socket.socket
        For it to await its neighbour at; closed here.
    log : int
        File descriptor for what it prints.
    """
    process = _forked(server, listener, log) if server is not None else None
    process = process or _spawned(environment, listener, log)
    try:
        listener.close()  # the process has it now; two owners would keep a dead one's port open
        yield process
    finally:
        process.end()


def _forked(server: ForkServer, listener: socket.socket, log: int) -> RankProcess | None:
    try:
        return RankProcess(server.call([listener.fileno(), log]))
    except OSError as error:
        # It saves time, and no more: some systems do not let such a server be.
        _LOG.warning("no fork server (%s): this rank imports for itself", error)
        return None


def _spawned(environment: Mapping[str, str], listener: socket.socket, log: int) -> RankProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        fds: list[Any] = [theirs.fileno(), listener.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "spark_nn.gang.child", *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=fds,
        )
    return RankProcess(ours, process)
