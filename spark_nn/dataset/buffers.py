"""Memory for blocks of rows that is used again as soon as nobody holds it.

Fresh memory comes from the kernel page by page, which can cost more than to fill it; and TensorFlow takes an array
over without a copy only where it begins at a multiple of 64 bytes, and holds it for as long as it is in use. So each
block lies in an area of its own, and an area is handed out anew when no array that lies in it is left.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from spark_nn.columns import Tensor

_ALIGNMENT = 64
# Areas kept to be used again: more than this, whoever trains does not hold at a time.
_KEPT = 8


class Areas:
    """Hands out memory of one size.

    Parameters
    ----------
    size : int
        Its bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._areas: list[np.ndarray] = []

    def take(self) -> tuple[np.ndarray, int]:
        """An uninitialised area of bytes, and where in it to begin; it is free again when no array lies in it."""
        # A view of a view refers to the area itself, so that its count of references tells all of them.
        for place in range(len(self._areas)):
            if sys.getrefcount(self._areas[place]) == _UNUSED:
                area = self._areas[place]
                break
        else:
            area = np.empty(self._size + _ALIGNMENT, np.uint8)
            if len(self._areas) < _KEPT:
                self._areas.append(area)
        return area, -area.ctypes.data % _ALIGNMENT


class Buffers:
    """Hands out blocks of a number of rows.

    Parameters
    ----------
    tensors : sequence of Tensor
        What a block holds, of known shape.
    rows : int
        Rows of a block.
    """

    def __init__(self, tensors: Sequence[Tensor], rows: int) -> None:
        self._layout: list[tuple[str, np.dtype[np.generic], tuple[int, ...], int]] = []
        size = 0
        for tensor in tensors:
            shape = (rows, *(tensor.shape or ()))
            self._layout.append((tensor.name, tensor.numpy, shape, size))
            if tensor.numeric:
                nbytes = rows * tensor.size * tensor.numpy.itemsize
                size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._areas = Areas(size)

    def take(self) -> dict[str, np.ndarray]:
        """An uninitialised block; its memory is free again when the last of its arrays, and of their views, is gone."""
        area, skip = self._areas.take()
        return {
            name: np.empty(shape, dtype) if dtype.hasobject else np.ndarray(shape, dtype, area, skip + start)
            for name, dtype, shape, start in self._layout
        }


# What `getrefcount` says of an array that only a list refers to: Python versions count their own use differently.
_UNUSED = next(sys.getrefcount(each[0]) for each in [[np.empty(1)]])
