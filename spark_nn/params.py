"""Params shared by every estimator and model, and their checks."""

from __future__ import annotations

from typing import Any, TypeVar

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import (
    HasCheckpointInterval,
    HasFeaturesCol,
    HasInputCols,
    HasLabelCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasSeed,
    HasThreshold,
    HasValidationIndicatorCol,
    HasWeightCol,
)
from pyspark.sql.types import StructType

from spark_nn import columns
from spark_nn.columns import Tensor
from spark_nn.converters import (
    boolean,
    by_output,
    checkpoint_interval,
    choice,
    class_weights,
    columns_dict,
    integer,
    number,
    param,
)
from spark_nn.errors import ParamError
from spark_nn.outputs import KINDS, Choice

P = TypeVar("P", bound=Params)


class ModelParams(
    HasFeaturesCol,
    HasInputCols,
    HasLabelCol,
    HasWeightCol,
    HasPredictionCol,
    HasProbabilityCol,
    HasRawPredictionCol,
    HasThreshold,
):
    """Params that an estimator and its fitted model share: the columns they read and write."""

    featuresCol: Param[str] = param(
        "featuresCol",
        "Column that holds the model's single input: a Vector, an array (nested ones for inputs of several "
        "dimensions), a number, a string or binary.",
        TypeConverters.toString,
    )
    inputCols: Param[list[str]] = param(
        "inputCols",
        "Columns joined, in this order, into the model's single input: all of them numbers or booleans (which become "
        "32-bit floats), or all of them strings. Used in place of featuresCol.",
        TypeConverters.toListString,
    )
    inputs: Param[dict[str, Any]] = param(
        "inputs",
        "For models of several inputs: a dict of each input's name to a column, as for featuresCol, or to a list of "
        "columns, as for inputCols, such as {'color': 'color', 'numbers': ['age', 'height']}. Used in place of either.",
        columns_dict("inputs", several=True),
    )
    labels: Param[dict[str, str]] = param(
        "labels",
        "For models of several outputs: a dict of each output's name to the column it learns to predict. Used in "
        "place of labelCol.",
        columns_dict("labels", several=False),
    )
    handleInvalid: Param[str] = param(
        "handleInvalid",
        "What to do with rows that cannot be used (null, NaN or infinite numbers, arrays of another length): 'error' "
        "names the columns and the number of rows; 'skip' leaves the rows out, of training where an input, label or "
        "weight cannot be used, of predictions where an input cannot; 'keep' leaves them out of training too, and "
        "predicts null for them.",
        choice("handleInvalid", ("error", "skip", "keep")),
    )
    outputKind: Param[Any] = param(
        "outputKind",
        "What the model puts out, which decides the output columns: 'regression', one number; 'binary', the "
        "probability of class 1; 'multiclass', one of each class; 'raw', an array of the output's shape; 'auto', as "
        "the loss says. For several outputs one for all, or a dict of the outputs' names to them.",
        by_output(
            "outputKind", choice("outputKind", ("auto", *KINDS)), "one of 'auto', " + ", ".join(map(repr, KINDS))
        ),
    )
    threshold: Param[float] = param(
        "threshold",
        "For outputs of kind 'binary': the prediction is 1 where the probability of class 1 is above it, else 0 "
        "(0 <= x <= 1).",
        number("threshold", low=0.0, high=1.0),
    )
    predictBatchSize: Param[int] = param(
        "predictBatchSize",
        "Rows that go through the model at once while it scores (>= 1). If it is not set, as many as keep what its "
        "widest layer puts out in a core's cache, 32 to 4096.",
        integer("predictBatchSize", low=1),
    )
    outputCols: Param[dict[str, str]] = param(
        "outputCols",
        "For models of several outputs: a dict of outputs' names to the columns that their predictions go to, in place "
        "of predictionCol with the output's name after it; an empty name leaves all columns of that output out.",
        columns_dict("outputCols", several=False),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(handleInvalid="error", outputKind="auto", threshold=0.5)

    def setFeaturesCol(self: P, value: str) -> P:
        """Set :py:attr:`featuresCol`."""
        return self._set(featuresCol=value)

    def setInputCols(self: P, value: list[str]) -> P:
        """Set :py:attr:`inputCols`."""
        return self._set(inputCols=value)

    def getInputs(self) -> dict[str, Any]:
        """Get :py:attr:`inputs`."""
        return self.getOrDefault(self.inputs)

    def setInputs(self: P, value: dict[str, Any]) -> P:
        """Set :py:attr:`inputs`."""
        return self._set(inputs=value)

    def getLabels(self) -> dict[str, str]:
        """Get :py:attr:`labels`."""
        return self.getOrDefault(self.labels)

    def setLabels(self: P, value: dict[str, str]) -> P:
        """Set :py:attr:`labels`."""
        return self._set(labels=value)

    def getHandleInvalid(self) -> str:
        """Get :py:attr:`handleInvalid`."""
        return self.getOrDefault(self.handleInvalid)

    def setHandleInvalid(self: P, value: str) -> P:
        """Set :py:attr:`handleInvalid`."""
        return self._set(handleInvalid=value)

    def getOutputKind(self) -> Any:
        """Get :py:attr:`outputKind`."""
        return self.getOrDefault(self.outputKind)

    def setOutputKind(self: P, value: str | dict[str, str]) -> P:
        """Set :py:attr:`outputKind`."""
        return self._set(outputKind=value)

    def setThreshold(self: P, value: float) -> P:
        """Set :py:attr:`threshold`."""
        return self._set(threshold=value)

    def getPredictBatchSize(self) -> int:
        """Get :py:attr:`predictBatchSize`."""
        return self.getOrDefault(self.predictBatchSize)

    def setPredictBatchSize(self: P, value: int) -> P:
        """Set :py:attr:`predictBatchSize`."""
        return self._set(predictBatchSize=value)

    def getOutputCols(self) -> dict[str, str]:
        """Get :py:attr:`outputCols`."""
        return self.getOrDefault(self.outputCols)

    def setOutputCols(self: P, value: dict[str, str]) -> P:
        """Set :py:attr:`outputCols`."""
        return self._set(outputCols=value)

    def setLabelCol(self: P, value: str) -> P:
        """Set :py:attr:`labelCol`."""
        return self._set(labelCol=value)

    def setWeightCol(self: P, value: str) -> P:
        """Set :py:attr:`weightCol`: a numeric column that weights each row's loss."""
        return self._set(weightCol=value)

    def setPredictionCol(self: P, value: str) -> P:
        """Set :py:attr:`predictionCol`; an empty name leaves the column out."""
        return self._set(predictionCol=value)

    def setProbabilityCol(self: P, value: str) -> P:
        """Set :py:attr:`probabilityCol`; an empty name leaves the column out."""
        return self._set(probabilityCol=value)

    def setRawPredictionCol(self: P, value: str) -> P:
        """Set :py:attr:`rawPredictionCol`; an empty name leaves the column out."""
        return self._set(rawPredictionCol=value)

    def inputColumns(self) -> dict[str, tuple[str, list[str]]]:
        """For each of the model's inputs, by its tensor's name, the param that names its columns, and the columns.

        Raises
        ------
        ParamError
            More than one of featuresCol, inputCols and inputs was set, or inputCols is empty.
        """
        given = [name for name in ("featuresCol", "inputCols", "inputs") if self.isSet(name)]
        if len(given) > 1:
            values = " and ".join(f"{name}={self.getOrDefault(name)!r}" for name in given)
            raise ParamError(f"{values} are both set, but name the same thing: set one of them (and clear the other)")
        if given == ["inputs"]:
            return {
                f"features:{key}": (f"inputs[{key!r}]", value if isinstance(value, list) else [value])
                for key, value in self.getInputs().items()
            }
        if given != ["inputCols"]:
            return {"features": ("featuresCol", [self.getFeaturesCol()])}
        if not self.getInputCols():
            raise ParamError("inputCols=[]: must name at least one column")
        return {"features": ("inputCols", list(self.getInputCols()))}

    def inputTensors(self, schema: StructType) -> tuple[Tensor, ...]:
        """The model's inputs, as the DataFrame's columns make them.

        Raises
        ------
        ParamError
            As :meth:`inputColumns` does.
        ColumnError
            A column is missing, or of a type that cannot become a tensor.
        """
        return tuple(
            columns.features(schema, param, given, name) for name, (param, given) in self.inputColumns().items()
        )

    def labelTensors(self, schema: StructType) -> tuple[Tensor, ...]:
        """What the model's outputs learn to predict, as the DataFrame's columns make it."""
        if not self.isSet("labels"):
            return (columns.label(schema, self.getLabelCol()),)
        if self.isSet("labelCol"):
            raise ParamError(
                f"labelCol={self.getLabelCol()!r} and labels={self.getLabels()!r} are both set: set one of them (and "
                "clear the other)"
            )
        return tuple(
            columns.label(schema, column, f"labels[{key!r}]", f"label:{key}")
            for key, column in self.getLabels().items()
        )

    def weightTensors(self, schema: StructType) -> tuple[Tensor, ...]:
        """The weight of each row, none where no weightCol is set."""
        given = self.isDefined("weightCol") and self.getWeightCol()
        return (columns.weight(schema, self.getWeightCol()),) if given else ()

    def outputChoice(self) -> Choice:
        """What the params say of the model's outputs."""
        return Choice(
            kinds=self.getOutputKind(),
            threshold=self.getThreshold() if self.isSet("threshold") else None,
            columns=self.getOutputCols() if self.isSet("outputCols") else {},
        )


class RunningParams(HasCheckpointInterval):
    """Params of how a gang runs, whatever it trains."""

    timeout: Param[float] = param(
        "timeout",
        "Seconds after which a worker that gives no sign of life, data that does not come, or a start that does not "
        "happen ends the attempt (> 0).",
        number("timeout", above=0.0),
    )
    maxRetries: Param[int] = param(
        "maxRetries",
        "How often training is begun again, from the last checkpoint, after a worker, its machine or the store has "
        "failed (>= 0). Errors of the model or of a callback are raised at once.",
        integer("maxRetries", low=0),
    )
    checkpointInterval: Param[int] = param(
        "checkpointInterval",
        "Steps between two checkpoints (>= 1), or -1 for none. If it is not set, one is written about every minute.",
        checkpoint_interval,
    )
    collective: Param[str] = param(
        "collective",
        "How workers exchange gradients: 'ring', over TCP connections of our own, the fastest on CPUs; 'native', by "
        "the framework's own operations (NCCL between GPUs), whose servers ask nobody who they are; 'auto', native "
        "where every worker has a GPU, else ring.",
        choice("collective", ("auto", "ring", "native")),
    )
    useGpu: Param[bool] = param(
        "useGpu",
        "Whether workers use GPUs: True demands that Spark assigns one to every task "
        "(spark.task.resource.gpu.amount), False hides those that it assigns. If it is not set, workers use what Spark "
        "assigns.",
        boolean("useGpu"),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(timeout=600.0, maxRetries=3, collective="auto")

    def getTimeout(self) -> float:
        """Get :py:attr:`timeout`."""
        return self.getOrDefault(self.timeout)

    def setTimeout(self: P, value: float) -> P:
        """Set :py:attr:`timeout`."""
        return self._set(timeout=value)

    def getMaxRetries(self) -> int:
        """Get :py:attr:`maxRetries`."""
        return self.getOrDefault(self.maxRetries)

    def setMaxRetries(self: P, value: int) -> P:
        """Set :py:attr:`maxRetries`."""
        return self._set(maxRetries=value)

    def setCheckpointInterval(self: P, value: int) -> P:
        """Set :py:attr:`checkpointInterval`."""
        return self._set(checkpointInterval=value)

    def getUseGpu(self) -> bool:
        """Get :py:attr:`useGpu`."""
        return self.getOrDefault(self.useGpu)

    def setUseGpu(self: P, value: bool) -> P:
        """Set :py:attr:`useGpu`."""
        return self._set(useGpu=value)

    def getCollective(self) -> str:
        """Get :py:attr:`collective`."""
        return self.getOrDefault(self.collective)

    def setCollective(self: P, value: str) -> P:
        """Set :py:attr:`collective`."""
        return self._set(collective=value)


class TrainingParams(ModelParams, RunningParams, HasValidationIndicatorCol, HasSeed):
    """Params of every estimator, whatever framework trains its model."""

    validationFraction: Param[float] = param(
        "validationFraction",
        "Share of the rows held back from training and used to measure it after every epoch (0 <= x < 1; "
        "0 holds back none). The rows are drawn by seed. Not together with validationIndicatorCol.",
        number("validationFraction", low=0.0, below=1.0),
    )
    classWeights: Param[dict[int, float]] = param(
        "classWeights",
        "How much the loss of each class's rows counts: a dict of classes (0, 1, ...) to weights (>= 0); classes that "
        "it leaves out count 1. It multiplies what weightCol says. For models of one output, whose label is the class "
        "or one element per class.",
        class_weights,
    )
    epochs: Param[int] = param(
        "epochs",
        "How many times training passes over the rows, or takes stepsPerEpoch steps (>= 1).",
        integer("epochs", low=1),
    )
    stepsPerEpoch: Param[int] = param(
        "stepsPerEpoch",
        "Optimizer steps of an epoch (>= 1), for epochs shorter or longer than a pass over the rows: the next one goes "
        "on where the last has stopped. If it is not set, an epoch is a pass.",
        integer("stepsPerEpoch", low=1),
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
    seed: Param[int] = param(
        "seed",
        "Seed of the initial weights, the order of rows, the split and dropout (a whole number). The same seed, rows "
        "and numWorkers give the same weights to the last bit, on CPU.",
        integer("seed"),
    )
    learningRate: Param[float] = param(
        "learningRate",
        "Learning rate of the optimizer (> 0), in place of the optimizer's own.",
        number("learningRate", above=0.0),
    )
    nonFiniteLoss: Param[str] = param(
        "nonFiniteLoss",
        "What to do when the loss of a step is NaN or infinite: 'error' ends the fit and names the step, 'ignore' goes "
        "on.",
        choice("nonFiniteLoss", ("error", "ignore")),
    )
    storeUrl: Param[str] = param(
        "storeUrl",
        "Directory that the driver and every executor can read and write, as a path or fsspec URL "
        "(file:///nfs/..., s3://..., hdfs://...). The fit keeps its Parquet data and messages there and "
        "removes them afterwards. Default: the Spark conf spark.nn.storeUrl; on a local master a directory "
        "under the system's temporary one.",
        TypeConverters.toString,
    )
    cache: Param[str] = param(
        "cache",
        "What each worker keeps of the rows that it has read: 'memory' their decoded form, which helps where training "
        "waits for the store, 'disk' their bytes on its local disk, for a slow store, 'none' nothing. 'auto': "
        "memory where the dataset takes no more than a quarter of the free memory, shared with the other workers of "
        "the same machine, else none. The result does not depend on it.",
        choice("cache", ("auto", "memory", "disk", "none")),
    )
    verbose: Param[int] = param(
        "verbose",
        "Progress on the driver's standard error: 0 none, 1 a live bar on a terminal or in a notebook and elsewhere a "
        "line per epoch, 2 a line per epoch everywhere.",
        choice("verbose", (0, 1, 2)),
    )
    followLogs: Param[bool] = param(
        "followLogs",
        "Whether what the workers print appears on the driver's standard error while they train, a second or two "
        "later, each line after its worker's number, such as '[rank 1] '.",
        boolean("followLogs"),
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
            nonFiniteLoss="error",
            cache="auto",
            verbose=1,
            followLogs=False,
        )

    def getClassWeights(self) -> dict[int, float]:
        """Get :py:attr:`classWeights`."""
        return self.getOrDefault(self.classWeights)

    def setClassWeights(self: P, value: dict[int, float]) -> P:
        """Set :py:attr:`classWeights`."""
        return self._set(classWeights=value)

    def getCache(self) -> str:
        """Get :py:attr:`cache`."""
        return self.getOrDefault(self.cache)

    def setCache(self: P, value: str) -> P:
        """Set :py:attr:`cache`."""
        return self._set(cache=value)

    def getValidationFraction(self) -> float:
        """Get :py:attr:`validationFraction`."""
        return self.getOrDefault(self.validationFraction)

    def setValidationFraction(self: P, value: float) -> P:
        """Set :py:attr:`validationFraction`."""
        return self._set(validationFraction=value)

    def setValidationIndicatorCol(self: P, value: str) -> P:
        """Set :py:attr:`validationIndicatorCol`: a boolean column, true where a row is for validation."""
        return self._set(validationIndicatorCol=value)

    def setSeed(self: P, value: int) -> P:
        """Set :py:attr:`seed`."""
        return self._set(seed=value)

    def getEpochs(self) -> int:
        """Get :py:attr:`epochs`."""
        return self.getOrDefault(self.epochs)

    def setEpochs(self: P, value: int) -> P:
        """Set :py:attr:`epochs`."""
        return self._set(epochs=value)

    def getStepsPerEpoch(self) -> int:
        """Get :py:attr:`stepsPerEpoch`."""
        return self.getOrDefault(self.stepsPerEpoch)

    def setStepsPerEpoch(self: P, value: int) -> P:
        """Set :py:attr:`stepsPerEpoch`."""
        return self._set(stepsPerEpoch=value)

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

    def getNonFiniteLoss(self) -> str:
        """Get :py:attr:`nonFiniteLoss`."""
        return self.getOrDefault(self.nonFiniteLoss)

    def setNonFiniteLoss(self: P, value: str) -> P:
        """Set :py:attr:`nonFiniteLoss`."""
        return self._set(nonFiniteLoss=value)

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

    def getFollowLogs(self) -> bool:
        """Get :py:attr:`followLogs`."""
        return self.getOrDefault(self.followLogs)

    def setFollowLogs(self: P, value: bool) -> P:
        """Set :py:attr:`followLogs`."""
        return self._set(followLogs=value)

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
        if self.isSet("classWeights") and self.isSet("labels") and len(self.getLabels()) > 1:
            raise ParamError(
                f"classWeights={self.getClassWeights()!r} with labels={self.getLabels()!r}: weights of classes are "
                "those of one label; weight the rows with weightCol"
            )
        if self.isSet("outputCols"):
            known = self.getLabels() if self.isSet("labels") else {}
            unknown = [name for name in self.getOutputCols() if name not in known]
            if unknown:
                raise ParamError(
                    f"outputCols names the outputs {', '.join(map(repr, unknown))}, and labels "
                    f"{', '.join(map(repr, known)) or 'none'}: it is for models of several outputs, by the names in "
                    "labels; for one output set predictionCol"
                )
        indicator = self.isDefined("validationIndicatorCol") and self.getValidationIndicatorCol()
        if indicator and self.getValidationFraction() > 0:
            raise ParamError(
                f"validationFraction={self.getValidationFraction()} and validationIndicatorCol="
                f"{indicator!r} are both set: one of them decides, clear the other"
            )
