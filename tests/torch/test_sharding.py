"""A fit whose network is divided over the ranks against one where each holds it whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyspark.sql import functions as F

from spark_nn.errors import ParamError, TrainingError
from tests.failure.processes import no_rank_is_left
from tests.torch import models
from tests.torch.test_fit import data, estimator

pytestmark = pytest.mark.timeout(240)

# Weighted rows, of which the ranks' shares differ; rows held back of which one rank has more batches.
CASES = {
    "clipped": {
        "model": models.wide,
        "optimizer": "adamw",
        "optimizerParams": {"weight_decay": 0.1},
        "clipGradNorm": 0.5,
        "weightCol": "w",
        "lrScheduler": models.decay,
        "lrSchedulerInterval": "step",
        "metrics": ["auroc", "accuracy"],
    },
    "transformer": {
        "model": models.transformer,
        "optimizer": "sgd",
        "optimizerParams": {"momentum": 0.9},
        "clipGradValue": 0.01,
    },
    "halves": {"model": models.wide, "optimizer": "sgd", "mixedPrecision": "bf16"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_divided_network_comes_to_what_a_whole_one_does(spark, store, name):
    df = data(spark, 264).withColumn("held", F.expr("id % 8 = 1"))
    settings = {"numWorkers": 2, "learningRate": 0.01, "validationIndicatorCol": "held", **CASES[name]}
    whole, divided = (estimator(store, sharding=each, **settings).fit(df) for each in ("none", "fsdp"))
    assert models.relative(models.weights(divided.model), models.weights(whole.model)) < 1e-5
    for measure, values in whole.getHistory().items():
        np.testing.assert_allclose(divided.getHistory()[measure], values, rtol=1e-5, err_msg=measure)
    found, expected = (each.transform(df).select("probability").collect() for each in (divided, whole))
    np.testing.assert_allclose([each[0][1] for each in found], [each[0][1] for each in expected], atol=1e-5)
    no_rank_is_left()
