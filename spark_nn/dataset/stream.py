"""A rank's share of a dataset as NumPy batches, in the planned order, read ahead by Petastorm.

Petastorm brings the machinery: a ventilator that hands out row groups no faster than they are used, and a
pool of threads that read them. The worker in the pool is ours: it turns a row group into NumPy blocks without
touching single rows. Blocks come back tagged with their place in the plan, are put in order, mixed window by
window, and cut into batches that are slices of large blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spark_nn.columns import Tensor
from spark_nn.dataset import petastorm_compat, plan
from spark_nn.dataset.manifest import Group, Manifest, Split
from spark_nn.errors import DatasetError
from spark_nn.store import RunDir

Block = dict[str, np.ndarray]


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
        Rows of a batch; the last of an epoch may have fewer.
    seed : int
        Seed of the order.
    shuffle : bool
        Whether the order changes with the epoch; False keeps the order of the DataFrame.
    threads : int
        Threads that read. The order does not depend on them.
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
        threads: int = 1,
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
        self.threads = threads

    @property
    def rows(self) -> int:
        """Rows of an epoch on this rank."""
        total = sum(group.rows for group in self.groups)
        start, stop = plan.share(total, self.rank, self.world, equal=self.equal)
        return stop - start

    @property
    def steps(self) -> int:
        """Batches of an epoch on this rank."""
        return -(-self.rows // self.batch)

    def epoch(self, number: int) -> Iterator[Block]:
        """The batches of an epoch, counted from 0: a block of each tensor by name.

        Raises
        ------
        DatasetError
            The files do not hold the rows that the manifest promises.
        """
        windows = plan.epoch(
            [group.rows for group in self.groups],
            rank=self.rank,
            world=self.world,
            number=number,
            seed=self.seed,
            shuffle=self.shuffle,
            equal=self.equal,
            window_rows=plan.WINDOW_GROUPS * self.manifest.group_rows,
        )
        return _batches(self._windows(windows), self.batch)

    def _windows(self, windows: Sequence[plan.Window]) -> Iterator[Block]:
        """The rows of each window, mixed as planned."""
        blocks = self._read([part for window in windows for part in window.slices])
        names = [tensor.name for tensor in self.manifest.tensors]
        for window in windows:
            parts = [next(blocks) for _ in window.slices]
            whole = {name: np.concatenate([part[name] for part in parts]) for name in names}
            order = window.order()
            yield whole if order is None else {name: values[order] for name, values in whole.items()}
        for _ in blocks:
            raise DatasetError("the reader delivered more than was planned")

    def _read(self, slices: Sequence[plan.Slice]) -> Iterator[Block]:
        """The blocks of the slices, in their order."""
        petastorm = petastorm_compat.load()
        pool = petastorm.ThreadPool(self.threads)
        work = [
            {"place": place, "group": self.groups[part.group], "start": part.start, "stop": part.stop}
            for place, part in enumerate(slices)
        ]
        ventilator = petastorm.ConcurrentVentilator(
            pool.ventilate, work, max_ventilation_queue_size=plan.WINDOW_GROUPS + self.threads
        )
        pool.start(_GroupReader, (self.run, self.manifest.tensors), ventilator=ventilator)
        try:
            waiting: dict[int, Block] = {}
            for place, part in enumerate(slices):
                while place not in waiting:
                    try:
                        arrived, block = pool.get_results()
                    except petastorm.EmptyResultError:
                        raise DatasetError(
                            f"rank {self.rank} read {place} of {len(slices)} planned parts of the dataset "
                            f"in {self.run.url}, then the reader ended: this is a defect, please report it"
                        ) from None
                    waiting[arrived] = block
                block = waiting.pop(place)
                if any(len(values) != part.rows for values in block.values()):
                    raise DatasetError(
                        f"{self.groups[part.group].file} in {self.run.url} does not hold the rows of its "
                        "manifest: the file was changed while the fit was running"
                    )
                yield block
        finally:
            pool.stop()
            pool.join()


class _GroupReader:
    """Petastorm's worker protocol: read row groups, publish NumPy blocks. One per thread of the pool."""

    def __init__(self, worker_id: int, publish_func: Callable[[Any], None], args: Any) -> None:
        self.worker_id = worker_id
        self.publish_func = publish_func
        self.run, self.tensors = args
        self.names = [tensor.name for tensor in self.tensors]
        self.path = ""
        self.parquet: pq.ParquetFile | None = None

    def process(self, place: int, group: Group, start: int, stop: int) -> None:
        """Read rows `start` to `stop` of a row group and publish them with their place in the plan."""
        if self.parquet is None or self.path != group.file:
            self.shutdown()
            self.parquet = pq.ParquetFile(self.run.fs.open(self.run.path(group.file), "rb"))
            self.path = group.file
        table = self.parquet.read_row_group(group.index, columns=self.names, use_threads=False)
        block = {tensor.name: _unpack(table.column(tensor.name), tensor)[start:stop] for tensor in self.tensors}
        self.publish_func((place, block))

    def shutdown(self) -> None:
        """Close the file that is open."""
        if self.parquet is not None:
            self.parquet.close(force=True)
            self.parquet = None


def _unpack(column: pa.ChunkedArray, tensor: Tensor) -> np.ndarray:
    """A column as a block of shape ``(rows,) + shape``, sharing Arrow's memory where it is in one piece."""
    if tensor.form == "scalar":
        return np.asarray(column.to_numpy())
    dtype = np.dtype(tensor.dtype)
    width = int(np.prod(tensor.shape))
    pieces = [
        np.frombuffer(chunk.buffers()[1], dtype, count=len(chunk) * width, offset=chunk.offset * width * dtype.itemsize)
        for chunk in column.chunks
    ]
    flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return flat.reshape((-1, *tensor.shape))


def _rows(block: Block) -> int:
    return len(next(iter(block.values())))


def _batches(blocks: Iterator[Block], size: int) -> Iterator[Block]:
    """Cut blocks into batches of exactly `size` rows; only the last may have fewer."""
    rest: Block | None = None
    for block in blocks:
        rows = _rows(block)
        start = 0
        if rest is not None:
            start = min(size - _rows(rest), rows)
            rest = {name: np.concatenate([rest[name], values[:start]]) for name, values in block.items()}
            if _rows(rest) < size:
                continue
            yield rest
            rest = None
        stop = start + (rows - start) // size * size
        for place in range(start, stop, size):
            yield {name: values[place : place + size] for name, values in block.items()}
        if stop < rows:
            rest = {name: values[stop:] for name, values in block.items()}
    if rest is not None:
        yield rest
