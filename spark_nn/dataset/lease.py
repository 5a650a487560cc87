"""Driver side: each dataset is written once, found again by its content, and removed when nothing uses it.

Whoever trains takes a lease. When the last lease of a dataset ends, it stays for a while, for the next fit may be on
the same rows (a grid in a Pipeline, a cell run again), and is then removed; at the latest when the interpreter ends.
What a driver that died has left, :func:`spark_nn.store.sweep` removes.

The same DataFrame is no proof of the same rows, since files and tables change. So a dataset is used again only where
a pass over the rows finds the fingerprint that was taken when it was written. That pass is made only where there is
a dataset that it could find.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spark_nn.dataset.manifest import MANIFEST, Manifest
from spark_nn.dataset.materialize import Spec, look, materialize
from spark_nn.errors import ParamError
from spark_nn.store import RunDir

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

IDLE_CONF = "spark.nn.datasetIdleSeconds"
_IDLE = 60.0


@dataclass(eq=False)
class Dataset:
    """A dataset in a store.

    Parameters
    ----------
    store : str
        The store's URL.
    spec : Spec
        What was written of each row.
    run : RunDir
        Its directory.
    manifest : Manifest
        What it holds.
    """

    store: str
    spec: Spec
    run: RunDir
    manifest: Manifest
    _leases: int = 0
    _leaving: bool = False
    _expiry: threading.Timer | None = field(default=None, repr=False)


class Shelf:
    """The datasets that this process has written and not yet removed; thread-safe."""

    def __init__(self) -> None:
        # Reentrant, as a garbage collection may end a lease in a thread that is in here.
        self._lock = threading.RLock()
        self._datasets: list[Dataset] = []
        self._turns: defaultdict[tuple[str, Spec], threading.Lock] = defaultdict(threading.Lock)

    @contextmanager
    def lease(self, dataset: DataFrame, spec: Spec, store: str) -> Iterator[Dataset]:
        """A dataset of the DataFrame's rows, written if there is none; it stays as long as the block runs.

        Parameters
        ----------
        dataset : pyspark.sql.DataFrame
            The rows.
        spec : Spec
            What is wanted of them.
        store : str
            URL of the store.
        """
        idle = _idle_seconds(dataset.sparkSession)
        with self._lock:
            turn = self._turns[store, spec]
        with turn:  # whoever comes second finds what the first has written
            leased = self._find(dataset, spec, store, idle) or self._write(dataset, spec, store)
        try:
            yield leased
        finally:
            self._release(leased, idle)

    def clear(self) -> None:
        """Remove the datasets that nobody has a lease of, now."""
        with self._lock:
            idle = [each for each in self._datasets if not each._leases]
        for each in idle:
            self._expire(each)

    def close(self) -> None:
        """Remove all datasets: the process ends."""
        with self._lock:
            left = list(self._datasets)
        for each in left:
            each.run.remove()

    def _find(self, dataset: DataFrame, spec: Spec, store: str, idle: float) -> Dataset | None:
        with self._lock:
            held = [each for each in self._datasets if not each._leaving]
            candidates = [each for each in held if (each.store, each.spec) == (store, spec)]
            for each in candidates:
                self._take(each)
        found = None
        try:
            # Somebody may have tidied up the store in the meantime.
            present = [each for each in candidates if each.run.read(MANIFEST) is not None]
            content = look(dataset, spec) if present else None
            found = next((each for each in present if each.manifest.content == content), None)
            idle = 0.0  # of those that hold other rows: they will hardly be asked for again
        finally:
            for each in candidates:
                if each is not found:
                    self._release(each, idle)
        return found

    def _write(self, dataset: DataFrame, spec: Spec, store: str) -> Dataset:
        run = RunDir.create(store, "data")
        try:
            manifest = materialize(dataset, spec, run)
        except BaseException:
            run.remove()
            raise
        written = Dataset(store, spec, run, manifest, _leases=1)
        with self._lock:
            self._datasets.append(written)
        return written

    def _take(self, each: Dataset) -> None:
        each._leases += 1
        if each._expiry is not None:
            each._expiry.cancel()
            each._expiry = None

    def _release(self, each: Dataset, idle: float) -> None:
        with self._lock:
            each._leases -= 1
            if each._leases:
                return
            if idle > 0:
                each._expiry = threading.Timer(idle, self._expire, (each,))
                each._expiry.daemon = True
                each._expiry.start()
                return
        self._expire(each)

    def _expire(self, each: Dataset) -> None:
        with self._lock:
            if each._leases or each._leaving:
                return
            each._leaving = True
            if each._expiry is not None:
                each._expiry.cancel()
        each.run.remove()
        with self._lock:  # not before it is gone: `close` would not know of it
            self._datasets.remove(each)


@functools.cache
def shelf() -> Shelf:
    """The shelf of this process; what is on it goes when the interpreter ends."""
    made = Shelf()
    atexit.register(made.close)
    return made


class Source:
    """A DataFrame as the fits of one call see it: written once for all of them that want the same of its rows.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        The rows, taken to be the same for all of the call's fits.
    """

    def __init__(self, dataset: DataFrame) -> None:
        self.dataset = dataset
        self._lock = threading.RLock()
        self._leased: dict[tuple[str, Spec], Dataset] = {}
        self._leases = ExitStack()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lease(self, spec: Spec, store: str) -> Dataset:
        """The dataset for a spec; the lease lasts until the source is closed."""
        with self._lock:
            if (store, spec) not in self._leased:
                lease = shelf().lease(self.dataset, spec, store)
                self._leased[store, spec] = self._leases.enter_context(lease)
            return self._leased[store, spec]

    def close(self) -> None:
        """End all leases."""
        with self._lock:
            self._leased.clear()
            self._leases.close()


def _idle_seconds(spark: SparkSession) -> float:
    value = spark.conf.get(IDLE_CONF, None)
    try:
        seconds = _IDLE if value is None else float(value)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ParamError(f"the Spark conf {IDLE_CONF}={value!r}: must be a number of seconds, 0 or more")
    return seconds
