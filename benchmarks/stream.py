"""How fast batches come from disk, in how much memory, and how long writing takes: `python benchmarks/stream.py`.

Three tables: rows per second of our stream and of its peers on the same rows, shuffled; the peak memory of a
stream on a dataset and on one an eighth its size; and the time to write the rows, from an array column and from a
Vector column, beside Spark's own writer. Every line is the median of three rounds, measured in turn after one that
does not count. Ratios travel between machines, rows per second do not. The data takes about 2.5 kB of temporary
disk per row.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers import BATCH, FEATURES, apart, made, opened, session, show, spec, stock_reader, written
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nn.dataset import petastorm_compat
from spark_nn.dataset.materialize import look
from spark_nn.dataset.plan import WINDOW_GROUPS
from spark_nn.doctor import requireJava

Block = dict[str, Any]

STOCK = "stock make_batch_reader"
SPARK = "Spark's writer"
FIRST, SECOND = "ours, memory, first epoch", "ours, memory, second epoch"


# --- Reading ---


def stock(path: str, threads: int) -> Iterator[Block]:
    """Stock Petastorm, the rows of each row group shuffled by NumPy."""
    draw = np.random.default_rng(1)
    with stock_reader(path, threads, epochs=1) as reader:
        for group in reader:
            yield from mixed({"features": group.features, "label": group.label}, len(group.label), draw)


def converter(df: DataFrame, folder: Path) -> Any:
    """Petastorm's Spark converter, which writes the rows its own way."""
    petastorm_compat.install()
    from petastorm.spark import SparkDatasetConverter, make_spark_converter

    df.sparkSession.conf.set(SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF, f"file://{folder}/converter")
    return make_spark_converter(df)


def converted(source: Any, threads: int) -> Iterator[Block]:
    """Its dataset for TensorFlow, which shuffles and batches single rows."""
    with source.make_tf_dataset(
        batch_size=BATCH, shuffling_queue_capacity=50_000, num_epochs=1, workers_count=threads
    ) as dataset:
        for batch in dataset:
            yield {"features": batch.features.numpy(), "label": batch.label.numpy()}


def arrow(path: str, unpack: Callable[[pa.Array], np.ndarray], threads: int) -> Iterator[Block]:
    """Pyarrow and NumPy, with the shuffling that ours does and nothing else: no plan, no ranks, no checks.

    Mapped files, one area for all windows and batches gathered one at a time are the fastest way that was found.
    """
    footers = {str(file): pq.read_metadata(file) for file in sorted(Path(path).rglob("*.parquet"))}
    groups = [(file, index) for file, footer in footers.items() for index in range(footer.num_row_groups)]
    room = WINDOW_GROUPS * max(footers[file].row_group(index).num_rows for file, index in groups)
    area = {"features": np.empty((room, FEATURES), np.float32), "label": np.empty(room, np.float32)}
    own = threading.local()  # a ParquetFile is not for two threads

    def read(file: str, index: int) -> Block:
        if file not in vars(own):
            vars(own)[file] = pq.ParquetFile(file, metadata=footers[file], memory_map=True)
        table = vars(own)[file].read_row_group(index, columns=["features", "label"], use_threads=False)
        pieces = [unpack(chunk) for chunk in table.column("features").chunks]
        features = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return {"features": features, "label": table.column("label").to_numpy()}

    draw = np.random.default_rng(1)
    filled = parts = 0
    for block in read_ahead(read, [groups[place] for place in draw.permutation(len(groups))], threads):
        rows = len(block["label"])
        for name, values in block.items():
            area[name][filled : filled + rows] = values
        filled += rows
        parts += 1
        if parts == WINDOW_GROUPS:
            yield from mixed(area, filled, draw)
            filled = parts = 0
    yield from mixed(area, filled, draw)


def read_ahead(read: Callable[..., Block], work: Iterable[tuple[Any, ...]], threads: int) -> Iterator[Block]:
    """The results in order; the next window is read while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Block]] = deque()
        for each in work:
            ahead.append(pool.submit(read, *each))
            if len(ahead) > WINDOW_GROUPS + threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def from_lists(column: pa.Array) -> np.ndarray:
    """The rows of a list column."""
    return column.flatten().to_numpy().reshape(-1, FEATURES)


def from_packed(column: pa.Array) -> np.ndarray:
    """The rows of a column of fixed-size binary values."""
    start = column.offset * FEATURES * 4
    return np.frombuffer(column.buffers()[1], np.float32, len(column) * FEATURES, start).reshape(-1, FEATURES)


def mixed(block: Block, rows: int, draw: np.random.Generator) -> Iterator[Block]:
    """Batches of the block's first rows in random order."""
    order = draw.permutation(rows)
    for start in range(0, rows, BATCH):
        chosen = order[start : start + BATCH]
        # Nothing is ever clipped, but checking the places costs a seventh of the time.
        yield {name: values.take(chosen, axis=0, mode="clip") for name, values in block.items()}


def ours(url: str, threads: int) -> Iterator[Block]:
    """An epoch of our stream, from disk."""
    stream = opened(url, threads, "none")
    yield from stream.epoch(0)
    stream.close()


def rate(batches: Iterable[Block], rows: int) -> float:
    """Thousand rows per second, from opening what is read to its last batch."""
    began = time.perf_counter()
    found = sum(len(batch["label"]) for batch in batches)
    spent = time.perf_counter() - began
    if found != rows:
        raise RuntimeError(f"{found:,} rows came of {rows:,}")
    return rows / 1000 / spent


