"""Worker side: the mean over the ranks of a step's gradients, as operations of TensorFlow's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from spark_nn.gang.collective import Collective
from spark_nn.keras.kernel import Mapped, Work


class Averager:
    """Averages gradients over the ranks through the gang's own collective.

    Parameters
    ----------
    collective : Collective
        Exchange with the other ranks.
    """

    def __init__(self, collective: Collective) -> None:
        self.collective = collective
        self._mapped = Mapped(self._averaging)

    def average(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients of the global batch: dense ones in one exchange, sparse ones one by one."""
        result = list(grads)
        dense = [i for i, grad in enumerate(grads) if isinstance(grad, tf.Tensor)]
        for i, grad in enumerate(grads):
            if isinstance(grad, tf.IndexedSlices):
                # Made dense, Adam would decay the moments of rows that no rank has seen.
                result[i] = self._gather(grad)
        if dense:
            # Halves add up in single precision; doubles stay doubles.
            dtype = tf.float64 if any(grads[i].dtype == tf.float64 for i in dense) else tf.float32
            means = self._means([tf.cast(grads[i], dtype) for i in dense])
            for i, mean in zip(dense, means, strict=True):
                result[i] = tf.cast(mean, grads[i].dtype)
                result[i].set_shape(grads[i].shape)
        return result

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Run the steps of a fit: what breaks the averaging is raised from the block as an error of the gang's."""
        yield

    def _means(self, grads: list[Any]) -> list[Any]:
        """The means over the ranks of gradients of the same type, float32 or float64."""
        return self._mapped(grads)

    def _gather(self, grad: tf.IndexedSlices) -> tf.IndexedSlices:
        indices, values = tf.numpy_function(
            self._gather_rows, [tf.cast(grad.indices, tf.int64), grad.values], [tf.int64, grad.values.dtype]
        )
        indices.set_shape([None])
        values.set_shape([None, *grad.values.shape[1:]])
        return tf.IndexedSlices(values, tf.cast(indices, grad.indices.dtype), grad.dense_shape)

    def _averaging(self, dtype: np.dtype[Any], sizes: tuple[int, ...]) -> Work:
        return self.collective.averaging(dtype, sizes)

    def _gather_rows(self, indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        every_index = self.collective.all_gather(indices.tobytes())
        every_value = self.collective.all_gather(values.tobytes())
        rows = np.frombuffer(b"".join(every_value), values.dtype).reshape(-1, *values.shape[1:])
        mean = (rows / self.collective.world).astype(values.dtype)
        return np.frombuffer(b"".join(every_index), np.int64), mean
