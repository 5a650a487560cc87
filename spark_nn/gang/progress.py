"""Progress of a fit, from rank 0 through the run directory to the driver's terminal.

Rank 0 overwrites one small file with the latest state, from a thread of its own, so that training never waits
for the store. The driver reads that file twice a second.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm.std import tqdm

from spark_nn.errors import StoreError
from spark_nn.store import RunDir

PROGRESS = "progress.json"
_INTERVAL = 0.5
_LOG = logging.getLogger(__name__)


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
    """

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    history: dict[str, list[Any]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    rows: int = 0
    phase: str = "start"

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
    """

    def __init__(self, run: RunDir, rank: int) -> None:
        self.state = State()
        self.moved = threading.Event()
        self._run = run
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._publish, name="progress", daemon=True)
        if rank == 0:
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
            self._closed.wait(_INTERVAL)


class Display:
    """Driver side: shows the progress of a fit, finished epochs as lines and the one under way as a bar.

    Parameters
    ----------
    verbose : {0, 1, 2}
        Nothing; a live bar, on a terminal; a line per epoch.
    label : str
        What begins each line, where several fits are shown; there is no bar then.
    """

    def __init__(self, verbose: int, label: str = "") -> None:
        self._verbose = verbose
        self._label = label
        self._told = 0  # epochs that have a line, whichever attempt finished them

    @contextlib.contextmanager
    def shown(self, run: RunDir) -> Iterator[None]:
        """Show an attempt's progress while the block runs; epochs that it took over from the last have their lines."""
        if self._verbose == 0:
            yield
            return
        live = self._verbose == 1 and not self._label and sys.stderr.isatty()
        attempt = _Attempt(self._told, self._label, live=live)
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(_INTERVAL):
                attempt.show(run)

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=10)
            attempt.show(run)
            attempt.close()
            self._told = max(self._told, attempt.lines)


class _Attempt:
    """The lines and the bar of an attempt."""

    def __init__(self, told: int, label: str, *, live: bool) -> None:
        self.lines = 0
        self._told = told
        self._label = label
        self.bar = tqdm(
            desc="starting",
            disable=not live,
            file=sys.stderr,
            leave=False,
            bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} steps{postfix}",
        )

    def show(self, run: RunDir) -> None:
        try:
            if (value := run.readJson(PROGRESS)) is not None:
                self.draw(State(**value))
        except Exception:  # noqa: BLE001  (every store has errors of its own, and none may end a fit)
            _LOG.debug("progress could not be read", exc_info=True)

    def draw(self, state: State) -> None:
        if state.epoch or state.seconds:  # training has begun, and what is finished by now was taken over
            self.lines = max(self.lines, min(self._told, len(state.seconds)))
            self._told = 0
            while self.lines < len(state.seconds):
                tqdm.write(self._label + _line(state, self.lines), file=sys.stderr)
                self.lines += 1
        self.bar.total = state.steps
        self.bar.n = state.step
        self.bar.set_description_str(f"epoch {state.epoch}/{state.epochs}", refresh=False)
        self.bar.set_postfix_str(f"{state.rowsPerSecond:,.0f} rows/s" if state.seconds else "")

    def close(self) -> None:
        self.bar.close()


def _line(state: State, epoch: int) -> str:
    values = "  ".join(
        f"{name} {series[epoch]}" if isinstance(series[epoch], int) else f"{name} {series[epoch]:.4f}"
        for name, series in state.history.items()
        if epoch < len(series) and isinstance(series[epoch], (int, float))
    )
    if not state.rows:  # what the user's own function reports need not be an epoch
        return f"report {epoch + 1}  {values}"
    speed = state.rows / state.seconds[epoch] if state.seconds[epoch] else 0.0
    return f"epoch {epoch + 1}/{state.epochs}  {values}  {speed:,.0f} rows/s"
