"""Worker side of asynchronous training: rank 0 holds the weights and applies the optimizer, the others run `fit`.

A worker's optimizer sends each step's gradients to rank 0 and takes the weights that come back. Rank 0 applies the
model's own optimizer under a lock, so that no update is lost and their number is exact. Workers never wait for each
other; one that is killed is missing from then on, with the rest of its rows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spark_nn.checkpoint import Checkpoints
from spark_nn.dataset.manifest import Manifest, Split
from spark_nn.dataset.stream import Stream
from spark_nn.errors import ParamError, PeerLost
from spark_nn.gang.collective import Alone
from spark_nn.gang.context import GangContext, attempt_folder
from spark_nn.gang.failure import lost_ranks
from spark_nn.gang.visits import Hall, Visit
from spark_nn.keras import backends, codec
from spark_nn.keras.describe import describe_outputs
from spark_nn.keras.draw import draw
from spark_nn.keras.feed import Feed
from spark_nn.keras.rate import learning_rate
from spark_nn.keras.training import INITIAL_MODEL, KerasTrainer, fetched, take_optimizer, take_weights
from spark_nn.outputs import Output
from spark_nn.report import extended
from spark_nn.store import RunDir
from spark_nn.tracking.events import Events
from spark_nn.trainer import Trained, publish

_PULL, _STATE, _PUSH, _EPOCH = range(4)
_LENGTH = struct.Struct("<I")
# Bytes of an epoch's metrics, at most.
_NEWS = 16 << 20


class ParameterTrainer(KerasTrainer):
    """Trains a Keras model on workers that do not wait for each other; rank 0 is their parameter server."""

    apart: ClassVar[bool] = True

    def train(
        self,
        gang: GangContext,
        manifest: Manifest,
        data: Stream,
        validation: Stream | None,
        checkpoints: Checkpoints,
    ) -> Trained:
        """Serve on rank 0, and train on the others."""
        gang.progress.update(phase="import")
        import keras

        gang.progress.update(phase="build")
        keras.utils.set_random_seed((self.schedule.seed + gang.rank) % 2**32)
        example = Feed(data).example()
        model, put_out = self._build(gang, example, manifest.role("features"))
        before = fetched(gang, INITIAL_MODEL, self.recipe.customs) if self.recipe.continued else None
        if before is not None:
            take_weights(model, before)
        workers = gang.world - 1
        self._compile(model, workers)
        if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            raise ParamError(
                "parameterServers=1 with an optimizer that scales the loss, as under mixed_float16: each worker would "
                "have a scale of its own; use mixed_bfloat16, or train in step"
            )
        backends.current().ready(model)
        outputs = describe_outputs(model, put_out, manifest, self.schedule.classWeights)
        order = tuple(outputs) if isinstance(put_out, (list, tuple)) and len(outputs) > 1 else None
        if gang.rank:
            self._pace(model, data.steps, workers)
            self._work(gang, model, Feed(data, self.schedule.classWeights, order))
            return Trained("", "", {}, {}, 0.0, [])
        if before is not None:
            take_optimizer(model, before)
        self.recipe.outputs.of({name: Output.fromDict(output) for name, output in outputs.items()})
        codec.check_loadable(model, self.recipe.customs)
        events = self.events(gang, 0, functools.partial(draw, model, example))
        return self._serve(gang, manifest, model, outputs, events)

    def _stream(self, gang: GangContext, data: RunDir, manifest: Manifest, split: Split) -> Stream:
        # The workers share the rows; rank 0 only looks at what they are.
        return super()._stream(
            dataclasses.replace(gang, rank=max(0, gang.rank - 1), world=gang.world - 1), data, manifest, split
        )

    def _serve(
        self, gang: GangContext, manifest: Manifest, model: Any, outputs: dict[str, Any], events: Events | None
    ) -> Trained:
        server = ParameterServer(model, gang, self.schedule.epochs, manifest.rows("train"), events)
        hall = Hall(gang, server.answer, server.limit)
        server.hall = hall
        if events is not None:
            events.network()  # now, and not while workers wait for the weights
        gang.progress.update(phase="serving")
        hall.serve(lambda: lost_ranks(attempt_folder(gang.run, gang.attempt)))
        server.finish()
        if len(hall.lost) == gang.world - 1:
            raise PeerLost(f"all {gang.world - 1} workers were lost before they had come to the end of their epochs")
        gang.progress.update(phase="publish")
        file, sha256 = publish(gang, functools.partial(codec.save, model), codec.SUFFIX)
        return Trained(
            file=file,
            sha256=sha256,
            outputs=outputs,
            history=gang.progress.state.history,
            rowsPerSecond=gang.progress.state.rowsPerSecond,
            epochSeconds=gang.progress.state.seconds,
        )

    def _work(self, gang: GangContext, model: Any, feed: Feed) -> None:
        import keras

        from spark_nn.keras.sync import Synchroniser

        worker = Worker(model, gang)
        worker.begin()
        watch = Synchroniser(model, Alone(), 0, nonFinite=self.schedule.nonFiniteLoss)
        told = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: gang.progress.update(epoch=epoch + 1, phase="training"),
            on_epoch_end=lambda epoch, logs: worker.tell(epoch, logs or {}, feed.stream.rows),
        )
        with worker.pushing(), watch.averaged_gradients(), feed.errors():
            model.fit(
                feed.dataset(),
                epochs=self.schedule.epochs,
                verbose=0,
                callbacks=[watch.callback(), feed.callback(), told],
            )
        worker.visit.close()


class ParameterServer:
    """The weights, and the optimizer that workers' gradients change them by.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    gang : GangContext
        Rank 0's view of its gang.
    epochs, rows : int
        Epochs of the training, and rows of each.
    events : Events or None
        What tells TensorBoard.

    Attributes
    ----------
    updates : int
        Gradients that were applied.
    limit : int
        Bytes that a request may have.
    """

    def __init__(self, model: Any, gang: GangContext, epochs: int, rows: int, events: Events | None = None) -> None:
        self.model = model
        self.updates = 0
        self.hall: Hall | None = None
        self.events = events
        self._gang = gang
        self._lock = threading.Lock()
        self._apply = _applied(model)
        self._size = sum(_sizes(model.trainable_variables))
        self._states: dict[int, np.ndarray] = {}
        self._told: dict[int, dict[int, dict[str, Any]]] = {}
        self._began = time.monotonic()
        self.limit = 4 * (self._size + sum(_sizes(_tracked(model)))) + _NEWS
        gang.progress.update(epochs=epochs, rows=rows)

    def answer(self, rank: int, kind: int, body: memoryview) -> bytes:
        """Answer a worker's request."""
        with self._lock:
            if kind == _PUSH:
                self.updates += 1
                weights: np.ndarray = self._apply(np.frombuffer(body, np.float32)).numpy()
                return weights.tobytes()
            if kind == _EPOCH:
                (length,) = _LENGTH.unpack_from(body)
                news = json.loads(bytes(body[_LENGTH.size : _LENGTH.size + length]))
                self._states[rank] = np.frombuffer(body[_LENGTH.size + length :], np.float32)
                self._told.setdefault(news["epoch"], {})[rank] = news
                self._settle()
                return b""
            return _flat(self.model.trainable_variables if kind == _PULL else _tracked(self.model)).tobytes()

    def finish(self) -> None:
        """Tell the last epochs, and take what the workers' layers have tracked: the mean of what each last had."""
        with self._lock:
            self._settle()
            if self._states:
                _assign(_tracked(self.model), np.mean(list(self._states.values()), axis=0))
            self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def _settle(self) -> None:
        """Tell the driver the epochs that all workers which are left have finished."""
        progress = self._gang.progress
        expected = self.hall.expected if self.hall is not None else set()
        while (told := self._told.get(len(progress.state.seconds))) and expected <= told.keys():
            number, now = len(progress.state.seconds), time.monotonic()
            rows = sum(news["rows"] for news in told.values())
            logs: dict[str, float] = {}
            for name in dict.fromkeys(name for news in told.values() for name in news["logs"]):
                weighted = [news["logs"].get(name, np.nan) * news["rows"] for news in told.values()]
                logs[name] = float(sum(weighted) / rows)
            logs |= {"updates": self.updates, "workers": len(told)}
            history = extended(progress.state.history, logs, number)
            seconds = [*progress.state.seconds, now - self._began]
            self._began = now
            progress.update(epoch=number + 1, history=history, seconds=seconds)
            if self.events is not None:
                self.events.epoch(number, logs, learning_rate(self.model.optimizer), rows / seconds[-1])


