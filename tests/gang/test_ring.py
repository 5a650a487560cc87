"""Real sockets on the loopback: threads for what the ring computes, processes for how it fails."""

import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from spark_nn.errors import CollectiveError, OutOfStep, PeerLost
from spark_nn.gang import meeting, shared, wire
from spark_nn.gang import ring as ring_module
from spark_nn.gang.collective import Alone
from spark_nn.gang.ring import Ring, listen

pytestmark = pytest.mark.timeout(120)

LOOPBACK = "127.0.0.1"
SECRET = b"known to the ranks of this ring alone"
FLOATS = ("float16", "float32", "float64")
INTS = ("int32", "int64", "uint8")
LARGE = [*zip(FLOATS, ("sum", "mean", "max"), strict=True), *zip(INTS, ("min", "sum", "sum"), strict=True)]
FOLD = {"sum": np.add.reduce, "mean": np.add.reduce, "max": np.maximum.reduce, "min": np.minimum.reduce}


@pytest.fixture(params=[False, True], ids=["frames", "watched"])
def spin(request, monkeypatch):
    """Whether small buffers are announced by the ring's frames or in the memory that the ranks watch."""
    monkeypatch.setattr(Gang, "spin", request.param)
    monkeypatch.setattr(Processes, "spin", request.param)
    return request.param


class Gang:
    """The ranks of one ring, each in a thread of this process."""

    spin = False

    def __init__(self, world, timeout=20.0):
        self.world = world
        self.threads = ThreadPoolExecutor(world)
        listeners = [listen(LOOPBACK) for _ in range(world)]
        addresses = [listener.getsockname() for listener in listeners]
        self.rings = list(
            self.threads.map(
                lambda rank: Ring.connect(
                    rank=rank,
                    addresses=addresses,
                    listener=listeners[rank],
                    secret=SECRET,
                    timeout=timeout,
                    spin=self.spin,
                ),
                range(world),
            )
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for ring in self.rings:
            ring.close()
        self.threads.shutdown()

    def run(self, work):
        """Return what `work(ring)` returns or raises on each rank."""
        return list(self.threads.map(lambda ring: outcome(work, ring), self.rings))


def outcome(work, *args):
    try:
        return work(*args)
    except CollectiveError as error:
        return error


def check_all(results, kind, pattern):
    for rank, result in enumerate(results):
        assert type(result) is kind, (rank, result)
        assert re.search(pattern, str(result)), (rank, str(result))


# ---------------------------------------------------------------- what the operations compute


def numbers(rank, size, dtype):
    chance = np.random.default_rng([rank, size])
    if np.dtype(dtype).kind == "f":
        return chance.standard_normal(size).astype(dtype)
    return chance.integers(0, 200, size).astype(dtype)


@np.errstate(all="ignore")
def check_reduced(gang, buffers, op):
    """Reduce copies of the buffers, and compare with NumPy and among the ranks."""
    copies = [buffer.copy() for buffer in buffers]
    assert gang.run(lambda ring: ring.all_reduce(copies[ring.rank], op)) == [None] * gang.world
    for copy in copies:
        assert copy.tobytes() == copies[0].tobytes()
    dtype = buffers[0].dtype
    exact = op in ("max", "min") or dtype.kind != "f"
    wide = dtype if exact else np.float64
    expected = FOLD[op](np.stack(buffers).astype(wide), axis=0, dtype=wide)
    if exact:
        assert_array_equal(copies[0], expected)
    else:
        expected = expected / gang.world if op == "mean" else expected
        finite = np.isfinite(expected)
        largest = np.abs(np.stack(buffers)[:, finite]).sum(axis=0, dtype=np.float64)
        assert_array_equal(copies[0][~finite], expected[~finite])
        assert (np.abs(copies[0] - expected)[finite] <= np.finfo(dtype).eps * gang.world * largest).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_all_reduce_agrees_with_numpy_on_every_rank(world):
    with Gang(world) as gang:
        for size in sorted({0, 1, world - 1, world, world + 1, 1000}):
            for dtype in FLOATS + INTS:
                for op in ("sum", "max", "min") + ("mean",) * (dtype in FLOATS):
                    check_reduced(gang, [numbers(rank, size, dtype) for rank in range(world)], op)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_large_buffers_agree_too(world):
    with Gang(world) as gang:
        for dtype, op in LARGE:
            check_reduced(gang, [numbers(rank, 1_000_003, dtype) for rank in range(world)], op)


@pytest.mark.parametrize("world", [2, 5])
def test_sockets_that_take_little_at_a_time_do_not_block_the_ring(monkeypatch, world):
    monkeypatch.setattr(wire, "SEND_BUFFER", 4096)
    with Gang(world) as gang:
        check_reduced(gang, [numbers(rank, 200_000, "float32") for rank in range(world)], "mean")


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize("world", [2, 3])
def test_nan_infinity_and_signed_zero_pass_through_with_the_same_bits(world, size):
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1e38], np.float32)
    payload = np.array([0x7FC00001, 0xFFC00777], np.uint32).view(np.float32)  # NaNs that can be told apart
    buffers = [np.resize(np.roll(np.concatenate([special, payload]), rank), size) for rank in range(world)]
    with Gang(world) as gang:
        for op in ("sum", "mean", "max", "min"):
            check_reduced(gang, buffers, op)


