"""Worker side: how far a training is, as the driver shows it and the summary holds it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spark_nn.checkpoint import Place
from spark_nn.gang.progress import INTERVAL, Reporter
from spark_nn.tracking.events import Events
from spark_nn.trainer import Trained


class Report:
    """Tells the driver how far training is.

    Parameters
    ----------
    progress : Reporter
        Who takes the news there.
    epochs, steps : int
        Epochs of the training, and steps of each.
    rows : int
        Rows of an epoch, over all ranks.
    place : Place
        Where training begins, or goes on.
    events : Events or None
        What tells TensorBoard.

    Attributes
    ----------
    first_batch : float or None
        When the first batches were done, by the monotonic clock.
    """

    def __init__(
        self, progress: Reporter, epochs: int, steps: int, rows: int, place: Place, events: Events | None = None
    ) -> None:
        self.progress = progress
        self.events = events
        self.rows = rows
        self.steps = steps
        self.place = place
        self.first_batch: float | None = None
        self._busy = 0.0
        self._since = 0.0  # when the training that is not yet in it began
        self._looked = 0.0
        progress.update(epochs=epochs, steps=steps, rows=rows)

    @property
    def due(self) -> bool:
        """Whether the driver should be told the loss so far: to read it may wait for a GPU, so not of every step."""
        return self.progress.heard and time.monotonic() >= self._looked + INTERVAL

    def wanted(self, done: int) -> bool:
        """Whether so many steps are a reason to tell it: where it is :attr:`due`, and at an epoch's end."""
        return self.due or (self.progress.heard and done >= self.steps)

    def begin_epoch(self, epoch: int) -> None:
        """Start the clock of an epoch, counted from 0."""
        self.epoch = epoch
        self.began = self._since = time.monotonic()
        self.spent: float | None = None
        self.first = self.place.step if epoch == self.place.epoch else 0
        self.progress.update(epoch=epoch + 1, step=self.first, loss=None)

    def end_step(self, done: int, loss: float | None = None) -> None:
        """Tell the steps that are done in this epoch.

        Parameters
        ----------
        done : int
            How many.
        loss : float or None
            Mean loss of the epoch so far, over this rank's rows, where it was :attr:`due`.
        """
        now = time.monotonic()
        changes: dict[str, Any] = {}
        if loss is not None:
            self._looked = now
            changes["loss"] = float(loss)
        if self.first_batch is None:
            self.first_batch = self._since = now  # what is traced before is no rate to go by
            changes["phase"] = "training"
        self.progress.update(step=min(done, self.steps), busy=self._busy + now - self._since, **changes)

    def begin_validation(self) -> None:
        """Stop the epoch's clock, as what follows is no training."""
        now = time.monotonic()
        self.spent = now - self.began
        self._busy += now - self._since
        self.progress.update(phase="validating")

    def end_epoch(self, logs: Mapping[str, Any], rate: float | None = None) -> None:
        """Tell the epoch's logs, the learning rate that it ended with, and how long it took."""
        now = time.monotonic()
        if self.spent is None:
            pause, spent = 0.0, now - self.began
            self._busy += now - self._since
        else:
            pause, spent = now - self.began - self.spent, self.spent
        # An epoch that another attempt began took as long as its rest suggests.
        spent *= self.steps / (self.steps - self.first)
        history = extended(self.progress.state.history, logs, len(self.progress.state.seconds))
        seconds = [*self.progress.state.seconds, spent]
        self.progress.update(history=history, seconds=seconds, phase="training", pause=pause)
        if self.events is not None:
            self.events.epoch(self.epoch, logs, rate, self.rows / spent)

    def trained(self, file: str, sha256: str, outputs: dict[str, dict[str, Any]], clock: Sequence[float]) -> Trained:
        """What the training gave.

        Parameters
        ----------
        file, sha256, outputs : object
            See :class:`~spark_nn.trainer.Trained`.
        clock : sequence of float
            By the monotonic clock, when the worker began, had imported, built, and trained.
        """
        began, imported, built, trained = clock
        traced = self.first_batch or trained
        return Trained(
            file=file,
            sha256=sha256,
            outputs=outputs,
            history=self.progress.state.history,
            rowsPerSecond=self.progress.state.rowsPerSecond,
            epochSeconds=self.progress.state.seconds,
            seconds={
                "import": imported - began,
                "build": built - imported,
                "trace": traced - built,
                "train": trained - traced,
                "publish": time.monotonic() - trained,
            },
        )


def extended(history: Mapping[str, Sequence[Any]], logs: Mapping[str, Any], epochs: int) -> dict[str, list[Any]]:
    """A history of so many epochs and the logs of the next one; NaN stands where an epoch has nothing by a name."""
    before = [math.nan] * epochs
    return {name: [*history.get(name, before), logs.get(name, math.nan)] for name in dict.fromkeys([*history, *logs])}
