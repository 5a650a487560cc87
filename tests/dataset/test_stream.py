from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from spark_nn.dataset import petastorm_compat, writer
from spark_nn.dataset.reading import GroupReader
from spark_nn.dataset.stream import Stream
from spark_nn.errors import DatasetError, StoreError
from tests.dataset.helpers import write

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    # Row groups of 100 rows, so that small data has many of them.
    monkeypatch.setattr(writer, "GROUP_BYTES", 100 * (3 * 4 + 8))


@pytest.fixture(params=["none", "memory", "disk"])
def cache(request, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return {"cache": request.param, "scratch": scratch}


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


def test_no_cache_changes_the_order_and_what_is_kept_is_not_read_again(tmp_path, cache):
    run, manifest = write(tmp_path, [1000, 500], shuffle=True)
    plain = stream(run, manifest, shuffle=True)
    expected = [labels(plain.epoch(number)) for number in range(3)]
    kept = stream(run, manifest, shuffle=True, threads=3, **cache)
    assert labels(kept.epoch(0)) == expected[0]
    for path in (tmp_path / "data").glob("*.parquet"):
        path.unlink()
    if cache["cache"] == "none":
        with pytest.raises(StoreError, match="cannot read .*No such file"):
            labels(kept.epoch(1))
    else:
        assert [labels(kept.epoch(number)) for number in (1, 2)] == expected[1:]
    kept.close()
    assert list(cache["scratch"].iterdir()) == []


def test_what_is_on_disk_is_never_unpickled(tmp_path, monkeypatch):
    run, manifest = write(tmp_path, [500])
    kept = stream(run, manifest, cache="disk", scratch=tmp_path / "scratch")
    labels(kept.epoch(0))
    import pickle

    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "Unpickler", lambda *_, **__: pytest.fail("unpickled"))
    assert sum(labels(kept.epoch(1)), []) == list(range(500))
    kept.close()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_keep_rows_get_their_share_of_every_epoch(tmp_path, world):
    """With a new assignment each epoch, what a rank has kept is only a part of its next share."""
    run, manifest = write(tmp_path, [700, 1, 331], shuffle=True)
    ranks = [stream(run, manifest, rank=rank, world=world, shuffle=True) for rank in range(world)]
    keeping = [stream(run, manifest, rank=rank, world=world, shuffle=True, cache="memory") for rank in range(world)]
    for number in range(4):
        for plain, kept in zip(ranks, keeping, strict=True):
            assert labels(kept.epoch(number)) == labels(plain.epoch(number))


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_goes_on_where_it_stopped(tmp_path, shuffle, cache):
    run, manifest = write(tmp_path, [5000, 331], shuffle=shuffle)
    whole = labels(stream(run, manifest, shuffle=shuffle).epoch(1))
    kept = stream(run, manifest, shuffle=shuffle, **cache)
    for start in (0, 1, 26, 27, len(whole) - 1, len(whole)):
        assert labels(kept.epoch(1, start=start)) == whole[start:]
    kept.close()


def test_going_on_reads_no_window_that_lies_before(tmp_path, monkeypatch):
    run, manifest = write(tmp_path, [5000])
    read = []
    original = Stream._read

    def counting(self, slices):
        read.extend(slices)
        return original(self, slices)

    monkeypatch.setattr(Stream, "_read", counting)
    labels(stream(run, manifest).epoch(0, start=60))  # 3,840 rows on, in the third of four windows
    assert sum(part.rows for part in read) == 1800


