"""Executor side of a gang: the Spark task, and the child process that it guards.

The task itself stays small: it meets the other tasks, starts one child with an environment of its own, waits,
and reports. Frameworks are only ever imported in the child, because a Spark Python worker is used again by
other jobs, and some frameworks can be configured only once in a process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import pyarrow as pa
from pyspark import BarrierTaskContext, SparkFiles

from spark_nn.errors import ClusterError
from spark_nn.gang.collective import listen
from spark_nn.gang.failure import Failure
from spark_nn.store import RunDir

# What must be alike on all ranks for them to train one model.
_PACKAGES = ("spark-nn", "numpy", "pyarrow", "petastorm", "keras", "tensorflow", "tensorflow-cpu", "torch", "jax")
# How much of a child's output goes into an error.
_LOG_TAIL = 4_000
# A survivor waits this long with its complaint, so that Spark hears of the cause first.
_SURVIVOR_DELAY = 1.0


@dataclass(frozen=True)
class GangTask:
    """The function that Spark runs in each task of the barrier stage.

    Parameters
    ----------
    run : RunDir
        The run directory.
    function : bytes
        The function to run on each rank, pickled by cloudpickle on the driver. It reaches the task inside
        Spark's own closure and is unpickled only in the child.
    environment : dict
        Variables that the function wants set.
    secret : bytes
        What the ranks prove to each other to know.
    timeout : float
        Seconds that a rank waits for another.
    """

    run: RunDir
    function: bytes
    environment: dict[str, str]
    secret: bytes = field(repr=False)
    timeout: float

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Run one rank; yield its number when it has finished."""
        for _ in batches:
            pass
        context = BarrierTaskContext.get()
        rank = context.partitionId()
        host = context.getTaskInfos()[rank].address.rsplit(":", 1)[0]
        try:
            with listen(host) as listener:
                address = listener.getsockname()[:2]
                card = {"rank": rank, "host": host, "address": address, "versions": versions()}
                cards = [json.loads(text) for text in context.allGather(json.dumps(card))]
                _check_alike(cards)
                order = {
                    "rank": rank,
                    "host": host,
                    "cpus": context.cpus(),
                    "neighbours": sum(other["host"] == host for other in cards),
                    "addresses": [other["address"] for other in cards],
                    "secret": self.secret.hex(),
                    "timeout": self.timeout,
                    "run": self.run.url,
                    "listener": listener.fileno(),
                }
                resources = context.resources()
                gpus = resources["gpu"].addresses if "gpu" in resources else []
                env = child_environment(os.environ, context.cpus(), gpus) | self.environment
                self._guard(order, listener, env)
        except _ChildFailed:
            raise
        except Exception as error:
            Failure.of(error, rank, host).save(self.run)
            raise
        yield pa.RecordBatch.from_pydict({"rank": [rank]})

    def _guard(self, order: dict[str, Any], listener: socket.socket, env: dict[str, str]) -> None:
        """Run the child and wait for it; see to it that it leaves a failure where it fails."""
        rank, host = order["rank"], order["host"]
        # Below Spark's own folder, which goes with the executor even if this task is killed. And a file without a
        # name: it is gone with the process, whichever way that ends.
        home = SparkFiles.getRootDirectory()
        with tempfile.TemporaryDirectory(prefix="spark_nn-", dir=home) as scratch, tempfile.TemporaryFile() as log:
            order["scratch"] = scratch
            child = subprocess.Popen(
                [sys.executable, "-u", "-m", "spark_nn.gang.child"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Whatever it leaves in the temporary directory when it is killed goes with it too.
                env={**env, "TMPDIR": scratch},
                pass_fds=[listener.fileno()],
            )
            try:
                listener.close()  # the child has it now; two owners would keep a dead child's port open
                _send(child, json.dumps(order).encode(), self.function)
                status = child.wait()
            finally:
                # Closing the pipe tells the child to go; killing it makes sure.
                child.kill()
                child.wait()
                if child.stdin is not None:
                    child.stdin.close()
            if status == 0:
                return
            failure = Failure.load(self.run, rank)
            if failure is None:
                failure = Failure(rank, host, "died", _death(status), when=time.time())
            failure = replace(failure, log=_tail(log))
            failure.save(self.run)
        if failure.kind == "peer":
            time.sleep(_SURVIVOR_DELAY)
        raise _ChildFailed(f"rank {rank} on {host}: {failure.reason}\n{failure.traceback}")


class _ChildFailed(RuntimeError):
    """The child failed and its failure is recorded."""


def versions() -> dict[str, str]:
    """Version of Python and of each package that training depends on, where it is installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def child_environment(base: Mapping[str, str], cpus: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a rank's process.

    Parameters
    ----------
    base : mapping
        The task's own environment: it holds credentials and library paths, but also what earlier jobs in the
        same Spark Python worker may have left behind.
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


def _send(child: subprocess.Popen[bytes], *parts: bytes) -> None:
    """Hand a child its order. The pipe stays open: its end tells the child that the task is gone."""
    assert child.stdin is not None
    try:
        for part in parts:
            child.stdin.write(struct.pack("!Q", len(part)))
            child.stdin.write(part)
        child.stdin.flush()
    except BrokenPipeError:
        # The child died while it started; its status and its log say why.
        return


def _death(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory is the usual reason)" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with status {status} before it could say why"


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _LOG_TAIL))
    return log.read().decode(errors="replace").strip()
