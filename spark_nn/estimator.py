"""The story of a fit and of a transform, framework-neutral.

A framework plugs in by four hooks: what travels to the gang (:meth:`NeuralEstimator._trainer`), what trains
there (the :class:`~spark_nn.trainer.Trainer` it returns), what loads the result for prediction
(:meth:`NeuralModel._loader`), and how the output is described (``Trained.outputs``).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pyspark.ml.base import Estimator, Model
from pyspark.ml.param import Param
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter

from spark_nn import columns
from spark_nn.columns import Tensor
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.materialize import Spec
from spark_nn.errors import ColumnError, ModelFileError, ParamError, SparkNNError
from spark_nn.fits import Fits
from spark_nn.gang.launch import Gang, Outcome
from spark_nn.outputs import Output, Outputs, columns_of
from spark_nn.params import ModelParams, TrainingParams
from spark_nn.persistence import ModelFile, StageReader, StageWriter
from spark_nn.scoring import Loader, Scorer, score, ship
from spark_nn.store import RunDir, store_url
from spark_nn.summary import TrainingSummary
from spark_nn.trainer import Schedule, Trained, Trainer

if TYPE_CHECKING:
    from pyspark.ml._typing import ParamMap
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
        ((_, model),) = Fits(dataset, [self._checked(dataset)])
        return model

    def fitMultiple(self, dataset: DataFrame, paramMaps: Sequence[ParamMap]) -> Iterator[tuple[int, M]]:
        """Fit a model for each param map, in one start of the gang and on rows that are written once.

        Maps with ``numWorkers=1`` are trained side by side, as many as the cluster has room for; maps of several
        workers one after the other.

        Parameters
        ----------
        dataset : pyspark.sql.DataFrame
            The rows.
        paramMaps : sequence of dict
            What to change of this estimator's params for each model.

        Returns
        -------
        iterator
            Yields the index of a map and its model; threads may share it, and the order is that of completion. Where a
            training fails, its turn raises the error, and the others go on.

        Raises
        ------
        ParamError, ColumnError, ClusterError
            A map holds what cannot be; nothing has been started.
        """
        estimators = [self.copy(each) for each in paramMaps]
        return Fits(dataset, [each._checked(dataset) for each in estimators])

    def _checked(self, dataset: DataFrame) -> _Fit[M]:
        """The fit of this estimator on a DataFrame, after all that can be wrong before anything is started."""
        began = time.monotonic()
        self.checkTrainingParams()
        self._check()
        schedule = self._schedule()
        spec = self._spec(dataset.schema, schedule)
        gpus = self.getUseGpu() if self.isDefined("useGpu") else None
        gang = Gang(dataset.sparkSession, self.getNumWorkers(), self.getTimeout(), self.getMaxRetries(), gpus)
        gang.check()
        store = store_url(dataset.sparkSession, self.getStoreUrl() if self.isDefined("storeUrl") else None)
        return _Fit(self, gang, store, spec, schedule, began, time.monotonic() - began)

    def _modelOf(self, trained: Trained, file: ModelFile, manifest: Manifest, summary: TrainingSummary) -> M:
        """The model that training gave."""
        model = self._newModel()
        # CrossValidator sets grid values on the model by the estimator's params: they must share the uid.
        model._resetUid(self.uid)
        outputs = {name: Output.fromDict(output) for name, output in trained.outputs.items()}
        model._fitted = Fitted(file, manifest.role("features"), outputs, summary)
        return self._copyValues(model)

    def _spec(self, schema: StructType, schedule: Schedule) -> Spec:
        """What is written of every row."""
        labels = self.labelTensors(schema)
        if self.isDefined("classWeights") and labels[0].depth > 1:
            raise ParamError(
                f"classWeights={self.getClassWeights()!r}, but a label in column {labels[0].columns[0]!r} has "
                f"{labels[0].depth} dimensions: it must be the class, or have one element per class; weight such rows "
                "with weightCol"
            )
        tensors = [*self.inputTensors(schema), *labels]
        if self.isDefined("weightCol") and self.getWeightCol():
            tensors.append(columns.weight(schema, self.getWeightCol()))
        if self.isDefined("validationIndicatorCol") and self.getValidationIndicatorCol():
            tensors.append(columns.validation(schema, self.getValidationIndicatorCol()))
        return Spec(
            tuple(tensors),
            validationFraction=self.getValidationFraction(),
            seed=schedule.seed,
            shuffle=schedule.shuffle,
            skip=self.getHandleInvalid() == "skip",
        )

    def _schedule(self) -> Schedule:
        return Schedule(
            epochs=self.getEpochs(),
            batch=self.getBatchSize(),
            seed=self.getSeed() % 2**63,  # NumPy takes no negative seeds, Spark does
            shuffle=self.getShuffle(),
            cache=self.getCache(),  # type: ignore[arg-type]
            classWeights=self.getClassWeights() if self.isDefined("classWeights") else {},
            nonFiniteLoss=self.getNonFiniteLoss(),  # type: ignore[arg-type]
            checkpointInterval=max(0, self.getCheckpointInterval()) if self.isDefined("checkpointInterval") else None,
            stepsPerEpoch=self.getStepsPerEpoch() if self.isDefined("stepsPerEpoch") else None,
        )


@dataclass(frozen=True)
class _Fit(Generic[M]):
    """A fit (see :class:`~spark_nn.fits.Fit`): the estimator's side of it."""

    estimator: NeuralEstimator[M]
    gang: Gang
    store: str
    spec: Spec
    schedule: Schedule
    began: float
    checking: float

    @property
    def verbose(self) -> int:
        return self.estimator.getVerbose()

    def trainer(self, run: RunDir) -> Trainer:
        return self.estimator._trainer(self.schedule, run)

    def model(self, outcome: Outcome, run: RunDir, manifest: Manifest, materializing: float) -> M:
        trained = Trained(**outcome.value)
        file = ModelFile.fetch(run, trained.file, trained.sha256)
        summary = TrainingSummary(
            history=trained.history,
            rows=manifest.rows("train"),
            validationRows=manifest.rows("validation"),
            skippedRows=manifest.skipped,
            numWorkers=self.gang.world,
            rowsPerSecond=trained.rowsPerSecond,
            epochSeconds=trained.epochSeconds,
            restarts=outcome.restarts,
            seconds={
                "check": self.checking,
                "materialize": materializing,
                **outcome.seconds,
                **trained.seconds,
                "total": time.monotonic() - self.began,
            },
        )
        return self.estimator._modelOf(trained, file, manifest, summary)


