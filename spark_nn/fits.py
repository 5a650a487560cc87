"""Driver side: the fits of one call, of one set of params or of many.

Rows are written once for all fits that want the same of them. Fits that need the same gang share its start: those of
several workers take turns in it, those of one worker run side by side as far as the cluster has room.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from spark_nn.dataset.lease import Dataset, Source
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.materialize import Spec, check_count
from spark_nn.errors import SparkNNError
from spark_nn.gang.board import Board
from spark_nn.gang.launch import Gang, Job, Outcome
from spark_nn.store import RunDir
from spark_nn.trainer import Trainer

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


class Fit(Protocol[M_co]):
    """One fit, whose params have been checked."""

    @property
    def gang(self) -> Gang:
        """What it trains on."""

    @property
    def store(self) -> str:
        """URL of the store."""

    @property
    def spec(self) -> Spec:
        """What it wants of the rows."""

    @property
    def label(self) -> str:
        """What tells it from the other fits of the call, for those who watch."""

    @property
    def verbose(self) -> int:
        """How to show progress."""

    @property
    def followLogs(self) -> bool:
        """Whether to show what the ranks print."""

    def trainer(self, run: RunDir) -> Trainer:
        """What travels to the gang; large parts are left as files in the run directory."""

    def model(self, outcome: Outcome, run: RunDir, manifest: Manifest, materializing: float) -> M_co:
        """The fitted model.

        Parameters
        ----------
        outcome : Outcome
            What came of the training.
        run : RunDir
            Its directory.
        manifest : Manifest
            The rows it was trained on.
        materializing : float
            Seconds that it took to write them, or to find them.
        """


class Fits(Generic[M]):
    """An iterator over the models of several fits, in the order of completion, as ``Estimator.fitMultiple`` gives it.

    Threads may share it. Training begins with the first ``next`` and goes on between two of them; who drops the
    iterator half-way ends it.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        The rows, taken to be the same for all fits.
    fits : sequence of Fit
        The fits.
    """

    def __init__(self, dataset: DataFrame, fits: Sequence[Fit[M]]) -> None:
        self._left = len(fits)
        self._models = _train(dataset, fits)
        self._lock = threading.Lock()
        self._broken: BaseException | None = None

    def __iter__(self) -> Fits[M]:
        return self

    def __next__(self) -> tuple[int, M]:
        with self._lock:
            if not self._left:
                raise StopIteration
            if self._broken is not None:
                raise self._broken
            try:
                place, result = next(self._models)
                self._left -= 1
                if not self._left:
                    for _ in self._models:  # nobody will ask again, and what was begun must end
                        pass
            except BaseException as error:
                self._broken = error  # which those whose turn comes now are told, too
                raise
        if isinstance(result, SparkNNError):
            raise result
        return place, result


def _train(dataset: DataFrame, fits: Sequence[Fit[M]]) -> Iterator[tuple[int, M | SparkNNError]]:
    """The place of a fit and its model, or the error that it ended with."""
    together: dict[tuple[Gang, str, int, bool], dict[int, Fit[M]]] = {}
    for place, fit in enumerate(fits):
        together.setdefault((fit.gang, fit.store, fit.verbose, fit.followLogs), {})[place] = fit
    with Source(dataset) as source:
        for group in together.values():
            with RunDir.open(next(iter(group.values())).store) as run:
                yield from _train_together(source, run, group)


def _train_together(source: Source, run: RunDir, fits: Mapping[int, Fit[M]]) -> Iterator[tuple[int, M | SparkNNError]]:
    runs = {place: run.below(f"fit-{place}") if len(fits) > 1 else run for place in fits}
    any_fit = next(iter(fits.values()))
    gang, labels = any_fit.gang, {runs[place].url: fit.label for place, fit in fits.items()}
    with Board(labels, verbose=any_fit.verbose, followLogs=any_fit.followLogs) as board:
        trainers: dict[int, Trainer] = {}
        for place, fit in fits.items():
            try:
                run.mkdir(runs[place].url.removeprefix(run.url).strip("/"))
                trainers[place] = fit.trainer(runs[place])
            except SparkNNError as error:
                board.done(runs[place].url, failed=True)
                yield place, error
        if not trainers:
            return
        first = next(iter(trainers.values()))
        home = gang.home(first.environment, first.preload)
        gang.warm(home, len(trainers))  # the executors import the framework while the rows are written
        board.phase("materializing rows")
        data: dict[int, Dataset] = {}
        seconds: dict[int, float] = {}
        for place in trainers:
            began = time.monotonic()
            try:
                leased = source.lease(fits[place].spec, any_fit.store)
                check_count(leased.manifest, fits[place].spec, gang.world)
            except SparkNNError as error:
                board.done(runs[place].url, failed=True)
                yield place, error
                continue
            data[place], seconds[place] = leased, time.monotonic() - began
        places = list(data)
        jobs = [
            Job(runs[place], functools.partial(trainers[place], data=data[place].run), trainers[place].apart)
            for place in places
        ]
        for index, outcome in gang.runAll(jobs, run, home=home, board=board):
            place = places[index]
            try:
                if isinstance(outcome, SparkNNError):
                    raise outcome
                result: M | SparkNNError = fits[place].model(outcome, runs[place], data[place].manifest, seconds[place])
            except SparkNNError as error:
                result = error
            board.done(runs[place].url, failed=isinstance(result, SparkNNError))
            yield place, result
