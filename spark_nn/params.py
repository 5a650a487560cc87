"""Params shared by every estimator and model, their converters and their checks.

A converter raises ``TypeError`` for a value of the wrong type (pyspark adds the param's name) and
:class:`~spark_nn.errors.ParamError` for a value out of range. Unlike pyspark's own converters they take
NumPy scalars, which is what a loop over ``np.logspace`` hands out.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import (
    HasFeaturesCol,
    HasInputCols,
    HasLabelCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasSeed,
    HasValidationIndicatorCol,
    HasWeightCol,
)

from spark_nn.errors import ParamError

P = TypeVar("P", bound=Params)


def integer(name: str, *, low: int | None = None) -> Callable[[Any], int]:
    """Converter for whole numbers of at least `low`; refuses booleans and fractions."""

    def convert(value: Any) -> int:
        whole = isinstance(value, numbers.Integral) or (isinstance(value, numbers.Real) and float(value).is_integer())
        if isinstance(value, (bool, np.bool_)) or not whole:
            raise TypeError(f"{name} takes a whole number, not {value!r} ({type(value).__name__})")
        if low is not None and int(value) < low:
            raise ParamError(f"{name}={int(value)}: must be at least {low}")
        return int(value)

    return convert


def number(name: str, *, above: float | None = None, low: float | None = None, below: float | None = None) -> Any:
    """Converter for finite numbers in an interval: `above` and `below` are excluded, `low` is included."""

    def convert(value: Any) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} takes a number, not {value!r} ({type(value).__name__})")
        result = float(value)
        limits = [
            (above is not None and not result > above, f"above {above}"),
            (low is not None and not result >= low, f"at least {low}"),
            (below is not None and not result < below, f"below {below}"),
            (not np.isfinite(result), "finite"),
        ]
        for broken, rule in limits:
            if broken:
                raise ParamError(f"{name}={result}: must be {rule}")
        return result

    return convert


def boolean(name: str) -> Callable[[Any], bool]:
    """Converter for true and false, NumPy's included."""

    def convert(value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} takes True or False, not {value!r} ({type(value).__name__})")
        return bool(value)

    return convert


def choice(name: str, allowed: Sequence[Any]) -> Callable[[Any], Any]:
    """Converter that lets only the values in `allowed` through."""

    def convert(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bool) or value not in allowed:
            raise ParamError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
        return value

    return convert


def plain_dict(name: str) -> Callable[[Any], dict[str, Any]]:
    """Converter for a dict with string keys whose values JSON can hold; NumPy scalars become plain ones."""

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (str, bool, int, float)):
            return value
        if isinstance(value, (list, tuple)):
            return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        raise TypeError(
            f"{where} is {value!r} ({type(value).__name__}): only numbers, strings, booleans, None, lists "
            "and dicts with string keys can be saved with the stage. Pass anything else through the "
            "function that uses it"
        )

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError(f"{name} takes a dict, not {value!r} ({type(value).__name__})")
        result: dict[str, Any] = plain(value, name)
        return result

    return convert


