"""Blocks of one size made from blocks of any, and items brought ahead."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from spark_nn.scoring.batches import ahead, recut

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("sizes", [(), (0,), (4, 4, 4), (1, 1, 9, 0, 2), (10, 0, 1, 30), (7,)])
def test_no_row_is_lost_or_moved(sizes, rows):
    total = sum(sizes)
    x, y = np.arange(total * 2).reshape(total, 2), np.arange(total)
    ends = [0, *itertools.accumulate(sizes)]
    blocks = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]
    found = list(recut(iter(blocks), rows))
    assert [len(block[0]) for block in found] == [rows] * (total // rows) + [total % rows] * (total % rows > 0)
    np.testing.assert_array_equal(np.concatenate([x[:0], *(block[0] for block in found)]), x)
    np.testing.assert_array_equal(np.concatenate([y[:0], *(block[1] for block in found)]), y)


def test_only_what_lies_across_a_border_is_copied():
    x = np.arange(20)
    found = [block[0] for block in recut(iter([(x[:11],), (x[11:],)]), 4)]
    assert [np.shares_memory(block, x) for block in found] == [True, True, False, True, True]


def test_one_item_is_brought_before_it_is_asked_for():
    asked = threading.Semaphore(0)

    def source():
        for number in range(4):
            yield number
            asked.release()

    items = ahead(source())
    assert next(items) == 0
    for _ in range(2):  # the second is in the queue and the third wanted for it, before anybody asks for more
        assert asked.acquire(timeout=10)
    assert list(items) == [1, 2, 3]


def test_an_error_comes_in_its_place():
    def source():
        yield 1
        raise ValueError("broken")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_who_drops_the_items_ends_the_thread():
    items = ahead(itertools.count())
    assert next(items) == 0
    (thread,) = (each for each in threading.enumerate() if each.name == "spark_nn-ahead")
    items.close()
    thread.join(10)
    assert not thread.is_alive()