@pytest.fixture(scope="module")
def gangs():
    with ExitStack() as stack:
        yield {world: stack.enter_context(Gang(world)) for world in (2, 3, 5)}


@settings(max_examples=60, deadline=None)
@given(
    world=st.sampled_from([2, 3, 5]),
    size=st.integers(0, 150),
    dtype=st.sampled_from(FLOATS + INTS),
    op=st.sampled_from(["sum", "mean", "max", "min"]),
    seed=st.integers(0, 1000),
)
def test_any_number_of_blocks_and_pieces_reduces_right(gangs, world, size, dtype, op, seed):
    if op == "mean" and dtype in INTS:
        op = "sum"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring_module, "_BLOCK", 32)  # so that few numbers already make many blocks
        check_reduced(gangs[world], [numbers(seed + rank, size, dtype) for rank in range(world)], op)


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_memory_that_is_shared_changes_no_bit(monkeypatch, spin, world, op):
    draws = [np.random.default_rng(rank).standard_normal(5000).astype(np.float32) for rank in range(world)]

    def reduce(gang):
        def work(ring):
            results = []
            for size in (5000, 1, 0, 4999, 7, 7, 7):  # places are used again, by longer and shorter buffers
                given = draws[ring.rank][:size].copy()
                given.flags.writeable = False
                buffer = np.full(size, np.nan, np.float32)
                ring.all_reduce(buffer, op, given)
                results.append(buffer.tobytes())
            return results

        return gang.run(work)

    with Gang(world) as gang:
        assert all(ring._shared.watched == spin for ring in gang.rings)
        shared = reduce(gang)
    monkeypatch.delattr(os, "memfd_create")
    with Gang(world) as gang:
        assert all(ring._shared is None for ring in gang.rings)
        assert reduce(gang) == shared
    assert len({tuple(each) for each in shared}) == 1


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(3,), (0, 17, 1, 300), (5, 400_000, 1, 70_000)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_mean_of_several_arrays_is_that_of_each(world, sizes, dtype):
    parts = [[numbers(10 * rank + size, size, dtype) for size in sizes] for rank in range(world)]

    def work(ring):
        own = [part.copy() for part in parts[ring.rank]]
        filled = [own[0], *(np.empty(size, dtype) for size in sizes[1:])]  # some in place, and some not
        for _ in range(3):
            own[0][:] = parts[ring.rank][0]
            ring.mean(own, filled)
        for kept, part in zip(own[1:], parts[ring.rank][1:], strict=True):
            assert_array_equal(kept, part)
        return filled

    def one_by_one(ring):
        own = [part.copy() for part in parts[ring.rank]]
        for part in own:
            ring.all_reduce(part, "mean")
        return own

    with Gang(world) as gang:
        together, apart = gang.run(work), gang.run(one_by_one)
    exact = world < 3  # the order of adding up goes by where a piece ends
    for rank in range(world):
        for found, same, number in zip(together[rank], apart[rank], range(len(sizes)), strict=True):
            expected = np.mean([part[number] for part in parts], axis=0, dtype=np.float64)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            assert found.tobytes() == together[0][number].tobytes()
            if exact:
                assert found.tobytes() == same.tobytes()


