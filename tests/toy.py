"""A "framework" of NumPy: linear regression by gradient descent. It drives the whole house in seconds."""

from __future__ import annotations

import errno
import shutil
import time
from dataclasses import dataclass

import numpy as np
from pyspark import keyword_only

from spark_nn.checkpoint import Place
from spark_nn.converters import integer, number, param
from spark_nn.errors import ParamError
from spark_nn.estimator import NeuralEstimator
from spark_nn.model import NeuralModel
from spark_nn.report import Report
from spark_nn.trainer import Trained, Trainer, check_digests, publish


class ToyEstimator(NeuralEstimator["ToyModel"]):
    failRank = param("failRank", "Rank that raises an error at its third step; -1 for none.", integer("failRank"))
    stepSeconds = param("stepSeconds", "Seconds to sleep in every step.", number("stepSeconds", low=0.0))
    failingWrites = param("failingWrites", "Files that the store refuses from rank 0.", integer("failingWrites", low=0))
    ballast = param("ballast", "Bytes that every checkpoint holds besides.", integer("ballast", low=0))

    @keyword_only
    def __init__(self, **kwargs):
        super().__init__()
        self._setDefault(failRank=-1, learningRate=0.1, stepSeconds=0.0, failingWrites=0, ballast=0)
        self._set(**self._input_kwargs)

    def _check(self):
        pass

    def _trainer(self, schedule, run):
        names = ("learningRate", "failRank", "stepSeconds", "failingWrites", "ballast")
        return ToyTrainer(schedule, **{name: self.getOrDefault(name) for name in names})

    def _newModel(self):
        return ToyModel()


class ToyModel(NeuralModel):
    def _loader(self):
        return load

    def _measurer(self):
        return ToyMeasure

    def _exporter(self, format):
        if format != "npy":
            raise ParamError(f"format={format!r}: must be 'npy'")
        return lambda path: shutil.copyfile(self.fitted.file.path, path)


@dataclass
class Toy:
    weights: np.ndarray

    def predict(self, x):
        return x @ self.weights[:-1] + self.weights[-1]

    def gradient(self, x, y):
        error = self.predict(x) - y
        return np.append(x.T @ error, error.sum()) * (2 / len(x))


class ToyTrainer(Trainer):
    preload = ("spark_nn.dataset.petastorm_compat:load",)

    def __init__(self, schedule, learningRate, failRank, stepSeconds, failingWrites, ballast):
        super().__init__(schedule)
        self.rate = learningRate
        self.failRank = failRank
        self.stepSeconds = stepSeconds
        self.failingWrites = failingWrites
        self.ballast = ballast

    def train(self, gang, manifest, data, validation, checkpoints):
        (width,) = manifest.tensor("features").shape
        toy = Toy(np.zeros(width + 1))
        if gang.rank == 0 and self.failingWrites:
            refuse(gang.run.fs, self.failingWrites)
        seen, place = np.zeros(2), Place(0, 0)
        if (found := checkpoints.restore()) is not None:
            place, seen = found.place, found.own["seen"]
            gang.progress.update(history=found.state["history"])
            toy.weights[:] = np.frombuffer(bytes.fromhex(found.state["weights"]))
        checkpoints.begin(place.epoch * data.steps + place.step)
        report = Report(gang.progress, self.schedule.epochs, data.steps, data.rows * gang.world, place)
        for epoch in range(place.epoch, self.schedule.epochs):
            report.begin_epoch(epoch)
            start = place.step if epoch == place.epoch else 0
            for step, block in enumerate(data.epoch(epoch, start=start), start + 1):
                report.end_step(step, seen[0] / seen[1] if seen[1] else None)
                if gang.rank == self.failRank and step == 3:
                    raise ValueError("the toy broke on purpose")
                x, y = block["features"].astype(np.float64), block["label"].astype(np.float64)
                gradient = toy.gradient(x, y)
                gang.collective.all_reduce(gradient, "mean")
                toy.weights -= self.rate * gradient
                seen += [((toy.predict(x) - y) ** 2).sum(), len(x)]
                if self.stepSeconds:
                    time.sleep(self.stepSeconds)
                if checkpoints.due(epoch * data.steps + step) and step < data.steps:
                    state = {"history": gang.progress.state.history, "weights": toy.weights.tobytes().hex()}
                    ballast = np.ones(self.ballast, np.uint8)
                    checkpoints.save(Place(epoch, step), state, {"ballast": ballast}, {"seen": seen})
            gang.collective.all_reduce(seen)
            report.end_epoch({"loss": seen[0] / seen[1], "rows": seen[1]})
            seen = np.zeros(2)
        check_digests(gang, toy.weights.tobytes())
        name, sha256 = publish(gang, lambda path: np.save(path, toy.weights), ".npy") if gang.rank == 0 else ("", "")
        return Trained(
            file=name,
            sha256=sha256,
            outputs={"": {"kind": "regression", "shape": [1], "logits": False}},
            history=gang.progress.state.history,
            rowsPerSecond=gang.progress.state.rowsPerSecond,
            epochSeconds=gang.progress.state.seconds,
        )


def refuse(fs, times):
    """Let a filesystem fail so many times when a file is put there, as a disk or a network does."""
    put, left = fs.put_file, [times]

    def failing(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "the disk has a bad day")
        return put(*args, **kwargs)

    fs.put_file = failing


class ToyPredictor:
    rows = 1000

    def __init__(self, toy):
        self.toy = toy

    def __call__(self, inputs):
        return self.toy.predict(inputs.astype(np.float64))[:, None]


def load(path, share):
    return ToyPredictor(Toy(np.load(path, allow_pickle=False)))


class ToyMeasure:
    """Counts weighted squared errors."""

    def __init__(self, path, share):
        self.predict = load(path, share)
        self.sums = np.zeros(2)

    def reset(self):
        self.sums[:] = 0

    def add(self, inputs, labels, weights):
        errors = (self.predict(inputs)[:, 0] - labels.reshape(len(labels), -1).mean(axis=1)) ** 2
        self.sums += [(errors * (1 if weights is None else weights)).sum(), len(errors)]

    def state(self):
        return self.sums.tobytes()

    def merge(self, state):
        self.sums += np.frombuffer(state)

    def results(self):
        return {"loss": self.sums[0] / self.sums[1], "rows": self.sums[1]}
