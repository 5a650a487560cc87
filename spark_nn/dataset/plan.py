"""Which rows which rank reads in which epoch: a pure function of the manifest, the seed and the gang.

All rows of a dataset stand in one line, row group after row group. Every rank takes one contiguous share of
the line. With shuffling, the row groups change places in the line in every epoch, and each rank mixes the
rows of its share within windows of several row groups. Nothing is read to decide any of it.

For training all shares have the same length, ``ceil(rows / world)``, so that every rank takes the same number
of steps with the same number of rows: neighbours then share at most one row, ``world - 1`` rows in all are
used twice in an epoch, and none is left out. For validation nothing needs to be equal, and the shares divide
the rows exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spark_nn.errors import DatasetError

# Row groups mixed in memory: enough that neighbours in a file meet strangers.
WINDOW_GROUPS = 16


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop`` (excluded) of one row group, given by its place in the manifest."""

    group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """Slices whose rows are mixed with each other.

    Parameters
    ----------
    slices : tuple of Slice
        In the order in which they are read.
    seed : tuple of int or None
        Seed of the permutation of the window's rows; None leaves them in order.
    """

    slices: tuple[Slice, ...]
    seed: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.slices)

    def order(self) -> np.ndarray | None:
        """The permutation of the window's rows, None for as they are."""
        return None if self.seed is None else np.random.default_rng(self.seed).permutation(self.rows)


def share(rows: int, rank: int, world: int, *, equal: bool) -> tuple[int, int]:
    """The part of the line, as start and stop, that belongs to a rank.

    Parameters
    ----------
    rows : int
        Rows of the dataset, at least `world`.
    rank, world : int
        Whose share, of how many.
    equal : bool
        Whether all shares must have the same length, for which neighbours may share a row.

    Raises
    ------
    DatasetError
        There are fewer rows than ranks.
    """
    if rows < world:
        raise DatasetError(
            f"{rows} rows cannot be shared by {world} workers: give more rows or set numWorkers to "
            f"{max(rows, 1)} or less"
        )
    start = rank * rows // world
    stop = start + -(-rows // world) if equal else (rank + 1) * rows // world
    return start, stop


def epoch(
    groups: Sequence[int],
    *,
    rank: int,
    world: int,
    number: int,
    seed: int,
    shuffle: bool,
    equal: bool = True,
    window_rows: int,
) -> list[Window]:
    """What a rank reads in an epoch.

    Parameters
    ----------
    groups : sequence of int
        Rows of each row group, in the manifest's order.
    rank, world : int
        Whose plan, in a gang of how many.
    number : int
        The epoch, counted from 0.
    seed : int
        With `number` it decides the order; the same on all ranks.
    shuffle : bool
        False keeps the manifest's order.
    equal : bool
        Whether all ranks need the same number of rows (see :func:`share`).
    window_rows : int
        A window is closed when it holds at least as many rows.

    Returns
    -------
    list of Window
        In the order in which they are read.
    """
    start, stop = share(sum(groups), rank, world, equal=equal)
    line = np.arange(len(groups))
    if shuffle:
        line = np.random.default_rng((seed, number)).permutation(line)
    lengths = np.asarray(groups, dtype=np.int64)[line]
    ends = np.cumsum(lengths)

    windows: list[Window] = []
    slices: list[Slice] = []
    held = 0
    first = int(np.searchsorted(ends, start, side="right"))
    for group, length, end in zip(line[first:], lengths[first:], ends[first:], strict=True):
        begin = int(end - length)
        if begin >= stop:
            break
        part = Slice(int(group), max(start - begin, 0), min(stop - begin, int(length)))
        if part.rows:
            slices.append(part)
            held += part.rows
        if held >= window_rows:
            windows.append(_window(slices, seed, number, rank, len(windows), shuffle))
            slices, held = [], 0
    if slices:
        windows.append(_window(slices, seed, number, rank, len(windows), shuffle))
    return windows


def skip(windows: Sequence[Window], rows: int) -> tuple[list[Window], int]:
    """The windows that are left after a number of rows, and how many rows to leave out of the first of them.

    A window is the least that can be left out unread, as its rows come mixed.
    """
    for place, window in enumerate(windows):
        if rows < window.rows:
            return list(windows[place:]), rows
        rows -= window.rows
    return [], 0


def first(windows: Sequence[Window], rows: int) -> list[Window]:
    """The first windows that hold so many rows."""
    ends = np.cumsum([window.rows for window in windows])
    return list(windows[: int(np.searchsorted(ends, rows)) + 1]) if rows else []


def _window(slices: list[Slice], seed: int, number: int, rank: int, place: int, shuffle: bool) -> Window:
    return Window(tuple(slices), (seed, number, rank, place) if shuffle else None)
