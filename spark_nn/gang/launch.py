"""Driver side of a gang: checks before it starts, the barrier job, and what came out of it."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle
from pyspark import inheritable_thread_target

from spark_nn.errors import ClusterError, ParamError, StoreError, TrainingError
from spark_nn.gang.context import CARDS, RESULT, GangContext, attempt_folder
from spark_nn.gang.failure import FOLDER, Failure, first_failure
from spark_nn.gang.progress import Display
from spark_nn.gang.worker import GangTask, Home, WarmTask
from spark_nn.store import RunDir

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

IDLE_CONF = "spark.nn.workerIdleSeconds"
_IDLE = 60.0
# Executors of a cluster register some seconds after the session is there, and come back some time after they died.
_REGISTRATION = 20.0
_RECOVERY = 120.0
# Seconds to wait for the cause of a failure while only survivors have reported.
_PATIENCE = 3.0
# Seconds before training is begun again: what has failed may need a moment.
_PAUSE = 0.5
# How Spark tells of tasks and executors that are gone.
_LOST = re.compile(r"stage failure|barrier|[Ee]xecutor|[Ww]orker|UNAVAILABLE|[Cc]onnection")
_CANCELLED = re.compile(r"JOB_CANCELLED|OPERATION_CANCELED|[Jj]ob \d+ (was )?cancelled")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Parameters
    ----------
    value : object
        What the function returned on rank 0.
    restarts : list of str
        Why it was begun again, each time.
    seconds : dict of str to float
        Where the time went but for the function itself: ``lost`` in attempts that failed, ``start`` until the function
        began on rank 0, ``finish`` after it had ended there.
    """

    value: Any
    restarts: list[str]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Gang:
    """A number of Spark tasks that run one function together.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Whose cluster.
    world : int
        How many tasks.
    timeout : float
        Seconds that a rank may keep silent, and that it waits for anything.
    retries : int
        How often to begin again after a failure that is not the function's.
    gpus : bool or None
        Whether every task must have a GPU, or none may see one; None for what Spark assigns.
    """

    spark: SparkSession
    world: int
    timeout: float = 600.0
    retries: int = 0
    gpus: bool | None = None

    def check(self) -> None:
        """Check that the cluster can run all tasks at the same time.

        Raises
        ------
        ClusterError
            It cannot. Spark itself would say so only after ten minutes.

        Notes
        -----
        A Spark Connect client cannot see the slots; there Spark's own check is the only one.
        """
        if (self.spark.conf.get("spark.dynamicAllocation.enabled", "false") or "").lower() == "true":
            raise ClusterError(
                "spark.dynamicAllocation.enabled=true, but all tasks of a training must run at the same time "
                "and Spark cannot promise that while executors come and go: set it to false"
            )
        amount = float(self.spark.conf.get("spark.task.resource.gpu.amount", None) or 0)
        if self.gpus and not amount:
            raise ParamError(
                "useGpu=True, but Spark assigns no GPU to its tasks: set spark.task.resource.gpu.amount (and "
                "spark.executor.resource.gpu.amount with its discovery script), or leave useGpu out"
            )
        slots = self._slots(_REGISTRATION)
        if slots is not None and slots < self.world:
            master = self.spark.conf.get("spark.master", "")
            raise ClusterError(
                f"numWorkers={self.world}, but the cluster (master {master!r}) runs {slots} "
                f"task{'s' if slots != 1 else ''} at a time: use {max(slots, 1)} or fewer workers, or give "
                "the session more cores (local[n], or executors x spark.executor.cores / spark.task.cpus)"
            )

    def home(self, variables: dict[str, str], preload: tuple[str, ...]) -> Home:
        """What the ranks' processes need, with the session's settings.

        Parameters
        ----------
        variables : dict
            Variables to set before such a process starts.
        preload : tuple of str
            What to do in the server that the processes are forked from, each a ``module:function``.
        """
        value = self.spark.conf.get(IDLE_CONF, None)
        try:
            idle = _IDLE if value is None else float(value)
        except ValueError:
            idle = -1.0
        if not 0 <= idle < float("inf"):
            raise ParamError(f"the Spark conf {IDLE_CONF}={value!r}: must be a number of seconds, 0 or more")
        return Home(variables, preload, idle, gpus=self.gpus is not False)

    def warm(self, home: Home) -> None:
        """Have the executors import what the ranks need; returns as soon as they have begun."""
        if not home.idle or not home.preload:
            return
        try:
            self.spark.range(0, self.world, 1, self.world).mapInArrow(WarmTask(home), "id long").collect()
        except Exception as error:  # noqa: BLE001  (whatever it is, it comes again where it matters)
            _LOG.info("the workers could not be warmed up: %s", _words(error))

    def run(
        self, function: Callable[[GangContext], Any], run: RunDir, *, home: Home | None = None, verbose: int = 0
    ) -> Outcome:
        """Run a function on every rank, and again where a machine fails.

        Parameters
        ----------
        function : callable
            Takes the :class:`~spark_nn.gang.context.GangContext`; what it returns on rank 0 must fit in JSON.
        run : RunDir
            The run directory.
        home : Home, optional
            What the ranks' processes need.
        verbose : {0, 1, 2}
            How to show progress (see :class:`~spark_nn.gang.progress.Display`).

        Returns
        -------
        Outcome
            What the function returned on rank 0.

        Raises
        ------
        TrainingError
            A rank failed; it carries the rank, the host, what it was doing and the original traceback.
        """
        pickled = cloudpickle.dumps(function)
        restarts: list[str] = []
        display = Display(verbose)
        first = time.monotonic()
        while True:
            lost = time.monotonic() - first
            task = GangTask(
                run=run,
                attempt=len(restarts),
                function=pickled,
                home=home or Home(),
                secret=secrets.token_bytes(32),
                timeout=self.timeout,
            )
            try:
                value, seconds = self._attempt(task, display)
                return Outcome(value, restarts, {"lost": lost, **seconds} if restarts else seconds)
            except TrainingError as error:
                error.restarts = restarts
                if not error.transient or len(restarts) >= self.retries:
                    if restarts:
                        error.add_note(f"It had been begun again {len(restarts)} times, after: " + "; ".join(restarts))
                    raise
                restarts.append(str(error).partition("\n")[0])
                _LOG.warning(
                    "%s. Trying again, from the last checkpoint if there is one (%d of %d)",
                    *(restarts[-1], len(restarts), self.retries),
                )
                time.sleep(_PAUSE)
                slots = self._slots(_RECOVERY)
                if slots is not None and slots < self.world:
                    raise ClusterError(
                        f"training cannot go on: {restarts[-1]}, and {_RECOVERY:g} s later the cluster has room for "
                        f"{slots} of {self.world} workers"
                    ) from error

    def _attempt(self, task: GangTask, display: Display) -> tuple[Any, dict[str, float]]:
        """What the function returned on rank 0, and the seconds before and after it."""
        left = attempt_folder(task.run, task.attempt)
        left.mkdir(FOLDER)
        submitted = time.time()
        try:
            with display.shown(left):
                self._collect(task)
        except Exception as error:
            words = str(error)
            if _CANCELLED.search(words):
                raise TrainingError(f"the training's Spark job was cancelled: {_words(error)}") from None
            try:
                failure = first_failure(left, self.world, _PATIENCE)
                failure = failure and self._named(failure, left)
            except StoreError:  # it may be what failed
                failure = None
            failure = failure or Failure.fromText(words)
            if failure is None:
                # No rank could report: Spark's own words are all there is.
                lost = bool(_LOST.search(words)) and "Traceback (most recent" not in words
                raise TrainingError(f"the gang could not run: {_words(error)}", transient=lost) from error
            raise _training_error(failure) from None
        result = left.readJson(RESULT)
        if result is None:
            raise StoreError(
                f"rank 0 has left no result in {left.url}: the store is not the same directory there as here"
            )
        around = time.time() - submitted - (result["ended"] - result["began"])
        # The clocks of two machines need not agree.
        start = min(max(0.0, result["began"] - submitted), around)
        return result["value"], {"start": start, "finish": around - start}

    def _named(self, failure: Failure, left: RunDir) -> Failure:
        """The failure; where only survivors have told of it, that of the rank that told nothing."""
        cards = left.readJson(CARDS)
        silent = [rank for rank in range(self.world) if Failure.load(left, rank) is None]
        if failure.kind != "peer" or not cards or not silent:
            return failure
        rank = silent[0]
        return replace(failure, rank=rank, host=cards[rank]["host"], traceback="", log="")

    def _collect(self, task: GangTask) -> None:
        """Run the job in a thread of its own, and cancel it where this one is interrupted, as by Ctrl-C.

        PySpark cannot cancel anything from a thread that waits for an answer of the JVM.
        """
        tag = f"spark_nn-{uuid.uuid4().hex}"
        done: Future[None] = Future()

        def collect() -> None:
            try:
                self.spark.addTag(tag)
                self.spark.range(0, self.world, 1, self.world).mapInArrow(task, "rank long", barrier=True).collect()
                done.set_result(None)
            except BaseException as error:  # noqa: BLE001  (the waiting thread raises it)
                done.set_exception(error)

        target = inheritable_thread_target(self.spark)(collect)
        threading.Thread(target=target, name="spark_nn-gang", daemon=True).start()
        try:
            done.result()
        except Exception:
            raise
        except BaseException:
            self.spark.interruptTag(tag)
            raise

    def _slots(self, patience: float) -> int | None:
        """Tasks that fit on the cluster at a time, None where the driver cannot know."""
        session = getattr(self.spark, "_jsparkSession", None)
        if session is None:
            return None
        context = session.sparkContext()
        profile = context.resourceProfileManager().defaultResourceProfile()
        local = str(context.master()).startswith("local[") or context.master() == "local"
        deadline = time.monotonic() + (0.0 if local else patience)
        while True:
            slots = int(context.maxNumConcurrentTasks(profile))
            if slots >= self.world or time.monotonic() >= deadline:
                return slots
            time.sleep(0.2)


def _words(error: BaseException) -> str:
    return str(error).split("\n\tat ")[0]


def _training_error(failure: Failure) -> TrainingError:
    phase = f" in phase '{failure.phase}'" if failure.phase else ""
    lines = [f"training failed on rank {failure.rank} (host {failure.host}){phase}: {failure.reason}"]
    if failure.traceback:
        lines += ["", "The worker's traceback:", failure.traceback.rstrip()]
    elif failure.log:
        lines += ["", "The last lines it printed:", failure.log]
    return TrainingError(
        "\n".join(lines),
        rank=failure.rank,
        host=failure.host,
        phase=failure.phase or None,
        workerTraceback=failure.traceback or None,
        transient=failure.transient,
    )
