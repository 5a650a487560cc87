from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from spark_nn.dataset import writer
from spark_nn.dataset.stream import Stream
from spark_nn.errors import DatasetError
from tests.dataset.helpers import write

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    # Row groups of 100 rows, so that small data has many of them.
    monkeypatch.setattr(writer, "GROUP_BYTES", 100 * (3 * 4 + 8))


def stream(run, manifest, split="train", **kwargs):
    settings = {"rank": 0, "world": 1, "batch": 64, "seed": 5, "shuffle": False, **kwargs}
    return Stream(run, manifest, split, **settings)


def labels(batches):
    return [block["label"].tolist() for block in batches]


def test_written_row_groups_have_exactly_the_planned_size(tmp_path):
    run, manifest = write(tmp_path, [2050, 0, 30])
    assert manifest.group_rows == 100
    assert [group.rows for group in manifest.train] == [100] * 20 + [50, 30]
    for group in manifest.train:
        file = pq.ParquetFile(run.path(group.file))
        assert file.metadata.row_group(group.index).num_rows == group.rows


def test_one_worker_without_shuffling_gets_the_rows_as_they_are(tmp_path):
    run, manifest = write(tmp_path, [230, 5, 400])
    got = list(stream(run, manifest).epoch(0))
    assert [len(block["label"]) for block in got] == [64] * 9 + [59]
    assert sum(labels(got), []) == list(range(635))
    x = np.concatenate([block["features"] for block in got])
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, np.arange(635)[:, None] + np.array([0, 0.25, 0.5], np.float32))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffled_shares_hold_every_row_and_features_stay_with_their_label(tmp_path, world, threads):
    run, manifest = write(tmp_path, [700, 1, 331], shuffle=True)
    ranks = [stream(run, manifest, rank=rank, world=world, shuffle=True, threads=threads) for rank in range(world)]
    for number in range(2):
        shares = [list(rank.epoch(number)) for rank in ranks]
        assert len({tuple(len(b["label"]) for b in share) for share in shares}) == 1
        assert all(len(share) == rank.steps for share, rank in zip(shares, ranks, strict=True))
        seen = sum((sum(labels(share), []) for share in shares), [])
        assert set(seen) == set(range(1032))
        assert len(seen) - 1032 <= world - 1
        for share in shares:
            for block in share:
                np.testing.assert_array_equal(block["features"][:, 0], block["label"])


def test_the_order_depends_on_seed_and_epoch_and_not_on_threads(tmp_path):
    run, manifest = write(tmp_path, [1000, 500], shuffle=True)

    def order(number, **kwargs):
        return labels(stream(run, manifest, shuffle=True, **kwargs).epoch(number))

    assert order(0) == order(0, threads=4)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=6)


def test_the_split_is_exact_and_repeatable(tmp_path):
    run, manifest = write(tmp_path / "a", [600, 600], fraction=0.25, seed=3)
    validation = sum(labels(stream(run, manifest, "validation").epoch(0)), [])
    train = sum(labels(stream(run, manifest).epoch(0)), [])
    assert sorted(train + validation) == list(range(1200))
    assert 240 < len(validation) < 360
    run, again = write(tmp_path / "b", [600, 600], fraction=0.25, seed=3)
    assert sum(labels(stream(run, again, "validation").epoch(0)), []) == validation
    run, other = write(tmp_path / "c", [600, 600], fraction=0.25, seed=4)
    assert sum(labels(stream(run, other, "validation").epoch(0)), []) != validation


def test_validation_shares_divide_the_rows_without_repeats(tmp_path):
    run, manifest = write(tmp_path, [500, 501], fraction=0.5, seed=1)
    shares = [sum(labels(stream(run, manifest, "validation", rank=rank, world=3).epoch(0)), []) for rank in range(3)]
    total = manifest.rows("validation")
    assert len(set(sum(shares, []))) == sum(map(len, shares)) == total


def test_a_file_that_was_changed_is_an_error(tmp_path):
    run, manifest = write(tmp_path, [300])
    path = run.path(manifest.train[0].file)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 250), path, row_group_size=100)
    with pytest.raises(DatasetError, match="does not hold the rows of its manifest"):
        list(stream(run, manifest).epoch(0))


def test_leaving_an_epoch_early_ends_the_readers(tmp_path):
    import threading

    run, manifest = write(tmp_path, [5000])
    before = threading.active_count()
    batches = stream(run, manifest, threads=2).epoch(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