def remembered(url: str, threads: int, rows: int) -> dict[str, float]:
    """Two epochs of our stream, the second from memory."""
    stream = opened(url, threads, "memory")
    rates = {name: rate(stream.epoch(number), rows) for number, name in enumerate((FIRST, SECOND))}
    stream.close()
    return rates


def reading(spark: SparkSession, source: str, url: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the table of rows per second."""
    rows, threads = arguments.rows, arguments.threads
    few = min(rows, arguments.slow_rows)
    petastorm = converter(spark.read.parquet(made(spark, few, f"{folder}/few")), folder)

    def once() -> dict[str, float]:
        return {
            STOCK: rate(stock(source, threads), rows),
            "stock Spark converter": rate(converted(petastorm, threads), few),
            "pyarrow, lists": rate(arrow(source, from_lists, threads), rows),
            "pyarrow, packed": rate(arrow(url.removeprefix("file://"), from_packed, threads), rows),
            "ours, from disk": rate(ours(url, threads), rows),
            **remembered(url, threads, rows),
        }

    once()
    rounds = [once() for _ in range(arguments.rounds)]
    title = f"Reading {rows:,} rows x {FEATURES} in batches of {BATCH}, shuffled, {threads} reading thread(s)"
    middle = show(title, "thousand rows/s", rounds, STOCK)
    print(f"second epoch from memory / first: {middle[SECOND] / middle[FIRST]:.2f}")
    petastorm.delete()


# --- Memory ---


def peak(url: str, threads: int) -> float:
    """Most MB that this process ever held in memory, after an epoch."""
    stream = opened(url, threads, "none")
    next(stream.epoch(0))  # whatever is imported late
    for _ in stream.epoch(1):
        pass
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def memory(urls: dict[str, str], arguments: argparse.Namespace) -> None:
    """Print the table of peaks, by number of rows."""
    rounds = [
        {name: apart(peak, url, arguments.threads) for name, url in urls.items()} for _ in range(arguments.rounds)
    ]
    small, large = urls
    middle = show("Peak memory of a process that streams an epoch from disk", "MB", rounds, small)
    print(f"growth: {100 * (middle[large] / middle[small] - 1):.1f} %")


# --- Writing ---


def saved(df: DataFrame, url: str) -> None:
    """Spark's own writer, the columns as they are."""
    df.select("features", "label").write.parquet(url)


def saved_as_arrays(df: DataFrame, url: str) -> None:
    """The same, with the Vector as an array of floats: what others than Spark can read."""
    saved(df.withColumn("features", vector_to_array("features", "float32")), url)


def looked(df: DataFrame, url: str) -> None:
    """Find out, by content, that the dataset at `url` holds the rows of `df`: what a fit does in place of writing."""
    if look(df, spec(df)) != opened(url, 1, "none").manifest.content:
        raise RuntimeError("the dataset was not recognised")


def seconds(way: Callable[[DataFrame, str], None], spark: SparkSession, source: str, target: Path) -> float:
    """How long writing takes, or looking; what was written goes."""
    df = spark.read.parquet(source)
    began = time.perf_counter()
    way(df, f"file://{target}")
    spent = time.perf_counter() - began
    shutil.rmtree(target, ignore_errors=True)
    return spent


def writing(spark: SparkSession, source: str, url: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the tables of seconds."""
    df = spark.read.parquet(source)
    vectors = f"{folder}/vectors"
    df.withColumn("features", array_to_vector(F.col("features").cast("array<double>"))).write.parquet(vectors)
    ways: dict[tuple[str, str], Callable[[], float]] = {
        (kind, name): partial(seconds, way, spark, path, folder / "target")
        for kind, path in (("an array", source), ("a Vector", vectors))
        for name, way in ((SPARK, saved), ("ours", written))
    }
    ways["a Vector", f"{SPARK}, as an array"] = partial(seconds, saved_as_arrays, spark, vectors, folder / "target")
    ways["an array", "ours, found again"] = partial(
        seconds, lambda df, _: looked(df, url), spark, source, folder / "target"
    )
    for way in ways.values():
        way()
    rounds = [{key: way() for key, way in ways.items()} for _ in range(arguments.rounds)]
    for kind in ("an array", "a Vector"):
        lines = [{name: spent for (of, name), spent in each.items() if of == kind} for each in rounds]
        show(f"Writing {arguments.rows:,} rows x {FEATURES} from {kind} column", "seconds", lines, SPARK)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--slow-rows", type=int, default=500_000, help="for the peer that handles single rows")
    parser.add_argument("--threads", type=int, default=1, help="that read")
    parser.add_argument("--rounds", type=int, default=3)
    for part in ("read", "memory", "write"):
        parser.add_argument(f"--{part}", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    requireJava()
    spark = session()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = made(spark, arguments.rows, f"{folder}/source")
        url = f"file://{folder}/ours"
        written(spark.read.parquet(source), url)
        if arguments.read:
            reading(spark, source, url, folder, arguments)
        if arguments.memory:
            small = arguments.rows // 8
            written(spark.read.parquet(made(spark, small, f"{folder}/small")), f"{url}-small")
            memory({f"{small:,} rows": f"{url}-small", f"{arguments.rows:,} rows": url}, arguments)
        if arguments.write:
            writing(spark, source, url, folder, arguments)


if __name__ == "__main__":
    main()
