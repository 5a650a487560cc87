"""Keras on TensorFlow: steps run in a graph, several of them in one call, and what is added to them is in it too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from spark_nn.keras.backends.plain import buffers, random_state, set_random_state
from spark_nn.keras.describe import by_name
from spark_nn.keras.feed import Feed
from spark_nn.keras.gradients import Averager
from spark_nn.keras.native import averager
from spark_nn.share import Share
from spark_nn.trainer import non_finite

__all__ = [
    "TOGETHER",
    "Averager",
    "Forward",
    "Step",
    "Watch",
    "averager",
    "buffers",
    "dataset",
    "first",
    "methods",
    "prepare",
    "random_state",
    "ready",
    "set_random_state",
    "start",
    "tensors",
]

TOGETHER = True
# Large against the cost of a call into Python, small against a processor's cache.
_BLOCK_BYTES = 2 << 20
# Seconds between two looks at what a GPU has noted: each look waits until it has done all its work.
_LOOK_EVERY = 1.0


def prepare() -> None:
    """Everything is imported with this room."""


def start(share: Share) -> str:
    """Ready a process that scores for a task's share of the machine; return Keras's name of its device.

    Of GPUs all are seen that this process may see, and their memory is taken as it is needed: Spark hands a Python
    worker from task to task, and each of these has a GPU of its own. Where tasks have none, none is seen.
    """
    cards = tf.config.list_physical_devices("GPU")
    # TensorFlow takes these once per process: a worker that scores again keeps the first ones.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(share.cpus)
        tf.config.threading.set_inter_op_parallelism_threads(share.cpus)
        if share.gpu is None:
            tf.config.set_visible_devices([], "GPU")
        for card in cards:
            tf.config.experimental.set_memory_growth(card, True)
    return _device(share, len(tf.config.get_visible_devices("GPU")))


def _device(share: Share, cards: int) -> str:
    """The task's GPU, or the CPU where it has none or TensorFlow, which can use so many, cannot."""
    return f"/GPU:{share.card(cards)}" if share.gpu is not None and cards else "/CPU:0"


def tensors(arrays: Any) -> Any:
    """Arrays as tensors, those of strings too."""
    return tf.nest.map_structure(tf.convert_to_tensor, arrays)


class Forward:
    """A model that predicts blocks of rows by one graph, whatever number of rows a block has.

    Parameters
    ----------
    model : keras.Model
        The model.
    device : str
        TensorFlow's name of the device to run it on.
    """

    def __init__(self, model: Any, device: str) -> None:
        self._device = device
        self._graphs: dict[Any, Any] = {}

        # Without autograph, which would leave generated files in the temporary directory: Keras layers need none.
        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def forward(block: Any) -> Any:
            return by_name(model, model(block, training=False))

        self._forward = forward

    def __call__(self, part: dict[str, np.ndarray], named: bool, fixed: int | None) -> dict[str, np.ndarray]:
        """The outputs of some rows by their names; the only input and the only output have the empty one."""
        with tf.device(self._device):
            block = tensors(part)
            found = self._graph(block, named, fixed)(block if named else block[""])
            return {name: tensor.numpy() for name, tensor in found.items()}

    def _graph(self, block: dict[str, Any], named: bool, fixed: int | None) -> Any:
        """The graph for inputs of such shapes and kinds, of any number of rows: a number is no reason to trace."""
        specs = {name: tf.TensorSpec((fixed, *each.shape[1:]), each.dtype) for name, each in block.items()}
        key = tuple(specs.items())
        if key not in self._graphs:
            self._graphs[key] = self._forward.get_concrete_function(specs if named else specs[""])
        return self._graphs[key]


class Step:
    """A compiled model that measures batches: its metrics take them in.

    Parameters
    ----------
    model : keras.Model
        Compiled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Without autograph, which would leave generated files in the temporary directory.
        self._graph = tf.function(model.test_step, autograph=False)

    def __call__(self, data: tuple[Any, ...], known: bool) -> None:
        """Take in a batch; one of a number of rows that is not known may never come again, and is worth no graph.

        A graph is for one number of rows: Keras weights the losses of several outputs by the number that it was built
        for, and not at all where that is open.
        """
        run = self._graph if known and not self._model.run_eagerly else self._model.test_step
        run(tensors(data))


def dataset(feed: Feed, start: int = 0) -> Any:
    """A ``tf.data.Dataset`` whose every iteration reads one epoch of a feed, but for so many steps at its beginning.

    The feed hands over blocks of many batches, which TensorFlow takes without a copy and cuts itself: Python runs once
    per block.
    """
    stream = feed.stream
    batches = max(1, int(_BLOCK_BYTES / (stream.batch * stream.manifest.row_bytes)))
    signature = feed.parts(_specs(feed, (None, stream.batch)))
    signature_of_rest = feed.parts(_specs(feed, (None,)))

    def stretch(place: Any) -> Any:
        whole = tf.data.Dataset.from_generator(
            lambda each: feed.blocks(int(each), batches, start), args=(place,), output_signature=signature
        )
        # A pass's last batch may be smaller than the others, and then is not one of a block.
        rest = tf.data.Dataset.from_generator(feed.rest, output_signature=signature_of_rest)
        return whole.prefetch(1).unbatch().concatenate(rest)

    joined = stretch(0) if stream.most == 1 else tf.data.Dataset.range(stream.most).flat_map(stretch)
    counted = joined.apply(tf.data.experimental.assert_cardinality(stream.steps - start))
    # Beside a GPU that computes, a thread that brings the next batch is free; on a CPU it takes a core from those
    # that compute, and so does the tuning of a pipeline that has nothing to tune.
    if tf.config.list_physical_devices("GPU"):
        counted = counted.prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False
    return counted.with_options(options)


def _specs(feed: Feed, rows: tuple[int | None, ...]) -> dict[str, Any]:
    def kind(dtype: str) -> str:
        return "string" if dtype in ("string", "binary") else dtype

    tensors = feed.stream.manifest.tensors
    specs = {each.name: tf.TensorSpec((*rows, *(each.shape or ())), kind(each.dtype)) for each in tensors}
    return {**specs, "weight": tf.TensorSpec(rows, "float32")} if feed.classWeights else specs


def first(feed: Feed, start: int) -> Any:
    """The first batch after so many."""
    return next(iter(dataset(feed, start).take(1)))


def methods(
    optimizers: Sequence[Any], model: keras.Model, averager: Averager | None, watch: Watch | None
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Objects, and the methods that they need for the time of a training.

    Parameters
    ----------
    optimizers : sequence of keras.optimizers.Optimizer
        Those that train the model.
    model : keras.Model
        Built and compiled.
    averager : Averager or None
        What averages the gradients over the ranks; None for a single one.
    watch : Watch or None
        What wants to know of losses that are not finite.

    Yields
    ------
    tuple
        An object, the name of a method, and what to have in its place.
    """
    for optimizer in optimizers:
        if averager is not None:
            yield optimizer, "apply", _averaged(optimizer, averager, watch)
        if watch is not None:
            yield optimizer, "scale_loss", watch.seen(optimizer)
    if watch is not None:
        yield model, "train_step", watch.counted(model)


