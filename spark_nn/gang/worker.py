"""Executor side of a gang: the Spark task, and the child process that it guards.

The task itself stays small: it meets the other tasks, has one child started with an environment of its own,
waits, and reports. Frameworks are only ever imported in the child, because a Spark Python worker is used again by
other jobs, and some frameworks can be configured only once in a process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyspark import BarrierTaskContext, SparkFiles, TaskContext

from spark_nn.errors import ClusterError, PeerLost, StoreError
from spark_nn.gang.context import CARDS, attempt_folder
from spark_nn.gang.failure import LOST, Failure, all_failed
from spark_nn.gang.forkserver import ForkServer, scratch_folder
from spark_nn.gang.logs import pumped
from spark_nn.gang.process import Silence, started
from spark_nn.gang.ring import listen
from spark_nn.store import RunDir

# What must be alike on all ranks for them to train one model.
_PACKAGES = ("spark-nn", "numpy", "pyarrow", "petastorm", "keras", "tensorflow", "tensorflow-cpu", "torch", "jax")
# How much of a child's output goes into an error.
_LOG_TAIL = 4_000
# Seconds that a rank which has failed waits for the others, who mostly notice at once and fail, too.
_IN_COMMON = 2.0
# A survivor waits this long with its complaint, so that Spark hears of the cause first.
_SURVIVOR_DELAY = 1.0


@dataclass(frozen=True)
class Work:
    """A function for a gang to run.

    Parameters
    ----------
    run : RunDir
        The directory where it finds and leaves things.
    function : bytes
        The function, pickled by cloudpickle on the driver. It reaches the task inside Spark's own closure and is
        unpickled only in the child.
    secret : bytes
        What the ranks prove to each other to know.
    apart : bool
        Whether they have no collective, but call rank 0, and all but that one may be lost.
    """

    run: RunDir
    function: bytes
    secret: bytes = field(repr=False)
    apart: bool = False


@dataclass(frozen=True)
class GangTask:
    """The function that Spark runs in each task of the barrier stage: a rank of a gang.

    Parameters
    ----------
    run : RunDir
        The gang's directory, where it leaves failures.
    attempt : int
        How often the gang was begun before.
    works : tuple of Work
        What to do, one after the other, each in a process of its own.
    home : Home
        What such a process needs.
    timeout : float
        Seconds that anything may keep silent.
    told : bool
        Whether what the processes print goes to the driver while they run.
    """

    run: RunDir
    attempt: int
    works: tuple[Work, ...]
    home: Home
    timeout: float
    told: bool = False

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Run one rank; yield its number when it has finished, and nothing where all have failed and left why."""
        for _ in batches:
            pass
        context = BarrierTaskContext.get()
        rank = context.partitionId()
        host = context.getTaskInfos()[rank].address.rsplit(":", 1)[0]
        left = attempt_folder(self.run, self.attempt)
        with _told(left, rank, host), listen(host) as listener:
            address = listener.getsockname()[:2]
            card = {"rank": rank, "host": host, "address": address, "versions": versions()}
            cards = [json.loads(text) for text in _gather(context, json.dumps(card), self.timeout)]
            _check_alike(cards)
            if rank == 0:
                left.writeJson(CARDS, [{name: card[name] for name in ("rank", "host")} for card in cards])
            neighbours = sum(other["host"] == host for other in cards)
            addresses = [other["address"] for other in cards]
            seat = Seat(rank, host, neighbours, addresses)
            for work in self.works:
                # Others may knock for the next work while this rank is still at the last, so the port stays open.
                door = listener if work is self.works[-1] else listener.dup()
                if not self.guard(work, context, seat, door):
                    return
        yield pa.RecordBatch.from_pydict({"rank": [rank]})

    def guard(self, work: Work, context: TaskContext, seat: Seat, listener: socket.socket) -> bool:
        """Have a child do some work and wait for it; see to it that it leaves a failure where it fails.

        Returns
        -------
        bool
            Whether it succeeded. False only where those of all other ranks have failed, too, and left a failure: what
            there is to say the driver then finds there, and Spark, which prints long traces of what a task raises,
            need not be told.

        Raises
        ------
        ChildFailed
            It failed, and others may be waiting for it: Spark ends them.
        """
        left = attempt_folder(self.run, self.attempt)
        environment = self.home.environment(context)
        rank, host = seat.rank, seat.host
        order = {
            **asdict(seat),
            "cpus": context.cpus(),
            "secret": work.secret.hex(),
            "apart": work.apart,
            "timeout": self.timeout,
            "run": work.run.url,
            "gang": self.run.url,
            "attempt": self.attempt,
            "taken": time.time(),
        }
        # Below Spark's own folder, which goes with the executor even if this task is killed. And a file without a
        # name: it is gone with the process, whichever way that ends.
        scratch = scratch_folder(SparkFiles.getRootDirectory(), os.getpid())
        with _folder(scratch), tempfile.TemporaryFile() as log, ExitStack() as stack:
            order["scratch"] = str(scratch)
            # Whatever it leaves in the temporary directory when it is killed goes with it too.
            order["environment"] = {**environment, "TMPDIR": str(scratch)}
            server = self.home.server(environment)
            if self.told:
                stack.enter_context(pumped(attempt_folder(work.run, self.attempt), rank, log.fileno()))
            with started(server, order["environment"], listener, log.fileno()) as process:
                process.send(json.dumps(order).encode(), work.function)
                try:
                    status = process.wait(self.timeout)
                    reason = _death(status)
                except Silence as silence:
                    status, reason = -1, str(silence)
            if status == 0:
                return True
            failure = Failure.fromText(process.failure) or Failure(
                rank, host, "died", reason, when=time.time(), phase=process.phase, transient=True
            )
            failure = replace(failure, log=_tail(log, card=bool(environment["CUDA_VISIBLE_DEVICES"])))
            if work.apart and rank and failure.kind == "died":
                with contextlib.suppress(StoreError):  # rank 0 will find out by itself, and later
                    left.mkdir(LOST)
                    failure.note(left)
                return True
            # The store may be what failed: then Spark's own message brings the news.
            with contextlib.suppress(StoreError):
                failure.save(left)
                if not work.apart and all_failed(left, len(seat.addresses), _IN_COMMON):
                    return False
        if failure.kind == "peer":
            time.sleep(_SURVIVOR_DELAY)
        raise ChildFailed(f"rank {rank} on {host}: {failure.reason}\n{failure.toText()}\n{failure.traceback}")


