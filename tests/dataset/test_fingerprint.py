"""Rows that differ anywhere have other fingerprints; the order of rows and of batches does not matter."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from spark_nn.columns import Tensor
from spark_nn.dataset.fingerprint import Fingerprint, hash_rows
from spark_nn.dataset.writer import PartitionWriter

KINDS = (
    Tensor("features", ("x",), "array", "float32", 2, (3, 2)),
    Tensor("label", ("y",), "scalar", "int64", 0, ()),
    Tensor("validation", ("v",), "scalar", "bool", 0, ()),
    Tensor("features:s", ("s",), "scalars", "string", 1, (2,)),
    Tensor("features:b", ("b",), "scalar", "binary", 0, ()),
)


def rows(count, seed=0):
    chance = np.random.default_rng(seed)
    return {
        "features": chance.standard_normal((count, 3, 2)).astype(np.float32),
        "label": chance.integers(-5, 5, count),
        "validation": chance.random(count) < 0.5,
        "features:s": np.array([[f"ä{n}", "b"] for n in range(count)], object),
        "features:b": np.array([bytes([n % 256]) for n in range(count)], object),
    }


def of(block):
    return Fingerprint.of(hash_rows(block, KINDS), len(block["label"]))


def cut(block, where):
    return {name: values[where] for name, values in block.items()}


def test_the_order_of_rows_and_blocks_does_not_matter():
    block = rows(500)
    whole = of(block)
    assert whole.rows == 500
    assert of(cut(block, np.random.default_rng(1).permutation(500))) == whole
    assert of(cut(block, slice(200, None))) + of(cut(block, slice(0, 200))) == whole
    assert Fingerprint() + whole == whole


def flip_two_signs(block):
    block["features"][7] *= np.array([[1, -1], [1, 1], [1, -1]], np.float32)


def swap_in_a_row(block):
    block["features"][7] = block["features"][7, ::-1]


def swap_between_rows(block):
    block["label"][:] = block["label"][::-1]


def set_to(name, place, value):
    def change(block):
        block[name][place] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        flip_two_signs,
        swap_in_a_row,
        swap_between_rows,
        set_to("label", 3, 2**40),
        set_to("features", (3, 1, 1), np.float32(1e-30)),
        set_to("features:s", (3, 1), "c"),
        set_to("features:b", 3, b"\x03\x00"),
        lambda block: np.logical_not(block["validation"], out=block["validation"]),
    ],
)
def test_any_change_shows(change):
    block = rows(100)
    before = of(block)
    change(block)
    assert of(block) != before


def test_the_shape_of_rows_shows():
    table = np.arange(12, dtype=np.float32)
    hashes = [
        hash_rows({"features": table.reshape(2, *shape)}, [Tensor("features", ("x",), "array", "float32", 2, shape)])
        for shape in ((2, 3), (3, 2))
    ]
    assert not set(hashes[0].tolist()) & set(hashes[1].tolist())


def test_rows_that_come_twice_more_show():
    block = rows(100)
    twice_more = of(block) + of(cut(block, slice(3, 4))) + of(cut(block, slice(3, 4)))
    assert twice_more.xor == of(block).xor
    assert twice_more.total != of(block).total


def test_hashes_of_similar_rows_do_not_meet():
    """Rows of small whole numbers, as categories are: the worst that a sum could be given."""
    table = np.array(list(itertools.product([0, 1, 2, -1], repeat=8)), np.float32)
    kind = Tensor("features", ("x",), "array", "float32", 1, (8,))
    hashes = hash_rows({"features": table}, [kind])
    assert len(np.unique(hashes)) == len(table)
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(len(table), 64).mean(axis=0)
    assert (np.abs(bits - 0.5) < 0.02).all()


def test_a_task_that_looks_finds_what_one_that_writes_would(tmp_path):
    from spark_nn.store import RunDir

    run = RunDir(tmp_path.as_uri())
    run.mkdir("data")
    kind = Tensor("label", ("y",), "scalar", "int64", 0, ())
    batches = [pa.RecordBatch.from_pydict({"label": pa.array(part)}) for part in ([1, 2], [], [3, 4, 5], [None, 6])]

    def content(run, batches, **settings):
        task = PartitionWriter(run, (kind,), 0.5, 0, settings.pop("shuffle", True), skip=True)
        return Fingerprint(**task.write(settings.pop("partition", 0), iter(batches))["content"])

    found = content(run, batches)
    assert found.rows == 7
    assert content(None, batches) == found
    assert content(None, batches[::-1]) == found
    kept = content(run, batches, shuffle=False)
    assert content(None, batches, shuffle=False) == kept
    assert content(None, batches[::-1], shuffle=False) != kept
    assert content(None, batches, shuffle=False, partition=1) != kept
    assert len(list(tmp_path.rglob("*.parquet"))) == 4
