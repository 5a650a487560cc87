"""Executor side of materialising: one task writes its partition's rows to Parquet and reports what it wrote.

Arrays of numbers are packed, one fixed-size binary value per row, which reads back as one NumPy array without
decoding; single numbers and strings are plain columns. Row groups have exactly the planned number of rows but for
the last of a file. Spark may run a task twice: every attempt writes files of its own, and the manifest lists only
those that a successful attempt reported.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext

from spark_nn.columns import Problem, Tensor, decode_usable, row_bytes, told
from spark_nn.dataset.extent import Extent, label_extents, together
from spark_nn.dataset.fingerprint import Fingerprint, hash_rows, mix
from spark_nn.store import RunDir

# Large enough that a read is one request worth its latency, small enough to mix many in memory.
GROUP_BYTES = 2 << 20
# Row groups whose rows are mixed with each other before they are written.
SHUFFLE_GROUPS = 16
# A codec has to halve the bytes to be worth its time: packed floats seldom shrink, encoded categories always do.
_WORTHWHILE = 0.5
_SAMPLE_BYTES = 1 << 20

Block = dict[str, np.ndarray]


def group_rows(tensors: list[Tensor], other_bytes: float = 0.0) -> int:
    """Rows of a full row group: about :data:`GROUP_BYTES` of them.

    Parameters
    ----------
    tensors : list of Tensor
        What is written, of known shape.
    other_bytes : float
        Bytes of a row's strings.
    """
    return int(np.clip(GROUP_BYTES // max(row_bytes(tensors) + other_bytes, 1), 1, 65_536))


@dataclass(frozen=True)
class PartitionWriter:
    """The function that Spark runs on each partition.

    Parameters
    ----------
    run : RunDir
        Where the files go, in its folder ``data``; None only looks what the rows hold.
    tensors : tuple of Tensor
        The batches' columns, by name.
    fraction : float
        Share of the rows that goes to validation, drawn by seed; unused with a tensor ``"validation"``.
    seed : int
        Seed of the split and of the shuffling.
    shuffle : bool
        Whether rows are mixed before they are written.
    skip : bool
        Whether to leave out rows that cannot be used, and not just report them.
    """

    run: RunDir | None
    tensors: tuple[Tensor, ...]
    fraction: float
    seed: int
    shuffle: bool
    skip: bool = False

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Write the rows and yield one row with the report."""
        context = TaskContext.get()
        partition = context.partitionId() if context else 0
        try:
            report = self.write(partition, batches)
        except FileNotFoundError as error:
            report = {"partition": partition, "unshared": f"{socket.gethostname()}: {error}"}
        yield pa.RecordBatch.from_pydict({"report": [json.dumps(report)]})

    def write(self, partition: int, batches: Iterator[pa.RecordBatch]) -> dict[str, Any]:
        """Write a partition and describe what was written."""
        tensors = list(self.tensors)
        problems: Counter[Problem] = Counter()
        draw = np.random.default_rng((self.seed, partition))
        files: dict[str, _File] = {}
        labels: dict[str, Extent] = {}
        content, skipped, group, strings = Fingerprint(), 0, 0, 0
        try:
            for batch in batches:
                first, rows = content.rows, batch.num_rows
                batch, block, known, invalid = decode_usable(batch, tensors, skip=self.skip)
                skipped += rows - batch.num_rows
                if not self.skip:
                    problems += invalid.problems
                if problems or not batch.num_rows:
                    content += Fingerprint(rows)
                    continue  # where rows are refused the data will not be used: only count what is wrong with the rest
                tensors = known
                content += Fingerprint.of(self._hashes(block, tensors, partition, first), rows)
                if self.run is None:
                    continue
                here = _string_bytes(batch, tensors)
                strings += here
                labels = together(labels, label_extents(block))
                group = group or group_rows(stored(tensors), here / batch.num_rows)
                held_back = block.pop("validation", None)
                if held_back is None and self.fraction > 0:
                    held_back = draw.random(batch.num_rows) < self.fraction
                for split, mask in _splits(held_back):
                    if split not in files:
                        order = (self.seed, partition) if self.shuffle and split == "train" else None
                        files[split] = _File(self.run, split, partition, stored(tensors), order, group)
                    files[split].add(block if mask is None else {n: b[mask] for n, b in block.items()})
            groups = {split: file.close() for split, file in files.items()}
        except BaseException:
            for file in files.values():
                file.abandon()
            raise
        return {
            "partition": partition,
            "files": {split: [files[split].name, rows] for split, rows in groups.items() if rows},
            "shapes": {tensor.name: tensor.shape for tensor in tensors},
            "group": group,
            "problems": told(problems),
            "skipped": skipped,
            "strings": strings,
            "labels": {name: extent.toDict() for name, extent in labels.items()},
            "content": asdict(content),
        }

    def _hashes(self, block: Block, tensors: list[Tensor], partition: int, first: int) -> np.ndarray:
        """A hash of each row; where the order is kept, a row's place is part of it."""
        hashes = hash_rows(block, tensors)
        if self.shuffle:
            return hashes
        return mix(hashes + mix(np.arange(first, first + len(hashes), dtype=np.uint64) + np.uint64(partition << 40)))


