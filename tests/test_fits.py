"""The fits of several param maps: equal to separate fits, in one start, shared by threads, and cleaned up after."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn.errors import ClusterError, ColumnError, DatasetError, ParamError, TrainingError
from spark_nn.gang import launch
from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(150)


def data(spark):
    df = spark.range(0, 600, 1, 2).select(F.rand(1).alias("a"), F.rand(2).alias("b"))
    return df.withColumn("label", F.expr("2*a - 3*b + 1"))


def estimator(store, **kwargs):
    return ToyEstimator(inputCols=["a", "b"], batchSize=60, verbose=0, storeUrl=store, **kwargs)


def weights(model):
    return np.load(model.fitted.file.path).tobytes()


@pytest.mark.parametrize("world", [1, 2])
def test_a_grid_gives_the_models_of_separate_fits(spark, store, world):
    df = data(spark)
    stage = estimator(store, numWorkers=world)
    maps = [{stage.learningRate: 0.1}, {stage.epochs: 3}, {stage.batchSize: 120}, {stage.seed: 5}]
    grid = dict(stage.fitMultiple(df, maps))
    assert grid.keys() == {0, 1, 2, 3}
    assert len({weights(model) for model in grid.values()}) == 4
    for place, each in enumerate(maps):
        assert weights(grid[place]) == weights(stage.fit(df, each))
        assert grid[place].uid == stage.uid
        assert grid[place].summary.seconds["total"] > 0


def test_maps_of_different_gangs_are_trained_too(spark, store):
    stage = estimator(store)
    models = dict(stage.fitMultiple(data(spark), [{stage.numWorkers: 2}, {stage.numWorkers: 1}]))
    assert [models[place].summary.numWorkers for place in (0, 1)] == [2, 1]


def test_threads_may_share_the_iterator(spark, store):
    stage = estimator(store)
    maps = [{stage.learningRate: 0.01 * place} for place in range(1, 7)]
    fits = stage.fitMultiple(data(spark), maps)
    with ThreadPoolExecutor(6) as pool:
        found = dict(pool.map(lambda _: next(fits), maps))
    assert found.keys() == set(range(6))
    losses = [found[place].summary.history["loss"][0] for place in range(6)]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(StopIteration):
        next(fits)


def test_what_is_wrong_with_a_map_is_told_before_anything_starts(spark, store, monkeypatch):
    stage = estimator(store)
    started = []
    monkeypatch.setattr(launch.SparkJob, "__enter__", lambda self: started.append(self))
    with pytest.raises(ParamError, match="batchSize=61 is not a multiple of numWorkers=2"):
        stage.fitMultiple(data(spark), [{}, {stage.batchSize: 61, stage.numWorkers: 2}])
    with pytest.raises(ColumnError, match="no such column|not in"):
        stage.fitMultiple(data(spark), [{stage.inputCols: ["a", "nowhere"]}])
    assert not started
    assert not list(Path(store).iterdir())


def test_no_maps_give_no_models(spark, store):
    assert list(estimator(store).fitMultiple(data(spark), [])) == []


def test_the_turn_of_a_map_that_fails_raises_and_the_others_go_on(spark, store):
    stage = estimator(store)
    fits = stage.fitMultiple(data(spark), [{stage.epochs: 2}, {stage.failRank: 0}, {stage.epochs: 3}])
    found, errors = {}, []
    for _ in range(3):
        try:
            place, model = next(fits)
            found[place] = model.summary.epochs
        except TrainingError as error:
            errors.append(error)
    assert found == {0: 2, 2: 3}
    assert "the toy broke on purpose" in str(errors[0])
    assert len(errors) == 1


def test_what_only_the_rows_can_show_ends_the_fit_of_its_map_alone(spark, store):
    stage = estimator(store)
    fits = stage.fitMultiple(data(spark).limit(3), [{stage.validationFraction: 0.9, stage.seed: 3}, {}])
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(next(fits)[0])
        except DatasetError as error:
            outcomes.append(str(error))
    told, place = sorted(outcomes, key=str, reverse=True)
    assert place == 1
    assert "rows" in told
    with pytest.raises(StopIteration):
        next(fits)


def test_what_ends_all_fits_is_told_to_all_that_wait_for_one(spark, store, monkeypatch):
    def broken(self, *args, **kwargs):
        raise ClusterError("no room")

    monkeypatch.setattr(launch.Gang, "runAll", broken)
    stage = estimator(store)
    fits = stage.fitMultiple(data(spark), [{}, {stage.epochs: 2}])
    for _ in range(3):
        with pytest.raises(ClusterError, match="no room"):
            next(fits)


def test_an_iterator_that_is_dropped_leaves_nothing(spark, store):
    stage = estimator(store, stepSeconds=0.2)
    fits = stage.fitMultiple(data(spark), [{stage.epochs: 1}, {stage.epochs: 100}])
    place, _ = next(fits)
    assert place == 0
    assert [path.name for path in Path(store).glob("run-*")]
    del fits
    gc.collect()
    until = time.monotonic() + 20
    while list(Path(store).glob("run-*")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not [each for each in threading.enumerate() if each.name == "progress"]


def test_progress_says_which_model_it_is_of(spark, store, capsys):
    stage = estimator(store)
    maps = [{stage.epochs: 2, stage.seed: 5}, {stage.seed: 5, stage.learningRate: 0.2}]
    list(stage.setVerbose(2).fitMultiple(data(spark), maps))
    lines = capsys.readouterr().err.splitlines()
    told = sorted(line.partition("  ")[0] for line in lines if line.startswith("["))
    assert told == ["[1/2 epochs=2] epoch 1/2", "[1/2 epochs=2] epoch 2/2", "[2/2 learningRate=0.2] epoch 1/1"]
