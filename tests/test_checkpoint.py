from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spark_nn import checkpoint
from spark_nn.checkpoint import Checkpoints, Place
from spark_nn.errors import CheckpointError, StoreError
from spark_nn.gang.collective import Alone
from spark_nn.store import RunDir


def gang(folder, attempt=0):
    scratch = Path(folder) / "scratch"
    scratch.mkdir(exist_ok=True)
    run = RunDir(f"file://{folder}")
    return SimpleNamespace(rank=0, world=1, attempt=attempt, run=run, scratch=scratch, collective=Alone())


def save(checkpoints, step, part=None):
    arrays = {"weights": np.arange(step, dtype=np.float32), "empty": np.zeros((0, 3))}
    checkpoints.save(Place(1, step), {"loss": [0.5, step]}, arrays, {"counter": np.array([step])}, part)


def files(folder, attempt=0):
    return sorted(path.name for path in (Path(folder) / f"attempt-{attempt}/checkpoints").iterdir())


def test_what_is_saved_comes_back_in_the_next_attempt(tmp_path):
    save(Checkpoints(gang(tmp_path), 1, {"seed": 7}), 12)
    found = Checkpoints(gang(tmp_path, attempt=1), 1, {"seed": 7}).restore()
    assert found.place == Place(1, 12)
    assert found.state == {"loss": [0.5, 12]}
    np.testing.assert_array_equal(found.arrays["weights"], np.arange(12, dtype=np.float32))
    assert found.arrays["weights"].dtype == np.float32
    assert found.arrays["empty"].shape == (0, 3)
    assert set(found.arrays) == {"weights", "empty"}
    np.testing.assert_array_equal(found.own["counter"], [12])
    assert not list((tmp_path / "scratch").iterdir())


def test_the_first_attempt_and_one_after_nothing_begin_at_the_beginning(tmp_path):
    save(Checkpoints(gang(tmp_path), 1, {}), 3)
    assert Checkpoints(gang(tmp_path), 1, {}).restore() is None
    (tmp_path / "empty").mkdir()
    assert Checkpoints(gang(tmp_path / "empty", attempt=2), 1, {}).restore() is None


def test_two_are_kept_and_the_newest_is_taken(tmp_path):
    checkpoints = Checkpoints(gang(tmp_path), 1, {})
    for step in (5, 10, 15):
        save(checkpoints, step)
    assert files(tmp_path) == [f"000001-{step:09d}.{end}" for step in (10, 15) for end in ("json", "npz")]
    assert Checkpoints(gang(tmp_path, attempt=1), 1, {}).restore().place.step == 15
    # An attempt that came to none passes on what the one before had.
    assert Checkpoints(gang(tmp_path, attempt=2), 1, {}).restore().place.step == 15
    save(Checkpoints(gang(tmp_path, attempt=1), 1, {}), 4)
    assert Checkpoints(gang(tmp_path, attempt=2), 1, {}).restore().place.step == 4


