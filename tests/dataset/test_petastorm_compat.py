from __future__ import annotations

import importlib.metadata
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_nn.dataset import petastorm_compat as compat
from spark_nn.errors import DatasetError

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parents[2]
ROWS = 1_000


def in_fresh_interpreter(code: str) -> str:
    """Run `code` where nothing was imported yet, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(first: int, stop: int) -> pa.Table:
    ids = np.arange(first, stop)
    return pa.table(
        {
            "id": ids,
            "features": pa.array([[i, i / 4, -i] for i in ids.tolist()], pa.list_(pa.float32())),
            "name": [f"row {i}" for i in ids],
        }
    )


def write(directory: Path, files: int = 4, row_group_size: int = 37) -> str:
    """Write ROWS rows into `files` files and return the dataset's URL."""
    bounds = np.linspace(0, ROWS, files + 1).astype(int).tolist()
    directory.mkdir(exist_ok=True)
    for part, (first, stop) in enumerate(itertools.pairwise(bounds)):
        pq.write_table(table(first, stop), directory / f"part-{part}.parquet", row_group_size=row_group_size)
    (directory / "_SUCCESS").touch()
    return directory.as_uri()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return write(tmp_path / "data")


def read(url, **options) -> dict[str, np.ndarray]:
    """Read a whole dataset with Petastorm's own reader."""
    compat.install()
    from petastorm import make_batch_reader

    with make_batch_reader(url, **options) as reader:
        batches = [batch._asdict() for batch in reader]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# --- The layer is not felt by anybody else ---


def test_importing_the_module_imports_neither_petastorm_nor_tensorflow() -> None:
    printed = in_fresh_interpreter(
        "import sys, spark_nn.dataset.petastorm_compat as compat\n"
        "roots = lambda: {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(roots() & {'petastorm', 'tensorflow', 'pyspark', 'pandas', 'torch'}))\n"
        "compat.install()\n"
        "print(sorted(roots() & {'petastorm', 'tensorflow', 'pyspark', 'pandas', 'torch'}))\n"
    )
    assert printed == "[]\n[]\n"


def test_numpy_and_pyarrow_stay_as_they_are_and_tensorflow_is_not_imported() -> None:
    printed = in_fresh_interpreter(
        "import sys, numpy, pyarrow, pyarrow.parquet, pyarrow.dataset, pyarrow.compute\n"
        "modules = (numpy, pyarrow, pyarrow.parquet)\n"
        "before = [dict(vars(module)) for module in modules]\n"
        "from spark_nn.dataset import petastorm_compat\n"
        "petastorm_compat.install()\n"
        "import petastorm, petastorm.reader, petastorm.arrow_reader_worker, petastorm.local_disk_cache\n"
        "import petastorm.cache, petastorm.etl.dataset_metadata, petastorm.workers_pool.thread_pool\n"
        "import petastorm.workers_pool.ventilator, petastorm.workers_pool.worker_base\n"
        "print([dict(vars(module)) == old for module, old in zip(modules, before)])\n"
        "print([hasattr(numpy, name) for name in ('unicode_', 'string_', 'float')])\n"
        "print([name in sys.modules for name in ('pyarrow.filesystem', 'pyarrow.hdfs', 'tensorflow')])\n"
        "from petastorm import unischema\n"
        "print(unischema.np.unicode_ is numpy.str_, unischema.np.ndarray is numpy.ndarray)\n"
    )
    assert printed == "[True, True, True]\n[False, False, False]\n[False, False, False]\nTrue True\n"


