"""Executor side: a process that has imported the framework once, and forks every rank's process from there.

Importing TensorFlow takes seconds, and twice as long where two processes do it at once. So one process per executor
does it, while the rows are still being written, and each rank of each fit is a fork of it that finds everything
imported. The server itself never runs a step: whatever a fit does to its process, to the framework's state, its
threads, its memory or a GPU, goes with that process, and the next fit begins from the same fresh imports.

The server ends with the executor's JVM, however that ends, and after some idle time. It listens on a Unix socket in
Linux's abstract namespace, which leaves no file behind, and answers to its own user alone, as the kernel tells it.
It kills a rank whose Spark task hangs up, even one that is stopped or stuck in native code; and ranks die with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import hmac
import importlib.metadata
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

_PR_SET_NAME, _PR_SET_PDEATHSIG = 15, 1
_BACKLOG = 64
# Seconds that starting the server may take; it imports nothing before it can be reached.
_START_LIMIT = 60.0
# Seconds that a call may take: the server may still be importing.
_FORK_LIMIT = 120.0
# Seconds that a caller has to say who it is; it does so at once.
_INTRODUCTION_LIMIT = 1.0
_FORKED = b"+"
_TOKEN = 32
# What differs from one task of an executor to the next and is set in the fork.
OF_THE_TASK = ("TMPDIR", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class ForkServer:
    """The server of this executor for one environment; it need not run yet.

    Parameters
    ----------
    environment : dict
        Its environment, and so what its libraries see when they are loaded.
    preload : tuple of str
        What it does before it forks, each a ``module:function`` without arguments.
    idle : float
        Seconds after which a server that nobody uses ends.
    guardian : int
        Process to end with: the executor's JVM.
    home : str
        The executor's own folder, where each task has one in turn (see :func:`scratch_folder`).
    versions : dict
        Of the packages that matter.
    """

    environment: dict[str, str]
    preload: tuple[str, ...]
    idle: float
    guardian: int
    home: str
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, environment: Mapping[str, str], preload: Sequence[str], idle: float, home: str, versions: Mapping[str, str]
    ) -> ForkServer | None:
        """The server for an environment; None where there can be none.

        That is so where the idle time is 0, on systems other than Linux, outside an executor, and for tasks with a
        GPU: whether a driver for one survives a fork, every vendor decides for itself.
        """
        guardian = _jvm()
        if idle <= 0 or not preload or environment.get("CUDA_VISIBLE_DEVICES") or guardian is None:
            return None
        own = {name: value for name, value in environment.items() if name not in OF_THE_TASK}
        # What Spark tells each of its workers about itself is of no use to a process that is not one.
        own = {name: value for name, value in own.items() if not name.startswith("PYTHON_WORKER_FACTORY")}
        return cls({**own, "CUDA_VISIBLE_DEVICES": ""}, tuple(preload), idle, guardian, home, dict(versions))

    @property
    def address(self) -> str:
        """Its name in the abstract namespace: another one for whatever could make a fork behave differently."""
        described = json.dumps([os.getuid(), sys.executable, asdict(self)], sort_keys=True)
        return f"\0spark_nn-{hashlib.sha256(described.encode()).hexdigest()}"

    def start(self) -> None:
        """Start the server where it does not run; it can be called from then on, and imports meanwhile.

        Raises
        ------
        OSError
            It cannot be started.
        """
        order = {"address": self.address[1:], "preload": self.preload, "idle": self.idle, "guardian": self.guardian}
        order["home"] = self.home
        order["token"] = _token(self.home).hex()
        began = subprocess.run(
            [sys.executable, "-u", "-m", "spark_nn.gang.forkserver"],
            input=json.dumps(order).encode(),
            env=self.environment,
            capture_output=True,
            timeout=_START_LIMIT,
            check=False,
        )
        if began.returncode:
            raise OSError(f"the fork server did not start: {began.stderr.decode(errors='replace').strip()}")

    def call(self, fds: Sequence[int]) -> socket.socket:
        """A connection to a new process that has these file descriptors, the last one for what it prints.

        The process reads from the connection what to do. The server sends its exit status there as a line of JSON.
        """
        for last in (False, False, True):
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(_FORK_LIMIT)
                sock.connect(self.address)
                _check_owner(sock)
                socket.send_fds(sock, [_token(self.home)], list(fds))
                if sock.recv(1) != _FORKED:
                    raise ConnectionResetError("the fork server left")
                sock.settimeout(None)
            except (ConnectionError, FileNotFoundError):
                # There is none, or it was about to end.
                sock.close()
                if last:
                    raise
                self.start()
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise AssertionError("unreachable")


def scratch_folder(home: str, task: int) -> Path:
    """The folder of a Spark task, given by its process, which runs one task at a time."""
    return Path(home) / f"spark_nn-task-{task}"


def name_process(name: str) -> None:
    """Name this process in ``ps`` and ``top``; at most 15 characters show."""
    if sys.platform == "linux":
        _prctl(_PR_SET_NAME, name.encode()[:15])


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, even if it is stuck in native code."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


class _Server:
    """Forks, reaps and kills; it never waits for anything but the next event."""

    def __init__(self, listener: socket.socket, guardian: int, idle: float, home: str, token: bytes) -> None:
        self.listener = listener
        self.guardian = guardian
        self.idle = idle
        self.home = home
        self.token = token
        self.poller = select.poll()
        self.poller.register(listener, select.POLLIN)
        self.poller.register(guardian, select.POLLIN)
        self.callers: dict[int, tuple[int, socket.socket]] = {}  # by the process's pidfd: its pid and its task
        self.used = time.monotonic()

    def serve(self) -> None:
        """Serve until the guardian is gone, or nobody has come for a while."""
        while True:
            wait = None if self.callers else max(0.0, self.used + self.idle - time.monotonic())
            ready = dict(self.poller.poll(None if wait is None else wait * 1000))
            if not ready or self.guardian in ready:
                return  # the kernel kills what is left
            for pidfd in [each for each in self.callers if each in ready]:
                self._reap(pidfd)
            for pid, sock in list(self.callers.values()):
                if sock.fileno() in ready:
                    os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is this process and no other
                    self.poller.unregister(sock)
            if self.listener.fileno() in ready:
                self._admit()

    def _admit(self) -> None:
        # Whatever goes wrong with one caller, the others' processes must not go with it.
        with contextlib.suppress(OSError):
            sock, _ = self.listener.accept()
            try:
                fds = self._introduced(sock)
                self._fork(sock, fds)
            except OSError:
                sock.close()

    def _introduced(self, sock: socket.socket) -> list[int]:
        """What a caller brings for its process, if it has the right to call."""
        _check_owner(sock)
        sock.settimeout(_INTRODUCTION_LIMIT)
        token, fds, _, _ = socket.recv_fds(sock, _TOKEN, 2)
        sock.settimeout(None)
        if len(fds) != 2 or not hmac.compare_digest(token, self.token):
            for each in fds:
                os.close(each)
            raise PermissionError("a caller does not know the executor's token")
        return fds

    def _fork(self, sock: socket.socket, fds: list[int]) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
            if pid == 0:
                self._become(sock, server, fds)
        finally:
            for each in fds:
                os.close(each)
        pidfd = os.pidfd_open(pid)
        self.callers[pidfd] = pid, sock
        self.poller.register(pidfd, select.POLLIN)
        self.poller.register(sock, select.POLLRDHUP)
        with contextlib.suppress(OSError):  # it has hung up, which the poller tells
            sock.sendall(_FORKED)

    def _reap(self, pidfd: int) -> None:
        pid, sock = self.callers.pop(pidfd)
        try:
            self.poller.unregister(sock)
        except KeyError:
            # The task had hung up before. If it was killed, its folder is left for others to remove.
            shutil.rmtree(scratch_folder(self.home, _peer(sock)[0]), ignore_errors=True)
        self.poller.unregister(pidfd)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # nobody is left to be told
            sock.sendall(b"\n" + json.dumps({"status": status}).encode() + b"\n")
        sock.close()
        self.used = time.monotonic()

    def _become(self, sock: socket.socket, server: int, fds: list[int]) -> NoReturn:
        """Become a rank's process."""
        status = 1
        try:
            die_with_parent(server)
            self.listener.close()
            os.close(self.guardian)
            for pidfd, (_, other) in self.callers.items():
                os.close(pidfd)
                other.close()
            listener, log = fds
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            from spark_nn.gang import child

            status = child.run(sock, listener)
        finally:
            # Nothing of the server's may run here, whatever happens.
            os._exit(status)


