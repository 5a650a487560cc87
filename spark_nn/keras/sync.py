"""Worker side: keeps the ranks of a Keras fit in step.

``fit`` stays Keras's own. Three things are added around it: all ranks start from rank 0's weights; the
optimizer averages the gradients over the ranks before it does anything else with them, so that clipping,
loss scaling, accumulation and weight decay act on the gradient of the global batch; and metrics and moving
statistics are brought together at the end of every epoch, so that callbacks decide alike everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from spark_nn.gang.collective import Collective
from spark_nn.keras.gradients import Averager


class Synchroniser:
    """Keeps one rank's model in step with the others'.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    collective : Collective
        Exchange with the other ranks.
    rank : int
        This rank.
    """

    def __init__(self, model: keras.Model, collective: Collective, rank: int) -> None:
        self.model = model
        self.collective = collective
        self.rank = rank

    def start_alike(self) -> None:
        """Give every rank rank 0's weights and optimizer state, and random numbers of its own."""
        for variable in [*self.model.variables, *self.model.optimizer.variables]:
            value = _array(variable)
            # As bytes, because not every type of Keras is one that can be added up.
            self.collective.broadcast(value.reshape(-1).view(np.uint8))
            if variable.name == "seed_generator_state":
                # Dropout on every rank must drop something else; rank 0 draws what a single process would.
                value[0] += self.rank
            variable.assign(value)

    @contextlib.contextmanager
    def averaged_gradients(self) -> Iterator[None]:
        """Average the gradients over the ranks in every step of the block.

        The optimizer gets a subclass of its own class for the time of the block. It keeps name and module, so
        that what Keras saves meanwhile names the original.
        """
        optimizer = self.model.optimizer
        original = type(optimizer)
        average = Averager(self.collective).average

        def apply(self: Any, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
            return original.apply(self, average(grads), trainable_variables)

        if self.collective.world > 1:
            optimizer.__class__ = type(
                original.__name__,
                (original,),
                {"apply": apply, "__module__": original.__module__, "__qualname__": original.__qualname__},
            )
        try:
            yield
        finally:
            optimizer.__class__ = original

    def callback(self) -> keras.callbacks.Callback:
        """The callback that makes metrics and moving statistics global; it must come first."""
        return _Global(self)

    def digest(self) -> bytes:
        """SHA-256 over the model's weights."""
        return _digest(self.model.weights)

    def sum_metrics(self) -> dict[str, Any]:
        """The value of each metric over the rows of all ranks. The metrics' own state becomes global."""
        variables = self.model.metrics_variables
        arrays = [_array(variable) for variable in variables]
        # Keras metrics keep sums and counts, which add up over ranks; doubles hold both exactly enough.
        total = np.concatenate([np.ravel(array) for array in arrays] or [np.zeros(0)]).astype(np.float64)
        self.collective.all_reduce(total)
        for variable, array, part in zip(
            variables, arrays, np.split(total, np.cumsum([a.size for a in arrays])[:-1]), strict=True
        ):
            variable.assign(part.reshape(array.shape).astype(array.dtype))
        return {name: _plain(value) for name, value in self.model.get_metrics_result().items()}

    def average_logs(self, logs: dict[str, float]) -> dict[str, float]:
        """The mean over the ranks of values that no metric stands behind."""
        values = np.array([float(logs[name]) for name in sorted(logs)], dtype=np.float64)
        self.collective.all_reduce(values, "mean")
        return dict(zip(sorted(logs), values.tolist(), strict=True))

    def settle_statistics(self) -> None:
        """Average what layers track on their own rows, such as BatchNormalization's moving statistics."""
        variables = self.model.non_trainable_weights
        if len(set(self.collective.all_gather(_digest(variables)))) == 1:
            return
        for variable in variables:
            value = _array(variable)
            if np.issubdtype(value.dtype, np.floating):
                self.collective.all_reduce(value, "mean")
            else:
                self.collective.broadcast(value.reshape(-1).view(np.uint8))
            variable.assign(value)


class _Global(keras.callbacks.Callback):  # type: ignore[misc]
    """Replaces the values of this rank's rows in the logs by those of all rows."""

    def __init__(self, sync: Synchroniser) -> None:
        super().__init__()
        self.sync = sync
        self.train: dict[str, Any] | None = None
        self.validation: dict[str, Any] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.sync.collective.mark(epoch, 0)  # ranks that meet in different epochs are told so

    def on_test_begin(self, logs: Any = None) -> None:
        # The metrics still hold the training rows; evaluation is about to reset them.
        self.sync.settle_statistics()
        self.train = self.sync.sum_metrics()

    def on_test_end(self, logs: Any = None) -> None:
        results = self.sync.sum_metrics()
        logs = logs or {}
        values = results if set(logs) == set(results) else self.sync.average_logs(logs)
        self.validation = {f"val_{name}": value for name, value in values.items()}

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        if self.train is None:
            self.sync.settle_statistics()
            self.train = self.sync.sum_metrics()
        own = {name: value for name, value in logs.items() if name not in self.validation}
        # The rule is Keras's: a train_step that logs what no metric measures is taken at its word.
        values = self.train if set(own) == set(self.train) else self.sync.average_logs(own)
        logs.update({**values, **self.validation})
        self.train, self.validation = None, {}


def _array(variable: Any) -> np.ndarray:
    """A variable's value as an array of its own."""
    return np.array(keras.ops.convert_to_numpy(variable.value))


def _plain(value: Any) -> Any:
    """A metric's value as JSON can hold it; some have a value per class."""
    array = np.asarray(keras.ops.convert_to_numpy(value), np.float64)
    return float(array.item()) if array.size == 1 else array.tolist()


def _digest(variables: Sequence[Any]) -> bytes:
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(_array(variable).tobytes())
    return digest.digest()
