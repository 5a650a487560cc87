"""Driver side: fits as MLflow shows them.

Only a run that the user has begun is written to, and MLflow is imported here only after the user has. A fit goes into
that run, with its model; each map of a grid into a run of its own below that, without.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spark_nn.columns import quoted
from spark_nn.persistence import versions
from spark_nn.store import public_url

if TYPE_CHECKING:
    from pyspark.ml._typing import ParamMap
    from pyspark.sql import DataFrame

# What one request to MLflow's servers may hold.
_PARAMS, _METRICS = 100, 900
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """An MLflow run that the user has begun.

    Parameters
    ----------
    id, experiment : str
        The run's id, and that of its experiment.
    uri : str
        Where it is kept.
    """

    id: str
    experiment: str
    uri: str

    @classmethod
    def active(cls) -> Run | None:
        """The run that is active in this thread; a warning and None where there is none."""
        mlflow: Any = sys.modules.get("mlflow")
        run = None if mlflow is None else mlflow.active_run()
        if run is None:
            warnings.warn(
                "tracking='mlflow', and no MLflow run is active in this thread: the fit is not logged. Call fit inside "
                "'with mlflow.start_run():', or set tracking='none'",
                stacklevel=4,
            )
            return None
        return cls(run.info.run_id, run.info.experiment_id, mlflow.get_tracking_uri())

    def log_fit(self, estimator: Any, dataset: DataFrame, model: Any) -> None:
        """Log a fit into the run: the estimator's params, the metrics of each epoch, and the model.

        A run that holds other values by these names, of another fit, gets them with ``fit-2.`` before them.
        """
        params, history = _params(estimator), model.summary.history
        prefix: str | None = None
        with _told(self):
            prefix = self._prefix(params, history)
        if prefix is None:  # without it, what another fit has told might be taken for this one's
            return
        with _told(self):
            self._write_params(self.id, prefix, params)
        with _told(self):
            self._write_metrics(self.id, prefix, history)
        with _told(self):
            _log_model(model, dataset, f"{prefix.replace('.', '-')}model")

    def log_map(self, estimator: Any, changed: ParamMap, model: Any) -> None:
        """Log the fit of a param map into a run of its own below this one: params and metrics."""
        with _told(self):
            name = ", ".join(f"{param.name}={_text(value) or repr(value)}" for param, value in changed.items())
            tags = {"mlflow.parentRunId": self.id}
            run = self._client().create_run(self.experiment, tags=tags, run_name=name or estimator.uid).info.run_id
            status = "FAILED"
            try:
                self._write_params(run, "", _params(estimator))
                self._write_metrics(run, "", model.summary.history)
                status = "FINISHED"
            finally:
                self._client().set_terminated(run, status)

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def _prefix(self, params: Mapping[str, str], history: Mapping[str, Any]) -> str:
        """What to put before names that the run has for something else."""
        held = self._client().get_run(self.id).data
        for number in itertools.count(1):
            prefix = "" if number == 1 else f"fit-{number}."
            other = any(held.params.get(f"{prefix}{name}", value) != value for name, value in params.items())
            if not other and not any(f"{prefix}{name}" in held.metrics for name, _, _ in _scalars(history)):
                break
        return prefix

    def _write_params(self, run: str, prefix: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(f"{prefix}{name}", value) for name, value in params.items()]
        for start in range(0, len(entries), _PARAMS):
            self._log(run, "params", entries[start : start + _PARAMS])

    def _write_metrics(self, run: str, prefix: str, history: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(f"{prefix}{name}", value, now, epoch) for name, epoch, value in _scalars(history)]
        for start in range(0, len(entries), _METRICS):
            self._log(run, "metrics", entries[start : start + _METRICS])

    def _log(self, run: str, kind: str, entries: Sequence[Any]) -> None:
        """Log entries in one request; where MLflow refuses a name or a value, those of each name by themselves."""
        from mlflow.exceptions import MlflowException

        try:
            self._client().log_batch(run, **{kind: entries})
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            for name in dict.fromkeys(each.key for each in entries):
                with _told(self):
                    self._client().log_batch(run, **{kind: [each for each in entries if each.key == name]})


def _log_model(model: Any, dataset: DataFrame, name: str) -> None:
    """Log a model into the active run, as ``mlflow.spark.load_model`` loads it."""
    if getattr(dataset.sparkSession, "_jsparkSession", None) is None:
        _LOG.warning(
            "tracking='mlflow': the model is not logged, as MLflow saves models of Spark ML through a JVM, which Spark "
            "Connect does not have; save it with model.save, or fit in a classic session"
        )
        return
    import mlflow.spark
    from mlflow.models import infer_signature

    scored = model.transform(dataset)
    read = [column for _, columns in model.inputColumns().values() for column in columns]
    added = [column for column in scored.columns if column not in dataset.columns]
    required = [
        f"{name}=={version}" for name, version in versions(model.libraries).items() if version and name != "python"
    ]
    mlflow.spark.log_model(
        model,
        name,
        signature=infer_signature(dataset.select(*map(quoted, read)), scored.select(*map(quoted, added))),
        # MLflow would find them out by loading the model in another process.
        pip_requirements=required,
    )


def _params(estimator: Any) -> dict[str, str]:
    """The params that JSON can hold, set or by default."""
    found = ((param.name, _text(value)) for param, value in estimator.extractParamMap().items())
    return {name: text for name, text in found if text is not None}


def _text(value: Any) -> str | None:
    """A value as MLflow shows it, None where JSON cannot hold it."""
    try:
        return public_url(value) if isinstance(value, str) else json.dumps(value)
    except (TypeError, ValueError):
        return None


def _scalars(history: Mapping[str, list[Any]]) -> Iterator[tuple[str, int, float]]:
    """Each metric's name, epoch and value; a metric of several has a name for each."""
    for name, values in history.items():
        several = any(map(np.ndim, values))
        for epoch, value in enumerate(values):
            if several and not np.ndim(value):  # an epoch that has none of them
                continue
            for place, each in enumerate(np.ravel(value).tolist()):
                yield f"{name}/{place}" if np.ndim(value) else name, epoch, float(each)


@contextlib.contextmanager
def _told(run: Run) -> Iterator[None]:
    """A block that talks to MLflow, whose trouble must not cost the model that training has come to."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (every tracking store has errors of its own)
        _LOG.warning(
            "tracking='mlflow': something of the fit could not be logged to the run %s of %s (%s: %s); the model "
            "that fit returns is not affected",
            run.id,
            public_url(run.uri),
            type(error).__name__,
            error,
            exc_info=True,
        )
