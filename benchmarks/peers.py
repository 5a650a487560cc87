"""What `stream.py` and `train.py` share: the rows, who writes and reads them, and a process for each measurement."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession

from spark_nn import columns
from spark_nn.dataset import petastorm_compat
from spark_nn.dataset.manifest import MANIFEST, Manifest
from spark_nn.dataset.materialize import Spec, materialize
from spark_nn.dataset.stream import Stream
from spark_nn.store import RunDir

FEATURES = 100
BATCH = 256
# Rows of a row group in the files that Spark writes; the 2 MB groups of the packed files hold about half as many.
GROUP_ROWS = 10_000


def session() -> SparkSession:
    """Spark on this machine."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False)
    spark = builder.config("spark.ui.showConsoleProgress", False).getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def note_peak(folder: str) -> None:
    """Note in a folder, from now on, how much more memory this process has held than it holds now (VmHWM), in MB."""
    noted = Path(folder) / f"peak-{os.getpid()}"

    def highest() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    def note(before: int) -> None:
        while True:
            noted.with_suffix(".new").write_text(f"{(highest() - before) / 2**20:.0f}")
            noted.with_suffix(".new").replace(noted)  # so that nobody reads half of it
            time.sleep(0.05)

    if not noted.exists():  # once for a process
        threading.Thread(target=note, args=(highest(),), daemon=True).start()
        while not noted.exists():
            time.sleep(0.01)


def peaks(folder: str) -> list[int]:
    """What processes have noted there, the largest first."""
    noted = [each for each in Path(folder).glob("peak-*") if not each.suffix]
    return sorted((int(each.read_text()) for each in noted), reverse=True)


def made(spark: SparkSession, rows: int, path: str) -> str:
    """Write rows as Spark does by default, an array of floats and a label each; return the path."""

    # Nested, so that it travels to Spark's Python workers by value: they do not find this file.
    def draw(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for batch in batches:
            seed = batch.column(0)[0].as_py()
            x = np.random.default_rng(seed).standard_normal((batch.num_rows, FEATURES), np.float32)
            offsets = pa.array(np.arange(0, x.size + 1, FEATURES, dtype=np.int32))
            lists = pa.ListArray.from_arrays(offsets, pa.array(x.reshape(-1)))
            yield pa.RecordBatch.from_arrays([lists, pa.array(x[:, 0] * x[:, 1] + x[:, 2])], ["features", "label"])

    df = spark.range(rows).mapInArrow(draw, "features array<float>, label float")
    df.write.option("parquet.block.row.count.limit", GROUP_ROWS).parquet(path)
    return path


def spec(df: DataFrame) -> Spec:
    """What a fit writes of the columns `features` and `label`."""
    tensors = (columns.features(df.schema, "featuresCol", ["features"]), columns.label(df.schema, "label"))
    return Spec(tensors, validationFraction=0.0, seed=1, shuffle=True, skip=False)


def written(df: DataFrame, url: str) -> None:
    """Write the rows as a fit does."""
    run = RunDir(url)
    run.mkdir("data")
    materialize(df, spec(df), run)


def opened(url: str, threads: int, cache: str) -> Stream:
    """The stream of what :func:`written` wrote."""
    run = RunDir(url)
    manifest = Manifest.fromDict(run.readJson(MANIFEST))
    return Stream(
        run, manifest, "train", rank=0, world=1, batch=BATCH, seed=1, shuffle=True, threads=threads, cache=cache
    )


def stock_reader(path: str, threads: int, epochs: int | None) -> Any:
    """Petastorm's own reader of plain Parquet, row groups shuffled.

    The layer that lets Petastorm run on today's pyarrow replaces the part of its thread pool that loses rows; all
    that reads and converts is Petastorm's own.
    """
    petastorm_compat.install()
    from petastorm import make_batch_reader

    return make_batch_reader(
        f"file://{path}",
        reader_pool_type="thread",
        workers_count=threads,
        shuffle_row_groups=True,
        num_epochs=epochs,
    )


def settle(folder: str) -> None:
    """Keep this process's temporary files in a folder."""
    tempfile.tempdir = folder


def apart(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Call a function in a fresh process, which shares neither memory nor warmed-up libraries with another call.

    Parameters
    ----------
    function : callable
        What to call.
    *arguments : object
        What to call it with.
    environment : mapping, optional
        The process's environment, where it is not this one's.
    """
    return together(function, [arguments], environment)[0]


def together(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], environment: Mapping[str, str] | None = None
) -> list[Any]:
    """Call a function several times at once, each time in a fresh process.

    Parameters
    ----------
    function : callable
        What to call.
    calls : sequence of tuple
        The arguments of each call.
    environment : mapping, optional
        The processes' environment, where it is not this one's.
    """
    kept = dict(os.environ)
    with contextlib.ExitStack() as stack:
        # Such a process ends without its exit handlers, and TensorFlow would leave files behind.
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in calls]
        context = multiprocessing.get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, context, settle, (folder,))) for folder in folders]
        try:
            os.environ.update(environment or {})
            waiting = [pool.submit(function, *call) for pool, call in zip(pools, calls, strict=True)]
            return [each.result() for each in waiting]
        finally:
            os.environ.clear()
            os.environ.update(kept)


def show(title: str, unit: str, rounds: Sequence[Mapping[str, float]], base: str) -> dict[str, float]:
    """Print the median of each line and its ratio to that of the line `base`; return the medians."""
    middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    width = max(map(len, middle)) + 2
    print(f"\n{title}, median of {len(rounds)}")
    print(f"{'':<{width}}{unit:>16}  ratio to {base}")
    for name, value in middle.items():
        print(f"{name:<{width}}{value:16,.2f}{value / middle[base]:10.2f}")
    return middle