def param(name: str, doc: str, converter: Callable[[Any], Any]) -> Param[Any]:
    """Declare a Param, as pyspark.ml does it."""
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class ModelParams(HasFeaturesCol, HasInputCols, HasLabelCol, HasPredictionCol, HasProbabilityCol, HasRawPredictionCol):
    """Params that an estimator and its fitted model share: the columns they read and write."""

    inputCols: Param[list[str]] = param(
        "inputCols",
        "Names of numeric or boolean columns joined, in this order, into the model's single input. "
        "Used in place of featuresCol.",
        TypeConverters.toListString,
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def setFeaturesCol(self: P, value: str) -> P:
        """Set :py:attr:`featuresCol`: a Vector or array column that holds the model's single input."""
        return self._set(featuresCol=value)

    def setInputCols(self: P, value: list[str]) -> P:
        """Set :py:attr:`inputCols`."""
        return self._set(inputCols=value)

    def setLabelCol(self: P, value: str) -> P:
        """Set :py:attr:`labelCol`."""
        return self._set(labelCol=value)

    def setPredictionCol(self: P, value: str) -> P:
        """Set :py:attr:`predictionCol`; an empty name leaves the column out."""
        return self._set(predictionCol=value)

    def setProbabilityCol(self: P, value: str) -> P:
        """Set :py:attr:`probabilityCol`; an empty name leaves the column out."""
        return self._set(probabilityCol=value)

    def setRawPredictionCol(self: P, value: str) -> P:
        """Set :py:attr:`rawPredictionCol`; an empty name leaves the column out."""
        return self._set(rawPredictionCol=value)

    def inputColumns(self) -> tuple[str, list[str]]:
        """The param that names the model's input, and the columns it names.

        Raises
        ------
        ParamError
            Both featuresCol and inputCols were set, or inputCols is empty.
        """
        if not self.isSet("inputCols"):
            return "featuresCol", [self.getFeaturesCol()]
        if self.isSet("featuresCol"):
            raise ParamError(
                f"featuresCol={self.getFeaturesCol()!r} and inputCols={self.getInputCols()!r} are both set, "
                "but the model has one input: set one of them (and clear the other)"
            )
        if not self.getInputCols():
            raise ParamError("inputCols=[]: must name at least one column")
        return "inputCols", list(self.getInputCols())


class TrainingParams(ModelParams, HasWeightCol, HasValidationIndicatorCol, HasSeed):
    """Params of every estimator, whatever framework trains its model."""

    validationFraction: Param[float] = param(
        "validationFraction",
        "Share of the rows held back from training and used to measure it after every epoch (0 <= x < 1; "
        "0 holds back none). The rows are drawn by seed. Not together with validationIndicatorCol.",
        number("validationFraction", low=0.0, below=1.0),
    )
    epochs: Param[int] = param(
        "epochs", "How many times training passes over the rows (>= 1).", integer("epochs", low=1)
    )
    batchSize: Param[int] = param(
        "batchSize",
        "Rows per optimizer step, over all workers together: each worker takes batchSize / numWorkers of "
        "them (>= 1, a multiple of numWorkers).",
        integer("batchSize", low=1),
    )
    numWorkers: Param[int] = param(
        "numWorkers",
        "Spark tasks that train the model together, all at the same time (>= 1).",
        integer("numWorkers", low=1),
    )
    shuffle: Param[bool] = param(
        "shuffle",
        "Whether the rows come in another order in every epoch. If False they come in the order of the "
        "DataFrame, each worker reading one contiguous share.",
        boolean("shuffle"),
    )
    learningRate: Param[float] = param(
        "learningRate",
        "Learning rate of the optimizer (> 0), in place of the optimizer's own.",
        number("learningRate", above=0.0),
    )
    storeUrl: Param[str] = param(
        "storeUrl",
        "Directory that the driver and every executor can read and write, as a path or fsspec URL "
        "(file:///nfs/..., s3://..., hdfs://...). The fit keeps its Parquet data and messages there and "
        "removes them afterwards. Default: the Spark conf spark.nn.storeUrl; on a local master a directory "
        "under the system's temporary one.",
        TypeConverters.toString,
    )
    verbose: Param[int] = param(
        "verbose",
        "Progress on the driver's standard error: 0 none, 1 a line per epoch and on a terminal a live bar, 2 a line "
        "per epoch only.",
        choice("verbose", (0, 1, 2)),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(
            validationFraction=0.0,
            epochs=1,
            batchSize=32,
            numWorkers=1,
            shuffle=True,
            # pyspark's default seed hashes the class name, which differs from one process to the next.
            seed=0,
            verbose=1,
        )

    def getValidationFraction(self) -> float:
        """Get :py:attr:`validationFraction`."""
        return self.getOrDefault(self.validationFraction)

    def setValidationFraction(self: P, value: float) -> P:
        """Set :py:attr:`validationFraction`."""
        return self._set(validationFraction=value)

    def setValidationIndicatorCol(self: P, value: str) -> P:
        """Set :py:attr:`validationIndicatorCol`: a boolean column, true where a row is for validation."""
        return self._set(validationIndicatorCol=value)

    def setWeightCol(self: P, value: str) -> P:
        """Set :py:attr:`weightCol`: a numeric column that weights each row's loss."""
        return self._set(weightCol=value)

    def setSeed(self: P, value: int) -> P:
        """Set :py:attr:`seed`."""
        return self._set(seed=value)

    def getEpochs(self) -> int:
        """Get :py:attr:`epochs`."""
        return self.getOrDefault(self.epochs)

    def setEpochs(self: P, value: int) -> P:
        """Set :py:attr:`epochs`."""
        return self._set(epochs=value)

    def getBatchSize(self) -> int:
        """Get :py:attr:`batchSize`."""
        return self.getOrDefault(self.batchSize)

    def setBatchSize(self: P, value: int) -> P:
        """Set :py:attr:`batchSize`."""
        return self._set(batchSize=value)

    def getNumWorkers(self) -> int:
        """Get :py:attr:`numWorkers`."""
        return self.getOrDefault(self.numWorkers)

    def setNumWorkers(self: P, value: int) -> P:
        """Set :py:attr:`numWorkers`."""
        return self._set(numWorkers=value)

    def getShuffle(self) -> bool:
        """Get :py:attr:`shuffle`."""
        return self.getOrDefault(self.shuffle)

    def setShuffle(self: P, value: bool) -> P:
        """Set :py:attr:`shuffle`."""
        return self._set(shuffle=value)

    def getLearningRate(self) -> float:
        """Get :py:attr:`learningRate`."""
        return self.getOrDefault(self.learningRate)

    def setLearningRate(self: P, value: float) -> P:
        """Set :py:attr:`learningRate`."""
        return self._set(learningRate=value)

    def getStoreUrl(self) -> str:
        """Get :py:attr:`storeUrl`."""
        return self.getOrDefault(self.storeUrl)

    def setStoreUrl(self: P, value: str) -> P:
        """Set :py:attr:`storeUrl`."""
        return self._set(storeUrl=value)

    def getVerbose(self) -> int:
        """Get :py:attr:`verbose`."""
        return self.getOrDefault(self.verbose)

    def setVerbose(self: P, value: int) -> P:
        """Set :py:attr:`verbose`."""
        return self._set(verbose=value)

    def checkTrainingParams(self) -> None:
        """Check the params that only together can be wrong.

        Raises
        ------
        ParamError
            Two params contradict each other.
        """
        batch, workers = self.getBatchSize(), self.getNumWorkers()
        if batch < workers:
            raise ParamError(
                f"batchSize={batch} is smaller than numWorkers={workers}: each worker needs at least one row "
                f"of every batch. Set batchSize to {workers} or more, or use fewer workers"
            )
        if batch % workers:
            down, up = batch - batch % workers, batch + workers - batch % workers
            raise ParamError(
                f"batchSize={batch} is not a multiple of numWorkers={workers}, and the workers share each "
                f"batch equally: set batchSize to {down} or {up}"
            )
        indicator = self.isDefined("validationIndicatorCol") and self.getValidationIndicatorCol()
        if indicator and self.getValidationFraction() > 0:
            raise ParamError(
                f"validationFraction={self.getValidationFraction()} and validationIndicatorCol="
                f"{indicator!r} are both set: one of them decides, clear the other"
            )
