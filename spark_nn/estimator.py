"""The story of a fit and of a transform, framework-neutral.

A framework plugs in by four hooks: what travels to the gang (:meth:`NeuralEstimator._trainer`), what trains
there (the :class:`~spark_nn.trainer.Trainer` it returns), what loads the result for prediction
(:meth:`NeuralModel._loader`), and how the output is described (``Trained.output``).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pyspark.ml.base import Estimator, Model
from pyspark.ml.param import Param
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter

from spark_nn import columns
from spark_nn.columns import Tensor
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.materialize import materialize
from spark_nn.errors import ModelFileError, SparkNNError
from spark_nn.gang.launch import Gang
from spark_nn.outputs import Output
from spark_nn.params import ModelParams, TrainingParams
from spark_nn.persistence import ModelFile, StageReader, StageWriter
from spark_nn.scoring import Loader, Scorer, score, ship
from spark_nn.store import RunDir, store_url
from spark_nn.summary import TrainingSummary
from spark_nn.trainer import Schedule, Trained, Trainer

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

M = TypeVar("M", bound="NeuralModel")


class _Stage(MLReadable[Any], MLWritable):
    """Saving and loading, alike for estimators and models."""

    # Params whose values may be functions, or hold some.
    functionParams: ClassVar[frozenset[str]] = frozenset()

    def write(self) -> MLWriter:
        """Writer that saves this stage."""
        return StageWriter(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        """Reader that loads a stage of this class."""
        return StageReader(cls)

    def _savedFiles(self) -> dict[str, ModelFile]:
        """Files to save under ``model/``, by name."""
        return {}

    def _unsavedParams(self) -> set[str]:
        """Params that the files stand for."""
        return set()

    def _savedMetadata(self) -> dict[str, Any]:
        """What else to save, as JSON can hold it."""
        return {}

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        """Take what was saved beside the params."""


class NeuralEstimator(Estimator[M], TrainingParams, _Stage, Generic[M]):
    """An estimator that trains a neural network on a gang of Spark tasks."""

    @abstractmethod
    def _check(self) -> None:
        """Check the framework's own params, before anything is started."""

    @abstractmethod
    def _trainer(self, schedule: Schedule, run: RunDir) -> Trainer:
        """What travels to the gang; large parts are left as files in the run directory."""

    @abstractmethod
    def _newModel(self) -> M:
        """An empty model."""

    def _fit(self, dataset: DataFrame) -> M:
        self.checkTrainingParams()
        self._check()
        tensors = self._tensors(dataset.schema)
        gang = Gang(dataset.sparkSession, self.getNumWorkers())
        gang.check()
        schedule = self._schedule()
        url = self.getStoreUrl() if self.isDefined("storeUrl") else None
        clock = [time.monotonic()]
        with RunDir.open(store_url(dataset.sparkSession, url)) as run:
            trainer = self._trainer(schedule, run)
            manifest = materialize(
                dataset,
                tensors,
                run,
                validationFraction=self.getValidationFraction(),
                seed=schedule.seed,
                shuffle=schedule.shuffle,
                workers=gang.world,
            )
            clock.append(time.monotonic())
            answer = gang.run(trainer, run, environment=trainer.environment, verbose=self.getVerbose())
            clock.append(time.monotonic())
            trained = Trained(**answer)
            file = ModelFile.fetch(run, trained.file, trained.sha256)
        model = self._newModel()
        # CrossValidator sets grid values on the model by the estimator's params: they must share the uid.
        model._resetUid(self.uid)
        summary = self._summary(trained, manifest, clock)
        model._fitted = Fitted(file, manifest.tensors[0], Output.fromDict(trained.output), summary)
        return self._copyValues(model)

    def _tensors(self, schema: StructType) -> list[Tensor]:
        """What is written of every row."""
        tensors = [
            columns.features(schema, *self.inputColumns()),
            columns.label(schema, self.getLabelCol()),
        ]
        if self.isDefined("weightCol") and self.getWeightCol():
            tensors.append(columns.weight(schema, self.getWeightCol()))
        if self.isDefined("validationIndicatorCol") and self.getValidationIndicatorCol():
            tensors.append(columns.validation(schema, self.getValidationIndicatorCol()))
        return tensors

    def _summary(self, trained: Trained, manifest: Manifest, clock: list[float]) -> TrainingSummary:
        """What the fit was like; `clock` holds when it began, when the rows were written and when training ended."""
        began, written, ended = clock
        return TrainingSummary(
            history=trained.history,
            rows=manifest.rows("train"),
            validationRows=manifest.rows("validation"),
            numWorkers=self.getNumWorkers(),
            rowsPerSecond=trained.rowsPerSecond,
            seconds={
                "materialize": written - began,
                "start": max(0.0, ended - written - sum(trained.seconds.values())),
                **trained.seconds,
                "total": time.monotonic() - began,
            },
        )

    def _schedule(self) -> Schedule:
        return Schedule(
            epochs=self.getEpochs(),
            batch=self.getBatchSize(),
            seed=self.getSeed() % 2**63,  # NumPy takes no negative seeds, Spark does
            shuffle=self.getShuffle(),
        )


