"""The process of one rank: forked from the executor's server, or ``python -m spark_nn.gang.child``.

Its Spark task guards it, over a connection: what to do comes there, signs of life go there, and where it ends, the
process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from spark_nn.errors import ClusterError, PeerLost
from spark_nn.gang.collective import Alone, Apart, Collective
from spark_nn.gang.context import RESULT, GangContext, Peers, attempt_folder
from spark_nn.gang.failure import Failure
from spark_nn.gang.forkserver import die_with_parent, name_process
from spark_nn.gang.progress import Reporter
from spark_nn.gang.ring import Ring
from spark_nn.store import RunDir

# Seconds between two signs of life, at most.
_SIGN = 0.5


def run(sock: socket.socket, listener: int) -> int:
    """Do what the task sends; return the exit status."""
    try:
        with sock.makefile("rb") as stream:
            order = json.loads(_receive(stream))
            function = _receive(stream)
        _settle(order)
        _obey(sock, order, function, socket.socket(fileno=listener))
    except BaseException:  # noqa: BLE001
        # What is printed here, the task finds at the end of the log.
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _settle(order: dict[str, Any]) -> None:
    """Be a process of this order, and of nothing that was before."""
    name_process(f"spark_nn rank {order['rank']}")
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the driver may follow what is printed
    np.random.seed()  # forks would all draw the same numbers; Python's own generator sees to itself


def _obey(sock: socket.socket, order: dict[str, Any], function: bytes, listener: socket.socket) -> None:
    """Run the function, and leave its result or its failure."""
    run, rank, host = RunDir(order["run"]), order["rank"], order["host"]
    attempt = attempt_folder(run, order["attempt"])
    gang = attempt_folder(RunDir(order["gang"]), order["attempt"])
    progress = Reporter(attempt, rank)
    line = _Line(sock)
    threading.Thread(target=_leave_with, args=(sock,), daemon=True).start()
    threading.Thread(target=_give_signs, args=(line, progress, order["timeout"]), daemon=True).start()
    collective: Collective | None = None
    try:
        peers = _peers(order, listener) if order["apart"] else None
        collective = Apart(rank, len(order["addresses"])) if peers is not None else _join(order, listener)
        context = GangContext(
            rank=rank,
            world=collective.world,
            host=host,
            cpus=order["cpus"],
            neighbours=order["neighbours"],
            attempt=order["attempt"],
            timeout=order["timeout"],
            scratch=Path(order["scratch"]),
            run=run,
            collective=collective,
            progress=progress,
            peers=peers,
        )
        began = time.time()
        value = _function(function)(context)
        progress.close()
        if rank == 0:
            result = {"value": value, "taken": order["taken"], "began": began, "ended": time.time()}
            with collective.waited_for():
                attempt.writeJson(RESULT, result)
        # Nobody leaves before rank 0's result is in the store: a rank that leaves early may still fail.
        collective.barrier()
        collective.close()
    except BaseException as error:
        failure = replace(Failure.of(error, rank, host), phase=progress.place)
        if collective is not None:
            failure = _seen(failure, collective)
            collective.abort(failure.reason)
        # Twice, as the store may be what failed.
        line.send(failure=failure.toText())
        failure.save(gang)
        raise


def _function(pickled: bytes) -> Any:
    """The function to run.

    Raises
    ------
    ClusterError
        It is of a module that is not here.
    """
    try:
        return cloudpickle.loads(pickled)
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"what is to be run needs the module {error.name!r}, which this worker does not have: install it for the "
            f"executors' Python, or send it with spark.addArtifacts('{error.name}.py', pyfile=True)"
        ) from error


def _peers(order: dict[str, Any], listener: socket.socket) -> Peers:
    """What a rank without a collective needs to call rank 0, or to be called."""
    host, port = order["addresses"][0]
    if order["rank"]:
        listener.close()
    return Peers(bytes.fromhex(order["secret"]), (host, port), None if order["rank"] else listener)


def _join(order: dict[str, Any], listener: socket.socket) -> Collective:
    """Meet the other ranks."""
    addresses = [(host, port) for host, port in order["addresses"]]
    if len(addresses) == 1:
        listener.close()
        return Alone()
    return Ring.connect(
        rank=order["rank"],
        addresses=addresses,
        listener=listener,
        secret=bytes.fromhex(order["secret"]),
        timeout=order["timeout"],
        spin=len(os.sched_getaffinity(0)) >= order["neighbours"] * order["cpus"],
    )


def _seen(failure: Failure, collective: Collective) -> Failure:
    """The failure, recognised as a survivor's where the collective broke before.

    A framework wraps what is raised inside its graph into an error of its own.
    """
    if isinstance(collective.error, PeerLost):
        return replace(failure, kind="peer", reason=str(collective.error), transient=True)
    return failure


def _receive(stream: Any) -> bytes:
    (size,) = struct.unpack("!Q", stream.read(8))
    data: bytes = stream.read(size)
    return data


class _Line:
    """What threads tell the task, one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, **message: str) -> bool:
        """Send a line of JSON; whether it went: without a task there is nobody to tell, and this process ends."""
        try:
            with self._lock:
                self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True


def _leave_with(sock: socket.socket) -> None:
    """Leave when the task does: the end of the connection comes after any death."""
    with contextlib.suppress(OSError):
        while sock.recv(4096):
            pass
    os._exit(1)


def _give_signs(line: _Line, progress: Reporter, timeout: float) -> None:
    """Tell the task again and again where this rank is, and so that it lives."""
    while line.send(phase=progress.place):
        progress.moved.wait(min(_SIGN, timeout / 4))
        progress.moved.clear()


if __name__ == "__main__":
    PARENT = os.getppid()
    die_with_parent(PARENT)
    STATUS = run(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    # Threads that frameworks leave behind must not keep the gang waiting.
    os._exit(STATUS)