def test_install_can_be_repeated_from_any_thread() -> None:
    threads = [threading.Thread(target=compat.install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compat.install()
    assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
    assert compat.load() == compat.load()
    assert compat.load().ThreadPool is compat.thread_pool_class()
    assert not hasattr(np, "unicode_")


def test_an_import_that_failed_before_the_layer_was_there_does_no_harm(tmp_path: Path) -> None:
    printed = in_fresh_interpreter(
        "import sys\n"
        "try:\n    import petastorm\n"
        "except ImportError:\n    print('petastorm.arrow_reader_worker' in sys.modules)\n"
        "from spark_nn.dataset import petastorm_compat\n"
        "petastorm_compat.install()\n"
        "from petastorm import make_batch_reader\n"
        f"with make_batch_reader({write(tmp_path / 'data')!r}) as reader:\n"
        "    print(sum(len(batch.id) for batch in reader))\n"
    )
    assert printed == f"True\n{ROWS}\n"


def test_petastorm_imported_by_other_means_is_refused() -> None:
    printed = in_fresh_interpreter(
        "import sys, types\n"
        "from spark_nn.dataset import petastorm_compat\n"
        "sys.modules['petastorm'] = types.ModuleType('petastorm')\n"
        "try:\n    petastorm_compat.install()\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert "before the first import of petastorm" in printed


def test_another_version_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.12.1")
    with pytest.raises(ImportError, match=r"0\.13\.1.*0\.12\.1.*pip install petastorm==0\.13\.1"):
        compat.install()
    with pytest.raises(ImportError, match=r"0\.12\.1"):
        compat.load()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"found none.*pip install"):
        compat.install()


# --- Reading ---


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_exactly_the_rows_written_are_read_in_their_order(url: str, workers: int) -> None:
    rows = read(url, workers_count=workers, shuffle_row_groups=False)
    assert rows["id"].dtype == np.int64
    assert rows["id"].tolist() == list(range(ROWS))
    assert rows["features"].dtype == np.float32
    np.testing.assert_array_equal(rows["features"], np.outer(np.arange(ROWS), [1, 0.25, -1]).astype("float32"))
    assert rows["name"].tolist() == [f"row {i}" for i in range(ROWS)]


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle_rows": True},
        {"shuffle_row_groups": True, "seed": 7},
        {"convert_early_to_numpy": True},
        {"shuffle_row_drop_partitions": 2},
        {"schema_fields": ["id"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_stock_reader_keep_every_row(url: str, options: dict[str, object]) -> None:
    assert sorted(read(url, workers_count=2, **options)["id"]) == list(range(ROWS))


def test_local_disk_cache(url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache = {"cache_type": "local-disk", "cache_size_limit": 10**8, "cache_row_size_estimate": 100}
    rows = read(url, num_epochs=2, cache_location=str(tmp_path / "cache"), **cache)
    assert sorted(rows["id"]) == sorted([*range(ROWS), *range(ROWS)])
    assert capfd.readouterr().out == ""


def test_a_list_of_files(url: str) -> None:
    rows = read([f"{url}/part-1.parquet", f"{url}/part-3.parquet"])
    assert sorted(rows["id"]) == [*range(250, 500), *range(750, 1000)]


def test_any_fsspec_filesystem() -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/bucket/data/part-0.parquet", "wb") as file:
        pq.write_table(table(0, 100), file, row_group_size=30)
    try:
        assert read("memory://bucket/data", shuffle_row_groups=False)["id"].tolist() == list(range(100))
    finally:
        memory.rm("/bucket", recursive=True)


def test_hive_partitions_become_columns(tmp_path: Path) -> None:
    # The dataset's own place looks like a partition, and is none.
    data = tmp_path / "run=3"
    for year in (2024, 2025):
        for city in ("Aix", "New York", None):
            name = "__HIVE_DEFAULT_PARTITION__" if city is None else city.replace(" ", "%20")
            directory = data / f"year={year}" / f"city={name}"
            directory.mkdir(parents=True)
            pq.write_table(pa.table({"id": [year, year + 1]}), directory / "part.parquet")

    rows = read(f"file://{data}")
    assert set(rows) == {"year", "city", "id"}
    assert rows["year"].dtype == np.int64
    assert sorted(zip(rows["year"], rows["city"], rows["id"], strict=True)) == [
        (year, city, year + i) for year in (2024, 2025) for city in ("Aix", "New York", "None") for i in (0, 1)
    ]
    assert set(read(f"file://{data}", schema_fields=["year"])["year"]) == {2024, 2025}


def test_a_predicate_on_the_partition_column(tmp_path: Path) -> None:
    compat.install()
    from petastorm.predicates import in_lambda

    for key in (1, 2, 10):
        (tmp_path / f"key={key}").mkdir()
        pq.write_table(pa.table({"id": [key * 100]}), tmp_path / f"key={key}" / "part.parquet")
    rows = read(tmp_path.as_uri(), predicate=in_lambda(["key"], lambda key: key != 2))
    assert sorted(rows["id"]) == [100, 1000]


def test_the_old_interface_of_a_dataset(tmp_path: Path) -> None:
    write(tmp_path, files=2)
    compat.install()
    from petastorm.reader import pq as patched

    dataset = patched.ParquetDataset(str(tmp_path), validate_schema=False, metadata_nthreads=10)
    assert patched.read_metadata is pq.read_metadata
    assert dataset.paths == str(tmp_path)
    assert [Path(piece.path).name for piece in dataset.pieces] == ["part-0.parquet", "part-1.parquet"]
    assert dataset.pieces[0].get_metadata().num_row_groups == 14
    assert dataset.schema.names == ["id", "features", "name"]
    assert (dataset.metadata, dataset.common_metadata, list(dataset.partitions)) == (None, None, [])
    whole = dataset.pieces[1].read(["id"], dataset.partitions)
    assert whole.column("id").to_pylist() == list(range(500, ROWS))
    piece = patched.ParquetDatasetPiece(dataset.pieces[1].path, dataset.fs.open, row_group=1)
    assert piece.read(["id"], dataset.partitions).column("id").to_pylist() == list(range(537, 574))


def test_reading_into_tensorflow(url: str) -> None:
    pytest.importorskip("tensorflow")
    printed = in_fresh_interpreter(
        "from spark_nn.dataset import petastorm_compat\n"
        "petastorm_compat.install()\n"
        "from petastorm import make_batch_reader, tf_utils\n"
        f"with make_batch_reader({url!r}, schema_fields=['id', 'name', 'features']) as reader:\n"
        "    batches = list(tf_utils.make_petastorm_dataset(reader).as_numpy_iterator())\n"
        "print(sum(int(batch.id.sum()) for batch in batches), batches[0].features.shape[1])\n"
    )
    assert printed == f"{ROWS * (ROWS - 1) // 2} 3\n"


def test_what_cannot_work_says_so(url: str, tmp_path: Path) -> None:
    compat.install()
    from petastorm.hdfs.namenode import HdfsConnector

    with pytest.raises(DatasetError, match="use threads"):
        read(url, reader_pool_type="process")
    with pytest.raises(DatasetError, match="filter the rows"):
        read(url, filters=[("id", "<", 10)])
    with pytest.raises(DatasetError, match="fsspec"):
        HdfsConnector._try_next_namenode(0, ["namenode:8020"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"empty holds no Parquet files"):
        read((tmp_path / "empty").as_uri())


# --- A dataset cannot run code ---


class Payload:
    """Unpickles into a call that Petastorm's own allow-list lets through."""

    def __init__(self, marker: Path) -> None:
        self.code = f"open({str(marker)!r}, 'w').close()"

    def __reduce__(self):
        return eval, (self.code,)


@pytest.mark.parametrize("key", ["unischema", "rowgroups_index"])
@pytest.mark.parametrize("file", ["_common_metadata", "_metadata"])
def test_a_pickled_schema_is_refused_and_its_payload_never_runs(tmp_path: Path, key: str, file: str) -> None:
    compat.install()
    from petastorm import make_batch_reader, make_reader
    from petastorm.etl import dataset_metadata, legacy, rowgroup_indexing

    marker = tmp_path / "marker"
    pickled = pickle.dumps(Payload(marker))
    pickle.loads(pickled)
    assert marker.exists(), "the payload is live"
    marker.unlink()

    data = tmp_path / "data"
    url = write(data)
    schema = table(0, 1).schema.with_metadata({f"dataset-toolkit.{key}.v1": pickled})
    pq.write_metadata(schema, data / file)
    if file == "_common_metadata":
        dataset = dataset_metadata.pq.ParquetDataset(str(data))
        for opens in (
            lambda: make_batch_reader(url),
            lambda: make_reader(url),
            lambda: dataset_metadata.get_schema(dataset),
            lambda: rowgroup_indexing.get_row_group_indexes(dataset),
        ):
            with pytest.raises(DatasetError, match=r"data/_common_metadata holds a pickled"):
                opens()
    else:
        with pytest.raises(DatasetError, match=r"data/_metadata holds a pickled"):
            make_batch_reader(url)
    for unpickle in (legacy.restricted_loads, rowgroup_indexing.depickle_legacy_package_name_compatible):
        with pytest.raises(DatasetError, match="can run any code"):
            unpickle(pickled)
    assert not marker.exists()


def test_a_summary_without_pickles_is_used(tmp_path: Path) -> None:
    url = write(tmp_path, files=2, row_group_size=100)
    footers = []
    for path in sorted(tmp_path.glob("*.parquet")):
        footers.append(pq.read_metadata(path))
        footers[-1].set_file_path(path.name)
    footers[0].append_row_groups(footers[1])
    footers[0].write_metadata_file(tmp_path / "_metadata")
    assert read(url, shuffle_row_groups=False)["id"].tolist() == list(range(ROWS))


# --- The thread pool ---


@pytest.fixture
def petastorm() -> compat.Petastorm:
    return compat.load()


def echo_worker(process=None):
    """Return a worker class whose workers publish the items they get, or what `process` makes of them."""

    class Echo(compat.load().WorkerBase):
        def process(self, item):
            if process is None:
                self.publish_func(item)
            else:
                process(item, self.publish_func)

    return Echo


def collect(pool) -> list[int]:
    results = []
    while True:
        try:
            results.append(pool.get_results())
        except compat.load().EmptyResultError:
            return results


def run(pool, worker_class, ventilator) -> list[int]:
    pool.start(worker_class, ventilator=ventilator)
    try:
        return collect(pool)
    finally:
        pool.stop()
        pool.join()


def paused_ventilator(pool, items: int, *, answer_first: bool):
    """Return a ventilator whose thread is suspended until the consumer asks whether it has completed.

    It then runs to its end, either after the answer was found or before: the two places at which the
    operating system may have suspended the consumer.
    """

    class Paused(compat.load().ConcurrentVentilator):
        go = threading.Event()

        def _ventilate(self):
            self.go.wait()
            super()._ventilate()

        def completed(self):
            if threading.current_thread() is self._ventilation_thread or self.go.is_set():
                return super().completed()
            answer = super().completed()
            self.go.set()
            self._ventilation_thread.join()
            return answer if answer_first else super().completed()

    return Paused(pool.ventilate, [{"item": item} for item in range(items)])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_stock_pool_loses_what_is_ventilated_between_its_two_questions_and_ours_does_not(workers) -> None:
    ours = compat.thread_pool_class()
    from petastorm.workers_pool.thread_pool import ThreadPool as Stock

    assert issubclass(ours, Stock)
    lost = Stock(workers)
    assert run(lost, echo_worker(), paused_ventilator(lost, 10, answer_first=False)) == []
    pool = ours(workers)
    assert run(pool, echo_worker(), paused_ventilator(pool, 10, answer_first=False)) == list(range(10))


def test_nothing_is_lost_when_ventilation_ends_after_the_question(petastorm: compat.Petastorm) -> None:
    pool = petastorm.ThreadPool(2)
    assert run(pool, echo_worker(), paused_ventilator(pool, 10, answer_first=True)) == list(range(10))


def test_results_come_in_the_order_of_ventilation_however_slow_anybody_is(
    petastorm: compat.Petastorm,
) -> None:
    def process(item, publish):
        time.sleep(0.004 * (item % 4 == 0))
        for part in range(item % 3):
            publish((item, part))

    class Hesitant(petastorm.ConcurrentVentilator):
        def _ventilate(self):
            ventilate = self._ventilate_fn

            def hesitate(item):
                time.sleep(0.003 * (item % 5 == 0))
                ventilate(item)

            self._ventilate_fn = hesitate
            super()._ventilate()

    pool = petastorm.ThreadPool(3)
    ventilator = Hesitant(pool.ventilate, [{"item": item} for item in range(40)], iterations=2)
    once = [(item, part) for item in range(40) for part in range(item % 3)]
    assert run(pool, echo_worker(process), ventilator) == once + once


def test_nothing_to_ventilate(petastorm: compat.Petastorm) -> None:
    pool = petastorm.ThreadPool(2)
    assert run(pool, echo_worker(), petastorm.ConcurrentVentilator(pool.ventilate, [])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_hundreds_of_reads_of_many_row_groups_lose_no_row(petastorm, tmp_path: Path, workers: int) -> None:
    # With the stock pool, every third such read lost rows.
    write(tmp_path, files=1, row_group_size=20)
    file = tmp_path / "part-0.parquet"

    def process(item, publish):
        with pq.ParquetFile(file) as parquet:
            publish(parquet.read_row_group(item, columns=["id"]).column("id").to_pylist())

    items = [{"item": row_group} for row_group in range(50)]
    for _ in range(100):
        pool = petastorm.ThreadPool(workers)
        ventilator = petastorm.ConcurrentVentilator(pool.ventilate, items)
        blocks = run(pool, echo_worker(process), ventilator)
        assert list(itertools.chain(*blocks)) == list(range(ROWS))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stock_reader_has_the_pool_that_loses_no_row(tmp_path: Path, workers: int) -> None:
    url = write(tmp_path / "data", files=1, row_group_size=20)
    sums = [int(read(url, workers_count=workers, schema_fields=["id"])["id"].sum()) for _ in range(20)]
    assert sums == [ROWS * (ROWS - 1) // 2] * 20


def test_runs_of_a_thousand_items_lose_none(petastorm: compat.Petastorm) -> None:
    items = [{"item": item} for item in range(1_000)]
    for _ in range(50):
        pool = petastorm.ThreadPool(2)
        ventilator = petastorm.ConcurrentVentilator(pool.ventilate, items)
        assert run(pool, echo_worker(), ventilator) == list(range(1_000))


def test_an_error_comes_in_its_place_with_its_traceback_and_not_on_stderr(
    petastorm: compat.Petastorm, capfd: pytest.CaptureFixture[str]
) -> None:
    def stumble(item, publish):
        if item == 5:
            raise KeyError("stumbled")
        publish(item)

    pool = petastorm.ThreadPool(2)
    pool.start(echo_worker(stumble))
    for item in range(10):
        pool.ventilate(item)
    assert [pool.get_results() for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="stumbled") as caught:
        pool.get_results()
    assert "stumble" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RuntimeError, match="stopped"):
        pool.get_results()


def test_a_worker_that_exits_is_an_error_and_not_a_hang(petastorm: compat.Petastorm) -> None:
    def leave(item, publish):
        sys.exit(3)

    pool = petastorm.ThreadPool(1)
    pool.start(echo_worker(leave))
    pool.ventilate(0)
    with pytest.raises(SystemExit):
        pool.get_results()


def test_two_workers_may_fail_at_once_one_of_them_with_its_queue_full(petastorm: compat.Petastorm) -> None:
    full = threading.Event()

    def process(item, publish):
        if item == 1:
            for part in range(5):
                publish(part)
            full.set()
        else:
            full.wait()
        raise ValueError(item)

    pool = petastorm.ThreadPool(2, results_queue_size=10)
    pool.start(echo_worker(process))
    pool.ventilate(0)
    pool.ventilate(1)
    with pytest.raises(ValueError, match="0"):
        pool.get_results()


def test_stopping_the_pool_wakes_whoever_waits_for_results(petastorm: compat.Petastorm) -> None:
    release, waiting, outcome = threading.Event(), threading.Event(), []

    def process(item, publish):
        waiting.set()
        release.wait()

    def consume():
        try:
            outcome.append(pool.get_results())
        except RuntimeError as error:
            outcome.append(error)

    pool = petastorm.ThreadPool(1)
    pool.start(echo_worker(process))
    pool.ventilate(0)
    consumer = threading.Thread(target=consume)
    consumer.start()
    waiting.wait()
    pool.stop()
    consumer.join(timeout=10)
    release.set()
    pool.join()
    assert not consumer.is_alive()
    assert [str(error) for error in outcome] == ["The reader was stopped while its results were awaited"]
    assert not isinstance(outcome[0], petastorm.EmptyResultError)
