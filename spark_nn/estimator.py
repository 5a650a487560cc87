"""The story of a fit, framework-neutral.

A framework plugs in by hooks: what travels to the gang (:meth:`NeuralEstimator._trainer`), what trains there (the
:class:`~spark_nn.trainer.Trainer` it returns), how the output is described (``Trained.outputs``), and what its models
do with the result (see :mod:`spark_nn.model`).
"""

from __future__ import annotations

import functools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pyspark.ml.base import Estimator

from spark_nn import columns
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.materialize import Spec
from spark_nn.errors import ParamError
from spark_nn.fits import Fits
from spark_nn.gang.launch import Gang, Outcome
from spark_nn.model import Fitted, NeuralModel
from spark_nn.outputs import Output
from spark_nn.params import TrainingParams
from spark_nn.persistence import ModelFile
from spark_nn.stage import Stage
from spark_nn.store import RunDir, public_url, store_url
from spark_nn.summary import TrainingSummary
from spark_nn.tracking.events import run_folder, run_name
from spark_nn.tracking.mlflow import Run
from spark_nn.trainer import Schedule, Trained, Trainer

if TYPE_CHECKING:
    from pyspark.ml._typing import ParamMap
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType

M = TypeVar("M", bound="NeuralModel")
# Of a param's value in the label of a fit.
_LETTERS = 24


class NeuralEstimator(Estimator[M], TrainingParams, Stage, Generic[M]):
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

    def _servers(self) -> int:
        """Ranks beside the workers."""
        return 0

    def _environment(self) -> dict[str, str]:
        """What must be set in a rank's process before it imports the framework."""
        return {}

    def _fit(self, dataset: DataFrame) -> M:
        run = Run.active() if self.getTracking() == "mlflow" else None
        ((_, model),) = Fits(dataset, [self._checked(dataset, run_name(self.uid))])
        if run is not None:
            run.log_fit(self, dataset, model)
        return model

    def fitMultiple(self, dataset: DataFrame, paramMaps: Sequence[ParamMap]) -> Iterator[tuple[int, M]]:
        """Fit a model for each param map, in one start of the gang and on rows that are written once.

        Maps with ``numWorkers=1`` are trained side by side, as many as the cluster has room for; maps of several
        workers one after the other, and all of them where ``spark.speculation`` is on.

        Parameters
        ----------
        dataset : pyspark.sql.DataFrame
            The rows.
        paramMaps : sequence of dict
            What to change of this estimator's params for each model.

        Returns
        -------
        iterator
            Yields the index of a map and its model; threads may share it, and the order is that of completion. Where
            the fit of a map fails, its turn raises the error (``TrainingError``, ``DatasetError``, ``StoreError``, or
            ``ParamError`` for what only its model shows), and the others go on.

        Raises
        ------
        ParamError, ColumnError, ClusterError
            A map holds what cannot be; nothing has been started.
        """
        name = run_name(self.uid)
        estimators = [self.copy(changed) for changed in paramMaps]
        tracked = [estimator.getTracking() == "mlflow" for estimator in estimators]
        run = Run.active() if any(tracked) else None
        fits = []
        for place, (estimator, changed, label) in enumerate(
            zip(estimators, paramMaps, _labels(paramMaps), strict=True)
        ):
            fit = estimator._checked(dataset, f"{name}/map-{place}", label)
            if run is not None and tracked[place]:
                fit = replace(fit, told=functools.partial(run.log_map, estimator, changed))
            fits.append(fit)
        return Fits(dataset, fits)

    def _checked(self, dataset: DataFrame, name: str, label: str = "") -> _Fit[M]:
        """The fit of this estimator on a DataFrame, after all that can be wrong before anything is started.

        Parameters
        ----------
        dataset : pyspark.sql.DataFrame
            The rows.
        name : str
            What the fit is called below `logDir`.
        label : str
            What tells it from others of the same call, for those who watch.
        """
        began = time.monotonic()
        self.checkTrainingParams()
        self._check()
        schedule = self._schedule()
        spec = self._spec(dataset.schema, schedule)
        gpus = self.getUseGpu() if self.isDefined("useGpu") else None
        others = self._servers()
        world = self.getNumWorkers() + others
        gang = Gang(dataset.sparkSession, world, self.getTimeout(), self.getMaxRetries(), gpus, others)
        gang.check()
        store = store_url(dataset.sparkSession, self.getStoreUrl() if self.isDefined("storeUrl") else None)
        if self.isDefined("logDir"):
            schedule = replace(schedule, logUrl=run_folder(self.getLogDir(), name))
        return _Fit(self, label, gang, store, spec, schedule, began, time.monotonic() - began)

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
        tensors = [*self.inputTensors(schema), *labels, *self.weightTensors(schema)]
        if self.isDefined("validationIndicatorCol") and self.getValidationIndicatorCol():
            tensors.append(columns.validation(schema, self.getValidationIndicatorCol()))
        return Spec(
            tuple(tensors),
            validationFraction=self.getValidationFraction(),
            seed=schedule.seed,
            shuffle=schedule.shuffle,
            skip=self.getHandleInvalid() != "error",
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


def _labels(paramMaps: Sequence[ParamMap]) -> list[str]:
    """What tells the models of param maps from each other, for those who watch them being trained."""
    if len(paramMaps) == 1:
        return [""]
    values = [{param.name: _short(value) for param, value in each.items()} for each in paramMaps]
    names = dict.fromkeys(name for each in values for name in each)
    told = [name for name in names if len({each.get(name) for each in values}) > 1]
    return [
        " ".join([f"{place}/{len(values)}", *(f"{name}={each[name]}" for name in told if name in each)])
        for place, each in enumerate(values, 1)
    ]


def _short(value: Any) -> str:
    """A param's value in a few letters."""
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


@dataclass(frozen=True)
class _Fit(Generic[M]):
    """A fit (see :class:`~spark_nn.fits.Fit`): the estimator's side of it."""

    estimator: NeuralEstimator[M]
    label: str
    gang: Gang
    store: str
    spec: Spec
    schedule: Schedule
    began: float
    checking: float
    told: Callable[[M], None] | None = None

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.estimator._environment().items()))

    @property
    def verbose(self) -> int:
        return self.estimator.getVerbose()

    @property
    def followLogs(self) -> bool:
        return self.estimator.getFollowLogs()

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
            numWorkers=self.estimator.getNumWorkers(),
            rowsPerSecond=trained.rowsPerSecond,
            epochSeconds=trained.epochSeconds,
            restarts=outcome.restarts,
            logDir=self.schedule.logUrl and public_url(self.schedule.logUrl),
            seconds={
                "check": self.checking,
                "materialize": materializing,
                **{phase: each for phase, each in outcome.seconds.items() if phase != "finish"},
                **trained.seconds,
                **{phase: each for phase, each in outcome.seconds.items() if phase == "finish"},
                "total": time.monotonic() - self.began,
            },
        )
        model = self.estimator._modelOf(trained, file, manifest, summary)
        if self.told is not None:
            self.told(model)
        return model
