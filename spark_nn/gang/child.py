"""The process of one rank: ``python -m spark_nn.gang.child``, started and guarded by its Spark task."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import cloudpickle

from spark_nn.errors import PeerLost
from spark_nn.gang.collective import Alone, Collective, Ring
from spark_nn.gang.context import RESULT, GangContext
from spark_nn.gang.failure import Failure
from spark_nn.gang.progress import Reporter
from spark_nn.store import RunDir

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Read the order from standard input, run the function, leave the result; return the exit status."""
    parent = os.getppid()
    die_with_parent(parent)
    order = json.loads(_receive(sys.stdin.buffer))
    function = _receive(sys.stdin.buffer)
    threading.Thread(target=_leave_with, args=(sys.stdin.buffer,), daemon=True).start()
    run = RunDir(order["run"])
    rank, host = order["rank"], order["host"]
    progress = Reporter(run, rank)
    collective: Collective | None = None
    try:
        collective = _join(order)
        context = GangContext(
            rank=rank,
            world=collective.world,
            host=host,
            cpus=order["cpus"],
            neighbours=order["neighbours"],
            scratch=Path(order["scratch"]),
            run=run,
            collective=collective,
            progress=progress,
        )
        result = cloudpickle.loads(function)(context)
        progress.close()
        if rank == 0:
            run.writeJson(RESULT, result)
        # Nobody leaves before rank 0's result is in the store: a rank that leaves early may still fail.
        collective.barrier()
        collective.close()
    except BaseException as error:
        failure = Failure.of(error, rank, host)
        if collective is not None:
            failure = _seen(failure, collective)
            collective.abort(failure.reason)
        failure.save(run)
        raise
    return 0


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even if it is stuck in native code."""
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _join(order: dict[str, Any]) -> Collective:
    """Meet the other ranks."""
    addresses = [(host, port) for host, port in order["addresses"]]
    listener = socket.socket(fileno=order["listener"])
    if len(addresses) == 1:
        listener.close()
        return Alone()
    return Ring.connect(
        rank=order["rank"],
        addresses=addresses,
        listener=listener,
        secret=bytes.fromhex(order["secret"]),
        timeout=order["timeout"],
    )


def _seen(failure: Failure, collective: Collective) -> Failure:
    """The failure, recognised as a survivor's where the collective broke before.

    A framework wraps what is raised inside its graph into an error of its own.
    """
    if isinstance(collective.error, PeerLost):
        return replace(failure, kind="peer", reason=str(collective.error))
    return failure


def _receive(pipe: IO[bytes]) -> bytes:
    (size,) = struct.unpack("!Q", pipe.read(8))
    return pipe.read(size)


def _leave_with(pipe: IO[bytes]) -> None:
    """Leave when the task does: the end of the pipe comes on every system, and after any death."""
    pipe.read()
    os._exit(1)


if __name__ == "__main__":
    try:
        STATUS = main()
    except BaseException:  # noqa: BLE001
        # excepthook prints what the task then finds at the end of the log
        sys.excepthook(*sys.exc_info())
        STATUS = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that frameworks leave behind must not keep the gang waiting.
    os._exit(STATUS)
