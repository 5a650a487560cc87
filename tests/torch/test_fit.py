"""A fit on a gang against a plain loop of PyTorch's in one process, on the batches that the ranks have together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from torch.nn import functional

from spark_nn import TorchEstimator
from tests.keras.test_fit import arrays, data
from tests.torch import models

pytestmark = pytest.mark.timeout(240)


def estimator(store, **kwargs):
    settings = {
        "model": models.mlp,
        "loss": "binary_cross_entropy_with_logits",
        "inputCols": ["a", "b", "c"],
        "batchSize": 32,
        "epochs": 2,
        "seed": 11,
        "verbose": 0,
        "shuffle": False,
        "storeUrl": store,
        **kwargs,
    }
    return TorchEstimator(**settings)


def logits(output, target):
    return functional.binary_cross_entropy_with_logits(output, target.float()[:, None])


OPTIMIZERS = {
    "adam": (2, "adam", {}, torch.optim.Adam),
    "momentum": (2, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "three": (3, "AdamW", {"weight_decay": 0.1}, torch.optim.AdamW),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_workers_equal_one_process_on_the_global_batches(sessions, store, name):
    world, given, arguments, kind = OPTIMIZERS[name]
    spark = sessions.get(f"local[{max(2, world)}]")
    df = data(spark)
    x, y, _ = arrays(df)
    settings = {"optimizer": given, "optimizerParams": arguments, "learningRate": 0.02, "batchSize": 12 * world}
    model = estimator(store, numWorkers=world, **settings).fit(df)
    expected = models.single_process(
        models.mlp, x, y, world, 12 * world, 2, 11, loss=logits, optimizer=lambda p: kind(p, lr=0.02, **arguments)
    )
    assert models.relative(models.weights(model.model), models.weights(expected)) < 1e-5
    scored = model.transform(df)
    assert scored.columns == [*df.columns, "rawPrediction", "probability", "prediction"]
    by_id = {row.id: row.probability[1] for row in scored.collect()}
    with torch.inference_mode():
        found = expected(torch.from_numpy(x)).sigmoid().numpy()[:, 0]
    np.testing.assert_allclose([by_id[row.id] for row in df.collect()], found, atol=1e-6)
    assert BinaryClassificationEvaluator().evaluate(scored) > 0.6
