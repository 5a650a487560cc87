"""Driver side of a gang: checks before it starts, the barrier job, and what came out of it."""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle
from pyspark import inheritable_thread_target

from spark_nn.errors import ClusterError, ParamError, SparkNNError, StoreError, TrainingError
from spark_nn.gang.board import Board
from spark_nn.gang.context import CARDS, RESULT, GangContext, attempt_folder
from spark_nn.gang.failure import FOLDER, Failure, first_failure
from spark_nn.gang.job import SparkJob
from spark_nn.gang.plain import plain
from spark_nn.gang.worker import GangTask, Home, LoneTasks, WarmTask, Work
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
# Seconds between two looks at which of several trainings are done.
_LOOK = 0.1
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
        Where the time went but for the function itself: ``lost`` in attempts that failed, ``wait`` for others of the
        same call, ``start`` until the function began on rank 0, ``finish`` after it had ended there.
    """

    value: Any
    restarts: list[str]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Job:
    """What a gang is to run.

    Parameters
    ----------
    run : RunDir
        The directory where the function finds and leaves things, its own.
    function : callable
        Takes the :class:`~spark_nn.gang.context.GangContext`; what it returns on rank 0 must fit in JSON.
    apart : bool
        Whether the ranks have no collective, but call rank 0, and all but that one may be lost.
    """

    run: RunDir
    function: Callable[[GangContext], Any]
    apart: bool = False


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
    others : int
        How many of the tasks are not workers, such as parameter servers.
    """

    spark: SparkSession
    world: int
    timeout: float = 600.0
    retries: int = 0
    gpus: bool | None = None
    others: int = 0

    def check(self) -> None:
        """Check that the cluster can run all tasks at the same time.

        Raises
        ------
        ClusterError
            It cannot. Spark itself would say so only after ten minutes.

        Notes
        -----
        A Spark Connect client sees the slots of a local master alone; elsewhere Spark's own check is the only one.
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
            more = f" and {self.others} more for their chief, parameter servers or evaluator" if self.others else ""
            raise ClusterError(
                f"numWorkers={self.world - self.others}{more}, but the cluster (master {master!r}) runs {slots} "
                f"task{'s' if slots != 1 else ''} at a time: use {max(slots - self.others, 1)} or fewer workers, or "
                "give the session more cores (local[n], or executors x spark.executor.cores / spark.task.cpus)"
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

    def warm(self, home: Home, jobs: int = 1) -> None:
        """Have the executors import what the ranks of so many jobs need, while the driver does something else."""
        if not home.idle or not home.preload:
            return
        tasks = jobs if self.world == 1 else self.world

        def warm() -> None:
            try:
                self.spark.range(0, tasks, 1, tasks).mapInArrow(WarmTask(home), "id long").collect()
            except Exception as error:  # noqa: BLE001  (whatever it is, it comes again where it matters)
                _LOG.info("the workers could not be warmed up: %s", _words(error))

        threading.Thread(target=inheritable_thread_target(self.spark)(warm), name="spark_nn-warm", daemon=True).start()

    def run(
        self,
        function: Callable[[GangContext], Any],
        run: RunDir,
        *,
        home: Home | None = None,
        board: Board | None = None,
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
        board : Board, optional
            Where to show progress.

        Returns
        -------
        Outcome
            What the function returned on rank 0.

        Raises
        ------
        TrainingError
            A rank failed; it carries the rank, the host, what it was doing and the original traceback.
        """
        ((_, outcome),) = self.runAll([Job(run, function)], run, home=home, board=board)
        if isinstance(outcome, SparkNNError):
            raise outcome
        return outcome

    def runAll(
        self, jobs: Sequence[Job], run: RunDir, *, home: Home | None = None, board: Board | None = None
    ) -> Iterator[tuple[int, Outcome | SparkNNError]]:
        """Run several functions in one start: one after the other, or side by side where each takes one rank only.

        Parameters
        ----------
        jobs : sequence of Job
            What to run.
        run : RunDir
            The gang's own directory; that of the job, where there is one.
        home : Home, optional
            What the ranks' processes need.
        board : Board, optional
            Where to show progress.

        Yields
        ------
        tuple
            The place of a job among them, and what came of it: an outcome, or the error that it ended with, which does
            not end the others. In the order of completion, the last when all is over.

        Raises
        ------
        ClusterError
            After a failure the cluster has no room left.
        TrainingError
            The Spark job was cancelled.
        """
        works = [Work(job.run, cloudpickle.dumps(job.function), secrets.token_bytes(32), job.apart) for job in jobs]
        board = board or Board({})
        waiting: dict[int, list[str]] = {place: [] for place in range(len(jobs))}  # and why they were begun again
        first = time.monotonic()
        attempt = 0
        while waiting:
            lost = {"lost": time.monotonic() - first} if attempt else {}
            failures = yield from self._attempt(works, run, attempt, home or Home(), board, waiting, lost)
            transient: SparkNNError | None = None
            for place, error in failures.items():
                restarts = waiting[place]
                if isinstance(error, TrainingError):
                    error.restarts = restarts
                if getattr(error, "transient", False) and len(restarts) < self.retries:
                    transient = error
                    restarts.append(plain(str(error).partition("\n")[0]))
                    with board.aside():
                        _LOG.warning(
                            "%s. Trying again, from the last checkpoint if there is one (%d of %d)",
                            *(restarts[-1], len(restarts), self.retries),
                        )
                    continue
                if restarts:
                    error.add_note(f"It had been begun again {len(restarts)} times, after: " + "; ".join(restarts))
                del waiting[place]
                yield place, error
            if transient is not None:
                self._recover(transient)
            attempt += 1

    def _attempt(
        self,
        works: Sequence[Work],
        run: RunDir,
        attempt: int,
        home: Home,
        board: Board,
        waiting: dict[int, list[str]],
        lost: dict[str, float],
    ) -> Generator[tuple[int, Outcome], None, dict[int, SparkNNError]]:
        """Do the works that wait, and take those that are done from them; return what others have failed of."""
        places = list(waiting)
        folders = {place: attempt_folder(works[place].run, attempt) for place in places}
        left = attempt_folder(run, attempt)
        for folder in (left, *folders.values()):
            folder.mkdir(FOLDER)
        gang = GangTask(
            run, attempt, tuple(works[place] for place in places), home, self.timeout, told=board.followLogs
        )
        lone = self.world == 1 and not self._speculates()
        task = LoneTasks(tuple(replace(gang, run=work.run, works=(work,)) for work in gang.works)) if lone else gang
        submitted = time.time()

        def outcome(place: int, result: dict[str, Any]) -> Outcome:
            seconds = {**(lost if waiting[place] else {}), **_around(result, submitted, alone=len(places) == 1)}
            return Outcome(result["value"], waiting.pop(place), seconds)

        shown = {works[place].run.url: folder for place, folder in folders.items()}
        notes = {
            works[place].run.url: f"attempt {len(reasons) + 1} of {self.retries + 1}, after: {reasons[-1]}"
            for place, reasons in waiting.items()
            if reasons
        }
        tasks = len(places) if lone else self.world
        with board.attempt(shown, notes), SparkJob(self.spark, task, tasks, barrier=not lone) as job:
            # A single one needs no looking for.
            while len(waiting) > 1 and not job.over(_LOOK):
                for place in [each for each in places if each in waiting]:
                    result = _look(folders[place])
                    if result is not None and len(waiting) > 1:
                        board.taken(works[place].run.url)
                        yield place, outcome(place, result)
            job.over()
        error = job.error
        if error is not None and _CANCELLED.search(str(error)):
            raise TrainingError(f"the training's Spark job was cancelled: {_words(error)}") from None
        failures: dict[int, SparkNNError] = {}
        unknown: list[int] = []
        for place in [each for each in places if each in waiting]:
            result = _look(folders[place])
            if result is not None:
                yield place, outcome(place, result)
            elif lone and (own := _left_in(folders[place])) is not None:
                failures[place] = _training_error(own)
            else:
                unknown.append(place)
        if not lone:  # the first of them has failed, and those after it in line have not
            return {unknown[0]: self._cause(left, error, told=error is None)} if unknown else {}
        if error is not None and failures:
            return failures  # the others were ended with the job, and it is not their fault
        for place in unknown:
            told = places.index(place) in job.yielded
            failures[place] = self._cause(folders[place], error, told=told, alone=len(places) == 1)
        return failures

    def _cause(self, left: RunDir, error: BaseException | None, *, told: bool, alone: bool = True) -> SparkNNError:
        """Why there is no result: what the ranks say of it, else what Spark says.

        Parameters
        ----------
        left : RunDir
            Where the ranks leave their failures.
        error : BaseException or None
            How the Spark job ended.
        told : bool
            Whether rank 0 came to its end, and left a result or a failure.
        alone : bool
            Whether the job did nothing else.
        """
        words = "" if error is None else str(error)
        unread: StoreError | None = None
        try:
            failure = first_failure(left, self.world, _PATIENCE if error is not None and alone else 0.0)
            failure = failure and self._named(failure, left)
        except StoreError as refused:  # it may be what failed
            failure, unread = None, refused
        if failure is None and alone:
            failure = Failure.fromText(words)
        if failure is not None:
            return _training_error(failure)
        if error is not None:
            # No rank could report: Spark's own words are all there is.
            lost = bool(_LOST.search(words)) and "Traceback (most recent" not in words
            unable = TrainingError(f"the gang could not run: {_words(error)}", transient=lost)
            unable.__cause__ = error
            return unable
        if unread is not None:
            return unread
        if told:
            return StoreError(
                f"rank 0 has left no result in {left.url}: the store is not the same directory there as here"
            )
        return TrainingError("the Spark task that trained was lost, with its executor", transient=True)

    def _recover(self, error: SparkNNError) -> None:
        """Give what has failed a moment, and see that there is room again."""
        time.sleep(_PAUSE)
        slots = self._slots(_RECOVERY)
        if slots is not None and slots < self.world:
            reason = str(error).partition("\n")[0]
            raise ClusterError(
                f"training cannot go on: {reason}, and {_RECOVERY:g} s later the cluster has room for "
                f"{slots} of {self.world} workers"
            ) from error

    def _speculates(self) -> bool:
        """Whether Spark may run a second copy of a task, which only a barrier stage keeps it from."""
        return (self.spark.conf.get("spark.speculation", "false") or "").lower() == "true"

    def _named(self, failure: Failure, left: RunDir) -> Failure:
        """The failure; where only survivors have told of it, that of the rank that told nothing."""
        cards = left.readJson(CARDS)
        silent = [rank for rank in range(self.world) if Failure.load(left, rank) is None]
        if failure.kind != "peer" or not cards or not silent:
            return failure
        rank = silent[0]
        return replace(failure, rank=rank, host=cards[rank]["host"], traceback="", log="")

    def _slots(self, patience: float) -> int | None:
        """Tasks that fit on the cluster at a time, None where the driver cannot know."""
        session = getattr(self.spark, "_jsparkSession", None)
        if session is None:  # a Connect client sees no more than what the conf tells
            cpus = self.spark.conf.get("spark.task.cpus", None) or "1"
            return slots_of(self.spark.conf.get("spark.master", None) or "", int(cpus))
        context = session.sparkContext()
        profile = context.resourceProfileManager().defaultResourceProfile()
        local = str(context.master()).startswith("local[") or context.master() == "local"
        deadline = time.monotonic() + (0.0 if local else patience)
        while True:
            slots = int(context.maxNumConcurrentTasks(profile))
            if slots >= self.world or time.monotonic() >= deadline:
                return slots
            time.sleep(0.2)