@dataclass(frozen=True)
class Fitted:
    """What a fit leaves in a model beside its params.

    Parameters
    ----------
    file : ModelFile
        The framework's native model file.
    inputs : tuple of Tensor
        The model's inputs, as they were trained.
    outputs : dict of str to Output
        What it puts out, by the model's names; the only one by the empty name.
    summary : TrainingSummary
        What the fit was like.
    """

    file: ModelFile
    inputs: tuple[Tensor, ...]
    outputs: Outputs
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
        inputs = self._inputs(dataset.schema)
        outputs = self.outputChoice().of(fitted.outputs)
        names = self._outputColumns(outputs)
        if not names:
            return dataset
        scorer = Scorer(
            file=ship(dataset.sparkSession, fitted.file.path),
            sha256=fitted.file.sha256,
            load=self._loader(),
            inputs=inputs,
            outputs=outputs,
            fields=tuple(names),
            skip=self.getHandleInvalid() == "skip",
        )
        return score(dataset, scorer, names)

    def _outputColumns(self, outputs: Outputs) -> dict[str, str]:
        """Name of the column for each value that a row gets, by its key; none for what is left out."""
        chosen = self.outputChoice().columns
        names = {}
        for field, (param, output) in columns_of(outputs).items():
            column = self.getOrDefault(self.getParam(param))
            if not column or chosen.get(output) == "":
                continue
            own = chosen.get(output) if param == "predictionCol" else None
            names[field] = own or (f"{column}_{output}" if output else column)
        return names

    def _inputs(self, schema: StructType) -> tuple[Tensor, ...]:
        """The DataFrame's columns as the inputs that the model was trained on."""
        found = {tensor.name: tensor for tensor in self.inputTensors(schema)}
        trained = {tensor.name: tensor for tensor in self.fitted.inputs}
        if found.keys() != trained.keys():
            raise ColumnError(
                f"the model was trained with the inputs {', '.join(map(repr, trained))}, and its params now name "
                f"{', '.join(map(repr, found))}: name columns for the same ones"
            )
        for name, tensor in found.items():
            known = trained[name]
            # Numbers may become floats, but floats not whole numbers, and strings neither.
            alike = tensor.dtype == known.dtype or (
                tensor.numeric and known.numeric and (known.dtype == "float32" or tensor.dtype != "float32")
            )
            if tensor.depth != known.depth or not alike:
                raise ColumnError(
                    f"column {tensor.columns[0]!r} holds {tensor.dtype} values of {tensor.depth} dimensions, and the "
                    f"model was trained with {known.dtype} values of {known.depth}: give it the same kind of column"
                )
            if tensor.shape is not None and tensor.shape != known.shape:
                raise ColumnError(
                    f"the columns {', '.join(map(repr, tensor.columns))} make an input of shape {tensor.shape}, and "
                    f"the model was trained with {known.shape} from {', '.join(map(repr, known.columns))}: name as many"
                )
        return tuple(replace(found[name], dtype=known.dtype, shape=known.shape) for name, known in trained.items())

    def _savedFiles(self) -> dict[str, ModelFile]:
        file = self.fitted.file
        return {f"model{file.path.suffix}": file}

    def _savedMetadata(self) -> dict[str, Any]:
        fitted = self.fitted
        return {
            "inputs": [tensor.toDict() for tensor in fitted.inputs],
            "outputs": {name: output.toDict() for name, output in fitted.outputs.items()},
            "summary": fitted.summary.toDict(),
        }

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if len(files) != 1:
            raise ModelFileError(f"a {type(self).__name__} has one model file, and {len(files)} were saved")
        (file,) = files.values()
        self._fitted = Fitted(
            file,
            tuple(Tensor.fromDict(tensor) for tensor in metadata["inputs"]),
            {name: Output.fromDict(output) for name, output in metadata["outputs"].items()},
            TrainingSummary.fromDict(metadata["summary"]),
        )
