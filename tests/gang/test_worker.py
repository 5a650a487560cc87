from __future__ import annotations

import io
import os
import sys

import pytest
from pyspark.resource import ResourceInformation

from spark_nn.errors import ClusterError, ParamError
from spark_nn.gang.failure import Failure, first_failure
from spark_nn.gang.launch import Gang
from spark_nn.gang.worker import Home, _check_alike, _tail, child_environment, first_environment, versions
from spark_nn.store import RunDir


def test_a_rank_gets_an_environment_of_its_own():
    base = {"PATH": "/bin", "AWS_REGION": "x", "TF_CONFIG": "of an earlier job", "RANK": "7", "OMP_NUM_THREADS": "64"}
    env = child_environment(base, 3, ["1", "4"])
    assert env["PATH"] == "/bin"
    assert env["AWS_REGION"] == "x"
    assert "TF_CONFIG" not in env
    assert "RANK" not in env
    assert env["OMP_NUM_THREADS"] == env["TF_NUM_INTRAOP_THREADS"] == "3"
    assert env["CUDA_VISIBLE_DEVICES"] == "1,4"
    assert env["MALLOC_MMAP_THRESHOLD_"] == "33554432"
    assert env["PYTHONPATH"].split(os.pathsep) == [path for path in sys.path if path]
    assert child_environment(base, 1, [])["CUDA_VISIBLE_DEVICES"] == ""
    assert base["RANK"] == "7"


class Task:
    """A task of Spark's that has been assigned two GPUs."""

    def cpus(self):
        return 2

    def resources(self):
        return {"gpu": ResourceInformation("gpu", ["3", "5"])}


@pytest.mark.parametrize(("gpus", "visible"), [(True, "3,5"), (False, "")])
def test_a_rank_sees_the_gpus_of_its_task_unless_it_must_not(gpus, visible):
    assert Home(gpus=gpus).environment(Task())["CUDA_VISIBLE_DEVICES"] == visible


def test_a_rank_starts_in_the_environment_that_its_task_was_started_in(monkeypatch):
    monkeypatch.setenv("LEFT_BY_A_JOB", "x")
    assert os.environ["LEFT_BY_A_JOB"] == "x"
    found = first_environment()
    assert "LEFT_BY_A_JOB" not in found
    assert found["PATH"]


def test_gpus_that_are_demanded_must_be_assigned(spark):
    with pytest.raises(ParamError, match="useGpu=True, but Spark assigns no GPU to its tasks: set spark.task.resource"):
        Gang(spark, 1, gpus=True).check()
    Gang(spark, 1, gpus=False).check()


def test_executors_that_differ_are_an_error_that_names_the_package():
    cards = [
        {"rank": 0, "host": "a", "versions": {"python": "3.11.7", "keras": "3.15.1"}},
        {"rank": 1, "host": "b", "versions": {"python": "3.11.7", "keras": "3.15.2"}},
    ]
    message = r"keras differs between the executors: 3.15.1 on a \(rank 0\), 3.15.2 on b \(rank 1\)"
    with pytest.raises(ClusterError, match=message):
        _check_alike(cards)
    del cards[1]["versions"]["keras"]
    with pytest.raises(ClusterError, match="keras differs .* 3.15.1 on a .* nothing on b"):
        _check_alike(cards)
    _check_alike([cards[0], {**cards[0], "rank": 1}])
    assert versions()["python"].startswith("3.")


def test_of_what_a_process_printed_only_the_missing_card_is_left_out():
    head = "E0000 00:00:1795671072.081854   10823 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error: "
    missing = [
        f"{head}Failed call to cuInit: UNKNOWN ERROR (303)",
        f"{head}CUDA_ERROR_NO_DEVICE: no CUDA-capable device",
    ]
    told = [
        "step 1\r step 2",
        "",
        f"{head}Failed call to cuInit: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: system has unsupported display driver",
        "W0000 00:00:1795671072.5 10823 cuInit.cc:303] something else",
        "out of memory",
    ]
    log = io.BytesIO("\n".join([*told[:2], missing[0], *told[2:], missing[1], ""]).encode())
    assert _tail(log, card=False) == "\n".join(told)
    for card in (False, True):
        assert _tail(io.BytesIO(f"{missing[0]}\n".encode()), card=card) == (missing[0] if card else "")


def failure(rank, kind, when):
    return Failure(rank, f"host{rank}", kind, f"reason {rank}", when=when)


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([], None),
        ([("peer", 1.0), ("error", 2.0)], 1),  # a survivor may report before the cause does
        ([("died", 1.0), ("error", 2.0)], 1),  # an exception says more than a death
        ([("error", 2.0), ("error", 1.0)], 1),
        ([("peer", 2.0), ("peer", 1.0)], 1),
    ],
)
def test_the_cause_is_told_from_its_consequences(tmp_path, failures, first):
    with RunDir.open(f"file://{tmp_path}") as run:
        run.mkdir("failures")
        for rank, (kind, when) in enumerate(failures):
            failure(rank, kind, when).save(run)
        found = first_failure(run, 2, patience=0.0)
        assert (found and found.rank) == first
