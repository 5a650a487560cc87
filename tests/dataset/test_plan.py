from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_nn.dataset import plan
from spark_nn.errors import DatasetError

GROUPS = st.lists(st.integers(0, 700), min_size=1, max_size=40)


def rows(windows, groups):
    """The rows that a plan reads, numbered through the dataset, in its order."""
    starts = np.concatenate([[0], np.cumsum(groups)]).astype(int)
    taken = []
    for window in windows:
        whole = np.concatenate([starts[s.group] + np.arange(s.start, s.stop) for s in window.slices])
        order = window.order()
        taken.append(whole if order is None else whole[order])
    return np.concatenate(taken) if taken else np.empty(0, int)


def plans(groups, world, **kwargs):
    return [
        rows(plan.epoch(groups, rank=rank, world=world, window_rows=500, **kwargs), groups) for rank in range(world)
    ]


@st.composite
def partitions(draw):
    """Row groups as a writer leaves them: up to 100,000 rows in partitions of any size, empty and skewed ones too."""
    total = draw(st.integers(1, 100_000))
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=12)))
    full = draw(st.integers(1, 20_000))
    sizes = np.diff([0, *cuts, total])
    return [min(full, int(size) - start) for size in sizes for start in range(0, int(size), max(full, total // 200))]


@settings(max_examples=60, deadline=None)
@given(partitions(), st.integers(1, 16), st.integers(0, 3), st.booleans())
def test_any_dataset_is_shared_whole(groups, world, number, shuffle):
    total = sum(groups)
    if total < world:
        return
    read = plans(groups, world, number=number, seed=1, shuffle=shuffle)
    assert {len(share) for share in read} == {-(-total // world)}
    counts = np.bincount(np.concatenate(read), minlength=total)
    assert counts.min() == 1
    assert counts.sum() - total <= world - 1


@settings(max_examples=60, deadline=None)
@given(partitions(), st.integers(0, 120_000))
def test_skipping_leaves_the_rest_of_the_plan(groups, skipped):
    windows = plan.epoch(groups, rank=0, world=1, number=1, seed=2, shuffle=True, window_rows=500)
    left, first = plan.skip(windows, skipped)
    assert rows(left, groups)[first:].tolist() == rows(windows, groups)[skipped:].tolist()
    assert not left or first < left[0].rows


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(1, 16), st.integers(0, 5), st.integers(0, 2**63), st.booleans())
def test_ranks_read_equally_much_and_every_row(groups, world, number, seed, shuffle):
    total = sum(groups)
    if total < world:
        with pytest.raises(DatasetError, match=f"{total} rows cannot be shared by {world} workers"):
            plan.epoch(groups, rank=0, world=world, number=0, seed=0, shuffle=False, window_rows=500)
        return
    read = plans(groups, world, number=number, seed=seed, shuffle=shuffle)
    assert {len(share) for share in read} == {-(-total // world)}
    counts = Counter(np.concatenate(read).tolist())
    assert set(counts) == set(range(total))
    repeats = sum(counts.values()) - total
    assert repeats <= world - 1
    assert max(counts.values()) <= 2 or total < 2 * world


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(1, 16))
def test_validation_reads_every_row_once(groups, world):
    if sum(groups) < world:
        return
    read = plans(groups, world, number=0, seed=0, shuffle=False, equal=False)
    assert np.concatenate(read).tolist() == list(range(sum(groups)))


def test_without_shuffling_one_worker_reads_the_dataframe_in_order():
    (read,) = plans([30, 50, 20], 1, number=3, seed=9, shuffle=False)
    assert read.tolist() == list(range(100))


def test_two_workers_without_shuffling_read_the_two_halves():
    first, second = plans([30, 50, 21], 2, number=0, seed=0, shuffle=False)
    assert first.tolist() == list(range(51))
    assert second.tolist() == list(range(50, 101))  # row 50 is the one repeat that equal shares need


def test_the_order_follows_from_seed_and_epoch_alone():
    groups = [40] * 25

    def order(**kwargs):
        return np.concatenate(plans(groups, 2, shuffle=True, **kwargs)).tolist()

    again = order(number=1, seed=7)
    assert again == order(number=1, seed=7)
    assert again != order(number=2, seed=7)
    assert again != order(number=1, seed=8)
    assert sorted(again) == sorted(order(number=2, seed=7))


def test_shuffling_moves_rows_between_ranks_and_far_within_one():
    groups = [100] * 50
    first, _ = plans(groups, 2, number=0, seed=1, shuffle=True)
    later, _ = plans(groups, 2, number=1, seed=1, shuffle=True)
    assert 0.3 < len(set(first) & set(later)) / len(first) < 0.7  # about half, by chance
    neighbours = np.abs(np.diff(first)) == 1
    assert neighbours.mean() < 0.02
