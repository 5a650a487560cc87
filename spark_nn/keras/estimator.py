"""KerasEstimator: its constructor and its hooks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.materialize import Spec
from spark_nn.errors import ModelFileError, ParamError
from spark_nn.estimator import NeuralEstimator
from spark_nn.keras import archive, backends, codec
from spark_nn.keras.customs import Customs, registered, require
from spark_nn.keras.known import is_known
from spark_nn.keras.model import KerasModel
from spark_nn.keras.names import check_names
from spark_nn.keras.parameters import ParameterTrainer
from spark_nn.keras.params import KerasParams
from spark_nn.keras.sharded import ShardedTrainer
from spark_nn.keras.sharding import Sharding
from spark_nn.keras.stages import check_numbers
from spark_nn.keras.training import INITIAL_MODEL, MODEL, KerasTrainer, Recipe
from spark_nn.network import check_arguments, check_network, refuse_arguments
from spark_nn.persistence import ModelFile
from spark_nn.stage import keyword_only
from spark_nn.store import RunDir
from spark_nn.summary import TrainingSummary
from spark_nn.trainer import Schedule, Trained

if TYPE_CHECKING:
    from pyspark.sql.types import StructType

E = TypeVar("E", bound="KerasEstimator")
_MODEL_FILE = f"model{codec.SUFFIX}"
_INITIAL_FILE = f"initial{codec.SUFFIX}"


class KerasEstimator(KerasParams, NeuralEstimator[KerasModel]):
    """Trains a Keras model on a gang of Spark tasks, as a stage of Spark ML.

    It works wherever ``LogisticRegression`` does: in a ``Pipeline``, under ``CrossValidator`` and
    ``TrainValidationSplit``. The columns it needs are written once to Parquet by the executors; `numWorkers`
    tasks of a barrier stage then train one model in step, each streaming its share of the rows, with the
    gradients averaged in every step.

    Parameters
    ----------
    model : keras.Model or callable
        The model, or a function that returns it and is called on each worker. A function needs no
        TensorFlow on the driver.
    modelParams : dict, optional
        Keyword arguments of that function; numbers, strings, lists and dicts only.
    customObjects : dict, optional
        Classes and functions of your own that the model consists of, by their names, as Keras's ``custom_objects``.
        They travel to the executors as functions do. Those registered on the driver with
        ``keras.saving.register_keras_serializable`` need not be named. Lambda layers are refused always.
    initialModel : KerasModel, optional
        A fitted model to go on from: training begins with its weights, and with the state of its optimizer where that
        is of the same kind. `model` must then give a network of the same layers, or be left out.
    optimizer : str, keras.optimizers.Optimizer, optional
        As ``compile`` takes it. Default: the compiled model's own, else ``"rmsprop"``.
    learningRate : float, optional
        In place of the optimizer's own (> 0).
    loss : str, keras.losses.Loss, function, or a dict or list of them for several outputs, optional
        As ``compile`` takes it. Default: the compiled model's own. The output columns follow from it.
    lossWeights : float, or a list or dict of them by the outputs' names, optional
        How much the loss of each output counts (>= 0), as ``compile`` takes it. Default: the compiled model's own,
        else 1.
    metrics : list or dict, optional
        As ``compile`` takes them. Default: the compiled model's own.
    featuresCol : str, default ``"features"``
        The column that holds the model's single input: a Vector, an array (nested for more dimensions), a number, a
        string or binary, for models that begin with preprocessing layers.
    inputCols : list of str, optional
        Columns joined into the single input, in place of `featuresCol`: numbers and booleans, or strings.
    inputs : dict, optional
        For models of several inputs, in place of both: each input's name, and its column or list of columns.
    labelCol : str, default ``"label"``
        What to predict: a number, or a Vector or array of numbers.
    labels : dict, optional
        For models of several outputs, in place of `labelCol`: each output's name, and its column.
    weightCol : str, optional
        Weight of each row's loss (>= 0).
    predictionCol, probabilityCol, rawPredictionCol : str, optional
        Names of the output columns; an empty name leaves the column out.
    outputKind : {"auto", "regression", "binary", "multiclass", "raw"}, or a dict of them by outputs, default ``"auto"``
        What the model puts out, which decides the output columns (see Notes); ``"auto"`` goes by the loss.
    threshold : float, default 0.5
        Of a binary output: probability of class 1 above which the prediction is 1 (0 <= x <= 1).
    outputCols : dict, optional
        For models of several outputs: each output's name, and the column that its prediction goes to; an empty name
        leaves all columns of that output out.
    predictBatchSize : int, optional
        Rows that go through the fitted model at once while it scores (>= 1). Default: as many as keep what its widest
        layer puts out in a core's cache, 32 to 4096.
    validationFraction : float, default 0.0
        Share of the rows held back to measure after every epoch.
    validationIndicatorCol : str, optional
        A boolean column that says which rows to hold back.
    handleInvalid : {"error", "skip", "keep"}, default ``"error"``
        Whether rows with null, NaN, infinite numbers or arrays of another length end the fit, or are left out. The
        model does the same with rows that it scores; with ``"keep"`` it gives them null predictions.
    classWeights : dict, optional
        How much the rows of each class count in the loss: class to weight, 1 for a class that is not named.
    epochs : int, default 1
        Passes over the rows, or, with `stepsPerEpoch`, times so many steps (>= 1).
    stepsPerEpoch : int, optional
        Optimizer steps of an epoch (>= 1), where that is to be no pass: the next epoch goes on where the last has
        stopped.
    batchSize : int, default 32
        Rows per optimizer step over all workers together, a multiple of `numWorkers`.
    numWorkers : int, default 1
        Spark tasks that train together.
    shuffle : bool, default True
        Whether the order of the rows changes with the epoch.
    seed : int, default 0
        Seed of the initial weights, the order of rows, the split and dropout. The same seed, data and
        `numWorkers` give the same weights to the last bit, on CPU.
    callbacks : list of keras.callbacks.Callback or callable, optional
        They run on every worker, so that decisions such as early stopping are taken alike; Keras's
        ``ModelCheckpoint``, ``CSVLogger``, ``TensorBoard`` and ``RemoteMonitor`` run on the first alone. Or a
        function that returns them. ``BackupAndRestore`` is refused, and ``TerminateOnNaN`` with several workers.
    nonFiniteLoss : {"error", "ignore"}, default ``"error"``
        Whether a loss that is NaN or infinite ends the fit, with the step and the learning rate, or does not.
    storeUrl : str, optional
        Directory that driver and executors share, as a path or fsspec URL.
    cache : {"auto", "memory", "disk", "none"}, default ``"auto"``
        What each worker keeps of the rows that it has read: their decoded form in memory, their bytes on the local
        disk, or nothing. ``"auto"`` is memory where the dataset fits into a quarter of what is free.
    collective : {"auto", "ring", "native"}, default ``"auto"``
        How workers exchange gradients: by our own ring of TCP connections, or by TensorFlow's collective operations
        (NCCL between GPUs). ``"auto"`` is native where every worker has a GPU, and the ring on other backends.
    backend : {"tensorflow", "jax", "torch"}, default ``"tensorflow"``
        What Keras runs on in the workers, whatever the driver's runs on: the same model, trained in step on each. JAX
        comes with the extra ``jax``, PyTorch with the extra ``torch``; both take numbers only, and no strings. The
        fitted model scores on the same backend, unless its own `backend` is set.
    modelParallel : dict, optional
        With ``backend="jax"``, how a model that is too large for one worker is cut over all of them: ``{"mesh":
        {"data": 1, "model": 2}, "layout": {".*kernel": [None, "model"]}}`` names axes with the number of workers along
        each, their product `numWorkers`, and for patterns that the paths of variables match as a whole the axis that
        each dimension is cut along, or None. Workers take different rows along the axis ``data`` and compute the
        same ones together along others. Without checkpoints: what a failure ends is begun again.
    parameterServers : {0, 1}, default 0
        With 1 training is asynchronous: one more Spark task holds the weights and applies the optimizer to each
        worker's gradients as they come. Workers do not wait for each other, and one whose process is killed is
        outlived. Each update is of `batchSize` / `numWorkers` rows.
    useGpu : bool, optional
        True demands that Spark assigns a GPU to every task, False hides those that it assigns. Default: workers use
        what Spark assigns.
    timeout : float, default 600.0
        Seconds after which a worker that gives no sign of life ends the attempt.
    maxRetries : int, default 3
        How often training is begun again, from the last checkpoint, after a machine has failed.
    checkpointInterval : int, optional
        Steps between two checkpoints, -1 for none. Default: one about every minute.
    logDir : str, optional
        Directory for TensorBoard, as a path or fsspec URL: each fit writes its metrics by epoch, the learning rate,
        rows per second and the network to a folder of its own there (``summary.logDir``). Needs the package
        tensorboard where tasks run.
    tracking : {"none", "mlflow"}, default ``"none"``
        ``"mlflow"`` logs params, metrics by epoch and the model to the MLflow run that is active where ``fit`` is
        called; each map of a grid goes into a run below it, without its model.
    verbose : {0, 1, 2}, default 1
        Progress on standard error: none; a live bar on a terminal or in a notebook, elsewhere a line per epoch; a line
        per epoch everywhere.
    followLogs : bool, default False
        Whether what the workers print appears on standard error while they train, after their numbers.

    Notes
    -----
    With ``outputKind="auto"`` the loss decides the output columns. Squared, absolute, Huber, log-cosh and Poisson
    errors on one unit give ``prediction`` (double); binary cross-entropy on one unit gives ``rawPrediction``,
    ``probability`` (Vectors of 2) and ``prediction``, where ``rawPrediction`` holds what the model puts out: logits
    only with ``from_logits``, else probabilities; (sparse) categorical cross-entropy gives the same with one element
    per class; anything else is ``"raw"`` and gives the model's output as an array in ``prediction``. ``from_logits``
    is honoured. Of several outputs each gives the same columns with its name, as ``prediction_price``.

    The rows are written once to the store, in the order of the DataFrame or mixed by `seed`. Another fit on rows of
    the same content, at the latest a minute later (Spark conf ``spark.nn.datasetIdleSeconds``), uses what is there.

    Examples
    --------
    >>> def build(units):
    ...     import keras
    ...     return keras.Sequential([keras.layers.Dense(units, "relu"), keras.layers.Dense(1, "sigmoid")])
    >>> estimator = KerasEstimator(
    ...     model=build, modelParams={"units": 16}, optimizer="adam", loss="binary_crossentropy",
    ...     epochs=3, numWorkers=2,
    ... )
    >>> estimator.fit(train).transform(test).select("prediction")  # doctest: +SKIP
    """

    __module__ = "spark_nn"  # what is saved names the public package, so that rooms may move
    functionParams: ClassVar[frozenset[str]] = frozenset({"model", "loss", "metrics", "callbacks", "customObjects"})
    _input_kwargs: dict[str, Any]

    @keyword_only
    def __init__(
        self,
        *,
        model: Any = None,
        modelParams: dict[str, Any] | None = None,
        customObjects: dict[str, Any] | None = None,
        initialModel: KerasModel | None = None,
        optimizer: Any = None,
        learningRate: float | None = None,
        loss: Any = None,
        lossWeights: float | list[float] | dict[str, float] | None = None,
        metrics: list[Any] | dict[str, Any] | None = None,
        featuresCol: str = "features",
        inputCols: list[str] | None = None,
        inputs: dict[str, str | list[str]] | None = None,
        labelCol: str = "label",
        labels: dict[str, str] | None = None,
        weightCol: str | None = None,
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        outputKind: str | dict[str, str] = "auto",
        threshold: float = 0.5,
        outputCols: dict[str, str] | None = None,
        predictBatchSize: int | None = None,
        validationFraction: float = 0.0,
        validationIndicatorCol: str | None = None,
        handleInvalid: str = "error",
        classWeights: dict[int, float] | None = None,
        epochs: int = 1,
        stepsPerEpoch: int | None = None,
        batchSize: int = 32,
        numWorkers: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
        callbacks: Any = None,
        nonFiniteLoss: str = "error",
        storeUrl: str | None = None,
        cache: str = "auto",
        collective: str = "auto",
        backend: str = "tensorflow",
        modelParallel: dict[str, Any] | None = None,
        parameterServers: int = 0,
        useGpu: bool | None = None,
        timeout: float = 600.0,
        maxRetries: int = 3,
        checkpointInterval: int | None = None,
        logDir: str | None = None,
        tracking: str = "none",
        verbose: int = 1,
        followLogs: bool = False,
    ) -> None:
        super().__init__()
        self.setParams(**self._input_kwargs)

    @keyword_only
    def setParams(
        self: E,
        *,
        model: Any = None,
        modelParams: dict[str, Any] | None = None,
        customObjects: dict[str, Any] | None = None,
        initialModel: KerasModel | None = None,
        optimizer: Any = None,
        learningRate: float | None = None,
        loss: Any = None,
        lossWeights: float | list[float] | dict[str, float] | None = None,
        metrics: list[Any] | dict[str, Any] | None = None,
        featuresCol: str = "features",
        inputCols: list[str] | None = None,
        inputs: dict[str, str | list[str]] | None = None,
        labelCol: str = "label",
        labels: dict[str, str] | None = None,
        weightCol: str | None = None,
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        outputKind: str | dict[str, str] = "auto",
        threshold: float = 0.5,
        outputCols: dict[str, str] | None = None,
        predictBatchSize: int | None = None,
        validationFraction: float = 0.0,
        validationIndicatorCol: str | None = None,
        handleInvalid: str = "error",
        classWeights: dict[int, float] | None = None,
        epochs: int = 1,
        stepsPerEpoch: int | None = None,
        batchSize: int = 32,
        numWorkers: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
        callbacks: Any = None,
        nonFiniteLoss: str = "error",
        storeUrl: str | None = None,
        cache: str = "auto",
        collective: str = "auto",
        backend: str = "tensorflow",
        modelParallel: dict[str, Any] | None = None,
        parameterServers: int = 0,
        useGpu: bool | None = None,
        timeout: float = 600.0,
        maxRetries: int = 3,
        checkpointInterval: int | None = None,
        logDir: str | None = None,
        tracking: str = "none",
        verbose: int = 1,
        followLogs: bool = False,
    ) -> E:
        """Set the params that are given; None stands for not given."""
        # A param set to None would save and then fail to load.
        return self._set(**{name: value for name, value in self._input_kwargs.items() if value is not None})

    def _servers(self) -> int:
        return self.getParameterServers()

    def _environment(self) -> dict[str, str]:
        return backends.environment(self.getBackend())

    def _spec(self, schema: StructType, schedule: Schedule) -> Spec:
        if self.getBackend() != "tensorflow":
            check_numbers(self.getBackend(), self.inputTensors(schema))
        return super()._spec(schema, schedule)

    def _check(self) -> None:
        self.checkBackend()
        self.checkModelParallel()
        self.checkParameterServers()
        self._checkSettings()
        check_network(self._ifGiven("model"), self._ifGiven("initialModel"), self.getModelParams(), "keras.Model")
        if not self.isDefined("model"):
            return
        model = self.getModel()
        if not codec.is_model(model):
            check_arguments(model, self.getModelParams())
            return
        refuse_arguments(model, self.getModelParams())
        if not model.compiled and not self.isDefined("loss"):
            raise ParamError(
                "loss is not set and the model is not compiled: set loss, such as 'mse' or "
                "'binary_crossentropy', or compile the model"
            )
        # A subclassed model does not know its inputs before it is called.
        inputs = [tensor.name for tensor in getattr(model, "inputs", None) or []] or [None]
        outputs = getattr(model, "output_names", None) or [None]
        for kind, setting, names in (("input", "inputs", inputs), ("output", "labels", outputs)):
            given = list(self.getOrDefault(setting)) if self.isSet(setting) else [None]
            if len(names) != len(given) or (len(names) > 1 and set(names) != set(given)):
                raise ParamError(
                    f"model has the {kind}s {', '.join(map(repr, names))}, and {setting} names "
                    f"{', '.join(map(repr, given)) if given != [None] else 'none'}: set {setting} to a dict of each "
                    f"{kind}'s name and its column"
                )

    def _checkSettings(self) -> None:
        """Refuse settings that the workers could not make again."""
        doubtful = []
        for name in ("optimizer", "loss", "metrics"):
            if self.isDefined(name):
                try:
                    named = archive.examine(self.getOrDefault(name), name).all
                except ModelFileError as error:
                    raise ParamError(str(error)) from error
                require(named, self._known(named), name, named, ParamError)
                strings = self._strings(name, self.getOrDefault(name))
                doubtful += [(name, each) for each in strings if not self._isKnown(name, each)]
        if doubtful:
            check_names(doubtful, self.getBackend())

    def _isKnown(self, name: str, value: str) -> bool:
        """Whether a name is surely one of Keras's, or of the user's own."""
        return is_known(name, value) or value in self._known([value])

    def _strings(self, name: str, value: Any) -> Iterator[str]:
        """The names in a setting; refuse a lambda, whose code the model's file would have to hold."""
        if isinstance(value, (list, tuple)) or (isinstance(value, dict) and "class_name" not in value):
            for each in value.values() if isinstance(value, dict) else value:
                yield from self._strings(name, each)
        elif getattr(value, "__name__", "") == "<lambda>":
            raise ParamError(f"{name} is a lambda, which the model's file cannot name: give a function with a name")
        elif isinstance(value, str):
            yield value

    def _trainer(self, schedule: Schedule, run: RunDir) -> KerasTrainer:
        given = self._ifGiven
        model = given("model")
        instance = self._hasInstance()
        if instance:
            with TemporaryDirectory(prefix="spark_nn-") as folder:
                local = Path(folder) / MODEL
                codec.save(model, local)
                # Where the loss is given anew, the one that it was compiled with is not needed.
                codec.check_saved(local, "the model", self._known, compiled=not self.isDefined("loss"))
                run.put(local, MODEL)
        before = given("initialModel")
        if before is not None:
            codec.check_saved(before.fitted.file.path, "initialModel", self._known, compiled=False)
            run.put(before.fitted.file.path, INITIAL_MODEL)
        recipe = Recipe(
            function=None if instance else model,
            instance=instance,
            continued=before is not None,
            arguments=self.getModelParams(),
            optimizer=given("optimizer"),
            loss=given("loss"),
            lossWeights=given("lossWeights"),
            metrics=given("metrics"),
            learningRate=given("learningRate"),
            callbacks=given("callbacks"),
            collective=self.getCollective(),  # type: ignore[arg-type]
            outputs=self.outputChoice(),
            customs=Customs.of(self._given(), registered()),
            backend=self.getBackend(),  # type: ignore[arg-type]
        )
        if self.isDefined("modelParallel"):
            return ShardedTrainer(schedule, recipe, Sharding.of(self.getModelParallel()))
        return (ParameterTrainer if self.getParameterServers() else KerasTrainer)(schedule, recipe)

    def _newModel(self) -> KerasModel:
        return KerasModel()

    def _modelOf(self, trained: Trained, file: ModelFile, manifest: Manifest, summary: TrainingSummary) -> KerasModel:
        model = super()._modelOf(trained, file, manifest, summary)
        # What the network has of initialModel's own classes it needs in the fitted model, too.
        return model.setCustomObjects(given) if (given := self._given()) else model

    def _given(self) -> dict[str, Any]:
        before = self.getInitialModel().getCustomObjects() if self.isDefined("initialModel") else {}
        return {**before, **self.getCustomObjects()}

    def _savedFiles(self) -> dict[str, ModelFile]:
        files = {}
        if self._hasInstance():
            file = ModelFile(codec.SUFFIX)
            codec.save(self.getModel(), file.path)
            codec.check_saved(file.path, "the model", self._known, compiled=True)
            files[_MODEL_FILE] = file.sealed()
        if self.isDefined("initialModel"):
            files[_INITIAL_FILE] = self.getInitialModel().fitted.file
        return files

    def _savedMetadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if self._hasInstance():
            metadata["customObjects"] = self._recorded(archive.examine(codec.plain(self.getModel()), "the model"))
        if self.isDefined("initialModel"):
            metadata["initialModel"] = self.getInitialModel()._savedMetadata()
        return metadata

    def _unsavedParams(self) -> set[str]:
        return {"initialModel"} | ({"model"} if self._hasInstance() else set())

    def _hasInstance(self) -> bool:
        """Whether the model is given as such, and not as a function."""
        return self.isDefined("model") and codec.is_model(self.getModel())

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if _MODEL_FILE in files:
            file = files[_MODEL_FILE]
            self._admit(file, metadata.get("customObjects"), compiled=True)
            self._set(model=codec.load_model(str(file.path), self._known, compiled=True))
        if _INITIAL_FILE in files:
            before = KerasModel()
            before._set(customObjects=self.getCustomObjects())
            before._loadSaved(metadata["initialModel"], {_INITIAL_FILE: files[_INITIAL_FILE]})
            self._set(initialModel=before)
