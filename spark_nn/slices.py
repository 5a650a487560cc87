"""Executor side: how many rows go through a model at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

_SLICE_BYTES = 16 << 20


def slices(arrays: Mapping[str, np.ndarray]) -> Iterator[slice]:
    """Cut the rows of a model's inputs into what goes through it at once.

    What a layer puts out may be a hundred times its input: images go through in smaller slices than rows of numbers.
    """
    total = len(next(iter(arrays.values())))
    row = max(1, sum(array[:1].nbytes for array in arrays.values()))
    rows = int(np.clip(_SLICE_BYTES // row, 32, 4096))
    return (slice(start, start + rows) for start in range(0, total, rows))
