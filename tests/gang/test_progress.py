from __future__ import annotations

import time

from spark_nn.gang import progress
from spark_nn.gang.progress import PROGRESS, Display, Reporter, State
from spark_nn.store import RunDir


def finished(epochs):
    history = {"loss": [0.5, 0.25][:epochs], "val_loss": [0.75, 0.125][:epochs]}
    return {"history": history, "seconds": [2.0, 4.0][:epochs], "rows": 1000}


def test_rank_0_publishes_its_latest_state_and_nobody_else_does(tmp_path):
    with RunDir.open(f"file://{tmp_path}") as run:
        silent = Reporter(run, 1)
        silent.update(epoch=9)
        silent.close()
        assert run.readJson(PROGRESS) is None
        reporter = Reporter(run, 0)
        for step in range(100):
            reporter.update(epoch=1, step=step)
        reporter.update(**finished(2))
        reporter.close()
        state = State(**run.readJson(PROGRESS))
        assert (state.epoch, state.step, state.seconds) == (1, 99, [2.0, 4.0])
        assert state.rowsPerSecond == 2000 / 6


def test_finished_epochs_are_lines_on_standard_error(tmp_path, capsys):
    with RunDir.open(f"file://{tmp_path}") as run:
        with Display(2).shown(run):
            reporter = Reporter(run, 0)
            reporter.update(epoch=1, epochs=2, **finished(1))
            time.sleep(1.2)
            reporter.update(**finished(2))
            reporter.close()
        out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "epoch 1/2  loss 0.5000  val_loss 0.7500  500 rows/s",
        "epoch 2/2  loss 0.2500  val_loss 0.1250  250 rows/s",
    ]


def test_verbose_0_says_nothing(tmp_path, capsys):
    with RunDir.open(f"file://{tmp_path}") as run, Display(0).shown(run):
        reporter = Reporter(run, 0)
        reporter.update(epochs=2, **finished(2))
        reporter.close()
    assert capsys.readouterr().err == ""


def lines_of_a_second_attempt(tmp_path, capsys, taken_over):
    """What a second attempt prints that takes over so many finished epochs of one that had finished the first."""
    display = Display(2)
    for attempt, before, after in [("a", 0, 1), ("b", taken_over, 2)]:
        (tmp_path / attempt).mkdir()
        with RunDir.open(f"file://{tmp_path}/{attempt}") as run, display.shown(run):
            reporter = Reporter(run, 0)
            reporter.update(epochs=2, phase="start", **finished(before))
            time.sleep(1.2)
            reporter.update(epoch=before + 1)
            time.sleep(1.2)
            reporter.update(**finished(after))
            reporter.close()
        printed = capsys.readouterr().err.splitlines()
    return [line.partition("  ")[0] for line in printed]


def test_epochs_that_an_attempt_takes_over_are_not_told_again(tmp_path, capsys):
    assert lines_of_a_second_attempt(tmp_path, capsys, 1) == ["epoch 2/2"]


def test_epochs_that_are_trained_again_are_told_again(tmp_path, capsys):
    assert lines_of_a_second_attempt(tmp_path, capsys, 0) == ["epoch 1/2", "epoch 2/2"]


def test_counts_are_told_as_counts():
    state = State(epochs=2, rows=100, history={"loss": [0.5], "updates": [821]}, seconds=[1.0])
    assert progress._line(state, 0) == "epoch 1/2  loss 0.5000  updates 821  100 rows/s"
