"""Executor side of materialising: one task writes its partition's rows to Parquet and reports what it wrote.

Arrays of numbers are packed, one fixed-size binary value per row, which reads back as one NumPy array without
decoding; single numbers are plain columns. Row groups have exactly the planned number of rows but for the
last of a file. Spark may run a task twice: every attempt writes files of its own, and the manifest lists only
those that a successful attempt reported.
"""

from __future__ import annotations

import json
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext

from spark_nn.columns import Problem, Tensor, decode
from spark_nn.store import RunDir

# Large enough that a read is one request worth its latency, small enough to mix many in memory.
GROUP_BYTES = 4 << 20
# Row groups whose rows are mixed with each other before they are written.
SHUFFLE_GROUPS = 16

Block = dict[str, np.ndarray]


def group_rows(tensors: list[Tensor]) -> int:
    """Rows of a full row group: about :data:`GROUP_BYTES` of them."""
    row_bytes = sum(np.dtype(t.dtype).itemsize * int(np.prod(t.shape)) for t in tensors)
    return int(np.clip(GROUP_BYTES // max(row_bytes, 1), 1, 65_536))


@dataclass(frozen=True)
class PartitionWriter:
    """The function that Spark runs on each partition.

    Parameters
    ----------
    run : RunDir
        Where the files go, in its folder ``data``.
    tensors : tuple of Tensor
        The batches' columns, by name.
    fraction : float
        Share of the rows that goes to validation, drawn by seed; unused with a tensor ``"validation"``.
    seed : int
        Seed of the split and of the shuffling.
    shuffle : bool
        Whether rows are mixed before they are written.
    """

    run: RunDir
    tensors: tuple[Tensor, ...]
    fraction: float
    seed: int
    shuffle: bool

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
        try:
            for batch in batches:
                if not batch.num_rows:
                    continue
                block, tensors = _decode(batch, tensors, problems)
                if problems:
                    continue  # the data will not be used: only count what is wrong with the rest
                held_back = block.pop("validation", None)
                if held_back is None and self.fraction > 0:
                    held_back = draw.random(batch.num_rows) < self.fraction
                for split, mask in _splits(held_back):
                    if split not in files:
                        order = (self.seed, partition) if self.shuffle and split == "train" else None
                        files[split] = _File(self.run, split, partition, stored(tensors), order)
                    files[split].add(block if mask is None else {n: b[mask] for n, b in block.items()})
            groups = {split: file.close() for split, file in files.items()}
        except BaseException:
            for file in files.values():
                file.abandon()
            raise
        return {
            "partition": partition,
            "files": {split: [files[split].name, rows] for split, rows in groups.items() if rows},
            "widths": {tensor.name: tensor.width for tensor in tensors},
            "problems": [[problem.column, problem.kind, rows] for problem, rows in problems.items()],
        }


def stored(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors that are written: the indicator of the split is not."""
    return [tensor for tensor in tensors if tensor.name != "validation"]


def _decode(batch: pa.RecordBatch, tensors: list[Tensor], problems: Counter[Problem]) -> tuple[Block, list[Tensor]]:
    """Decode a batch; the first rows seen decide the widths that were open."""
    block: Block = {}
    known = []
    for array, tensor in zip(batch.columns, tensors, strict=True):
        values = decode(array, tensor, problems)
        if values is not None:
            block[tensor.name] = values
            if tensor.form != "scalar" and tensor.width is None:
                tensor = replace(tensor, width=values.shape[1])
        known.append(tensor)
    return block, known


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
    blocks: list[Block] = field(default_factory=list)
    held: int = 0
    groups: list[int] = field(default_factory=list)
    chunks: int = 0

    def __post_init__(self) -> None:
        self.name = f"data/{self.split}-{self.partition:05d}-{uuid.uuid4().hex}.parquet"
        self.group = group_rows(self.tensors)
        self.sink = self.run.fs.open(self.run.path(self.name), "wb")
        # Packed floats neither repeat nor compress enough to pay for a dictionary or a codec.
        self.parquet = pq.ParquetWriter(
            self.sink, _schema(self.tensors), compression="none", use_dictionary=False, write_statistics=False
        )

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
        columns = [_pack(chunk[t.name][:rows] if order is None else chunk[t.name][order]) for t in self.tensors]
        table = pa.Table.from_arrays(columns, schema=_schema(self.tensors))
        self.parquet.write_table(table, row_group_size=self.group)
        self.groups += [min(self.group, rows - start) for start in range(0, rows, self.group)]
        self.chunks += 1


def _schema(tensors: list[Tensor]) -> pa.Schema:
    return pa.schema([pa.field(t.name, _arrow_type(t), nullable=False) for t in tensors])


def _arrow_type(tensor: Tensor) -> pa.DataType:
    dtype = np.dtype(tensor.dtype)
    if tensor.form == "scalar":
        return pa.from_numpy_dtype(dtype)
    return pa.binary(dtype.itemsize * int(np.prod(tensor.shape)))


def _pack(block: np.ndarray) -> pa.Array:
    """A block as an Arrow array, shape ``(rows, width)`` as one fixed-size binary value per row."""
    if block.ndim == 1:
        return pa.array(block)
    block = np.ascontiguousarray(block)
    kind = pa.binary(block.dtype.itemsize * block.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(block), [None, pa.py_buffer(block)])
