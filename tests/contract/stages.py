"""The public stages, the toy's, and a value for each of their params."""

from __future__ import annotations

import pytest

from spark_nn import KerasEstimator, KerasModel, TorchEstimator, TorchModel
from tests.keras.models import mlp
from tests.torch.models import after_two, decay
from tests.toy import ToyEstimator, ToyModel

ESTIMATORS = [KerasEstimator, TorchEstimator, ToyEstimator]
MODELS = [KerasModel, TorchModel, ToyModel]
STAGES = [*ESTIMATORS, *MODELS]

# A value other than the default for every param, as a user would give it. Floats are such that 32 bits hold them.
VALUES = {
    "featuresCol": "f",
    "inputCols": ["a", "b"],
    "inputs": {"x": "a", "z": ["b", "c"]},
    "labelCol": "y",
    "labels": {"out": "y"},
    "handleInvalid": "skip",
    "classWeights": {0: 1.0, 3: 2.5},
    "cache": "disk",
    "weightCol": "w",
    "predictionCol": "p",
    "probabilityCol": "q",
    "rawPredictionCol": "r",
    "validationFraction": 0.5,
    "validationIndicatorCol": "v",
    "epochs": 7,
    "batchSize": 96,
    "numWorkers": 3,
    "shuffle": False,
    "seed": 17,
    "learningRate": 0.125,
    "storeUrl": "file:///nowhere",
    "verbose": 2,
    "followLogs": True,
    "model": mlp,
    "modelParams": {"units": 3},
    "optimizer": "sgd",
    "loss": "mse",
    "metrics": ["mae"],
    "callbacks": mlp,
    "nonFiniteLoss": "ignore",
    "timeout": 12.5,
    "maxRetries": 1,
    "checkpointInterval": 9,
    "collective": "ring",
    "parameterServers": 1,
    "useGpu": False,
    "stepsPerEpoch": 11,
    "lossWeights": 0.5,
    "outputKind": "raw",
    "threshold": 0.75,
    "outputCols": {"out": "p"},
    "predictBatchSize": 512,
    "customObjects": {"mlp": mlp},
    "optimizerParams": {"momentum": 0.5},
    "lrScheduler": decay,
    "lrSchedulerInterval": "step",
    "clipGradNorm": 0.5,
    "clipGradValue": 0.25,
    "mixedPrecision": "bf16",
    "stopWhen": after_two,
    "failRank": 1,
    "stepSeconds": 0.5,
    "failingWrites": 2,
    "ballast": 3,
}
# Params that take a fitted model, which have tests of their own.
FITTED = {"initialModel"}
# The toy's own, which no user sets.
TOYS = {"failRank", "stepSeconds", "failingWrites", "ballast"}


def name_of(stage):
    return stage.__name__


def values(stage):
    """A value for each of a stage's params."""
    names = [param.name for param in stage().params if param.name not in FITTED]
    for name in names:
        if name not in VALUES:
            pytest.fail(
                f"{stage.__name__}.{name} has no value in VALUES of {__name__}: add one that is not its default"
            )
    return {name: VALUES[name] for name in names}


def upper(name):
    return name[0].upper() + name[1:]
