"""A rank's share of a dataset as NumPy batches, in the planned order, read ahead by Petastorm.

Petastorm brings the machinery: a ventilator that hands out row groups no faster than they are used, a pool of
threads that read them, a cache on the local disk. The worker in the pool is ours: it turns a row group into NumPy
blocks without touching single rows. The blocks of a window are laid side by side, and each batch gathers its rows
from there, whatever order the plan gives them, straight into memory of its own. What is gathered so fits into the
processor's cache, and no row is copied twice.

Every epoch counts its rows against the plan: a reader that loses some fails.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from spark_nn.columns import Tensor
from spark_nn.dataset import memory, petastorm_compat, plan
from spark_nn.dataset.buffers import Buffers
from spark_nn.dataset.manifest import Group, Manifest, Split
from spark_nn.dataset.reading import GroupReader, Reading, disk_cache
from spark_nn.errors import DatasetError, StoreError
from spark_nn.store import RunDir

Block = dict[str, np.ndarray]
Cache = Literal["none", "memory", "disk"]


def choose_cache(wanted: Cache | Literal["auto"], nbytes: int, processes: int, *, repeated: bool) -> Cache:
    """What to keep of the rows that were read, where the user leaves that to us.

    Parameters
    ----------
    wanted : {"auto", "none", "memory", "disk"}
        The user's choice.
    nbytes : int
        Bytes of all rows in memory: in the end each rank keeps all row groups.
    processes : int
        Ranks on this machine.
    repeated : bool
        Whether rows are read more than once; else nobody would use what is kept.
    """
    if wanted != "auto":
        return wanted
    return "memory" if repeated and memory.fits(nbytes, processes) else "none"


# On a local disk one decodes while another reads; a store across the network makes each of them wait.
_LOCAL_THREADS, _REMOTE_THREADS = 2, 4
_SMALL = 128 * 1024  # bytes: up to here the C library keeps memory at hand, and new blocks are the cheapest
_VENTILATION_S = 0.002  # how often the ventilator looks for room: Petastorm's 0.01 lets fast readers run dry


@dataclass(frozen=True)
class Stretch:
    """Batches `first` to `last` (excluded) of a pass over the rows; `lap` says which pass, counted from 0."""

    lap: int
    first: int
    last: int


class Stream:
    """The batches of one rank.

    Parameters
    ----------
    run : RunDir
        Where the dataset lies.
    manifest : Manifest
        What it holds.
    split : {"train", "validation"}
        Which rows. Training gives every rank the same number of batches, validation every row once.
    rank, world : int
        Whose share, in a gang of how many.
    batch : int
        Rows of a batch; the last of a pass may have fewer.
    seed : int
        Seed of the order.
    shuffle : bool
        Whether the order changes with the epoch; False keeps the order of the DataFrame.
    steps : int, optional
        Batches of an epoch, where that is to be no pass over the rows: the next epoch goes on where the last has
        stopped.
    threads : int, optional
        Threads that read: by default 2 from a local disk, 4 from elsewhere. The order does not depend on them.
    cache : {"none", "memory", "disk"}
        What to keep of the row groups that were read: nothing, their decoded rows, or their bytes on the local disk.
        The order does not depend on it. As row groups go from rank to rank with the epochs, a rank comes to keep all.
    scratch : Path, optional
        Folder for the cache on disk.
    timeout : float, optional
        Seconds that a row group may take to come. Default: as long as it takes.
    """

    def __init__(
        self,
        run: RunDir,
        manifest: Manifest,
        split: Split,
        *,
        rank: int,
        world: int,
        batch: int,
        seed: int,
        shuffle: bool,
        steps: int | None = None,
        threads: int | None = None,
        cache: Cache = "none",
        scratch: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        self.run = run
        self.manifest = manifest
        self.groups = manifest.groups(split)
        self.rank = rank
        self.world = world
        self.batch = batch
        self.seed = seed
        self.shuffle = shuffle
        self.equal = split == "train"
        total = sum(group.rows for group in self.groups)
        start, stop = plan.share(total, rank, world, equal=self.equal)
        self.passRows = stop - start
        self.passSteps = -(-self.passRows // batch)
        self.steps = steps or self.passSteps
        self.timeout = timeout
        self._running: Generator[Block, None, None] | None = None
        self._desk: _Desk = _Library(manifest.tensors, self.groups) if cache == "memory" else _Desk(manifest.tensors)
        self._reading = Reading(run, manifest.tensors, disk_cache(scratch, split) if cache == "disk" else None)
        self.threads = threads or (_LOCAL_THREADS if self._reading.local else _REMOTE_THREADS)

    @property
    def rows(self) -> int:
        """Rows of the first epoch on this rank; later ones may have some more or less, where an epoch is no pass."""
        return sum(self._rows(part) for part in self.stretches(0))

    @property
    def most(self) -> int:
        """Stretches that an epoch has at most."""
        return 1 if self.steps == self.passSteps else -(-self.steps // self.passSteps) + 1

    def stretches(self, number: int, start: int = 0) -> list[Stretch]:
        """The parts of passes that make up an epoch, without so many batches at its beginning."""
        parts = []
        begin, end = number * self.steps + start, (number + 1) * self.steps
        while begin < end:
            lap, first = divmod(begin, self.passSteps)
            last = min(self.passSteps, first + end - begin)
            parts.append(Stretch(lap, first, last))
            begin += last - first
        return parts

    def epoch(self, number: int, *, start: int = 0, batches: int = 1) -> Iterator[Block]:
        """The batches of an epoch, counted from 0, without so many at its beginning (see :meth:`blocks`)."""
        for part in self.stretches(number, start):
            yield from self.blocks(part, batches)

    def blocks(self, part: Stretch, batches: int = 1) -> Iterator[Block]:
        """The batches of a part of a pass: a block of each tensor by name.

        There is one at a time: to begin one ends the one before, wherever that is.

        Parameters
        ----------
        part : Stretch
            Of which pass which batches.
        batches : int
            Batches that come together as one block.

        Yields
        ------
        dict of str to numpy.ndarray
            Arrays of shape ``(batches * batch,) + shape`` that are the receiver's own; the last may have fewer rows.

        Raises
        ------
        DatasetError
            The files do not hold the rows that the manifest promises.
        StoreError
            A row group did not come in time.
        """
        windows = plan.epoch(
            [group.rows for group in self.groups],
            rank=self.rank,
            world=self.world,
            number=part.lap,
            seed=self.seed,
            shuffle=self.shuffle,
            equal=self.equal,
            window_rows=plan.WINDOW_GROUPS * self.manifest.group_rows,
        )
        left, skipped = plan.skip(windows, part.first * self.batch)
        expected = self._rows(part)
        left = plan.first(left, skipped + expected)
        if self._running is not None:
            self._running.close()  # both would lay their windows in the same place
        self._running = self._blocks(left, skipped, batches * self.batch, expected)
        return self._running

    def close(self) -> None:
        """Give back what the cache holds."""
        self._desk.close()
        self._reading.close()

    def _rows(self, part: Stretch) -> int:
        return min(part.last * self.batch, self.passRows) - part.first * self.batch

    def _blocks(
        self, windows: Sequence[plan.Window], skipped: int, size: int, expected: int
    ) -> Generator[Block, None, None]:
        wanted = self._desk.begin(windows)
        buffers = Buffers(self.manifest.tensors, size)
        small = size * self.manifest.row_bytes < _SMALL
        filled, delivered = 0, 0
        block: Block = {}
        with closing(self._read(wanted)) as arriving:
            for window in windows:
                arrays, rows = self._desk.lay(window, arriving)
                rows = rows[: skipped + expected - delivered]
                place, skipped = skipped, 0
                while place < len(rows):
                    if small and not filled and len(rows) - place >= size:
                        taken = rows[place : place + size]
                        place, delivered = place + size, delivered + size
                        # Clipping never happens; it is the mode of `take` that needs no buffer.
                        yield {name: array.take(taken, axis=0, mode="clip") for name, array in arrays.items()}
                        continue
                    block = block or buffers.take()
                    taken = rows[place : place + size - filled]
                    for name, array in arrays.items():
                        array.take(taken, axis=0, out=block[name][filled : filled + len(taken)], mode="clip")
                    place, filled, delivered = place + len(taken), filled + len(taken), delivered + len(taken)
                    if filled == size:
                        yield block
                        block, filled = {}, 0
            if filled:
                yield {name: array[:filled] for name, array in block.items()}
            if delivered != expected or next(arriving, None) is not None:
                raise self._defect(f"delivered {delivered} rows of {expected} planned")

    def _read(self, slices: Sequence[plan.Slice]) -> Generator[Block, None, None]:
        """The blocks of the slices, in their order."""
        if not slices:
            return
        petastorm = petastorm_compat.load()
        pool = petastorm.ThreadPool(self.threads)
        pool.patience = self.timeout
        work = [{"group": self.groups[part.group], "start": part.start, "stop": part.stop} for part in slices]
        ventilator = petastorm.ConcurrentVentilator(
            pool.ventilate,
            work,
            max_ventilation_queue_size=plan.WINDOW_GROUPS + self.threads,
            ventilation_interval=_VENTILATION_S,
        )
        pool.start(GroupReader, self._reading, ventilator=ventilator)
        try:
            for place, part in enumerate(slices):
                try:
                    block = pool.get_results()
                except petastorm.EmptyResultError:
                    raise self._defect(f"read {place} of {len(slices)} planned parts of it") from None
                except TimeoutError:
                    raise StoreError(
                        f"no data came from {self.groups[part.group].file} in {self.run.url} within {self.timeout:g} "
                        "s: look at what serves the store, or set a longer timeout",
                        transient=True,
                    ) from None
                if any(len(values) != part.rows for values in block.values()):
                    raise DatasetError(
                        f"{self.groups[part.group].file} in {self.run.url} does not hold the rows of its "
                        "manifest: the file was changed while the fit was running"
                    )
                yield block
        finally:
            pool.stop()
            pool.join()

    def _defect(self, what: str) -> DatasetError:
        return DatasetError(
            f"rank {self.rank} {what}, the dataset in {self.run.url}: this is a defect of spark_nn, please report it"
        )


class _Desk:
    """Where the blocks of one window lie side by side while batches are gathered from them.

    Parameters
    ----------
    tensors : tuple of Tensor
        What a block holds.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.arrays: Block = {}
        self.room = 0

    def begin(self, windows: Sequence[plan.Window]) -> list[plan.Slice]:
        """Make room for an epoch's windows; return what must be read for them, in order."""
        self._make_room(max((window.rows for window in windows), default=0))
        return [part for window in windows for part in window.slices]

    def lay(self, window: plan.Window, arriving: Iterator[Block]) -> tuple[Block, np.ndarray]:
        """Take a window's blocks in; return the arrays they lie in and the window's rows there, in their order."""
        filled = 0
        for part in window.slices:
            self._copy(next(arriving), filled)
            filled += part.rows
        order = window.order()
        return self.arrays, np.arange(window.rows) if order is None else order

    def close(self) -> None:
        """Give the memory back."""
        self.arrays, self.room = {}, 0

    def _make_room(self, rows: int) -> None:
        # One area, used by one window after the other: fresh memory costs as much as the copy.
        if rows <= self.room:
            return
        self.arrays = {}  # the old one goes first
        self.arrays = {tensor.name: np.empty((rows, *(tensor.shape or ())), tensor.numpy) for tensor in self.tensors}
        self.room = rows

    def _copy(self, block: Block, start: int) -> None:
        for name, values in block.items():
            self.arrays[name][start : start + len(values)] = values


