"""The errors users meet. Each message says what was found, what was allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparkNNError(Exception):
    """Base class of every error that spark_nn raises on purpose."""


class ParamError(SparkNNError, ValueError):
    """A param's value cannot be used, alone or together with another one."""


class ColumnError(SparkNNError, ValueError):
    """A column is missing, has a type that cannot become a tensor, or holds values that cannot be used."""


class StoreError(SparkNNError, OSError):
    """The run store cannot be reached, read or written.

    Attributes
    ----------
    transient : bool
        Whether the same may succeed at another time: not on a disk that is full, or where permission is missing.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class DatasetError(SparkNNError):
    """The materialised dataset does not hold what its manifest says, or too little to train on."""


class ClusterError(SparkNNError):
    """The cluster cannot start a gang of the size asked for."""


class CollectiveError(SparkNNError):
    """An exchange between the ranks of a gang went wrong."""


class PeerLost(CollectiveError):
    """Another rank closed its connection or stayed silent past the time limit.

    The rank that raises it is a survivor: the cause is somewhere else in the gang.
    """


class OutOfStep(CollectiveError):
    """Two ranks met in an exchange at different places of the training."""


class ModelFileError(SparkNNError):
    """A saved model is incomplete, was changed since it was saved, or holds what may not be loaded."""


class CheckpointError(SparkNNError):
    """A checkpoint is of another training than the one that was to go on from it."""


class NonFiniteLoss(SparkNNError, ArithmeticError):
    """The loss of a training step is NaN or infinite, and training was to stop then."""


class TrainingError(SparkNNError):
    """Training failed on a worker.

    Attributes
    ----------
    rank : int or None
        The rank that failed first, ``None`` where none could report.
    host : str or None
        The host it ran on.
    phase : str or None
        What it was doing.
    workerTraceback : str or None
        The traceback as the worker saw it.
    transient : bool
        Whether a machine failed, and no mistake of the user's: such failures are retried (`maxRetries`).
    restarts : list of str
        Why training was begun again before, each time.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        phase: str | None = None,
        workerTraceback: str | None = None,
        transient: bool = False,
        restarts: list[str] | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.host = host
        self.phase = phase
        self.workerTraceback = workerTraceback
        self.transient = transient
        self.restarts = restarts or []


def meant(given: str, known: Iterable[str]) -> str:
    """The name that somebody may have meant, as a remark to put after the one given; empty where none is near."""
    near = {_bare(name): name for name in known}
    found = difflib.get_close_matches(_bare(given), near, n=3, cutoff=0.7)
    # Letters that have changed places are the likeliest mistake, and difflib counts them as two.
    found.sort(key=lambda each: sorted(each) != sorted(_bare(given)))
    return f" (did you mean {near[found[0]]!r}?)" if found else ""


def _bare(name: str) -> str:
    return name.replace("_", "").lower()