@dataclass(frozen=True)
class Seat:
    """A rank's place in its gang: which it is, on which host, with how many there, and where to find the others."""

    rank: int
    host: str
    neighbours: int
    addresses: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class LoneTasks:
    """The function that Spark runs in each task of a plain stage: gangs of one rank, as many as there are tasks.

    Nobody waits for anybody, so Spark may run them whenever there is room, and one that fails does not end the others.

    Parameters
    ----------
    gangs : tuple of GangTask
        What each task does.
    """

    gangs: tuple[GangTask, ...]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Run one gang; yield its place, or nothing where it has left a failure."""
        for _ in batches:
            pass
        context = TaskContext.get()
        assert context is not None
        place = context.partitionId()
        # The driver begins again what was lost, with directories of its own for each attempt.
        if context.attemptNumber() == 0 and self._run(self.gangs[place], context):
            yield pa.RecordBatch.from_pydict({"rank": [place]})

    def _run(self, gang: GangTask, context: TaskContext) -> bool:
        host = socket.gethostname()
        # At most as many as there are cores train on this machine at the same time.
        neighbours = min(len(self.gangs), max(1, (os.cpu_count() or 1) // context.cpus()))
        left = attempt_folder(gang.run, gang.attempt)
        (work,) = gang.works
        try:
            with _told(left, 0, host), listen("127.0.0.1") as listener:
                return gang.guard(work, context, Seat(0, host, neighbours, [listener.getsockname()[:2]]), listener)
        except ChildFailed:
            if Failure.load(left, 0) is None:
                raise  # the store did not take it: Spark's message brings the news
            return False


@contextlib.contextmanager
def _told(left: RunDir, rank: int, host: str) -> Iterator[None]:
    """Leave a failure for the driver where the block fails of something else than its child."""
    try:
        yield
    except ChildFailed:
        raise
    except Exception as error:
        failure = replace(Failure.of(error, rank, host), phase="start")
        with contextlib.suppress(StoreError):
            failure.save(left)
        raise ChildFailed(f"rank {rank} on {host}: {failure.reason}\n{failure.toText()}") from error


class ChildFailed(RuntimeError):
    """The child failed and its failure is recorded."""


@dataclass(frozen=True)
class Home:
    """What the process of a rank needs, whatever it does.

    Parameters
    ----------
    variables : dict
        Environment variables that the function wants set.
    preload : tuple of str
        What the fork server does beforehand (see :class:`~spark_nn.gang.forkserver.ForkServer`).
    idle : float
        Seconds that the fork server stays without anything to do; 0 for none.
    gpus : bool
        Whether it sees the GPUs that Spark assigns to its task.
    """

    variables: dict[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    idle: float = 0.0
    gpus: bool = True

    def environment(self, context: TaskContext) -> dict[str, str]:
        """The environment of the process of a task."""
        resources = context.resources()
        gpus = resources["gpu"].addresses if self.gpus and "gpu" in resources else []
        return child_environment(first_environment(), context.cpus(), gpus) | self.variables

    def server(self, environment: dict[str, str]) -> ForkServer | None:
        """The server to fork the process from, None where there can be none."""
        return ForkServer.of(environment, self.preload, self.idle, SparkFiles.getRootDirectory(), versions())


@dataclass(frozen=True)
class WarmTask:
    """The function that Spark runs to have the executors import what ranks will need.

    Parameters
    ----------
    home : Home
        What they will need.
    """

    home: Home

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Start this executor's fork server, and leave while it imports."""
        context = TaskContext.get()
        assert context is not None
        server = self.home.server(self.home.environment(context))
        if server is not None:
            server.start()
        yield from batches


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A fresh folder, removed at the end of the block."""
    shutil.rmtree(path, ignore_errors=True)  # of another process that had this one's number
    path.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _gather(context: BarrierTaskContext, text: str, timeout: float) -> list[str]:
    """Spark's ``allGather`` with a limit: by itself it waits for a task that hangs as long as a year."""
    answer: Future[list[str]] = Future()

    def gather() -> None:
        try:
            answer.set_result(context.allGather(text))
        except BaseException as error:  # noqa: BLE001  (the task's thread raises it)
            answer.set_exception(error)

    threading.Thread(target=gather, daemon=True).start()
    try:
        return answer.result(timeout)
    except FutureTimeoutError:
        raise PeerLost(
            f"not all tasks of the gang came to its start within {timeout:g} s, though Spark had begun all of them: "
            "look for an executor that hangs, or set a longer timeout"
        ) from None
    except Exception as error:
        raise PeerLost(f"another task of the gang was lost before its start: {error}") from error