def test_arrays_that_do_not_fit_each_other_are_refused_and_break_nothing():
    with Gang(2) as gang:
        for given, filled in [
            ([np.zeros(3)], [np.zeros(4)]),
            ([np.zeros(3), np.zeros(3)], [np.zeros(3)]),
            ([np.zeros(3, "i4")], [np.zeros(3, "i4")]),
            ([np.zeros(3), np.zeros(3, "f4")], [np.zeros(3), np.zeros(3, "f4")]),
            ([], []),
            ([np.zeros(3)], [np.zeros(6)[::2]]),
            ([np.zeros(3)], [np.frombuffer(bytes(24))]),
        ]:
            assert gang.run(lambda ring: ring.mean([np.zeros(3)], [np.zeros(3)])) == [None, None]  # which is in order
            for _ in range(2):
                with pytest.raises(ValueError, match="source holds|are given|mean of int32|at least one|contiguous"):
                    gang.rings[0].mean(given, filled)
        assert gang.run(lambda ring: ring.barrier()) == [None, None]


@pytest.mark.usefixtures("spin")
def test_arrays_of_all_dimensions_and_numbers_are_averaged_again_and_again():
    def work(ring):
        results = []
        for count in (1, 150, 2, 40, 1, 150) * 4:  # more layouts in turn than a training has
            given = [np.full((2, 3), ring.rank + number, np.float32) for number in range(count)]
            filled = [np.empty(6, np.float32) for _ in given]
            ring.mean(given, filled)
            results.append([float(each[0]) for each in filled])
            assert all((each == each[0]).all() for each in filled)
        return results

    expected = [[number + 0.5 for number in range(count)] for count in (1, 150, 2, 40, 1, 150) * 4]
    with Gang(2) as gang:
        assert gang.run(work) == [expected] * 2


def test_small_arrays_take_turns_in_the_same_memory_with_others(monkeypatch):
    monkeypatch.setattr(Gang, "spin", True)

    def work(ring):
        for size in range(1, 60):
            buffer = np.full(size, ring.rank + size, np.float32)
            ring.mean([buffer], [buffer])
            assert (buffer == size + 1).all()

    with Gang(3) as gang:
        assert gang.run(work) == [None] * 3


def test_memory_is_watched_by_all_ranks_or_none(monkeypatch):
    """A rank that has no core of its own to watch from makes all of them announce themselves by frames."""
    connect = Ring.connect
    monkeypatch.setattr(Ring, "connect", lambda rank, **rest: connect(rank=rank, **rest | {"spin": rank != 1}))
    with Gang(3) as gang:
        assert [ring._shared.watched for ring in gang.rings] == [False] * 3
        assert gang.run(lambda ring: ring.all_reduce(np.ones(3))) == [None] * 3


def test_memory_is_not_watched_where_writes_may_overtake_each_other(monkeypatch):
    monkeypatch.setattr(shared.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(Gang, "spin", True)
    with Gang(2) as gang:
        assert [ring._shared.watched for ring in gang.rings] == [False] * 2
        assert gang.run(lambda ring: ring.all_reduce(np.ones(3))) == [None] * 2


@pytest.mark.parametrize("late", [1e-4, 1e-3, 0.02, 0.3])
def test_who_comes_late_is_seen_in_the_memory_too(monkeypatch, late):
    monkeypatch.setattr(Gang, "spin", True)

    def work(ring):
        totals = []
        for step in range(6):
            if step % 3 == ring.rank:
                time.sleep(late)
            buffer = np.full(9, 10.0**ring.rank * (step + 1))
            ring.all_reduce(buffer)
            if step == 3:
                ring.barrier()  # frames come on the heels of what the memory showed
            totals.append(buffer[0])
        return totals

    with Gang(3) as gang:
        assert gang.run(work) == [[111.0 * (step + 1) for step in range(6)]] * 3


def test_memory_is_not_shared_where_one_rank_cannot_open_it(monkeypatch):
    """As on another machine, where the same path is nothing, or something else."""
    opened = shared._opened
    refused = iter([False, True])
    monkeypatch.setattr(shared, "_opened", lambda *args: None if next(refused) else opened(*args))
    with Gang(2) as gang:
        assert [ring._shared for ring in gang.rings] == [None, None]
        assert gang.run(lambda ring: len(ring.all_gather(b"x"))) == [2, 2]


def test_memory_of_somebody_else_is_not_taken(tmp_path):
    for content in (b"x" * 128, b"y" * 128, b"x" * 64):
        path = tmp_path / "memory"
        path.write_bytes(content)
        found = shared._opened(str(path), b"x" * 32, 128)
        assert (found is not None) == (content == b"x" * 128)
    assert shared._opened(str(tmp_path / "nothing"), b"x" * 32, 128) is None
    assert shared._opened("", b"", 128) is None


def test_a_source_that_does_not_fit_is_refused_and_breaks_nothing():
    for ring in (Alone(), None):
        with Gang(2) as gang:
            for each in [ring] if ring else gang.rings:
                with pytest.raises(ValueError, match="the source holds 3 float64, and the buffer 4 float32"):
                    each.all_reduce(np.zeros(4, np.float32), "sum", np.zeros(3))
            gang.run(lambda ring: ring.barrier())


def test_shape_is_kept_and_the_buffer_changed_in_place():
    with Gang(2) as gang:
        buffers = [np.full((3, 4, 5), rank + 1.0) for rank in range(2)]
        scalars = [np.array(rank + 1.0) for rank in range(2)]
        gang.run(lambda ring: ring.all_reduce(buffers[ring.rank], "mean"))
        gang.run(lambda ring: ring.all_reduce(scalars[ring.rank]))
    assert_array_equal(buffers, np.full((2, 3, 4, 5), 1.5))
    assert scalars == [3.0, 3.0]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 7, 300_000])
