"""Several functions in one start of a gang: in turn or side by side, and what the failure of one does to the others."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from spark_nn.errors import TrainingError
from spark_nn.gang import launch
from spark_nn.gang.launch import Gang, Job, Outcome
from spark_nn.store import RunDir

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def starts(monkeypatch):
    """The Spark jobs that gangs begin: how many tasks, and whether they go together."""
    begun = []

    class Counted(launch.SparkJob):
        def __init__(self, spark, task, tasks, *, barrier):
            begun.append((tasks, barrier))
            super().__init__(spark, task, tasks, barrier=barrier)

    monkeypatch.setattr(launch, "SparkJob", Counted)
    return begun


def run_all(gang, store, functions):
    with RunDir.open(f"file://{store}") as run:
        jobs = [Job(run.below(f"job-{place}"), function) for place, function in enumerate(functions)]
        return list(gang.runAll(jobs, run))


def answer(context, name):
    """What is written in the job's own directory, the rank's part in it, and the process that did it."""
    parts = context.collective.all_gather(f"{name}{context.rank}".encode())
    return {"name": b"".join(parts).decode(), "process": os.getpid()}


@pytest.mark.parametrize(("world", "started"), [(1, [(3, False)]), (2, [(2, True)])])
def test_several_functions_run_in_one_start(spark, store, starts, world, started):
    done = run_all(Gang(spark, world), store, [functools.partial(answer, name=name) for name in "abc"])
    assert starts == started
    assert {place for place, _ in done} == {0, 1, 2}
    if world == 2:
        assert [place for place, _ in done] == [0, 1, 2]
    names = {place: outcome.value["name"] for place, outcome in done}
    assert names == {place: "".join(f"{name}{rank}" for rank in range(world)) for place, name in enumerate("abc")}
    # Each has a process of its own: what one leaves behind in it, another does not find.
    assert len({outcome.value["process"] for _, outcome in done}) == 3
    assert all({"start", "wait"} <= outcome.seconds.keys() for _, outcome in done)


def meets(context, folder, mine, other):
    """End only when the other one has begun."""
    (folder / mine).touch()
    until = time.monotonic() + 60
    while not (folder / other).exists():
        assert time.monotonic() < until, f"{mine} never met {other}"
        time.sleep(0.05)
    return mine


def test_functions_of_one_rank_run_side_by_side(spark, store, tmp_path):
    folder = Path(tmp_path)
    functions = [functools.partial(meets, folder=folder, mine=a, other=b) for a, b in (("x", "y"), ("y", "x"))]
    assert sorted(outcome.value for _, outcome in run_all(Gang(spark, 1), store, functions)) == ["x", "y"]


def breaks(context):
    raise ValueError("broken on purpose")


@pytest.mark.parametrize("world", [1, 2])
def test_one_that_fails_does_not_end_the_others(spark, store, starts, world):
    functions = [functools.partial(answer, name="a"), breaks, functools.partial(answer, name="c")]
    done = dict(run_all(Gang(spark, world), store, functions))
    assert isinstance(done[1], TrainingError)
    assert "ValueError: broken on purpose" in str(done[1])
    assert done[1].rank in range(world)
    assert 'raise ValueError("broken on purpose")' in done[1].workerTraceback
    assert {done[place].value["name"][0] for place in (0, 2)} == {"a", "c"}
    # Those in line behind it take another start; those beside it do not.
    assert len(starts) == world


def killed_once(context, name):
    if context.attempt == 0 and context.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(context, name)


@pytest.mark.parametrize("world", [1, 2])
def test_one_that_is_killed_is_begun_again_alone(spark, store, starts, world):
    functions = [functools.partial(answer, name="a"), functools.partial(killed_once, name="b")]
    done = dict(run_all(Gang(spark, world, retries=1), store, functions))
    assert done[0].restarts == []
    (why,) = done[1].restarts
    assert "rank 0" in why
    assert "killed by SIGKILL" in why
    assert done[1].seconds["lost"] > 0
    assert done[1].value["name"][0] == "b"
    assert starts == ([(2, False), (1, False)] if world == 1 else [(2, True), (2, True)])


def test_what_is_killed_too_often_is_an_error_of_its_own(spark, store):
    done = dict(
        run_all(Gang(spark, 1), store, [functools.partial(killed_once, name="a"), functools.partial(answer, name="b")])
    )
    assert isinstance(done[1], Outcome)
    assert isinstance(done[0], TrainingError)
    assert done[0].transient


def waits(context):
    time.sleep(60)


def test_who_drops_the_iterator_ends_what_has_begun(spark, store):
    with RunDir.open(f"file://{store}") as run:
        jobs = [Job(run.below("a"), functools.partial(answer, name="a")), Job(run.below("b"), waits)]
        outcomes = Gang(spark, 1).runAll(jobs, run)
        place, _ = next(outcomes)
        assert place == 0  # though the other one is not done
        outcomes.close()
    tracker = spark.sparkContext.statusTracker()
    until = time.monotonic() + 20
    while tracker.getActiveJobsIds():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_where_spark_runs_second_copies_of_tasks_a_rank_keeps_to_a_barrier(spark, store, starts, monkeypatch):
    monkeypatch.setattr(Gang, "_speculates", lambda self: True)
    done = run_all(Gang(spark, 1), store, [functools.partial(answer, name=name) for name in "ab"])
    assert [outcome.value["name"] for _, outcome in done] == ["a0", "b0"]
    assert starts == [(1, True)]