@dataclass(frozen=True)
class Fitted:
    """What a fit leaves in a model beside its params.

    Parameters
    ----------
    file : ModelFile
        The framework's native model file.
    input : Tensor
        The model's input, as it was trained.
    output : Output
        What it puts out.
    summary : TrainingSummary
        What the fit was like.
    """

    file: ModelFile
    input: Tensor
    output: Output
    summary: TrainingSummary


class NeuralModel(Model, ModelParams, _Stage):
    """A fitted neural network that scores DataFrames."""

    _fitted: Fitted | None = None

    def hasParam(self, paramName: str) -> bool:
        """Whether the model has a param of this name."""
        # The inherited one would evaluate the property `model`, and with it load the network.
        return isinstance(getattr(type(self), paramName, None), Param)

    @abstractmethod
    def _loader(self) -> Loader:
        """The importable function that loads the model's file for prediction on an executor."""

    @property
    def fitted(self) -> Fitted:
        """What the fit left.

        Raises
        ------
        SparkNNError
            The model was made empty.
        """
        if self._fitted is None:
            name = type(self).__name__
            raise SparkNNError(f"this {name} is empty: get one from an estimator's fit or from {name}.load")
        return self._fitted

    @property
    def hasSummary(self) -> bool:
        """Whether there is a summary: always, in a model that was fitted."""
        return self._fitted is not None

    @property
    def summary(self) -> TrainingSummary:
        """What the fit was like: history, rows per second, timings."""
        return self.fitted.summary

    def _transform(self, dataset: DataFrame) -> DataFrame:
        fitted = self.fitted
        found = columns.features(dataset.schema, *self.inputColumns())
        trained = fitted.input
        names = {param: name for param in fitted.output.fields if (name := self.getOrDefault(self.getParam(param)))}
        if not names:
            return dataset
        scorer = Scorer(
            file=ship(dataset.sparkSession, fitted.file.path),
            sha256=fitted.file.sha256,
            load=self._loader(),
            input=replace(found, dtype=trained.dtype, width=trained.width),
            output=fitted.output,
            fields=tuple(names),
        )
        return score(dataset, scorer, names)

    def _savedFiles(self) -> dict[str, ModelFile]:
        file = self.fitted.file
        return {f"model{file.path.suffix}": file}

    def _savedMetadata(self) -> dict[str, Any]:
        fitted = self.fitted
        return {
            "input": fitted.input.toDict(),
            "output": fitted.output.toDict(),
            "summary": fitted.summary.toDict(),
        }

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if len(files) != 1:
            raise ModelFileError(f"a {type(self).__name__} has one model file, and {len(files)} were saved")
        (file,) = files.values()
        self._fitted = Fitted(
            file,
            Tensor.fromDict(metadata["input"]),
            Output.fromDict(metadata["output"]),
            TrainingSummary.fromDict(metadata["summary"]),
        )
