"""Petastorm 0.13.1 on today's pyarrow, NumPy and pandas; nothing else in spark_nn knows that it needs help.

Petastorm was written for pyarrow up to 14 and NumPy 1. :func:`install` hooks the import of Petastorm's own
modules, and of no others: their ``import`` statements find stand-ins for what has gone, and the few places
that lose rows or run code found in a dataset are replaced. Neither ``sys.modules`` nor pyarrow nor NumPy is
touched, so no other library can tell that the layer is there, and modules that Petastorm loads late
(``petastorm.tf_utils``, which needs TensorFlow) are served like the rest.

What works is reading plain Parquet from any fsspec filesystem with the thread pool. What does not says so:
pickled schemas and indexes, the process pool, Petastorm's own HDFS client, filters.
"""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, NoReturn

import fsspec
import numpy as np
import packaging.version
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from spark_nn.errors import DatasetError

__all__ = ["Petastorm", "install", "load", "thread_pool_class"]

_WANTED = "0.13.1"
_PICKLED_KEYS = (b"dataset-toolkit.unischema.v1", b"dataset-toolkit.rowgroups_index.v1")
_NO_PICKLES = (
    "holds a pickled Petastorm schema or index, and reading one can run any code: "
    "spark_nn reads plain Parquet only, without Petastorm's metadata"
)
_JOIN_S = 5.0
_STOP_CHECK_S = 0.02  # how often whoever waits looks whether the pool was stopped
_VENTILATION_CHECK_S = 0.001  # how often an idle consumer looks for new work

_install_lock = threading.Lock()


@dataclass(frozen=True)
class Petastorm:
    """The pieces of Petastorm that spark_nn builds on."""

    ThreadPool: type[Any]
    ConcurrentVentilator: type[Any]
    WorkerBase: type[Any]
    EmptyResultError: type[Exception]
    LocalDiskCache: type[Any]


def install() -> None:
    """Make ``import petastorm`` work in this interpreter, from now on.

    Imports nothing of Petastorm itself; may be called any number of times, from any thread.

    Raises
    ------
    ImportError
        If Petastorm is missing, of another version, or was imported before the layer was there.
    """
    try:
        found = importlib.metadata.version("petastorm")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != _WANTED:
        cure = f"pip install petastorm=={_WANTED}"
        raise ImportError(f"spark_nn needs Petastorm {_WANTED}, found {found}: {cure}", name="petastorm")
    with _install_lock:
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        if "petastorm" in sys.modules:
            cure = "call spark_nn.dataset.petastorm_compat.install() before the first import of petastorm"
            raise ImportError(f"Petastorm was imported before it could be prepared: {cure}", name="petastorm")
        # An import of Petastorm that failed for want of the layer leaves some of its modules behind.
        for name in [name for name in list(sys.modules) if name.startswith("petastorm.")]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())


def load() -> Petastorm:
    """Install the layer and return the pieces of Petastorm that spark_nn builds on."""
    pool = thread_pool_class()
    from petastorm.local_disk_cache import LocalDiskCache
    from petastorm.workers_pool import EmptyResultError
    from petastorm.workers_pool.ventilator import ConcurrentVentilator
    from petastorm.workers_pool.worker_base import WorkerBase

    return Petastorm(pool, ConcurrentVentilator, WorkerBase, EmptyResultError, LocalDiskCache)


def thread_pool_class() -> type[Any]:
    """Return ``RaceFreeThreadPool``: Petastorm's thread pool, but it neither loses nor reorders results.

    ``petastorm.make_batch_reader`` uses the same class.
    """
    install()
    from petastorm import reader

    pool: type[Any] = reader.ThreadPool
    return pool


# --- What Petastorm's modules see when they import anything ---


