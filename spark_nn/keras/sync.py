"""Worker side: keeps the ranks of a Keras fit in step.

``fit`` stays Keras's own. Three things are added around it: all ranks start from rank 0's weights; the
optimizer averages the gradients over the ranks before it does anything else with them, so that clipping,
loss scaling, accumulation and weight decay act on the gradient of the global batch; and metrics and moving
statistics are brought together at the end of every epoch, so that callbacks decide alike everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np

from spark_nn.chance import STRIDE, random_numbers_kept
from spark_nn.gang.collective import Collective
from spark_nn.keras import backends
from spark_nn.keras.tally import array_of, plain, results, settle, tally

# The values of metrics: over this rank's rows, and over those of all ranks.
Measured = tuple[dict[str, Any], dict[str, Any]]


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
    averager : Averager, optional
        How gradients are averaged: through the collective, where nothing else is given.
    nonFinite : {"ignore", "error"}
        Whether a loss that is NaN or infinite, on any rank, stops the fit with `NonFiniteLoss`.

    Attributes
    ----------
    first_step : int
        How many steps of the first epoch were made before this fit, which goes on from there.
    """

    def __init__(
        self,
        model: keras.Model,
        collective: Collective,
        rank: int,
        averager: Any = None,
        *,
        nonFinite: Literal["error", "ignore"] = "ignore",
    ) -> None:
        self.model = model
        self.collective = collective
        self.rank = rank
        self._backend = backends.current()
        self.averager = averager or self._backend.Averager(collective)
        self.first_step = 0
        self._watch = self._backend.Watch(collective.world) if nonFinite == "error" else None

    def start_alike(self) -> None:
        """Give every rank rank 0's weights and optimizer state, and random numbers of its own."""
        variables = [*self.model.variables, *self._backend.buffers(self.model)]
        for optimizer in optimizers(self.model):
            variables += optimizer.variables
        for variable in variables:
            value = array_of(variable)
            # As bytes, because not every type of Keras is one that can be added up.
            self.collective.broadcast(value.reshape(-1).view(np.uint8))
            if variable.name == "seed_generator_state":
                # Dropout on every rank must drop something else; rank 0 draws what a single process would.
                value[:1] += np.array(self.rank * STRIDE % 2**31, value.dtype)
            variable.assign(value)
        if self.collective.world > 1:
            keras.random.uniform(())  # Keras makes its generator when it is first used, from a number of Python's
        if self.rank:
            self._reseed()

    def _reseed(self) -> None:
        """Let layers that draw without a generator of their own draw other numbers than rank 0's do.

        Python's and NumPy's random numbers stay alike on all ranks: callbacks may decide by them.
        """
        with random_numbers_kept():
            keras.utils.set_random_seed((int(np.random.randint(2**31)) + self.rank * STRIDE) % 2**32)
            keras.random.uniform(())

    @contextlib.contextmanager
    def averaged_gradients(self) -> Iterator[None]:
        """Average the gradients over the ranks in every step of the block, and watch the loss if that is asked for.

        The optimizers get methods of their own for the time of the block. Their classes stay as they are, so
        that what Keras saves meanwhile names them, registered ones too.
        """
        model, watch = self.model, self._watch
        if self.collective.world == 1 and watch is None:
            yield
            return
        averager = self.averager if self.collective.world > 1 else None
        with contextlib.ExitStack() as block:
            for owner, name, method in self._backend.methods(optimizers(model), model, averager, watch):
                block.enter_context(backends.replaced(owner, name, method))
            # A step that was traced outside the block averages nothing, and one traced within still would.
            block.callback(setattr, model, "train_function", None)
            model.train_function = None
            block.enter_context(self.averager.guarded())
            yield

    def callback(self) -> keras.callbacks.Callback:
        """The callback that makes metrics and moving statistics global; it must come first."""
        return _Global(self) if self._watch is None else _Watching(self, self._watch)

    def digest(self) -> bytes:
        """SHA-256 over the model's weights, and what else it keeps."""
        return _digest([*self.model.weights, *self._backend.buffers(self.model)])

    def sum_metrics(self) -> Measured:
        """The value of each metric over the rows of this rank and of all. The metrics' own state becomes global."""
        own = results(self.model)
        total = tally(self.model)
        self.collective.all_reduce(total)
        settle(self.model, total, self.collective.world)
        return own, results(self.model)

    def combine_logs(self, logs: dict[str, Any], own: dict[str, Any], every: dict[str, Any]) -> dict[str, Any]:
        """What this rank's last step logged (nothing where it had no rows), for the rows of all ranks.

        Given the metrics' values over the rows of this rank and of all: the latter where a metric's value was logged,
        else the mean over the ranks. The same bits on every rank, whatever its processor.
        """
        logged_here = {name: plain(value) for name, value in logs.items()}
        news = {
            name: (value, name in own and np.array_equal(value, own[name], equal_nan=True), every.get(name))
            for name, value in logged_here.items()
        }
        gathered = [json.loads(part) for part in self.collective.all_gather(json.dumps(news).encode())]
        values: dict[str, Any] = {}
        for name in dict.fromkeys(name for part in gathered for name in part):
            logged = [part[name] for part in gathered if name in part]
            if all(measured for _, measured, _ in logged):
                values[name] = logged[0][2]
            else:
                values[name] = np.mean([value for value, _, _ in logged], axis=0).tolist()
        return values

    def settle_statistics(self) -> None:
        """Average what layers track on their own rows, such as BatchNormalization's moving statistics."""
        variables = [*self.model.non_trainable_weights, *self._backend.buffers(self.model)]
        if len(set(self.collective.all_gather(_digest(variables)))) == 1:
            return
        for variable in variables:
            value = array_of(variable)
            if "float" in value.dtype.name:
                # Halves add up in single precision; doubles stay doubles.
                wide = value.astype(
                    np.promote_types(np.float32, value.dtype) if value.dtype.kind == "f" else np.float32
                )
                self.collective.all_reduce(wide, "mean")
                value = wide.astype(value.dtype)
            else:
                self.collective.broadcast(value.reshape(-1).view(np.uint8))
            variable.assign(value)