class _Library(_Desk):
    """A desk large enough for all row groups, on which they stay: each is read once.

    Parameters
    ----------
    tensors : tuple of Tensor
        What a block holds.
    groups : sequence of Group
        All row groups. Memory that no row group has come to is not taken.
    """

    def __init__(self, tensors: Sequence[Tensor], groups: Sequence[Group]) -> None:
        super().__init__(tensors)
        self.groups = groups
        self.starts = np.cumsum([0, *(group.rows for group in groups)])
        self.held: set[int] = set()

    def begin(self, windows: Sequence[plan.Window]) -> list[plan.Slice]:
        self._make_room(int(self.starts[-1]))
        # Whole, for the part that this rank does not need now may be its part in the next epoch.
        return [
            plan.Slice(part.group, 0, self.groups[part.group].rows)
            for window in windows
            for part in window.slices
            if part.group not in self.held
        ]

    def lay(self, window: plan.Window, arriving: Iterator[Block]) -> tuple[Block, np.ndarray]:
        for part in window.slices:
            if part.group not in self.held:
                self._copy(next(arriving), self.starts[part.group])
                self.held.add(part.group)
        rows = np.concatenate([self.starts[part.group] + np.arange(part.start, part.stop) for part in window.slices])
        order = window.order()
        return self.arrays, rows if order is None else rows[order]

    def close(self) -> None:
        super().close()
        self.held.clear()