def test_broadcast_from_each_root(world, size):
    with Gang(world) as gang:
        for root in range(world):
            buffers = [numbers(rank, size, "float64") for rank in range(world)]
            expected = buffers[root].copy()
            assert gang.run(lambda ring: ring.broadcast(buffers[ring.rank], root)) == [None] * world  # noqa: B023
            for buffer in buffers:
                assert_array_equal(buffer, expected)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_gather_of_unequal_lengths(world):
    data = [bytes([rank]) * (rank * 700_001 % 1_000_000) for rank in range(world)]  # rank 0 has none
    with Gang(world) as gang:
        assert gang.run(lambda ring: ring.all_gather(data[ring.rank])) == [data] * world
        assert gang.run(lambda ring: ring.all_gather(b"")) == [[b""] * world] * world


def test_nobody_leaves_a_barrier_before_all_have_come():
    came = []

    def come(ring):
        time.sleep(0.1 * ring.rank)
        came.append(ring.rank)
        ring.barrier()
        return len(came)

    with Gang(3) as gang:
        assert gang.run(come) == [3, 3, 3]


@pytest.mark.usefixtures("spin")
def test_operations_of_all_kinds_follow_each_other():
    def work(ring):
        for step in range(50):
            ring.mark(0, step)
            buffer = np.full(step * 100, ring.rank, np.float32)
            ring.all_reduce(buffer, "max")
            assert (buffer == ring.world - 1).all()
            ring.broadcast(buffer, step % ring.world)
            assert len(ring.all_gather(bytes(step))) == ring.world
        return ring.rank

    with Gang(3) as gang:
        assert gang.run(work) == [0, 1, 2]