@pytest.mark.parametrize("steps", [1, 10, 83, 84, 85, 200])
def test_epochs_that_are_no_passes_go_on_where_the_last_has_stopped(tmp_path, steps, cache):
    run, manifest = write(tmp_path, [5000, 331], shuffle=True)
    whole = stream(run, manifest, shuffle=True)
    assert whole.steps == 84
    kept = stream(run, manifest, shuffle=True, steps=steps, **cache)
    epochs = 5
    passes = sum((labels(whole.epoch(lap)) for lap in range(-(-epochs * steps // 84))), [])
    got = [labels(kept.epoch(number)) for number in range(epochs)]
    assert got == [passes[number * steps : (number + 1) * steps] for number in range(epochs)]
    assert kept.rows == sum(map(len, got[0]))
    assert max(len(kept.stretches(number)) for number in range(100)) <= kept.most
    for start in (1, steps - 1):
        assert labels(kept.epoch(2, start=start)) == got[2][start:]
    kept.close()


@pytest.mark.parametrize("batches", [2, 7, 1000])
def test_blocks_are_the_same_batches_side_by_side(tmp_path, batches, cache):
    run, manifest = write(tmp_path, [1000, 531], shuffle=True)
    expected = labels(stream(run, manifest, shuffle=True).epoch(2))
    kept = stream(run, manifest, shuffle=True, **cache)
    got = labels(kept.epoch(2, batches=batches))
    assert got == [sum(expected[at : at + batches], []) for at in range(0, len(expected), batches)]
    kept.close()


def test_to_begin_an_epoch_ends_the_one_before(tmp_path, cache):
    run, manifest = write(tmp_path, [4000])
    kept = stream(run, manifest, shuffle=True, **cache)
    left = kept.epoch(0)
    next(left)
    assert sorted(sum(labels(kept.epoch(1)), [])) == list(range(4000))
    assert list(left) == []
    kept.close()


def test_batches_are_the_receivers_own(tmp_path, cache):
    run, manifest = write(tmp_path, [4000])
    kept = stream(run, manifest, **cache)
    got = list(kept.epoch(0))
    for block in got:
        block["label"] += 1  # neither other batches nor what is kept may notice
    assert sum(labels(got), []) == list(range(1, 4001))
    assert sum(labels(kept.epoch(0)), []) == list(range(4000))
    kept.close()


def test_two_hundred_reads_of_many_row_groups_lose_no_row(tmp_path):
    run, manifest = write(tmp_path, [3000, 17, 2000])
    for number in range(200):
        got = stream(run, manifest, threads=1 + number % 3, shuffle=True).epoch(number)
        assert sum(len(block["label"]) for block in got) == 5017


def test_rows_that_a_reader_loses_are_an_error(tmp_path, monkeypatch):
    run, manifest = write(tmp_path, [3000])
    original = Stream._read

    def losing(self, slices):
        blocks = list(original(self, slices))
        yield from blocks[:-1]

    def doubling(self, slices):
        for block in original(self, slices):
            yield block
        yield block

    monkeypatch.setattr(Stream, "_read", doubling)
    with pytest.raises(DatasetError, match="rank 0 delivered 3000 rows of 3000 planned.*a defect"):
        list(stream(run, manifest).epoch(0))
    monkeypatch.setattr(Stream, "_read", losing)
    with pytest.raises((DatasetError, RuntimeError)):
        list(stream(run, manifest).epoch(0))
    monkeypatch.setattr(Stream, "_read", original)
    pool = petastorm_compat.load().ThreadPool
    taken = pool.get_results

    def ending(self):
        ending.calls += 1
        if ending.calls > 12:
            raise petastorm_compat.load().EmptyResultError
        return taken(self)

    ending.calls = 0
    monkeypatch.setattr(pool, "get_results", ending)
    with pytest.raises(DatasetError, match="rank 0 read 12 of 30 planned parts"):
        list(stream(run, manifest).epoch(0))


def test_a_store_that_hangs_is_an_error_in_time(tmp_path, monkeypatch):
    run, manifest = write(tmp_path, [3000])
    hangs = threading.Event()
    original = GroupReader.process

    def process(self, group, start, stop):
        if group.index == 3:
            hangs.wait(60)
        original(self, group, start, stop)

    monkeypatch.setattr(GroupReader, "process", process)
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"no data came from .*parquet in file://.* within 0.3 s: look at") as caught:
        list(stream(run, manifest, timeout=0.3).epoch(0))
    assert caught.value.transient
    assert time.monotonic() - began < 10
    hangs.set()
