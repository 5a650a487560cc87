"""Worker side: a stream as the ``tf.data.Dataset`` that Keras trains from.

The stream hands over blocks of many batches, which TensorFlow takes without a copy and cuts itself: Python runs once
per block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spark_nn.columns import arrange
from spark_nn.dataset.stream import Block, Stream
from spark_nn.trainer import row_weights

# Large against the cost of a call into Python, small against a processor's cache.
_BLOCK_BYTES = 2 << 20


class Feed:
    """A stream as a ``tf.data.Dataset``.

    With its callback in place it reads the epoch that Keras is in; without, as for validation rows, always the first.

    Parameters
    ----------
    stream : Stream
        The batches.
    classWeights : dict of int to float, optional
        How much the rows of each class count.
    outputs : sequence of str, optional
        The outputs' names, where the model puts out a list: Keras then wants the labels in the same order.
    """

    def __init__(
        self, stream: Stream, classWeights: dict[int, float] | None = None, outputs: Sequence[str] | None = None
    ) -> None:
        self.stream = stream
        self.classWeights = classWeights or {}
        self.outputs = outputs
        self.epoch = 0
        self._left: Block | None = None
        self._error: Exception | None = None

    def dataset(self, start: int = 0) -> Any:
        """A dataset whose every iteration reads one epoch, but for so many steps at its beginning."""
        import tensorflow as tf

        stream = self.stream
        batches = max(1, int(_BLOCK_BYTES / (stream.batch * stream.manifest.row_bytes)))
        signature = self._parts(self._specs(tf, (None, stream.batch)))
        signature_of_rest = self._parts(self._specs(tf, (None,)))

        def stretch(place: Any) -> Any:
            whole = tf.data.Dataset.from_generator(
                lambda each: self._watched(self._blocks(int(each), batches, start)),
                args=(place,),
                output_signature=signature,
            )
            # A pass's last batch may be smaller than the others, and then is not one of a block.
            rest = tf.data.Dataset.from_generator(self._rest, output_signature=signature_of_rest)
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

    def callback(self) -> Any:
        """The callback that tells the feed which epoch it is."""
        import keras

        return keras.callbacks.LambdaCallback(on_epoch_begin=self._begin)

    def example(self) -> Any:
        """One row of the model's input."""
        tensors = self.stream.manifest.role("features")
        if all(tensor.numeric for tensor in tensors):
            block = {tensor.name: np.zeros((1, *(tensor.shape or ())), tensor.numpy) for tensor in tensors}
        else:  # an empty string may not be one that the model can read
            first = next(self.stream.epoch(0))
            block = {tensor.name: first[tensor.name][:1] for tensor in tensors}
        return as_tensors(arrange(block, "features"))

    def _begin(self, epoch: int, logs: Any) -> None:
        self.epoch = epoch

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the stream's own error, where TensorFlow makes another one of it on its way through the block."""
        try:
            yield
        except Exception as error:
            if self._error is not None and self._error is not error:
                raise self._error from error
            raise

    def _watched(self, blocks: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        try:
            yield from blocks
        except Exception as error:
            self._error = error
            raise

    def _blocks(self, place: int, batches: int, start: int) -> Iterator[tuple[Any, ...]]:
        """Blocks of whole batches of a stretch, of shape ``(batches, batch) + shape``; what is left is kept."""
        batch = self.stream.batch
        self._left = None
        stretches = self.stream.stretches(self.epoch, start)
        if place >= len(stretches):
            return
        for block in self.stream.blocks(stretches[place], batches):
            weights = row_weights(block, self.classWeights)
            if weights is not None:
                block = {**block, "weight": weights}
            count, rest = divmod(len(next(iter(block.values()))), batch)
            if rest:
                self._left = {name: array[-rest:] for name, array in block.items()}
            if count:
                yield self._parts(
                    {
                        name: array[: count * batch].reshape(count, batch, *array.shape[1:])
                        for name, array in block.items()
                    }
                )

    def _rest(self) -> Iterator[tuple[Any, ...]]:
        if self._left is not None:
            yield self._parts(self._left)

    def _specs(self, tf: Any, rows: tuple[int | None, ...]) -> dict[str, Any]:
        def kind(dtype: str) -> str:
            return "string" if dtype in ("string", "binary") else dtype

        tensors = self.stream.manifest.tensors
        specs = {each.name: tf.TensorSpec((*rows, *(each.shape or ())), kind(each.dtype)) for each in tensors}
        return {**specs, "weight": tf.TensorSpec(rows, "float32")} if self.classWeights else specs

    def _parts(self, block: Block) -> tuple[Any, ...]:
        """A block as Keras takes it: ``(x, y)`` or ``(x, y, sample_weight)``."""
        labels: Any = arrange(block, "label")
        if self.outputs is not None:
            labels = tuple(labels[name] for name in self.outputs)
        parts = (arrange(block, "features"), labels, block.get("weight"))
        return tuple(part for part in parts if part is not None)


def as_tensors(arrays: Any) -> Any:
    """Arrays as tensors, those of strings too."""
    import tensorflow as tf

    return tf.nest.map_structure(tf.convert_to_tensor, arrays)