class Worker:
    """A worker's side: gradients go to rank 0, and the weights come from there.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    gang : GangContext
        This rank's view of its gang.
    """

    def __init__(self, model: Any, gang: GangContext) -> None:
        self.model = model
        sizes = sum(_sizes(model.trainable_variables)) + sum(_sizes(_tracked(model)))
        self.visit = Visit(gang, 4 * sizes + _NEWS)

    def begin(self) -> None:
        """Take the weights that rank 0 has."""
        _assign(self.model.trainable_variables, np.frombuffer(self.visit.ask(_PULL), np.float32))
        _assign(_tracked(self.model), np.frombuffer(self.visit.ask(_STATE), np.float32))

    def pushing(self) -> Any:
        """A block in which the optimizer pushes gradients and pulls weights, in place of applying them here."""
        return backends.replaced(self.model.optimizer, "apply", self._apply)

    def tell(self, epoch: int, logs: dict[str, Any], rows: int) -> None:
        """Tell rank 0 what an epoch has come to, and what layers have tracked on their own rows."""
        numbers = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        news = json.dumps({"epoch": epoch, "rows": rows, "logs": numbers}).encode()
        self.visit.ask(_EPOCH, _LENGTH.pack(len(news)) + news + _flat(_tracked(self.model)).tobytes())

    def _apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        import tensorflow as tf

        variables = list(self.model.trainable_variables)
        parts = [
            tf.zeros(variable.shape) if grad is None else tf.cast(tf.convert_to_tensor(grad), tf.float32)
            for grad, variable in zip(grads, variables, strict=True)
        ]
        flat = tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)
        fresh = tf.numpy_function(self._push, [flat], tf.float32)
        for variable, part in zip(variables, tf.split(fresh, _sizes(variables)), strict=True):
            variable.assign(tf.cast(tf.reshape(part, variable.shape), variable.dtype))

    def _push(self, flat: np.ndarray) -> np.ndarray:
        return np.frombuffer(self.visit.ask(_PUSH, flat.tobytes()), np.float32)


