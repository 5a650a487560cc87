"""What TensorBoard is told: of fits by way of the toy, and by the writer itself; frameworks are with their own fits."""

from __future__ import annotations

import re
import threading
import time
from types import SimpleNamespace

import fsspec
import pytest
from pyspark.sql import functions as F

from spark_nn.errors import ParamError, StoreError
from spark_nn.store import RunDir
from spark_nn.tracking.events import Events, run_folder
from tests.toy import ToyEstimator, ToyModel
from tests.tracking.reading import check_told, found, scalars

pytestmark = pytest.mark.timeout(120)


def until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def gang(tmp_path, attempt=0):
    return SimpleNamespace(rank=0, host="a-host", attempt=attempt, scratch=tmp_path / f"scratch-{attempt}")


def test_each_fit_and_each_map_has_a_folder_of_its_own(spark, store, tmp_path):
    df = spark.range(0, 200, 1, 2).select(F.rand(1).alias("a"), F.rand(2).alias("b"), F.rand(3).alias("label"))
    logs = tmp_path / "logs"
    stage = ToyEstimator(
        inputCols=["a", "b"], batchSize=50, epochs=2, verbose=0, storeUrl=store, logDir=str(logs), numWorkers=2
    )
    models = dict(stage.fitMultiple(df, [{stage.learningRate: 0.1}, {stage.learningRate: 0.2}]))
    (run,) = logs.iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}\.\d{{6}}-{stage.uid}", run.name)
    for place, rate in enumerate((0.1, 0.2)):
        assert models[place].summary.logDir == f"file://{run}/map-{place}"
        rates = check_told(models[place].summary.logDir, models[place].summary.history)
        assert rates == pytest.approx({0: rate, 1: rate})
    path = str(tmp_path / "model")
    models[1].save(path)
    assert ToyModel.load(path).summary == models[1].summary
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ParamError, match=r"logDir='.*file/logs' cannot be written: .*Not a directory"):
        stage.setLogDir(f"{file}/logs").fit(df)


def test_a_training_that_begins_from_the_start_again_is_told_once(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for attempt in (0, 1):
        events = Events(f"file://{folder}", gang(tmp_path, attempt), 0)
        for epoch in range(3 - attempt):
            events.epoch(epoch, {"loss": 10 * attempt + epoch}, None, 100.0)
        events.close()
    assert scalars(folder / "train")["epoch_loss"] == [(0, 10.0), (1, 11.0)]


def test_an_epoch_that_is_told_again_counts_once(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    first = Events(f"file://{folder}", gang(tmp_path), 0, lambda: (None, '{"layers": 1}'))
    for epoch in range(3):
        first.epoch(epoch, {"loss": epoch, "val_loss": 10 + epoch, "recall": [0.5, 0.25]}, 0.5, 100.0)
    first.close()
    again = Events(f"file://{folder}", gang(tmp_path, attempt=1), 2)
    for epoch in (2, 3):
        again.epoch(epoch, {"loss": epoch, "val_loss": 10 + epoch, "recall": [0.5, 0.75]}, None, 100.0)
    again.close()
    train = scalars(folder / "train")
    assert train["epoch_loss"] == [(epoch, epoch) for epoch in range(4)]
    assert scalars(folder / "validation") == {"epoch_loss": [(epoch, 10 + epoch) for epoch in range(4)]}
    assert train["epoch_recall/1"] == [(0, 0.25), (1, 0.25), (2, 0.75), (3, 0.75)]
    assert train["epoch_learning_rate"] == [(0, 0.5), (1, 0.5)]
    (layers,) = found(folder / "train").Tensors("keras")
    assert layers.tensor_proto.string_val == [b'{"layers": 1}']


def test_an_object_store_gets_copies_and_trouble_with_it_does_not_end_the_training(tmp_path, caplog):
    def draw():
        raise ValueError("a network like no other")

    events = Events("memory://logs/run", gang(tmp_path), 0, draw)
    events.epoch(0, {"loss": 1.0}, None, 100.0)
    until(lambda: RunDir("memory://logs/run").names("train"))
    assert "cannot be drawn, and is left out (ValueError: a network like no other)" in caplog.text
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "put", lambda *_: 1 / 0)
        events.epoch(1, {"loss": 2.0}, None, 100.0)
        until(lambda: "epoch 2 could not be written to memory://logs/run (division by zero)" in caplog.text)
    events.close()  # the last one is tried again
    fsspec.filesystem("memory").get("/logs/run", str(tmp_path / "copy"), recursive=True)
    assert scalars(tmp_path / "copy" / "train")["epoch_loss"] == [(0, 1.0), (1, 2.0)]
    fsspec.filesystem("memory").rm("/logs", recursive=True)


def test_a_store_that_hangs_holds_up_no_epoch_and_the_end_not_for_long(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("spark_nn.tracking.events._MOST", 2)
    monkeypatch.setattr("spark_nn.tracking.events._PATIENCE", 0.1)
    copying, let_go = threading.Event(), threading.Event()
    monkeypatch.setattr(RunDir, "put", lambda *_: (copying.set(), let_go.wait(60)))
    events = Events("memory://slow/run", gang(tmp_path), 0)
    events.epoch(0, {"loss": 1.0}, None, 100.0)
    assert copying.wait(20)
    for epoch in range(1, 5):  # would never come to an end
        events.epoch(epoch, {"loss": 1.0}, None, 100.0)
    assert caplog.text.count("memory://slow/run is too slow: 2 epochs wait, and others are left out") == 1
    events.close()
    assert "the last epochs are not yet written to memory://slow/run after 0.1 s" in caplog.text
    let_go.set()
    monkeypatch.setattr("spark_nn.tracking.events._PATIENCE", 20)
    events.close()
    assert [step for step, _ in scalars(tmp_path / "scratch-0" / "events" / "train")["epoch_loss"]] == [0, 1, 2]
    fsspec.filesystem("memory").rm("/slow", recursive=True)


def test_a_url_that_cannot_be_opened_is_told_by_the_name_of_its_param(tmp_path):
    with pytest.raises(ParamError, match="^logDir='no-such://x/run': .*Install the filesystem's package"):
        run_folder("no-such://x", "run")
    with pytest.raises(StoreError, match="^logDir='no-such://x/run': "):
        Events("no-such://x/run", gang(tmp_path), 0)


def test_a_folder_that_only_the_driver_has_is_named(tmp_path):
    with pytest.raises(ParamError, match="a-host, where the first worker runs, does not see .*nowhere"):
        Events(f"file://{tmp_path}/nowhere", gang(tmp_path), 0)
