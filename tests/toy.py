"""A "framework" of NumPy: linear regression by gradient descent. It drives the whole house in seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from pyspark import keyword_only

from spark_nn.estimator import NeuralEstimator, NeuralModel
from spark_nn.params import integer, param
from spark_nn.trainer import Trained, Trainer, check_digests, publish


class ToyEstimator(NeuralEstimator["ToyModel"]):
    failRank = param("failRank", "Rank that raises an error at its third step; -1 for none.", integer("failRank"))

    @keyword_only
    def __init__(self, **kwargs):
        super().__init__()
        self._setDefault(failRank=-1, learningRate=0.1)
        self._set(**self._input_kwargs)

    def _check(self):
        pass

    def _trainer(self, schedule, run):
        return ToyTrainer(schedule, self.getLearningRate(), self.getOrDefault("failRank"))

    def _newModel(self):
        return ToyModel()


class ToyModel(NeuralModel):
    def _loader(self):
        return load


@dataclass
class Toy:
    weights: np.ndarray

    def predict(self, x):
        return x @ self.weights[:-1] + self.weights[-1]

    def gradient(self, x, y):
        error = self.predict(x) - y
        return np.append(x.T @ error, error.sum()) * (2 / len(x))


class ToyTrainer(Trainer):
    def __init__(self, schedule, rate, failRank):
        super().__init__(schedule)
        self.rate = rate
        self.failRank = failRank

    def train(self, gang, manifest, data, validation):
        (width,) = manifest.tensor("features").shape
        toy = Toy(np.zeros(width + 1))
        gang.progress.update(epochs=self.schedule.epochs, steps=data.steps, rows=data.rows * gang.world)
        history = {"loss": [], "rows": []}
        for epoch in range(self.schedule.epochs):
            began = time.monotonic()
            seen = np.zeros(2)
            for step, block in enumerate(data.epoch(epoch)):
                if gang.rank == self.failRank and step == 2:
                    raise ValueError("the toy broke on purpose")
                x, y = block["features"].astype(np.float64), block["label"].astype(np.float64)
                gradient = toy.gradient(x, y)
                gang.collective.all_reduce(gradient, "mean")
                toy.weights -= self.rate * gradient
                seen += [((toy.predict(x) - y) ** 2).sum(), len(x)]
            gang.collective.all_reduce(seen)
            history["loss"].append(seen[0] / seen[1])
            history["rows"].append(seen[1])
            seconds = [*gang.progress.state.seconds, time.monotonic() - began]
            gang.progress.update(epoch=epoch + 1, history=history, seconds=seconds)
        check_digests(gang, toy.weights.tobytes())
        name, sha256 = publish(gang, lambda path: np.save(path, toy.weights), ".npy") if gang.rank == 0 else ("", "")
        return Trained(
            file=name,
            sha256=sha256,
            outputs={"": {"kind": "regression", "shape": [1], "logits": False}},
            history=history,
            rowsPerSecond=gang.progress.state.rowsPerSecond,
            epochSeconds=gang.progress.state.seconds,
        )


def load(path, cpus):
    toy = Toy(np.load(path, allow_pickle=False))
    return lambda block: toy.predict(block.astype(np.float64))[:, None]