def _token(home: str) -> bytes:
    """What a caller must know: the content of a file in the executor's own folder, which its user alone can read.

    A name in the abstract namespace is seen by all containers that share a network, and their users may have the same
    numbers.
    """
    path = Path(home) / "spark_nn-token"
    if not path.exists():
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_bytes(secrets.token_bytes(_TOKEN))
        with contextlib.suppress(FileExistsError):  # another task was quicker
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()


def _jvm() -> int | None:
    """The executor's JVM: the nearest process above this one that is a Java virtual machine."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return None
    pid = os.getppid()
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        if name == "java":
            return pid
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    return None


def _check_owner(sock: socket.socket) -> None:
    """Refuse a peer that runs as another user."""
    _, user = _peer(sock)
    if user != os.getuid():
        raise PermissionError(f"the process at the other end runs as user {user}, and this one as {os.getuid()}")


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as they were when it connected."""
    pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, user


def _prctl(option: int, argument: int | bytes) -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    kind = ctypes.c_char_p if isinstance(argument, bytes) else ctypes.c_ulong
    prctl.argtypes = [ctypes.c_int, kind, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
    if prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def main() -> int:
    """Read the order from standard input, and leave a server behind; return the exit status of the starter."""
    order = json.loads(sys.stdin.buffer.read())
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{order['address']}")
    except OSError:
        return 0  # another task was quicker
    listener.listen(_BACKLOG)
    guardian = os.pidfd_open(order["guardian"])
    if os.fork():
        return 0  # so that the server is nobody's child: who started it need not outlive it, nor bury it
    os.setsid()
    name_process("spark_nn warm")
    with Path(os.devnull).open("r+b") as nowhere:
        for descriptor in range(3):
            os.dup2(nowhere.fileno(), descriptor)
    for each in order["preload"]:
        # What fails here fails again in the rank that needs it, and is told there.
        with contextlib.suppress(Exception):
            importlib.metadata.EntryPoint("", each, "").load()()
    # Pages that the collector never touches stay shared with the forks.
    gc.collect()
    gc.freeze()
    _Server(listener, guardian, order["idle"], order["home"], bytes.fromhex(order["token"])).serve()
    return 0


if __name__ == "__main__":
    STATUS = main()
    sys.stdout.flush()
    os._exit(STATUS)
