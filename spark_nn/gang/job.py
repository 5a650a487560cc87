"""Driver side: a Spark job in a thread of its own, so that who waits for it can do something else, and cancel it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from pyspark import inheritable_thread_target

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


# Seconds between two attempts at cancelling a job, and after which it is left to itself.
_INTERVAL = 0.2
_PATIENCE = 10.0


class SparkJob:
    """A job of one stage, begun with the block and cancelled where the block is left before it is over.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Where to run it.
    task : callable
        What each task does, as ``mapInArrow`` takes it; it yields a number as the column ``rank``.
    tasks : int
        How many.
    barrier : bool
        Whether all of them run at the same time.
    """

    def __init__(self, spark: SparkSession, task: Callable[[Iterator[Any]], Any], tasks: int, *, barrier: bool) -> None:
        self._spark = spark
        self._task = task
        self._tasks = tasks
        self._barrier = barrier
        self._tag = f"spark_nn-{uuid.uuid4().hex}"
        self._classic = getattr(spark, "_jsparkSession", None) is not None
        self._done: Future[list[int]] = Future()

    def __enter__(self) -> SparkJob:
        target = inheritable_thread_target(self._spark)(self._collect)
        threading.Thread(target=target, name="spark_nn-gang", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Again and again, as it may just be about to begin.
        until = time.monotonic() + _PATIENCE
        while not self._done.done() and time.monotonic() < until:
            # PySpark cannot cancel anything from a thread that waits for an answer of the JVM, so this one does.
            if self._classic:
                self._spark.sparkContext.cancelJobsWithTag(self._tag)
            else:
                self._spark.interruptTag(self._tag)
            self.over(_INTERVAL)

    def over(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most so long; whether it has come."""
        wait([self._done], seconds)
        return self._done.done()

    @property
    def error(self) -> BaseException | None:
        """What ended it before its time."""
        return self._done.exception()

    @property
    def yielded(self) -> set[int]:
        """What its tasks have yielded; nothing where it failed."""
        return set(self._done.result()) if self.error is None else set()

    def _collect(self) -> None:
        try:
            # On a classic session interruptTag finds only what its own thread has tagged.
            if self._classic:
                self._spark.sparkContext.addJobTag(self._tag)
            else:
                self._spark.addTag(self._tag)
            tasks = self._spark.range(0, self._tasks, 1, self._tasks)
            rows = tasks.mapInArrow(self._task, "rank long", barrier=self._barrier).collect()
            self._done.set_result([row.rank for row in rows])
        except BaseException as error:  # noqa: BLE001  (whoever waits finds it)
            self._done.set_exception(error)
