"""Progress of a fit, from rank 0 to the run directory.

Rank 0 overwrites one small file with the latest state, from a thread of its own, so that training never waits
for the store. The driver reads that file twice a second (see :mod:`spark_nn.gang.board`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from spark_nn.errors import StoreError
from spark_nn.store import RunDir

PROGRESS = "progress.json"
# Seconds between two states that are published, and between two looks at them.
INTERVAL = 0.5


@dataclass
class State:
    """Where training stands.

    Parameters
    ----------
    epoch, epochs : int
        Epochs begun, of how many.
    step, steps : int
        Steps of the epoch that are done, of how many.
    history : dict
        For each metric its value after each finished epoch.
    seconds : list of float
        Training time of each finished epoch, without its validation.
    rows : int
        Rows that all ranks together train on in an epoch.
    phase : str
        What the rank is doing.
    loss : float or None
        Mean loss of the epoch under way so far, over the rows of rank 0; None where nobody has looked.
    busy : float
        Seconds of training since the first step was done, without validation.
    pause : float
        Seconds that the last validation took.
    """

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    history: dict[str, list[Any]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    rows: int = 0
    phase: str = "start"
    loss: float | None = None
    busy: float = 0.0
    pause: float = 0.0

    @classmethod
    def fromDict(cls, value: Mapping[str, Any]) -> State:
        """A state as another process has published it.

        Raises
        ------
        TypeError, ValueError
            It makes no sense.
        """
        state = cls(**value)
        for name in ("epoch", "epochs", "step", "steps", "rows"):
            setattr(state, name, int(getattr(state, name)))
        for name in ("busy", "pause"):
            setattr(state, name, float(getattr(state, name)))
        state.history = {str(name): list(values) for name, values in dict(state.history).items()}
        state.seconds = [float(each) for each in state.seconds]
        state.phase = str(state.phase)
        state.loss = None if state.loss is None else float(state.loss)
        return state

    @property
    def rowsPerSecond(self) -> float:
        """Training rows per second over the finished epochs."""
        spent = sum(self.seconds)
        return self.rows * len(self.seconds) / spent if spent else 0.0


class Reporter:
    """Worker side: publishes the state of training. Only rank 0's goes anywhere.

    Parameters
    ----------
    run : RunDir
        Where to publish.
    rank : int
        Whose reporter.

    Attributes
    ----------
    moved : threading.Event
        Set where the phase changes.
    heard : bool
        Whether anybody is told.
    """

    def __init__(self, run: RunDir, rank: int) -> None:
        self.state = State()
        self.heard = rank == 0
        self.moved = threading.Event()
        self._run = run
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="progress", daemon=True)
        if self.heard:
            self._thread.start()

    @property
    def place(self) -> str:
        """What the rank is doing, in words."""
        state = self.state
        return f"{state.phase}, epoch {state.epoch}, step {state.step}" if state.epoch else state.phase

    def update(self, **changes: Any) -> None:
        """Set fields of the state; they are published soon."""
        for name, value in changes.items():
            setattr(self.state, name, value)
        self._changed.set()
        if "phase" in changes:
            self.moved.set()

    def close(self) -> None:
        """Publish the last state."""
        self._closed.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _publish(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            closing = self._closed.is_set()
            # Progress is a courtesy: a store that is slow or away for a moment must not end the training.
            with contextlib.suppress(OSError, StoreError, RuntimeError):
                self._run.writeJson(PROGRESS, asdict(self.state))
            if closing:
                return
            self._closed.wait(INTERVAL)