@pytest.mark.usefixtures("spin")
def test_calls_from_several_threads_take_turns():
    def work(ring):
        def many():
            for _ in range(20):
                ring.barrier()

        threads = [threading.Thread(target=many) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ring.error

    with Gang(2) as gang:
        assert gang.run(work) == [None, None]


def test_alone_there_is_nothing_to_exchange():
    alone = Alone()
    buffer = np.arange(5.0)
    alone.mark(1, 2)
    alone.all_reduce(buffer, "mean")
    alone.broadcast(buffer)
    alone.barrier()
    assert (alone.rank, alone.world, alone.error) == (0, 1, None)
    assert alone.all_gather(b"me") == [b"me"]
    assert_array_equal(buffer, np.arange(5.0))
    alone.close()


@pytest.mark.parametrize(
    ("buffer", "op", "found"),
    [
        (np.zeros(3, complex), "sum", "complex128"),
        (np.zeros(3, ">f4"), "sum", ">f4"),
        (np.zeros(3, object), "sum", "object"),
        (np.zeros((4, 4))[:, 1], "sum", "contiguous"),
        (np.zeros(3), "median", "median"),
        (np.zeros(3, int), "mean", "mean of int64"),
        (np.broadcast_to(np.zeros(1), (1,)), "sum", "writable"),
    ],
)
def test_what_cannot_be_reduced_is_refused_and_breaks_nothing(buffer, op, found):
    with pytest.raises(ValueError, match=found):
        Alone().all_reduce(buffer, op)
    with Gang(1) as gang:
        with pytest.raises(ValueError, match=found):
            gang.rings[0].all_reduce(buffer, op)
        with pytest.raises(ValueError, match="root 1"):
            gang.rings[0].broadcast(np.zeros(3), root=1)
        assert gang.rings[0].error is None


# ---------------------------------------------------------------- ranks out of step


def mark_then_reduce(ring):
    ring.mark(epoch=2, step=40 + ring.rank)
    ring.all_reduce(np.zeros(10))


MISMATCHES = {
    "sizes": (lambda ring: ring.all_reduce(np.zeros(10 + ring.rank)), ("80 bytes", "88 bytes")),
    "large sizes": (lambda ring: ring.all_reduce(np.zeros(900_000 + ring.rank)), ("7200000", "7200008")),
    "ops": (lambda ring: ring.all_reduce(np.zeros(9), ("sum", "max")[ring.rank]), (r"\(sum\)", r"\(max\)")),
    "types": (
        lambda ring: ring.all_reduce(np.zeros(8, ("f4", "i4")[ring.rank])),
        ("of float32", "of int32"),
    ),
    "calls": (
        lambda ring: ring.barrier() if ring.rank else ring.broadcast(np.zeros(3), 1),
        ("broadcast", "barrier"),
    ),
    "roots": (lambda ring: ring.broadcast(np.zeros(3), 1 - ring.rank), ("from rank 1", "from rank 0")),
    "ways": (lambda ring: ring.barrier() if ring.rank else ring.all_reduce(np.zeros(3)), ("all_reduce", "barrier")),
    "steps": (mark_then_reduce, ("epoch 2, step 40", "epoch 2, step 41")),
}


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("what", MISMATCHES)
def test_ranks_out_of_step_are_told_on_both_sides(what):
    work, found = MISMATCHES[what]
    with Gang(2, timeout=2) as gang:
        results = gang.run(work)
        for pattern in (*found, "rank 0", "rank 1", "operation 6"):
            check_all(results, OutOfStep, pattern)
        again = gang.run(lambda ring: ring.barrier())
        assert [str(error) for error in again] == [str(error) for error in results]
        check_all(again, OutOfStep, "")


@pytest.mark.usefixtures("spin")
def test_data_of_different_calls_is_never_mixed():
    buffers = [np.full(10 + rank, rank + 1.0) for rank in range(2)]
    with Gang(2) as gang:
        check_all(gang.run(lambda ring: ring.all_reduce(buffers[ring.rank])), OutOfStep, "")
    for rank, buffer in enumerate(buffers):
        assert_array_equal(buffer, np.full(10 + rank, rank + 1.0))


@pytest.mark.usefixtures("spin")
def test_all_ranks_learn_that_two_are_out_of_step():
    with Gang(5) as gang:
        results = gang.run(lambda ring: ring.all_reduce(np.zeros(10 + (ring.rank == 2))))
    check_all(results, OutOfStep, "80 bytes.*88 bytes|88 bytes.*80 bytes")


@pytest.mark.usefixtures("spin")
def test_one_batch_too_many_is_an_error_even_between_equal_calls():
    def train(ring):
        for step in range(3 + (ring.rank == 1)):
            ring.mark(0, step)
            ring.all_reduce(np.zeros(10))
        ring.mark(1, 0)
        ring.all_reduce(np.zeros(10))

    with Gang(2) as gang:
        check_all(gang.run(train), OutOfStep, "epoch 1, step 0")


# ---------------------------------------------------------------- ranks that fail or leave


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("size", [10, 3_000_000])
@pytest.mark.parametrize("world", [2, 5])
def test_the_reason_of_an_abort_reaches_every_rank(world, size):
    def work(ring):
        if ring.rank == world - 1:
            time.sleep(0.1)
            ring.abort("no more input — träge")
        ring.all_reduce(np.zeros(size))

    with Gang(world) as gang:
        *others, culprit = gang.run(work)
        check_all(others, PeerLost, f"^rank {world - 1} failed: no more input — träge$")
        check_all([culprit], CollectiveError, f"rank {world - 1} failed: no more input")
        check_all(gang.run(lambda ring: ring.all_gather(b""))[:-1], PeerLost, "no more input")
        check_all([ring.error for ring in gang.rings[:-1]], PeerLost, "no more input")


def test_a_reason_may_be_of_any_length():
    with Gang(2) as gang:
        gang.rings[0].abort("ü" * 100_000)
        result = outcome(gang.rings[1].barrier)
    check_all([result], PeerLost, "^rank 0 failed: ü+$")
    assert len(str(result)) < 2000


def test_abort_ends_an_operation_that_another_thread_is_in():
    def work(ring):
        if ring.rank == 0:
            time.sleep(0.5)
        else:
            threading.Timer(0.1, ring.abort, ("the watchdog bit",)).start()
        return outcome(ring.all_reduce, np.zeros(3_000_000))

    with Gang(2) as gang:
        other, culprit = gang.run(work)
    check_all([culprit], CollectiveError, "rank 1 failed: the watchdog bit")
    check_all([other], PeerLost, "rank 1 failed: the watchdog bit")


def test_a_failure_within_an_operation_is_an_abort_as_well(monkeypatch):
    with Gang(3) as gang:
        monkeypatch.setattr(gang.rings[1], "_hops", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gang.rings[1].barrier()
        others = [outcome(gang.rings[rank].barrier) for rank in (0, 2)]
        again = outcome(gang.rings[1].barrier)
    check_all(others, PeerLost, "rank 1 failed: ZeroDivisionError")
    check_all([again], CollectiveError, "rank 1 failed: ZeroDivisionError")


@pytest.mark.usefixtures("spin")
def test_closing_too_early_is_told_from_dying():
    def work(ring):
        ring.barrier()
        if ring.rank == 1:
            ring.close()
        else:
            ring.barrier()

    with Gang(3) as gang:
        results = gang.run(work)
    assert results.pop(1) is None
    check_all(results, PeerLost, "rank 1 .*closed in good order after barrier .*operation 6")


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("room", [4096, 1 << 20])
def test_closing_at_once_after_the_last_operation_harms_nobody(monkeypatch, room):
    monkeypatch.setattr(wire, "SEND_BUFFER", room)

    def work(ring):
        buffer = np.ones(60_000)
        ring.all_reduce(buffer)
        ring.broadcast(buffer, root=1)  # which does not wait for the others
        ring.close()
        ring.close()
        return buffer.sum()

    for _ in range(10):
        with Gang(3) as gang:
            assert gang.run(work) == [180_000] * 3
            check_all(gang.run(lambda ring: ring.barrier()), CollectiveError, "has closed its ring")


@pytest.mark.usefixtures("spin")
def test_a_rank_that_waits_is_not_taken_for_the_one_waited_for():
    """Rank 0 stays away; rank 2, next to rank 1 which waits for rank 0, must not suspect rank 1."""
    with Gang(4, timeout=3) as gang:
        results = gang.run(lambda ring: ring.barrier() if ring.rank else time.sleep(5))
    check_all(results[1:], PeerLost, "rank 0 .*kept silent for 3 s")


@pytest.mark.usefixtures("spin")
def test_a_rank_that_says_it_will_be_long_is_waited_for():
    """Its neighbours hear of it; the others hear of them."""

    def work(ring):
        first = ring.all_gather(b"%d" % ring.rank)
        if ring.rank == 0:
            with ring.waited_for():
                time.sleep(4)
        return first == ring.all_gather(b"%d" % ring.rank)

    with Gang(4, timeout=1.5) as gang:
        assert gang.run(work) == [True] * 4


@pytest.mark.usefixtures("spin")
def test_time_in_which_the_machine_stood_still_is_nobodys_silence(monkeypatch):
    """Rank 0 comes after a second, in which the clock jumps by more than the limit for all ranks."""
    jumped = threading.Event()

    class Clock:
        sleep = staticmethod(time.sleep)
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def monotonic():
            return time.monotonic() + 60 * jumped.is_set()

    def work(ring):
        if ring.rank == 0:
            time.sleep(0.5)
            jumped.set()
            time.sleep(0.5)
        ring.barrier()

    with Gang(4, timeout=3) as gang:
        monkeypatch.setattr(ring_module, "time", Clock)
        assert gang.run(work) == [None] * 4


# ---------------------------------------------------------------- real processes that die


def member(rank, addresses, listener, timeout, spin, size, pipe):
    """Reduce for ever; report the first exchange, then the error that ended it."""
    ring = Ring.connect(rank=rank, addresses=addresses, listener=listener, secret=SECRET, timeout=timeout, spin=spin)
    buffer = np.zeros(size, np.float32)
    with suppress(EOFError):
        pipe.send("ready")
        while True:
            if pipe.poll():
                ring.abort(pipe.recv())
                os._exit(1)  # with whatever lies unread in its sockets
            result = outcome(ring.all_reduce, buffer)
            if result is not None:
                pipe.send((type(result).__name__, str(result)))
                pipe.recv()


class Processes:
    """The ranks of one ring, each in a process of its own, reducing for ever."""

    spin = False

    def __init__(self, world, size, timeout=20.0):
        context = multiprocessing.get_context("spawn")
        listeners = [listen(LOOPBACK) for _ in range(world)]
        addresses = [listener.getsockname() for listener in listeners]
        self.pipes, self.processes = [], []
        for rank, listener in enumerate(listeners):
            ours, theirs = context.Pipe()
            args = (rank, addresses, listener, timeout, self.spin, size, theirs)
            process = context.Process(target=member, args=args, daemon=True)
            process.start()
            listener.close()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self):
        for pipe in self.pipes:
            assert pipe.poll(60)
            assert pipe.recv() == "ready"
        time.sleep(0.2)  # well into the exchange
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def kill(self, rank, how):
        os.kill(self.processes[rank].pid, how)

    def errors(self, within, but):
        """Return what the ranks raise before a time has passed, all but one."""
        until = time.monotonic() + within
        errors = []
        for rank, pipe in enumerate(self.pipes):
            if rank != but:
                assert pipe.poll(max(0, until - time.monotonic())), f"rank {rank} has raised nothing yet"
                errors.append(pipe.recv())
        return errors


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("size", [100, 2_000_000])
def test_all_ranks_learn_long_before_the_timeout_who_was_killed(size):
    with Processes(4, size) as ring:
        ring.kill(2, signal.SIGKILL)
        errors = ring.errors(within=10, but=2)
    for kind, text in errors:
        assert kind == "PeerLost"
        assert re.fullmatch(r"rank 2 \(127\.0\.0\.1:\d+\) closed its connection", text)


@pytest.mark.usefixtures("spin")
@pytest.mark.parametrize("size", [100, 2_000_000])
def test_all_ranks_learn_after_the_timeout_who_keeps_silent(size):
    with Processes(4, size, timeout=2) as ring:
        ring.kill(2, signal.SIGSTOP)
        errors = ring.errors(within=20, but=2)
    for kind, text in errors:
        assert kind == "PeerLost"
        assert re.match(r"rank 2 .*(kept silent|took no data) for 2 s", text)


def test_the_reason_outlives_the_process_that_gave_it():
    with Processes(4, 2_000_000) as ring:
        ring.pipes[1].send("the loss is NaN")
        errors = ring.errors(within=5, but=1)
    assert set(errors) == {("PeerLost", "rank 1 failed: the loss is NaN")}


def measure_memory(rank, addresses, listener, pipe):
    ring = Ring.connect(rank=rank, addresses=addresses, listener=listener, secret=SECRET, timeout=60)
    buffer = np.full(50_000_000, rank + 1, np.float32)
    ring.all_reduce(np.ones(1000))
    before = peak_memory()
    ring.all_reduce(buffer, "mean")
    pipe.send((peak_memory() - before, buffer.min(), buffer.max()))
    ring.close()


def peak_memory():
    """Return the most memory this process has had, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
def test_a_buffer_of_200_mb_needs_no_second_one():
    context = multiprocessing.get_context("spawn")
    listeners = [listen(LOOPBACK) for _ in range(2)]
    addresses = [listener.getsockname() for listener in listeners]
    pipes = [context.Pipe() for _ in range(2)]
    for rank in range(2):
        args = (rank, addresses, listeners[rank], pipes[rank][1])
        context.Process(target=measure_memory, args=args, daemon=True).start()
        listeners[rank].close()
    for pipe, _ in pipes:
        assert pipe.poll(60)
        grown, least, most = pipe.recv()
        assert least == most == 1.5
        assert grown < 40


# ---------------------------------------------------------------- forming the ring


def connect(rank, listeners, addresses=None, secret=SECRET, timeout=4.0):
    return outcome(
        lambda: Ring.connect(
            rank=rank,
            addresses=addresses or [listener.getsockname() for listener in listeners],
            listener=listeners[rank],
            secret=secret,
            timeout=timeout,
        )
    )


def test_strangers_do_not_keep_the_ring_from_forming():
    listeners = [listen(LOOPBACK) for _ in range(2)]
    addresses = [listener.getsockname() for listener in listeners]
    pledge = meeting.Pledge(b"a guess", world=2, caller=1, answerer=0)
    openings = [
        *[b""] * 20,  # silent, and in all for longer than the ring may take to form
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(100_000),
        pledge.hello[:5],
        pledge.hello + os.urandom(32),  # knows the form, and then falls silent
        pledge.hello + os.urandom(32) + os.urandom(32),  # or cannot prove itself
    ]
    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        for address in addresses:
            for opening in openings:
                stranger = stack.enter_context(socket.create_connection(address))
                with suppress(ConnectionError):
                    stranger.sendall(opening)
            socket.create_connection(address).close()  # a port scanner
        others = [stack.enter_context(listen(LOOPBACK)), listen(LOOPBACK)]
        theirs = [addresses[0], others[1].getsockname()]
        impostor = threads.submit(connect, 1, others, theirs, b"a guess", timeout=1.0)
        rings = list(threads.map(lambda rank: connect(rank, listeners, addresses), range(2)))
        gathered = list(threads.map(lambda ring: ring.all_gather(b"%d" % ring.rank), rings))
        assert gathered == [[b"0", b"1"]] * 2
        check_all([impostor.result()], PeerLost, "rank 0 .*did not call")
        for ring in rings:
            ring.close()


def test_an_answerer_without_the_secret_is_not_trusted():
    """Whatever listens at a neighbour's address, even if it repeats all that it hears, gets no data."""
    listeners = [listen(LOOPBACK) for _ in range(2)]
    parrot = listeners[1]
    heard = []

    def repeat():
        with suppress(OSError):
            while True:
                guest, _ = parrot.accept()
                with guest:
                    heard.append(guest.recv(1000))
                    guest.sendall(heard[-1][-32:] + heard[-1][:32])
                    heard.append(guest.recv(1000))

    with ThreadPoolExecutor(2) as threads:
        threads.submit(repeat)
        result = threads.submit(connect, 0, listeners, timeout=1.0).result()
        parrot.shutdown(socket.SHUT_RDWR)
    parrot.close()
    check_all([result], PeerLost, "rank 1 .*did not answer.*does not know the run's secret.*within 1 s")
    assert len(heard) > 2  # it was called again
    assert set(map(len, heard[1::2])) == {0}  # and heard nothing after the hello


def test_ranks_with_different_secrets_do_not_meet():
    listeners = [listen(LOOPBACK) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        zero = threads.submit(connect, 0, listeners, secret=b"one", timeout=1.0)
        one = threads.submit(connect, 1, listeners, secret=b"another", timeout=1.0)
        check_all([zero.result()], PeerLost, "rank 1 .*within 1 s, says rank 0")
        check_all([one.result()], PeerLost, "rank 0 .*within 1 s, says rank 1")


def test_every_rank_learns_which_one_did_not_come():
    listeners = [listen(LOOPBACK) for _ in range(5)]
    addresses = [listener.getsockname() for listener in listeners]
    listeners[2].close()
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda rank: connect(rank, listeners, addresses, timeout=1.0), [0, 1, 3, 4])
        check_all(results, PeerLost, r"rank 2 at 127.0.0.1:\d+ did not .* within 1 s, says rank [13]$")


def test_a_late_rank_is_waited_for():
    listeners = [listen(LOOPBACK) for _ in range(3)]
    addresses = [listener.getsockname() for listener in listeners]
    host, port = addresses[2]
    listeners[2].close()  # until then, calls are refused

    def come(rank):
        if rank == 2:
            time.sleep(0.5)
            listeners[2] = socket.create_server((host, port))
        return connect(rank, listeners, addresses)

    with ThreadPoolExecutor(3) as threads:
        rings = list(threads.map(come, range(3)))
        assert list(threads.map(lambda ring: ring.all_gather(b"x"), rings)) == [[b"x"] * 3] * 3
        for ring in rings:
            ring.close()


def test_the_listener_is_closed_whether_or_not_the_ring_has_formed():
    good, bad = listen(LOOPBACK), listen(LOOPBACK)
    address, nobody = good.getsockname(), bad.getsockname()
    connect(0, [good]).close()
    check_all([connect(0, [bad], [nobody, address], timeout=0.3)], PeerLost, "rank 1 .*did not call.*answer")
    assert good.fileno() == bad.fileno() == -1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_arguments_of_connect_are_checked():
    with listen() as listener:
        with pytest.raises(ValueError, match="rank 2 has no address among the 1"):
            Ring.connect(rank=2, addresses=[("", 1)], listener=listener, secret=SECRET, timeout=1)
        with pytest.raises(ValueError, match="secret is empty"):
            Ring.connect(rank=0, addresses=[("", 1)], listener=listener, secret=b"", timeout=1)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_addresses_may_be_ipv6():
    try:
        listener = listen("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    ring = connect(0, [listener], [listener.getsockname()[:2]])
    ring.barrier()
    ring.close()
