"""What a task writes and reports, and that it reads back as it was."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_nn.columns import Tensor
from spark_nn.dataset import writer
from spark_nn.dataset.writer import PartitionWriter, arrow_type, pack, unpack
from spark_nn.store import RunDir

SCALAR = Tensor("features", ("x",), "array", "float32", 1, (1,))


def tensor(dtype, shape):
    return Tensor("t", ("c",), "array" if shape else "scalar", dtype, len(shape), shape)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "int32", "int64", "bool", "string", "binary"])
def test_every_kind_of_tensor_reads_back_as_it_was(tmp_path, dtype, shape):
    kind = tensor(dtype, shape)
    numbers = np.arange(7 * kind.size).reshape(7, *shape)
    if dtype == "string":
        block = np.array([f"ü{n}" for n in numbers.flat], object).reshape(numbers.shape)
    elif dtype == "binary":
        block = np.array([bytes([n % 256, 0]) for n in numbers.flat], object).reshape(numbers.shape)
    else:
        block = (numbers % 2 if dtype == "bool" else numbers).astype(dtype)
    array = pack(block, kind)
    assert array.type == arrow_type(kind)
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"t": array}), path, row_group_size=3)
    for column in (
        pa.chunked_array([array]),
        pq.read_table(path).column("t"),
        pa.chunked_array([array[:2], array[2:]]),
    ):
        back = unpack(column, kind)
        assert back.shape == block.shape
        assert back.dtype == kind.numpy
        np.testing.assert_array_equal(back, block)


def batch(values):
    values = pa.array([None if v is None else [v] for v in values], pa.list_(pa.float32()))
    return pa.RecordBatch.from_pydict({"features": values})


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path.as_uri())
    run.mkdir("data")
    return run


def rows(run, report, split="train"):
    table = pq.read_table(run.path(report["files"][split][0]))
    return unpack(table.column("features"), SCALAR)[:, 0].tolist()


def test_rows_that_cannot_be_used_are_left_out_where_that_is_wanted(run):
    batches = [batch([None, 1, 2]), batch([np.nan, np.inf, None]), batch([3, np.nan, 4])]
    task = PartitionWriter(run, (Tensor("features", ("x",), "array", "float32", 1, None),), 0.0, 0, False, skip=True)
    report = task.write(0, iter(batches))
    assert rows(run, report) == [1, 2, 3, 4]
    assert report["problems"] == []
    assert report["skipped"] == 5
    assert report["content"]["rows"] == 9


def test_rows_that_cannot_be_used_are_counted_where_it_is_not(run):
    batches = [batch([1, 2]), batch([np.nan, None]), batch([None, 4])]
    task = PartitionWriter(run, (Tensor("features", ("x",), "array", "float32", 1, None),), 0.0, 0, False)
    report = task.write(0, iter(batches))
    assert sorted(report["problems"]) == [[1, "x", "nan", None, None], [2, "x", "null", None, None]]


def test_the_length_that_is_skipped_for_is_that_of_the_first_row_that_can_be_used(run):
    values = pa.array([None, [1, 2], [3], [4, 5]], pa.list_(pa.float32()))
    two = pa.RecordBatch.from_pydict({"features": values})
    task = PartitionWriter(run, (Tensor("features", ("x",), "array", "float32", 1, None),), 0.0, 0, False, skip=True)
    report = task.write(0, iter([two]))
    assert (report["skipped"], report["shapes"]) == (2, {"features": (2,)})


def test_a_codec_is_used_where_it_halves_the_bytes(run):
    noise = np.random.default_rng(0).random(20_000).astype(np.float32)
    for values, codec in ((noise, "UNCOMPRESSED"), (np.zeros(20_000, np.float32), "LZ4")):
        task = PartitionWriter(run, (SCALAR,), 0.0, 0, False)
        report = task.write(0, iter([batch(values.tolist())]))
        metadata = pq.read_metadata(run.path(report["files"]["train"][0]))
        assert metadata.row_group(0).column(0).compression == codec
        assert rows(run, report) == values.tolist()


def test_long_strings_make_row_groups_of_fewer_rows(run, monkeypatch):
    monkeypatch.setattr(writer, "GROUP_BYTES", 10_000)
    words = Tensor("features", ("x",), "scalars", "string", 1, (1,))
    values = pa.array([["x" * 1000]] * 95, pa.list_(pa.string()))
    text = pa.RecordBatch.from_pydict({"features": values})
    report = PartitionWriter(run, (words,), 0.0, 0, False).write(0, iter([text]))
    sizes = report["files"]["train"][1]
    assert set(sizes[:-1]) == {report["group"]}
    assert 5 <= report["group"] <= 10
    assert 95_000 <= report["strings"] <= 100_000
    assert sum(sizes) == 95