def _averaged(optimizer: Any, averager: Averager, watch: Watch | None) -> Callable[..., Any]:
    """The optimizer's ``apply``, on gradients of the global batch."""
    original = optimizer.apply

    def apply(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        given = list(grads)
        if watch is None:
            return original(averager.average(given), trainable_variables)
        # The news travels with the gradients, so that all ranks know it at the same step.
        *given, bad = averager.average([*given, tf.identity(watch.own)])
        watch.bad.assign_add(bad)
        return original(given, trainable_variables)

    return apply


def ready(model: keras.Model) -> None:
    """Settings of a compiled model that several ranks need: XLA cannot compile a step that talks to other processes."""
    model.jit_compile = False


class Watch:
    """Counts the steps of an epoch up to the first whose loss is not finite.

    It does so in the step's own graph, because Python sees an execution of several steps only when all are over.

    Parameters
    ----------
    world : int
        How many ranks there are.
    """

    def __init__(self, world: int) -> None:
        self.good = tf.Variable(0, trainable=False, dtype=tf.int64)  # the steps before
        self.bad = tf.Variable(0.0, trainable=False)  # above 0 from the bad step on
        # The same of this rank alone; it becomes known to all with the gradients.
        self.own = self.bad if world == 1 else tf.Variable(0.0, trainable=False)
        self.rate = tf.Variable(np.nan, trainable=False, dtype=tf.float32)  # what a schedule gave the bad step
        self.far = "GPU" in self.bad.device
        self.scaled = False
        self.looked = 0.0

    def counted(self, model: keras.Model) -> Callable[..., Any]:
        """The model's ``train_step``, counted; where it does not scale the loss, the loss that it logs is watched."""
        original = model.train_step

        def train_step(*args: Any, **kwargs: Any) -> Any:
            rate = _rate(model.optimizer)
            if isinstance(rate, tf.Tensor):
                self.rate.assign(tf.where(self.bad > 0, self.rate, tf.cast(rate, tf.float32)))
            self.scaled = False
            logs = original(*args, **kwargs)
            loss = logs.get("loss") if isinstance(logs, dict) else None
            if loss is not None and not self.scaled:
                self.bad.assign_add(_not_finite(loss))
            self.good.assign_add(tf.cast(tf.equal(self.bad, 0), tf.int64))
            return logs

        return train_step

    def seen(self, optimizer: Any) -> Callable[[Any], Any]:
        """The optimizer's ``scale_loss``, which every step passes its loss through before it is scaled."""
        original = optimizer.scale_loss

        def scale_loss(loss: Any) -> Any:
            self.scaled = True
            self.own.assign_add(_not_finite(loss))
            return original(loss)

        return scale_loss

    def begin(self, step: int) -> None:
        """Begin an epoch at a step."""
        self.good.assign(step)

    def due(self) -> bool:
        """Whether it is time to look."""
        return not self.far or time.monotonic() >= self.looked + _LOOK_EVERY

    def look(self, epoch: int, model: keras.Model) -> None:
        """Raise `NonFiniteLoss` if a step of this epoch was bad."""
        self.looked = time.monotonic()
        if not self.bad.numpy():
            return
        rate = _rate(model.optimizer)
        rate = float(self.rate.numpy() if isinstance(rate, tf.Tensor) else rate)
        raise non_finite(epoch, int(self.good.numpy()), rate, "clipnorm of the optimizer")


def _rate(optimizer: Any) -> Any:
    """The learning rate: a variable, or a tensor that a schedule gave; NaN for an optimizer made of several."""
    return getattr(optimizer, "learning_rate", np.nan)


def _not_finite(loss: Any) -> Any:
    """1 if it is, else 0."""
    return 1.0 - tf.cast(tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(loss))), tf.float32)
