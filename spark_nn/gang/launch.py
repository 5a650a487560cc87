"""Driver side of a gang: checks before it starts, the barrier job, and what came out of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle

from spark_nn.errors import ClusterError, TrainingError
from spark_nn.gang.context import RESULT, GangContext
from spark_nn.gang.failure import FOLDER, Failure, first_failure
from spark_nn.gang.progress import shown
from spark_nn.gang.worker import GangTask
from spark_nn.store import RunDir

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Executors of a cluster register some seconds after the session is there.
_REGISTRATION = 20.0
# Seconds that a rank waits for another: an import of a large framework on a slow disk must fit in.
_TIMEOUT = 600.0
# Seconds to wait for the cause of a failure while only survivors have reported.
_PATIENCE = 3.0


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
        Seconds that a rank waits for another.
    """

    spark: SparkSession
    world: int
    timeout: float = _TIMEOUT

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
        slots = self._slots()
        if slots is not None and slots < self.world:
            master = self.spark.conf.get("spark.master", "")
            raise ClusterError(
                f"numWorkers={self.world}, but the cluster (master {master!r}) runs {slots} "
                f"task{'s' if slots != 1 else ''} at a time: use {max(slots, 1)} or fewer workers, or give "
                "the session more cores (local[n], or executors x spark.executor.cores / spark.task.cpus)"
            )

    def run(
        self,
        function: Callable[[GangContext], Any],
        run: RunDir,
        *,
        environment: Mapping[str, str] | None = None,
        verbose: int = 0,
    ) -> Any:
        """Run a function on every rank.

        Parameters
        ----------
        function : callable
            Takes the :class:`~spark_nn.gang.context.GangContext`; what it returns on rank 0 must fit in JSON.
        run : RunDir
            The run directory.
        environment : mapping, optional
            Variables to set in every rank's process before it starts.
        verbose : {0, 1, 2}
            How to show progress (see :func:`~spark_nn.gang.progress.shown`).

        Returns
        -------
        object
            What the function returned on rank 0.

        Raises
        ------
        TrainingError
            A rank failed; it carries the rank, the host and the original traceback.
        """
        run.mkdir(FOLDER)
        task = GangTask(
            run=run,
            function=cloudpickle.dumps(function),
            environment=dict(environment or {}),
            secret=secrets.token_bytes(32),
            timeout=self.timeout,
        )
        try:
            with shown(run, verbose):
                (self.spark.range(0, self.world, 1, self.world).mapInArrow(task, "rank long", barrier=True).collect())
        except Exception as error:
            failure = first_failure(run, self.world, _PATIENCE)
            if failure is None:
                # No rank could report: Spark's own words are all there is.
                words = str(error).split("\n\tat ")[0]
                raise TrainingError(f"the gang could not run: {words}") from error
            raise _training_error(failure) from None
        return run.readJson(RESULT)

    def _slots(self) -> int | None:
        """Tasks that fit on the cluster at a time, None where the driver cannot know."""
        session = getattr(self.spark, "_jsparkSession", None)
        if session is None:
            return None
        context = session.sparkContext()
        profile = context.resourceProfileManager().defaultResourceProfile()
        local = str(context.master()).startswith("local[") or context.master() == "local"
        deadline = time.monotonic() + (0.0 if local else _REGISTRATION)
        while True:
            slots = int(context.maxNumConcurrentTasks(profile))
            if slots >= self.world or time.monotonic() >= deadline:
                return slots
            time.sleep(0.2)


def _training_error(failure: Failure) -> TrainingError:
    lines = [f"training failed on rank {failure.rank} (host {failure.host}): {failure.reason}"]
    if failure.traceback:
        lines += ["", "The worker's traceback:", failure.traceback.rstrip()]
    elif failure.log:
        lines += ["", "The last lines it printed:", failure.log]
    return TrainingError(
        "\n".join(lines), rank=failure.rank, host=failure.host, workerTraceback=failure.traceback or None
    )
