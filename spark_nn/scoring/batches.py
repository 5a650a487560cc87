"""Batches of one size made from batches of any, and brought while the one before is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import Full, Queue
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Block = Sequence[np.ndarray]

# Seconds between two looks at whether anybody still wants what a full queue has no room for.
_LOOK = 0.1
# What a network's widest layer puts out for the rows in work: not much more than a core's own cache holds, and enough
# for a call to cost little beside it.
_WIDEST_BYTES = 8 << 20
_FEWEST, _MOST = 32, 4096


def recut(blocks: Iterator[Block], rows: int) -> Iterator[list[np.ndarray]]:
    """Cut blocks of any number of rows into blocks of one.

    Only what lies across the border of two blocks is copied.

    Parameters
    ----------
    blocks : iterator of sequence of numpy.ndarray
        Arrays of the same number of rows each.
    rows : int
        Rows of a block that is yielded; the last one may have fewer.
    """
    held: list[Block] = []
    count = 0
    for block in blocks:
        total, start = len(block[0]), 0
        if held:
            start = min(rows - count, total)
            held.append([array[:start] for array in block])
            count += start
            if count < rows:
                continue
            yield _joined(held)
            held, count = [], 0
        while total - start >= rows:
            yield [array[start : start + rows] for array in block]
            start += rows
        if start < total:
            held, count = [[array[start:] for array in block]], total - start
    if held:
        yield _joined(held)


def ahead(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """Bring items in a thread of their own, so many of them before they are asked for.

    An error of the iterator is raised where its item would have come. A thread that waits for an item when the
    consumer ends, as at an error, is left to the end of the process.
    """
    queue: Queue[tuple[str, Any]] = Queue(depth)
    ended = threading.Event()

    def offer(kind: str, value: Any) -> bool:
        while not ended.is_set():
            try:
                queue.put((kind, value), timeout=_LOOK)
            except Full:
                continue
            return True
        return False

    def bring() -> None:
        try:
            for item in items:
                if not offer("item", item):
                    return
        except BaseException as error:  # noqa: BLE001
            offer("error", error)
        else:
            offer("end", None)

    threading.Thread(target=bring, name="spark_nn-ahead", daemon=True).start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        ended.set()


def rows_for(widest: int) -> int:
    """Rows that go through a network at once with good speed and little memory, by what its widest layer puts out.

    That may be a hundred times its input: images go through in smaller blocks than rows of numbers, so that what is
    handed from layer to layer stays in the cache.

    Parameters
    ----------
    widest : int
        Elements that the layer puts out for a row.
    """
    rows = _WIDEST_BYTES // (4 * widest)
    return min(max(1 << max(0, rows.bit_length() - 1), _FEWEST), _MOST)


def slices(total: int, rows: int) -> Iterator[slice]:
    """Cut so many rows into blocks of so many."""
    return (slice(start, start + rows) for start in range(0, total, rows))


def _joined(blocks: Sequence[Block]) -> list[np.ndarray]:
    if len(blocks) == 1:
        return list(blocks[0])
    return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
