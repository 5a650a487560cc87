"""Worker side: a stream as the batches that a network is trained on.

The stream hands over blocks of many batches, which PyTorch takes without a copy and cuts: Python touches no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from spark_nn.columns import arrange
from spark_nn.dataset.stream import Stream
from spark_nn.torch.blueprint import Specs
from spark_nn.trainer import row_weights

# Large against the cost of a call into Python, small against a processor's cache.
_BLOCK_BYTES = 2 << 20
# Inputs, labels, weights, and how many rows they are.
Batch = tuple[Any, Any, Any, int]


class Feed:
    """A stream as batches of tensors.

    Parameters
    ----------
    stream : Stream
        The batches.
    device : torch.device
        Where they go.
    classWeights : dict of int to float
        How much the rows of each class count.
    """

    def __init__(self, stream: Stream, device: Any, classWeights: dict[int, float]) -> None:
        self.stream = stream
        self.device = device
        self.classWeights = classWeights

    @property
    def specs(self) -> Specs:
        """Shape and dtype of each input."""
        return {
            tensor.key: (tuple(tensor.shape or ()), tensor.dtype) for tensor in self.stream.manifest.role("features")
        }

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, but for so many steps at its beginning."""
        size = self.stream.batch
        together = max(1, int(_BLOCK_BYTES / (size * self.stream.manifest.row_bytes)))
        for block in self.stream.epoch(epoch, start=start, batches=together):
            weights = row_weights(block, self.classWeights)
            inputs = self._cut(arrange(block, "features"), size)
            labels = self._cut(arrange(block, "label"), size)
            counted = [None] * len(labels) if weights is None else self._cut(weights, size)
            for x, y, w in zip(inputs, labels, counted, strict=True):
                yield x, y, w, len(next(iter(y.values())) if isinstance(y, dict) else y)

    def _cut(self, arrays: Any, size: int) -> list[Any]:
        if not isinstance(arrays, dict):
            return list(torch.from_numpy(arrays).to(self.device).split(size))
        parts = {name: self._cut(array, size) for name, array in arrays.items()}
        return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
