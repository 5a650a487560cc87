"""How the driver plans the writing: which tasks write, and what they must agree on."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.sql import functions as F

from spark_nn import columns
from spark_nn.dataset import materialize as module
from spark_nn.dataset.materialize import Spec, look, materialize
from spark_nn.dataset.stream import Stream
from spark_nn.store import RunDir

pytestmark = pytest.mark.timeout(120)


def data(spark, rows=3000, partitions=1):
    return spark.range(0, rows, 1, partitions).select(F.col("id").alias("n"), (F.col("id") * 2).alias("label"))


def spec(df, **changes):
    tensors = (columns.features(df.schema, "featuresCol", ["n"]), columns.label(df.schema, "label"))
    return Spec(tensors, **{"validationFraction": 0.0, "seed": 1, "shuffle": True, "skip": False, **changes})


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path.as_uri())


def labels(run, manifest, split="train"):
    stream = Stream(run, manifest, split, rank=0, world=1, batch=100, seed=0, shuffle=False)
    return np.concatenate([block["label"] for block in stream.epoch(0)])


@pytest.mark.parametrize(
    ("changes", "make", "files"),
    [
        ({}, lambda df: df, 2),  # one partition for two slots
        ({"shuffle": False}, lambda df: df, 1),  # the order is to be kept
        ({}, lambda df: df.repartition(3), 3),  # a shuffle has spread the rows already
        ({}, lambda df: df.repartition(1), 1),
    ],
)
def test_large_data_in_few_partitions_is_spread_over_the_slots(spark, run, monkeypatch, changes, make, files):
    monkeypatch.setattr(module, "_SPREAD_BYTES", 1)
    df = make(data(spark))
    manifest = materialize(df, spec(df, **changes), run)
    assert len({group.file for group in manifest.train}) == files
    written = labels(run, manifest)
    assert sorted(written.tolist()) == list(range(0, 6000, 2))
    assert look(df, spec(df, **changes)) == manifest.content
    if files == 2:
        sizes = [group.rows for group in manifest.train]
        assert min(sizes) > 1300
        # Neighbours were parted, and the same seed parts them in the same way.
        assert (np.abs(np.diff(written)) == 2).mean() < 0.01
        again = RunDir(f"{run.url}/again")
        assert labels(again, materialize(df, spec(df), again)).tolist() == written.tolist()


def test_small_data_is_written_where_it_lies(spark, run):
    df = data(spark)
    manifest = materialize(df, spec(df), run)
    assert len({group.file for group in manifest.train}) == 1


def test_what_was_written_is_what_the_dataframe_holds(spark, run):
    df = data(spark, partitions=4).where("n < 700 or n > 2900")  # some partitions are empty
    manifest = materialize(df, spec(df, shuffle=False, validationFraction=0.3), run)
    train, validation = labels(run, manifest), labels(run, manifest, "validation")
    assert sorted([*train, *validation]) == [row.label for row in df.collect()]
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert manifest.content.rows == 799
