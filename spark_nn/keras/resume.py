"""Worker side: what of a Keras training must be kept for another attempt to end with the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

# Nowhere else does Keras show the generator of operations that are given none.
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.random.seed_generator import global_seed_generator

from spark_nn.chance import random_state, set_random_state
from spark_nn.checkpoint import Arrays, Checkpoint, Checkpoints, Place
from spark_nn.gang.context import GangContext
from spark_nn.keras import backends
from spark_nn.keras.feed import Feed
from spark_nn.keras.sync import optimizers

# What Keras gives every callback, and no state of its own.
_GIVEN = {"params", "_model", "model"}
_METRIC = "metric-"
_SCALARS = (bool, int, float, str, type(None))


class Keeper(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes checkpoints of a training and brings it back to one; it must come last, after all that it keeps.

    Parameters
    ----------
    network : keras.Model
        Built and compiled.
    gang : GangContext
        This rank's view of its gang.
    checkpoints : Checkpoints
        Where they go.
    kept : sequence of keras.callbacks.Callback
        The callbacks whose state decides how training goes on.
    epochs, steps : int
        Epochs of the training, and steps of each.
    """

    def __init__(
        self,
        network: keras.Model,
        gang: GangContext,
        checkpoints: Checkpoints,
        kept: Sequence[keras.callbacks.Callback],
        epochs: int,
        steps: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.gang = gang
        self.checkpoints = checkpoints
        self.kept = list(kept)
        self.epochs = epochs
        self.steps = steps
        self.place = Place(0, 0)
        self.restored: Checkpoint | None = None
        self.settled: list[np.ndarray] = []

    @property
    def done(self) -> int:
        """Steps since the first epoch began."""
        return self.place.epoch * self.steps + self.place.step

    def find(self) -> Place:
        """Find where to go on, and bring back the weights and the optimizer's state on rank 0."""
        self.restored = self.checkpoints.restore(model=self._described())
        if self.restored is not None:
            self.place = self.restored.place
            self._assign(self.restored.arrays)
        self.checkpoints.begin(self.done)
        return self.place

    def settle(self, feed: Feed) -> None:
        """Bring back what differs between ranks, once they have been made alike."""
        if self.restored is None:
            return
        self._assign(self.restored.own)
        if self.place.step:
            # Keras makes a metric's variables when it meets the first batch.
            self.network.test_on_batch(*feed.first(self.place.step))
        self.settled = [_array(variable) for variable in self._variables()]

    def on_train_begin(self, logs: Any = None) -> None:
        """Bring back the callbacks' state, which they have just reset."""
        if self.restored is None:
            return
        # They may have set the learning rate, or weights, as at the beginning of a training.
        for variable, value in zip(self._variables(), self.settled, strict=True):
            variable.assign(value)
        self.settled = []
        own = self.restored.own
        for number, (callback, (plain, arrays)) in enumerate(
            zip(self.kept, json.loads(own["callbacks"].tobytes()), strict=True)
        ):
            found = {name: _gathered(own, f"callback-{number}-{name}", count) for name, count in arrays.items()}
            for name, value in {**plain, **found}.items():
                # Keras turns its sign when it finds out, at the end of an epoch, what the metric's direction is.
                turned = name == "min_delta" and getattr(callback, "monitor_op", name) is None
                setattr(callback, name, abs(value) if turned else value)
        state = self.restored.state
        self.gang.progress.update(history=state["history"], seconds=state["seconds"])
        _set_random(own)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Bring back the metrics of an epoch that another attempt began."""
        if self.restored is not None and self.place.step:
            # Not before: Keras resets the metrics when an epoch begins.
            values = [value for name, value in self.restored.own.items() if name.startswith(_METRIC)]
            for variable, value in zip(self.network.metrics_variables, values, strict=True):
                variable.assign(value)
        else:
            self.place = Place(epoch, 0)
        self.restored = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save a checkpoint if one is due; after the last batch only when the epoch is over."""
        self.place = Place(self.place.epoch, batch + 1)
        if self.place.step < self.steps and self.checkpoints.due(self.done):
            self._save(self.place)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save a checkpoint if one is due and training goes on."""
        self.place = Place(epoch + 1, 0)
        last = self.place.epoch == self.epochs or self.network.stop_training
        if self.checkpoints.due(self.done) and not last:
            self._save(self.place)

    def _save(self, place: Place) -> None:
        self.model  # noqa: B018  (JAX's state is brought back into the variables where a callback asks for its model)
        own = _random()
        described = []
        for number, callback in enumerate(self.kept):
            plain, arrays = _state(callback)
            described.append((plain, {name: len(it) if isinstance(it, list) else None for name, it in arrays.items()}))
            for name, value in arrays.items():
                own.update(_scattered(f"callback-{number}-{name}", value))
        own["callbacks"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
        for number, variable in enumerate(self.network.metrics_variables):
            own[f"{_METRIC}{number}"] = _array(variable)
        alike: Arrays = {}
        for number, (variable, same) in enumerate(self._compared()):
            if not same:
                own[f"variable-{number}"] = _array(variable)
            elif self.gang.rank == 0:
                alike[f"variable-{number}"] = _array(variable)
        progress = self.gang.progress.state
        self.checkpoints.save(place, {"history": progress.history, "seconds": progress.seconds}, alike, own)

    def _compared(self) -> list[tuple[Any, bool]]:
        """All variables of the model and its optimizer, and whether they are the same on all ranks.

        Those that change by the averaged gradient alone are. The others may be moving statistics and states of random
        generators, which differ, or the weights of a large frozen part, which do not.
        """
        every = self._variables()
        trained = {id(each) for each in (*self.network.trainable_variables, *self._optimized())}
        others = [each for each in every if id(each) not in trained]
        size = hashlib.sha256().digest_size
        mine = b"".join(hashlib.sha256(_array(each).tobytes()).digest() for each in others)
        digests = self.gang.collective.all_gather(mine)
        for number, variable in enumerate(others):
            if len({each[number * size : (number + 1) * size] for each in digests}) == 1:
                trained.add(id(variable))
        return [(each, id(each) in trained) for each in every]

    def _variables(self) -> list[Any]:
        return [*self.network.variables, *backends.current().buffers(self.network), *self._optimized()]

    def _optimized(self) -> list[Any]:
        return [variable for each in optimizers(self.network) for variable in each.variables]

    def _assign(self, arrays: Arrays) -> None:
        for number, variable in enumerate(self._variables()):
            value = arrays.get(f"variable-{number}")
            if value is not None:
                # NumPy stores types that it does not know, such as bfloat16, as bytes.
                variable.assign(value.view(_array(variable).dtype) if value.dtype.kind == "V" else value)

    def _described(self) -> str:
        """What the model is, so that another one is told."""
        described = [[each.path, list(each.shape), str(each.dtype)] for each in self._variables()]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _state(callback: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A callback's attributes: those that JSON can hold, and its arrays and lists of arrays."""
    plain: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name, value in vars(callback).items():
        if name in _GIVEN:
            continue
        if isinstance(value, np.generic):
            value = value.item()
        if _is_plain(value):
            plain[name] = value
        elif (value and isinstance(value, list) and all(map(_is_array, value))) or _is_array(value):
            arrays[name] = value
    return plain, arrays


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype != object


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return isinstance(value, _SCALARS)


def _scattered(name: str, value: np.ndarray | list[np.ndarray]) -> Arrays:
    if isinstance(value, np.ndarray):
        return {name: value}
    return {f"{name}-{number}": each for number, each in enumerate(value)}


def _gathered(arrays: Arrays, name: str, count: int | None) -> np.ndarray | list[np.ndarray]:
    return arrays[name] if count is None else [arrays[f"{name}-{number}"] for number in range(count)]


def _random() -> Arrays:
    """The state of Python's and NumPy's generators, which callbacks may draw from, of the backend's, and of Keras's.

    The latter is made when it is first used.
    """
    generator = get_global_attribute("global_seed_generator")
    own = {} if generator is None else {"keras-state": _array(generator.state)}
    return {**own, **backends.current().random_state(), **random_state()}


def _set_random(arrays: Arrays) -> None:
    if "keras-state" in arrays:
        global_seed_generator().state.assign(arrays["keras-state"])
    backends.current().set_random_state(arrays)
    set_random_state(arrays)


def _array(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable.value))
