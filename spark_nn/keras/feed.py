"""Worker side: a stream as what Keras trains from, whatever its backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from spark_nn.columns import arrange
from spark_nn.dataset.stream import Block, Stream
from spark_nn.keras import backends
from spark_nn.trainer import row_weights

# Large against the cost of a block, small against a processor's cache.
_BLOCK_BYTES = 2 << 20


class Feed:
    """A stream as what Keras trains from.

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
        """What ``fit`` takes: every iteration reads one epoch, but for so many steps at its beginning."""
        return backends.current().dataset(self, start)

    def first(self, start: int) -> Any:
        """The first batch after so many steps."""
        return backends.current().first(self, start)

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
        return backends.current().tensors(arrange(block, "features"))

    def _begin(self, epoch: int, logs: Any) -> None:
        self.epoch = epoch

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise the stream's own error, where a framework makes another one of it on its way through the block."""
        try:
            yield
        except Exception as error:
            if self._error is not None and self._error is not error:
                raise self._error from error
            raise

    def blocks(self, place: int, batches: int, start: int) -> Iterator[tuple[Any, ...]]:
        """Blocks of whole batches of a stretch, of shape ``(batches, batch) + shape``; what is left is kept.

        Parameters
        ----------
        place : int
            Which of the epoch's stretches.
        batches : int
            Batches of a block, at most.
        start : int
            Batches that are left out at the beginning of the epoch.
        """
        batch = self.stream.batch
        self._left = None
        stretches = self.stream.stretches(self.epoch, start)
        if place >= len(stretches):
            return
        with self._noted():
            for block in map(self._weighted, self.stream.blocks(stretches[place], batches)):
                count, rest = divmod(len(next(iter(block.values()))), batch)
                if rest:
                    self._left = {name: array[-rest:] for name, array in block.items()}
                if count:
                    yield self.parts(
                        {
                            name: array[: count * batch].reshape(count, batch, *array.shape[1:])
                            for name, array in block.items()
                        }
                    )

    def rest(self) -> Iterator[tuple[Any, ...]]:
        """What was left: a batch that is smaller than the others."""
        if self._left is not None:
            yield self.parts(self._left)

    def batches(self, start: int, check: Callable[[Block], None] | None = None) -> Iterator[tuple[Any, ...]]:
        """The batches of an epoch one by one, without so many at its beginning; they lie in blocks of many.

        Parameters
        ----------
        start : int
            Batches that are left out at the beginning of the epoch.
        check : callable, optional
            Sees each block, and may refuse it.
        """
        stream = self.stream
        size, left = stream.batch, stream.steps - start
        together = max(1, int(_BLOCK_BYTES / (size * stream.manifest.row_bytes)))
        with self._noted():
            blocks = stream.epoch(self.epoch, start=start, batches=together)
            for block in map(self._weighted, blocks):
                if check is not None:
                    check(block)
                for place in range(0, len(next(iter(block.values()))), size):
                    left -= 1
                    if not left:
                        next(blocks, None)  # nobody will ask for more, and the stream has its rows to count
                    yield self.parts({name: array[place : place + size] for name, array in block.items()})

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._error = error
            raise

    def _weighted(self, block: Block) -> Block:
        weights = row_weights(block, self.classWeights)
        return block if weights is None else {**block, "weight": weights}

    def parts(self, block: Block) -> tuple[Any, ...]:
        """A block as Keras takes it: ``(x, y)`` or ``(x, y, sample_weight)``."""
        labels: Any = arrange(block, "label")
        if self.outputs is not None:
            labels = tuple(labels[name] for name in self.outputs)
        parts = (arrange(block, "features"), labels, block.get("weight"))
        return tuple(part for part in parts if part is not None)