class _Global(keras.callbacks.Callback):  # type: ignore[misc]
    """Replaces the values of this rank's rows in the logs by those of all rows."""

    def __init__(self, sync: Synchroniser) -> None:
        super().__init__()
        self.sync = sync
        self.train: Measured | None = None
        self.validation: dict[str, Any] = {}
        self.logs: dict[str, Any] = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.sync.collective.mark(epoch, 0)  # ranks that meet in different epochs are told so

    def end_training(self) -> Measured:
        """Bring together what the epoch's training left on each rank."""
        self.sync.settle_statistics()
        return self.sync.sum_metrics()

    def on_test_begin(self, logs: Any = None) -> None:
        # The metrics still hold the training rows; evaluation is about to reset them.
        self.train = self.end_training()

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        logs.update(self.sync.combine_logs(logs, *self.sync.sum_metrics()))
        self.validation = {f"val_{name}": value for name, value in logs.items()}

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        train = self.train or self.end_training()
        own = {name: value for name, value in logs.items() if name not in self.validation}
        logs.update({**self.sync.combine_logs(own, *train), **self.validation})
        self.logs = dict(logs)
        self.train, self.validation = None, {}

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if logs:
            logs.update(self.logs)


class _Watching(_Global):
    """Stops the fit at a loss that is not finite, too."""

    def __init__(self, sync: Synchroniser, watch: Any) -> None:
        super().__init__(sync)
        self.watch = watch
        self.epoch = 0
        self.first_step = sync.first_step

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch
        self.watch.begin(self.first_step)
        self.first_step = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.watch.due():
            self.watch.look(self.epoch, self.sync.model)

    def end_training(self) -> Measured:
        self.watch.look(self.epoch, self.sync.model)
        return super().end_training()


def optimizers(model: keras.Model) -> list[Any]:
    """The optimizer that the model was compiled with, and those that a ``train_step`` of its own may use."""
    found: dict[int, Any] = {}
    for layer in _layers(model):
        for value in vars(layer).values():
            several = value.values() if isinstance(value, dict) else value
            values = several if isinstance(value, (dict, list, tuple)) else [value]
            found.update({id(each): each for each in values if isinstance(each, keras.optimizers.Optimizer)})
    # What an optimizer passes on to those within it is averaged already.
    for optimizer in list(found.values()):
        for inner in [*getattr(optimizer, "optimizers", []), getattr(optimizer, "inner_optimizer", None)]:
            found.pop(id(inner), None)
    return list(found.values())


def _layers(layer: Any) -> list[Any]:
    inner = layer.layers if isinstance(layer, keras.Model) else []
    return [layer, *(found for each in inner for found in _layers(each))]


def _digest(variables: Sequence[Any]) -> bytes:
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(array_of(variable).tobytes())
    return digest.digest()