@pytest.mark.parametrize("damage", ["bytes", "no arrays", "cut json", "json of something else", "pickle"])
def test_a_damaged_one_is_told_and_the_one_before_taken(tmp_path, damage, caplog):
    checkpoints = Checkpoints(gang(tmp_path), 1, {})
    save(checkpoints, 5)
    save(checkpoints, 10)
    newest = tmp_path / "attempt-0/checkpoints/000001-000000010"
    arrays, described = newest.with_suffix(".npz"), newest.with_suffix(".json")
    if damage == "bytes":
        data = bytearray(arrays.read_bytes())
        data[len(data) // 2] ^= 1
        arrays.write_bytes(data)
    elif damage == "no arrays":
        arrays.unlink()
    elif damage == "cut json":
        described.write_bytes(described.read_bytes()[:-9])
    elif damage == "json of something else":
        described.write_text("[]")
    else:
        np.savez(arrays, weights=np.array([object()], dtype=object))
        described.write_text(json.dumps({**json.loads(described.read_text()), "sha256": checkpoint.digest(arrays)}))
    with caplog.at_level(logging.WARNING, "spark_nn"):
        found = Checkpoints(gang(tmp_path, attempt=1), 1, {}).restore()
    assert found.place.step == 5
    assert "000001-000000010" in caplog.text
    assert "damaged" in caplog.text


def test_what_a_rank_wrote_itself_comes_back_or_the_one_before_does(tmp_path, caplog):
    checkpoints = Checkpoints(gang(tmp_path), 1, {})
    for step in (5, 10, 15):
        save(checkpoints, step, {"half": np.full(3, step)})
    names = [f"000001-{step:09d}.{end}" for step in (10, 15) for end in ("json", "npz", "rank-0.npz")]
    assert files(tmp_path) == names
    again = Checkpoints(gang(tmp_path, attempt=1), 1, {}).restore()
    assert (again.place.step, again.part["half"].tolist()) == (15, [15] * 3)
    (tmp_path / "attempt-0/checkpoints" / names[-1]).write_bytes(b"not what it was")
    with caplog.at_level(logging.WARNING, "spark_nn"):
        again = Checkpoints(gang(tmp_path, attempt=1), 1, {}).restore()
    assert (again.place.step, again.part["half"].tolist()) == (10, [10] * 3)
    assert "000001-000000015" in caplog.text
    assert not list((tmp_path / "scratch").iterdir())


def test_a_checkpoint_of_another_training_is_refused_with_both_values(tmp_path):
    save(Checkpoints(gang(tmp_path), 1, {"batch": 32, "model": "a"}), 5)
    again = Checkpoints(gang(tmp_path, attempt=1), 1, {"batch": 64})
    with pytest.raises(CheckpointError, match="whose batch is 32, where this training's is 64"):
        again.restore(model="a")
    again = Checkpoints(gang(tmp_path, attempt=1), 1, {"batch": 32})
    with pytest.raises(CheckpointError, match="whose model is 'a', where this training's is 'b'"):
        again.restore(model="b")
    other = gang(tmp_path, attempt=1)
    other.world = 2
    with pytest.raises(CheckpointError, match="whose world is 1, where this training's is 2"):
        Checkpoints(other, 1, {"batch": 32}).restore(model="a")


def test_a_store_that_is_full_is_an_error_and_leaves_no_part(tmp_path, monkeypatch):
    member = gang(tmp_path)
    checkpoints = Checkpoints(member, 1, {})
    monkeypatch.setattr(member.run.fs, "put_file", full)
    with pytest.raises(StoreError, match=r"cannot write '000001-000000003.npz'.*No space left.*make room") as caught:
        save(checkpoints, 3)
    assert not caught.value.transient
    monkeypatch.undo()
    assert files(tmp_path) == []
    assert not list((tmp_path / "scratch").iterdir())


def full(*_):
    raise OSError(28, "No space left on device")


def test_at_fixed_steps_it_is_due_once_each_whatever_the_steps_come_in():
    fixed = checkpoint._Fixed(10)
    fixed.begin(0)
    assert [done for done in range(4, 50, 4) if fixed.due(done)] == [12, 20, 32, 40]
    fixed.begin(25)
    assert [done for done in range(26, 50) if fixed.due(done)] == [30, 40]
    never = checkpoint._Fixed(0)
    never.begin(0)
    assert not any(never.due(done) for done in range(1, 100))


@pytest.mark.parametrize("speed", [0.4, 50.0, 3000.0])
def test_by_the_clock_it_is_due_about_every_minute_at_the_price_of_few_looks(monkeypatch, speed):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    alone = Alone()
    looks = []
    monkeypatch.setattr(alone, "all_gather", lambda data: looks.append(now[0]) or [data])
    clock = checkpoint._Clock(alone)
    clock.begin(0)
    saved = []
    for done in range(1, int(speed * 400) + 1):
        now[0] += 1 / speed
        if clock.due(done):
            saved.append(now[0])
            clock.saved(0.01)
    between = np.diff([100.0, *saved])
    assert len(saved) >= 6
    assert between.min() >= 0.9 * 60
    assert between.max() <= 60 + 2 / speed + 3
    assert len(looks) < 20 * len(saved) + 20


def test_by_the_clock_writing_takes_a_twentieth_of_the_time_at_most(monkeypatch):
    clock = checkpoint._Clock(Alone())
    clock.saved(30.0)
    assert clock.period == 600.0
    clock.saved(0.1)
    assert clock.period == 60.0
