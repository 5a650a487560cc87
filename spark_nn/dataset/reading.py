"""Petastorm's workers: how row groups are read, and what of them is kept on the local disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spark_nn.columns import Tensor
from spark_nn.dataset import petastorm_compat
from spark_nn.dataset.manifest import Group, Split
from spark_nn.dataset.writer import unpack
from spark_nn.errors import StoreError
from spark_nn.store import RunDir, is_lasting

_DISK_LIMIT = 1 << 40  # bytes: the disk sets the limit, not the cache


def disk_cache(scratch: Path | None, split: Split) -> Any:
    """Petastorm's cache of bytes on the local disk."""
    if scratch is None:
        raise ValueError("a cache on disk needs a scratch folder")
    cache = petastorm_compat.load().LocalDiskCache
    return cache(str(scratch / f"cache-{split}"), _DISK_LIMIT, 0, eviction_policy="none")


@dataclass
class Reading:
    """What the threads of a stream's pools share."""

    run: RunDir
    tensors: Sequence[Tensor]
    disk: Any

    def __post_init__(self) -> None:
        self.names = [tensor.name for tensor in self.tensors]
        self.footers: dict[str, pq.FileMetaData] = {}
        # Local files are read by Arrow itself, without the interpreter.
        self.local = "file" in self.run.fs.protocol

    def open(self, file: str) -> pq.ParquetFile:
        """Open a file, reading its footer the first time only."""
        path = self.run.path(file)
        source = path if self.local else self.run.fs.open(path, "rb", cache_type="none")
        parquet = pq.ParquetFile(source, metadata=self.footers.get(file), memory_map=False, pre_buffer=not self.local)
        self.footers[file] = parquet.metadata
        return parquet

    def close(self) -> None:
        """Remove what is on the local disk."""
        if self.disk is not None:
            self.disk.cleanup()


class GroupReader:
    """Petastorm's worker protocol: read row groups, publish NumPy blocks. One per thread of the pool."""

    def __init__(self, worker_id: int, publish_func: Callable[[Any], None], reading: Reading) -> None:
        self.worker_id = worker_id
        self.publish_func = publish_func
        self.reading = reading
        self.file = ""
        self.parquet: pq.ParquetFile | None = None

    def process(self, group: Group, start: int, stop: int) -> None:
        """Read rows `start` to `stop` of a row group and publish them."""
        disk = self.reading.disk
        if disk is None:
            table = self._table(group)
        else:
            # As plain bytes, which the cache stores as they are: nothing is ever unpickled.
            stored = disk.get(f"{group.file}:{group.index}", lambda: _to_bytes(self._table(group)))
            table = pa.ipc.open_stream(stored).read_all()
        tensors = self.reading.tensors
        self.publish_func({each.name: unpack(table.column(each.name), each)[start:stop] for each in tensors})

    def shutdown(self) -> None:
        """Close the file that is open."""
        if self.parquet is not None:
            self.parquet.close(force=True)
            self.parquet = None

    def _table(self, group: Group) -> pa.Table:
        try:
            return self._read(group)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"cannot read {group.file!r} in the store, {self.reading.run.url}: {error}; look at what serves it",
                transient=not is_lasting(error),
            ) from error

    def _read(self, group: Group) -> pa.Table:
        if self.parquet is None or self.file != group.file:
            self.shutdown()
            self.parquet, self.file = self.reading.open(group.file), group.file
        return self.parquet.read_row_group(group.index, columns=self.reading.names, use_threads=False)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]