def stored(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors that are written: the indicator of the split is not."""
    return [tensor for tensor in tensors if tensor.name != "validation"]


def pack(block: np.ndarray, tensor: Tensor) -> pa.Array:
    """A block as an Arrow array: arrays of numbers as one fixed-size binary value per row."""
    if not tensor.packed:
        if tensor.depth == 0:
            return pa.array(block, arrow_type(tensor))
        array = pa.array(block.reshape(-1), arrow_type(replace(tensor, depth=0)))
        return pa.FixedSizeListArray.from_arrays(array, tensor.size)
    block = np.ascontiguousarray(block)
    return pa.FixedSizeBinaryArray.from_buffers(arrow_type(tensor), len(block), [None, pa.py_buffer(block)])


def unpack(column: pa.ChunkedArray, tensor: Tensor) -> np.ndarray:
    """The block of shape ``(rows,) + shape`` that was packed; shares Arrow's memory where it is in one piece."""
    if not tensor.packed:
        if tensor.depth:
            column = column.combine_chunks().flatten()
        return np.asarray(column.to_numpy(zero_copy_only=False)).reshape((-1, *(tensor.shape or ())))
    dtype, size = tensor.numpy, tensor.size
    pieces = [
        np.frombuffer(chunk.buffers()[1], dtype, count=len(chunk) * size, offset=chunk.offset * size * dtype.itemsize)
        for chunk in column.chunks
    ]
    flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return flat.reshape((-1, *(tensor.shape or ())))


def arrow_type(tensor: Tensor) -> pa.DataType:
    """The type that a tensor's rows have in Parquet."""
    if tensor.packed:
        return pa.binary(tensor.numpy.itemsize * tensor.size)
    element = pa.from_numpy_dtype(tensor.numpy) if tensor.numeric else pa.type_for_alias(tensor.dtype)
    return pa.list_(element, tensor.size) if tensor.depth else element


def _string_bytes(batch: pa.RecordBatch, tensors: list[Tensor]) -> int:
    """Bytes of the strings in a batch."""
    return sum(int(batch.column(tensor.name).nbytes) for tensor in tensors if not tensor.numeric)


def _splits(held_back: np.ndarray | None) -> list[tuple[str, np.ndarray | None]]:
    """The splits that get rows of a block, each with the mask of its rows, None for all."""
    if held_back is None or not held_back.any():
        return [("train", None)]
    if held_back.all():
        return [("validation", None)]
    return [("train", ~held_back), ("validation", held_back)]


@dataclass
class _File:
    """A Parquet file in the making."""

    run: RunDir
    split: str
    partition: int
    tensors: list[Tensor]
    order: tuple[int, ...] | None
    group: int
    blocks: list[Block] = field(default_factory=list)
    held: int = 0
    groups: list[int] = field(default_factory=list)
    chunks: int = 0
    parquet: pq.ParquetWriter | None = None

    def __post_init__(self) -> None:
        self.name = f"data/{self.split}-{self.partition:05d}-{uuid.uuid4().hex}.parquet"
        self.schema = pa.schema([pa.field(t.name, arrow_type(t), nullable=False) for t in self.tensors])
        self.sink = self.run.fs.open(self.run.path(self.name), "wb")

    def add(self, block: Block) -> None:
        """Take rows; write those that fill a chunk of row groups."""
        self.blocks.append(block)
        self.held += len(next(iter(block.values())))
        if self.held >= self.group * SHUFFLE_GROUPS:
            self._flush(self.held - self.held % self.group)

    def close(self) -> list[int]:
        """Write the rest; return the rows of each row group."""
        if self.held:
            self._flush(self.held)
        if self.parquet is not None:
            self.parquet.close()
        self.sink.close()
        return self.groups

    def abandon(self) -> None:
        """Close without care for what was written: the directory goes anyway."""
        self.sink.close()

    def _flush(self, rows: int) -> None:
        chunk = {tensor.name: np.concatenate([block[tensor.name] for block in self.blocks]) for tensor in self.tensors}
        self.blocks = [{name: values[rows:] for name, values in chunk.items()}] if rows < self.held else []
        self.held -= rows
        order = None
        if self.order is not None:
            order = np.random.default_rng((*self.order, self.chunks)).permutation(rows)
        columns = [pack(chunk[t.name][:rows] if order is None else chunk[t.name][order], t) for t in self.tensors]
        if self.parquet is None:
            self.parquet = pq.ParquetWriter(
                self.sink,
                self.schema,
                compression={t.name: _codec(column) for t, column in zip(self.tensors, columns, strict=True)},
                # Packed floats do not repeat; a dictionary would only be built to be thrown away.
                use_dictionary=[t.name for t in self.tensors if not t.numeric],
                write_statistics=False,
            )
        self.parquet.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=self.group)
        self.groups += [min(self.group, rows - start) for start in range(0, rows, self.group)]
        self.chunks += 1


def _codec(column: pa.Array) -> str:
    """The codec for a column, tried on a sample of its first rows."""
    buffer = column.slice(0, max(1, _SAMPLE_BYTES * len(column) // max(column.nbytes, 1))).buffers()[-1]
    sample = buffer.slice(0, min(_SAMPLE_BYTES, buffer.size)) if buffer is not None else b""
    if not len(sample):
        return "none"
    return "lz4" if len(pa.compress(sample, "lz4", asbytes=True)) < _WORTHWHILE * len(sample) else "none"