class _Finder(MetaPathFinder):
    """Finds Petastorm's modules where Python finds them, and leaves their loading to :class:`_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "petastorm":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module with builtins of its own, then repairs it."""

    def exec_module(self, module: ModuleType) -> None:
        # `exec` respects a `__builtins__` that is there, and the module's functions inherit it.
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": _import, "print": _log}
        super().exec_module(module)
        if repair := _REPAIRS.get(module.__name__):
            repair(module)


def _import(
    name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] | None = (), level: int = 0
) -> ModuleType:
    """Import as everybody does, but for the stand-ins."""
    if level == 0 and name in _STAND_INS:
        # `from a.b import c` asks for a.b, `import a.b` for a.
        return _STAND_INS[name if fromlist else name.partition(".")[0]]
    return builtins.__import__(name, globals, locals, fromlist or (), level)


def _log(*values: object, **_: object) -> None:
    """Stand in for ``print``: nobody reads the standard output of an executor."""
    logging.getLogger("petastorm").info(" ".join(map(str, values)))


def _refusing(why: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise DatasetError(why)

    return refuse


# --- The old interface of pyarrow.parquet, as far as Petastorm uses it ---


@dataclass(frozen=True)
class _PartitionLevel:
    """A hive partition column: its name, and its values, which pieces refer to by index."""

    name: str
    keys: list[Any]

    @property
    def dictionary(self) -> Any:
        return pa.array(self.keys)


class _Partitions(list[_PartitionLevel]):
    """The levels of a hive directory, outermost first."""

    @property
    def partition_names(self) -> set[str]:
        return {level.name for level in self}


@dataclass(frozen=True)
class ParquetDatasetPiece:
    """A Parquet file, or one row group of it."""

    path: str
    open_file_func: Callable[..., Any]
    row_group: int | None = None
    partition_keys: Sequence[tuple[str, int]] = ()

    def get_metadata(self) -> Any:
        """Return the file's footer."""
        with self.open_file_func(self.path) as file:
            return pq.read_metadata(file)

    def read(self, columns: Iterable[str], partitions: _Partitions) -> Any:
        """Return a table of `columns`, followed by the partition columns."""
        with self.open_file_func(self.path) as file, pq.ParquetFile(file) as parquet:
            groups = range(parquet.num_row_groups) if self.row_group is None else [self.row_group]
            table = parquet.read_row_groups(groups, columns=list(columns))
        for level, (name, index) in zip(partitions, self.partition_keys, strict=True):
            table = table.append_column(name, pa.repeat(level.dictionary[index], table.num_rows))
        # Petastorm takes the first chunk of every column where the first column has only one.
        return table.combine_chunks()


class ParquetDataset:
    """A directory of Parquet files, one file or a list of files, on an fsspec filesystem.

    It looks at the storage only when asked: Petastorm makes one per worker and needs little of most.
    """

    def __init__(
        self,
        path_or_paths: str | list[str],
        filesystem: Any = None,
        validate_schema: bool = False,
        metadata_nthreads: int = 1,
        filters: Any = None,
    ) -> None:
        if filters is not None:
            # Old pyarrow ignored them, without a word, on all but partition columns.
            raise DatasetError("Petastorm's filters are not supported: filter the rows before writing them")
        self.paths = path_or_paths
        self.fs = fsspec.filesystem("file") if filesystem is None else filesystem
        self.metadata_path = f"{path_or_paths}/_metadata"
        self.common_metadata_path = f"{path_or_paths}/_common_metadata"

    @functools.cached_property
    def metadata(self) -> Any:
        """The footer in ``_metadata``, if there is one."""
        return self._summary(self.metadata_path)

    @functools.cached_property
    def common_metadata(self) -> Any:
        """The footer in ``_common_metadata``, if there is one."""
        return self._summary(self.common_metadata_path)

    @functools.cached_property
    def schema(self) -> Any:
        """The Arrow schema of the first file."""
        return self.pieces[0].get_metadata().schema.to_arrow_schema()

    @functools.cached_property
    def partitions(self) -> _Partitions:
        """The hive partition columns."""
        values: dict[str, set[Any]] = {}
        for keys in self._files.values():
            for name, value in keys.items():
                values.setdefault(name, set()).add(value)
        # Spark writes null as a partition like any other; it comes last.
        keys_of = {name: sorted(found, key=lambda key: (key is None, key)) for name, found in values.items()}
        return _Partitions(_PartitionLevel(name, keys) for name, keys in keys_of.items())

    @functools.cached_property
    def pieces(self) -> list[ParquetDatasetPiece]:
        """The files, by path."""
        pieces = []
        for path, keys in self._files.items():
            indexes = [(level.name, level.keys.index(keys[level.name])) for level in self.partitions]
            pieces.append(ParquetDatasetPiece(path, self.fs.open, partition_keys=indexes))
        return pieces

    @functools.cached_property
    def _files(self) -> dict[str, dict[str, Any]]:
        import pyarrow.dataset as ds  # brings pandas along: not before it is needed

        # A `key=value` above the dataset's own directory is none of its business.
        hive = "hive" if isinstance(self.paths, str) and self.fs.isdir(self.paths) else None
        dataset = ds.dataset(self.paths, format="parquet", filesystem=self.fs, partitioning=hive)
        found = dataset.get_fragments()
        files = {file.path: ds.get_partition_keys(file.partition_expression) for file in found}
        if not files:
            raise DatasetError(f"{self.paths} holds no Parquet files")
        return dict(sorted(files.items()))

    def _summary(self, path: str) -> Any:
        if not isinstance(self.paths, str) or not self.fs.exists(path):
            return None
        with self.fs.open(path) as file:
            footer = pq.read_metadata(file)
        if not set(_PICKLED_KEYS).isdisjoint(footer.metadata or ()):
            raise DatasetError(f"{path} {_NO_PICKLES}")
        return footer


def _stand_in(name: str, real: ModuleType | None = None, **names: object) -> ModuleType:
    """Return a module that shows `names` and, for all others, what the `real` one shows."""
    module = ModuleType(name)
    vars(module).update(names)
    if real is not None:
        vars(module)["__getattr__"] = functools.partial(getattr, real)
    return module


def _stand_ins() -> dict[str, ModuleType]:
    hdfs_gone = _refusing("Petastorm's HDFS client went with old pyarrow: pass an fsspec filesystem instead")
    filesystem = _stand_in("pyarrow.filesystem", LocalFileSystem=LocalFileSystem)
    hdfs = _stand_in("pyarrow.hdfs", HadoopFileSystem=object, connect=hdfs_gone)
    parquet = _stand_in("pyarrow.parquet", pq, ParquetDataset=ParquetDataset, ParquetDatasetPiece=ParquetDatasetPiece)
    arrow = _stand_in(
        "pyarrow",
        pa,
        filesystem=filesystem,
        hdfs=hdfs,
        parquet=parquet,
        localfs=fsspec.filesystem("file"),
        LocalFileSystem=LocalFileSystem,
    )
    # `float` went with NumPy 1.24, `string_` and `unicode_` with 2.0, `in1d` with 2.4.
    numpy = _stand_in("numpy", np, float=float, string_=np.bytes_, unicode_=np.str_, in1d=np.isin)
    # Gone with Python 3.12, after which it is there or not depending on setuptools.
    distutils = _stand_in("distutils.version", LooseVersion=packaging.version.Version)
    return {module.__name__: module for module in (filesystem, hdfs, parquet, arrow, numpy, distutils)}


_STAND_INS = _stand_ins()


# --- Repairs of Petastorm's own code ---


def _refuse_pickles(legacy: Any) -> None:
    # Everything that Petastorm unpickles from a dataset passes here; its allow-list allows `builtins.eval`.
    legacy.RestrictedUnpickler.load = _refusing(f"The dataset {_NO_PICKLES}")


def _calm_threads(thread_pool: Any) -> None:
    # Petastorm's idle threads wake up every millisecond, which costs up to a tenth of a core.
    thread_pool.IO_TIMEOUT_INTERVAL_S = _STOP_CHECK_S


def _replace_pools(reader: Any) -> None:
    reader.ThreadPool = _race_free(reader.ThreadPool)
    reader.ProcessPool = _refusing(
        "Petastorm's process pool unpickles from sockets, in interpreters that lack the layer: use threads"
    )


_REPAIRS: dict[str, Callable[[Any], None]] = {
    "petastorm.etl.legacy": _refuse_pickles,
    "petastorm.workers_pool.thread_pool": _calm_threads,
    "petastorm.reader": _replace_pools,
}


def _race_free(stock: Any) -> type[Any]:
    """Derive the pool that loses nothing from Petastorm's thread pool."""
    from petastorm.workers_pool import EmptyResultError, VentilatedItemProcessedMessage
    from petastorm.workers_pool.thread_pool import WorkerTerminationRequested

    class RaceFreeThreadPool(stock):  # type: ignore[misc]
        """A thread pool that hands out every result, in the order in which the items were ventilated.

        One thread ventilates, one collects.
        """

        _get_results_worker_id: int
        # Seconds that `get_results` waits for a result; None for as long as it takes.
        patience: float | None = None

        def start(self, worker_class: Any, worker_args: Any = None, ventilator: Any = None) -> None:
            """Start the workers, then the ventilator."""

            def make_worker(worker_id: int, publish: Callable[[Any], None], args: Any) -> Any:
                worker = worker_class(worker_id, publish, args)
                process = worker.process

                def process_or_report(*args: Any, **kwargs: Any) -> None:
                    try:
                        process(*args, **kwargs)
                    except WorkerTerminationRequested:
                        raise
                    except BaseException as error:  # noqa: BLE001 - get_results raises it
                        # The stock thread would print it, then wait for room in its queue and be deaf to
                        # stop(), or die without a word if it were no Exception.
                        publish(error)

                worker.process = process_or_report
                return worker

            super().start(make_worker, worker_args, ventilator)

        def join(self) -> None:
            """Wait for the workers, where `patience` is limited not for long: one of them may hang in a read."""
            until = None if self.patience is None else time.monotonic() + min(self.patience, _JOIN_S)
            for worker in self._workers:
                worker.join(None if until is None else max(0.0, until - time.monotonic()))

        def get_results(self) -> Any:
            """Return the next result, or raise the error that a worker met in its place.

            Raises
            ------
            EmptyResultError
                When all items were ventilated and all of their results handed out.
            TimeoutError
                When none came within `patience`.
            RuntimeError
                When the pool was stopped before that.
            """
            until = None if self.patience is None else time.monotonic() + self.patience
            while not self._stop_event.is_set():
                if until is not None and time.monotonic() > until:
                    raise TimeoutError(f"no result came within {self.patience:g} s")
                # Asked BEFORE the counters are compared. The other way round, as in the stock pool, the last
                # items may be ventilated in between, and their rows are lost.
                all_ventilated = self._ventilator is None or self._ventilator.completed()
                worker = self._get_results_worker_id
                if self.current_worker_done(worker):
                    # Workers are given items in turn and are heard in the same turn: if this one has none,
                    # none has. To pass it over, as in the stock pool, would break the order.
                    if all_ventilated:
                        raise EmptyResultError
                    time.sleep(_VENTILATION_CHECK_S)
                    continue
                try:
                    result = self._results_queues[worker].get(timeout=_STOP_CHECK_S)
                except queue.Empty:
                    continue
                if isinstance(result, BaseException):
                    self.stop()
                    self.join()
                    raise result
                if not isinstance(result, VentilatedItemProcessedMessage):
                    return result
                self._ventilated_items_processed_by_worker[worker] += 1
                self._get_results_worker_id = (worker + 1) % self.workers_count
                if self._ventilator is not None:
                    self._ventilator.processed_item()
            raise RuntimeError("The reader was stopped while its results were awaited")

    return RaceFreeThreadPool
