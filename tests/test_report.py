from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from spark_nn import report as module
from spark_nn.checkpoint import Place
from spark_nn.gang.progress import Reporter, State
from spark_nn.report import Report


@pytest.fixture
def clock(monkeypatch):
    """The time, which goes on where a test says so."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Silent(Reporter):
    """A reporter that rank 0 would have, without a thread."""

    def __init__(self):
        super().__init__(None, 1)
        self.heard = True


def test_only_training_counts_into_the_rate_and_a_validation_is_timed(clock):
    progress = Silent()
    report = Report(progress, 2, 10, 1000, Place(0, 0))
    report.begin_epoch(0)
    clock.now += 7  # tracing
    report.end_step(2)
    assert (progress.state.step, progress.state.busy, progress.state.phase) == (2, 0.0, "training")
    clock.now += 3
    report.end_step(10)
    assert progress.state.busy == 3.0
    clock.now += 1
    report.begin_validation()
    clock.now += 5
    report.end_epoch({"loss": 0.5})
    assert (progress.state.pause, progress.state.seconds) == (5.0, [11.0])
    clock.now += 50
    report.begin_epoch(1)
    clock.now += 2
    report.end_step(4)
    assert progress.state.busy == 6.0
    clock.now += 2
    report.end_epoch({"loss": 0.25})
    assert (progress.state.pause, progress.state.seconds) == (0.0, [11.0, 4.0])
    assert progress.state.history == {"loss": [0.5, 0.25]}


def test_what_an_epoch_does_not_have_is_nan_wherever_the_history_goes(clock):
    progress = Silent()
    report = Report(progress, 4, 1, 10, Place(0, 0))
    for epoch, logs in enumerate([{"loss": 4.0}, {"loss": 3.0, "auc": 0.5}, {"loss": 2.0}, {"loss": 1.0, "auc": 0.75}]):
        report.begin_epoch(epoch)
        clock.now += 1
        report.end_epoch(logs)
    history = State.fromDict(json.loads(json.dumps(asdict(progress.state)))).history
    assert list(history) == ["loss", "auc"]
    np.testing.assert_array_equal(history["loss"], [4.0, 3.0, 2.0, 1.0])
    np.testing.assert_array_equal(history["auc"], [np.nan, 0.5, np.nan, 0.75])


def test_the_loss_so_far_is_due_twice_a_second_and_only_where_somebody_is_told(clock):
    progress = Silent()
    report = Report(progress, 2, 100, 1000, Place(0, 0))
    report.begin_epoch(0)
    asked = []
    for step in range(1, 101):
        clock.now += 0.125
        due = report.due
        report.end_step(step, step / 100 if due else None)
        asked += [step] if due else []
    assert asked[:4] == [1, 5, 9, 13]
    assert progress.state.loss == asked[-1] / 100
    assert report.wanted(100)  # so that an epoch's bar ends with its loss
    assert not report.wanted(99)
    report.begin_epoch(1)
    assert progress.state.loss is None
    clock.now += 10
    progress.heard = False
    assert not report.due
    assert not report.wanted(100)