def versions() -> dict[str, str]:
    """Version of Python and of each package that training depends on, where it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def first_environment() -> dict[str, str]:
    """The environment that this process was started with.

    What jobs that ran in a Spark Python worker have set since then, as scoring with TensorFlow does, must not decide
    how a rank starts, nor have it find no fork server of its kind.
    """
    try:
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:  # not on Linux
        return dict(os.environ)
    return {
        os.fsdecode(name): os.fsdecode(value) for name, _, value in (each.partition(b"=") for each in entries) if name
    }


def child_environment(base: Mapping[str, str], cpus: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a rank's process.

    Parameters
    ----------
    base : mapping
        The task's own environment: it holds credentials and library paths, but where it is not the first one also
        what earlier jobs in the same Spark Python worker may have left behind.
    cpus : int
        Cores of the task; every library gets as many threads.
    gpus : sequence of str
        Addresses of the task's GPUs; without any, none is visible.
    """
    leftovers = {"TF_CONFIG", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in base.items() if name not in leftovers}
    threads = str(cpus)
    env.update(
        PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
        PYTHONHASHSEED="0",
        OMP_NUM_THREADS=threads,
        OPENBLAS_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        TF_NUM_INTRAOP_THREADS=threads,
        TF_NUM_INTEROP_THREADS=threads,
        NPROC=threads,  # what XLA, and so JAX, takes for the number of cores
        CUDA_VISIBLE_DEVICES=",".join(gpus),
        # Steps allocate and free the same again and again. glibc learns to keep such memory, but TensorFlow's generator
        # datasets stop it from learning, and the kernel would then hand it out page by page at every step.
        MALLOC_MMAP_THRESHOLD_=str(32 << 20),
        MALLOC_TOP_PAD_=str(64 << 20),
        TF_CPP_MIN_LOG_LEVEL=base.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    )
    return env


def _check_alike(cards: list[dict[str, Any]]) -> None:
    first = cards[0]
    for other in cards[1:]:
        for package in sorted({*first["versions"], *other["versions"]}):
            mine, theirs = (card["versions"].get(package, "nothing") for card in (first, other))
            if mine != theirs:
                raise ClusterError(
                    f"{package} differs between the executors: {mine} on {first['host']} (rank 0), {theirs} "
                    f"on {other['host']} (rank {other['rank']}). Give all of them the same environment"
                )


def _death(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory is the usual reason)" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with status {status} before it could say why"


def _tail(log: IO[bytes], *, card: bool) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _LOG_TAIL))
    text = log.read().decode(errors="replace").strip()
    if card:
        return text
    # On a machine without a card TensorFlow says so as an error at every start, and it explains no failure. What else
    # is wrong with a card has another number.
    without_card = re.compile(r"failed call to cuInit: .*(\(303\)|CUDA_ERROR_NO_DEVICE)", re.IGNORECASE)
    return "\n".join(line for line in text.split("\n") if not without_card.search(line)).strip()