def _applied(model: Any) -> Any:
    """The optimizer's step on all gradients laid end to end; it returns the weights in the same way."""
    import tensorflow as tf

    variables = list(model.trainable_variables)

    @tf.function(input_signature=[tf.TensorSpec([sum(_sizes(variables))], tf.float32)], autograph=False)  # type: ignore[untyped-decorator]
    def apply(flat: Any) -> Any:
        parts = tf.split(flat, _sizes(variables))
        grads = [tf.cast(tf.reshape(part, each.shape), each.dtype) for part, each in zip(parts, variables, strict=True)]
        model.optimizer.apply(grads, variables)
        return tf.concat([tf.reshape(tf.cast(each.value, tf.float32), [-1]) for each in variables], axis=0)

    apply.get_concrete_function()  # now, and not while the first workers wait
    return apply


def _tracked(model: Any) -> list[Any]:
    """What layers track besides what is trained, such as BatchNormalization's moving statistics."""
    return [each for each in model.non_trainable_variables if "float" in str(each.dtype)]


def _sizes(variables: Sequence[Any]) -> list[int]:
    return [int(np.prod(variable.shape)) for variable in variables]


def _flat(variables: Sequence[Any]) -> np.ndarray:
    parts = [np.asarray(variable, np.float32).reshape(-1) for variable in variables]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _assign(variables: Sequence[Any], flat: np.ndarray) -> None:
    ends = np.cumsum(_sizes(variables))
    for variable, part in zip(variables, np.split(flat, ends[:-1]) if len(ends) else [], strict=True):
        variable.assign(part.reshape(variable.shape))