def _look(folder: RunDir) -> dict[str, Any] | None:
    """The result in a folder, if there is one yet and the store tells."""
    try:
        result: dict[str, Any] | None = folder.readJson(RESULT)
    except StoreError:
        return None
    return result


def _left_in(folder: RunDir) -> Failure | None:
    """The failure that a gang of one rank has left, if it has and the store tells."""
    try:
        return Failure.load(folder, 0)
    except StoreError:
        return None


def _around(result: dict[str, Any], submitted: float, *, alone: bool) -> dict[str, float]:
    """Seconds before and after a function; the clocks of two machines need not agree."""
    if not alone:
        start = result["began"] - result["taken"]
        return {"wait": max(0.0, time.time() - submitted - (result["ended"] - result["taken"])), "start": start}
    around = time.time() - submitted - (result["ended"] - result["began"])
    start = min(max(0.0, result["began"] - submitted), around)
    return {"start": start, "finish": around - start}


def slots_of(master: str, cpus: int) -> int | None:
    """Tasks of `cpus` cores that fit on a local master at a time, None where its URL does not tell."""
    if master == "local":
        return 1 // cpus
    if local := re.fullmatch(r"local\[(\d+)(,\d+)?\]", master):
        return int(local[1]) // cpus
    if cluster := re.fullmatch(r"local-cluster\[(\d+),(\d+),\d+\]", master):
        return int(cluster[1]) * (int(cluster[2]) // cpus)
    return None


def _words(error: BaseException) -> str:
    return str(error).split("\n\tat ")[0]


def _training_error(failure: Failure) -> TrainingError:
    phase = f" in phase '{failure.phase}'" if failure.phase else ""
    lines = [f"training failed on rank {failure.rank} (host {failure.host}){phase}: {failure.reason}"]
    if failure.traceback:
        lines += ["", "The worker's traceback:", failure.traceback.rstrip()]
    # The process prints its traceback last of all.
    printed = failure.log.partition("Traceback (most recent call last)")[0] if failure.traceback else failure.log
    if printed.strip():
        lines += ["", "The last lines it printed:", printed.strip()]
    return TrainingError(
        "\n".join(lines),
        rank=failure.rank,
        host=failure.host,
        phase=failure.phase or None,
        workerTraceback=failure.traceback or None,
        transient=failure.transient,
    )
