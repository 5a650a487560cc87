"""Worker side: the callbacks of a Keras fit, the user's and ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import keras.callbacks as kinds

from spark_nn.errors import ParamError
from spark_nn.gang.context import GangContext
from spark_nn.keras.rate import learning_rate
from spark_nn.report import Report

# What these do outside the model, one rank does for all.
_OUTWARD = (kinds.ModelCheckpoint, kinds.CSVLogger, kinds.TensorBoard, kinds.RemoteMonitor)
_BATCH_HOOKS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


def chosen(given: Any, gang: GangContext, validated: bool) -> tuple[list[keras.callbacks.Callback], bool]:
    """The user's callbacks that run on this rank; Keras's own that write files or send messages run on rank 0 alone.

    And whether any of them, on whatever rank, wants to know of single batches: all ranks must take the same steps in a
    call.

    Parameters
    ----------
    given : list, callable or None
        Callbacks, or a function that returns them.
    gang : GangContext
        This rank's view of its gang.
    validated : bool
        Whether rows are held back for validation.

    Raises
    ------
    ParamError
        One of them cannot work on a gang, or monitors what there will not be.
    """
    callbacks = list(given() if callable(given) else given or [])
    for callback in callbacks:
        # Both act on what one rank alone sees, and the others would wait for it.
        if isinstance(callback, kinds.BackupAndRestore) or (
            gang.world > 1 and isinstance(callback, kinds.TerminateOnNaN)
        ):
            instead = (
                "checkpoints are written anyway (checkpointInterval)"
                if isinstance(callback, kinds.BackupAndRestore)
                else "such a loss ends the fit anyway (nonFiniteLoss)"
            )
            raise ParamError(
                f"callbacks holds a {type(callback).__name__}, which would act on some workers and not on others: "
                f"leave it out; {instead}"
            )
        monitor = getattr(callback, "monitor", None)
        if not validated and isinstance(monitor, str) and monitor.startswith("val_"):
            raise ParamError(
                f"callbacks holds a {type(callback).__name__} that monitors {monitor!r}, but no rows are held back "
                "for validation: set validationFraction or validationIndicatorCol, or monitor another metric"
            )
    own = [callback for callback in callbacks if gang.rank == 0 or not isinstance(callback, _OUTWARD)]
    return own, _watch_batches(callbacks)


def _watch_batches(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether any of the callbacks wants to know of single batches."""

    def overridden(callback: Any, hook: str) -> bool:
        return getattr(type(callback), hook) is not getattr(kinds.Callback, hook) or hook in vars(callback)

    return any(overridden(callback, hook) for callback in callbacks for hook in _BATCH_HOOKS)


class Session(keras.callbacks.CallbackList):  # type: ignore[misc]
    """The callbacks of one training, whose beginning and end they see once, however many calls of ``fit`` it takes.

    Parameters
    ----------
    callbacks : sequence of keras.callbacks.Callback
        In the order in which they are called.
    model : keras.Model
        What is trained.
    kept : sequence of keras.callbacks.Callback
        Those among them whose state a checkpoint holds: what they do when an epoch begins they have done, where another
        attempt began it.
    epochs, steps : int
        Epochs of the training, and steps of each.
    watched : bool
        Whether any of them wants the logs of single batches: to make them numbers waits for a GPU.
    report : Report
        Who wants them now and then.
    """

    def __init__(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        model: keras.Model,
        *,
        kept: Sequence[keras.callbacks.Callback],
        epochs: int,
        steps: int,
        watched: bool,
        report: Report,
    ) -> None:
        super().__init__(
            list(callbacks), add_history=True, add_progbar=False, model=model, epochs=epochs, steps=steps, verbose=0
        )
        self._kept = {id(callback) for callback in kept}
        self._watched = watched
        self._report = report
        self._begun = False
        self._final = True
        self._start = 0

    @contextlib.contextmanager
    def part(self, *, start: int, final: bool) -> Iterator[None]:
        """The block fits a part of the training, from a step of its first epoch on, the last part or another."""
        self._final = final
        self._start = start
        if final:
            yield
            return
        # At its end `fit` puts the averaged weights in place of the trained ones, if the optimizer keeps such.
        optimizer = self._model.optimizer
        finalize = optimizer.finalize_variable_values
        optimizer.finalize_variable_values = lambda *args: finalize(*args) if self._model.stop_training else None
        try:
            yield
        finally:
            del optimizer.finalize_variable_values

    def on_train_begin(self, logs: Any = None) -> None:
        """Pass it on the first time."""
        if not self._begun:
            self._begun = True
            super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Pass it on, but not to those that have seen this epoch begin."""
        for callback in self.callbacks:
            if not (self._start and id(callback) in self._kept):
                callback.on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Pass it on, counted from the epoch's first step."""
        super().on_train_batch_begin(self._start + batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Pass it on, counted from the epoch's first step, without the logs where nobody looks at them."""
        place = self._start + batch
        super().on_train_batch_end(place, logs if self._watched or self._report.wanted(place + 1) else None)

    def on_train_end(self, logs: Any = None) -> None:
        """Pass it on the last time."""
        if self._final or self._model.stop_training:
            super().on_train_end(logs)


class Reporting(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells a report how far training is; it comes after all that change the logs.

    Parameters
    ----------
    report : Report
        Who tells the driver. Until its first batches are done, Keras traces the model.
    """

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """An epoch begins."""
        self.report.begin_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Steps are done."""
        self.report.end_step(batch + 1, logs.get("loss") if logs else None)

    def on_test_begin(self, logs: Any = None) -> None:
        """What follows is no training."""
        self.report.begin_validation()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """An epoch is over."""
        rate = learning_rate(self.model.optimizer) if self.report.events is not None else None
        self.report.end_epoch(logs or {}, rate)
