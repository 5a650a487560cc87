"""TorchEstimator: its constructor and its hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, TypeVar

from spark_nn.dataset.manifest import Manifest
from spark_nn.errors import ParamError
from spark_nn.estimator import NeuralEstimator
from spark_nn.network import check_arguments, check_network, refuse_arguments
from spark_nn.persistence import ModelFile
from spark_nn.stage import keyword_only
from spark_nn.store import RunDir
from spark_nn.summary import TrainingSummary
from spark_nn.torch import codec, lightning
from spark_nn.torch.blueprint import Blueprint, is_module, skeleton_of
from spark_nn.torch.losses import check_loss
from spark_nn.torch.model import TorchModel
from spark_nn.torch.names import check_metrics, check_optimizer
from spark_nn.torch.params import TorchParams
from spark_nn.torch.training import WEIGHTS, Recipe, TorchTrainer
from spark_nn.trainer import Schedule, Trained

E = TypeVar("E", bound="TorchEstimator")
_LOSS_ONLY = (
    *("optimizer", "optimizerParams", "learningRate", "lrScheduler", "lrSchedulerInterval"),
    *("metrics", "weightCol", "classWeights"),
)
_INITIAL_FILE = f"initial{codec.SUFFIX}"


class TorchEstimator(TorchParams, NeuralEstimator[TorchModel]):
    """Trains a PyTorch network on a gang of Spark tasks, as a stage of Spark ML.

    Everything but the network is as with :class:`KerasEstimator`: the columns are written once to Parquet, and
    `numWorkers` tasks train one model in step. Each step is that of one process on the global batch, as under
    DistributedDataParallel: the workers begin with the same weights, and average their gradients before these are
    clipped and the optimizer sees them.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The network; or a function or class that returns it, called on each worker. A function needs no PyTorch on the
        driver. Several `inputs` come as keyword arguments of ``forward``, which returns a tensor, or, for several
        `labels`, a dict of tensors by the outputs' names.
    modelParams : dict, optional
        Keyword arguments of that function; numbers, strings, lists and dicts only.
    initialModel : TorchModel, optional
        A fitted model to go on from: training begins with its weights. `model` must then give a network of the same
        layers, or be left out.
    loss : str, torch.nn.Module, callable, or dict of them by the outputs' names
        A name of ``torch.nn.functional``, such as ``"mse_loss"``, ``"cross_entropy"`` or
        ``"binary_cross_entropy_with_logits"``; a module; or a function ``(output, target)`` that returns the mean over
        the rows. Losses of several outputs are added up. None only for a LightningModule, which then is trained by its
        own steps.
    optimizer : str, class or callable, default ``"adam"``
        A name or class of ``torch.optim``, or a function of the parameters that returns an optimizer.
    learningRate : float, optional
        In place of the optimizer's own (> 0).
    optimizerParams : dict, optional
        Its other arguments, such as ``{"weight_decay": 0.01}``.
    lrScheduler : callable, optional
        A function of the optimizer that returns one of ``torch.optim.lr_scheduler``. ``ReduceLROnPlateau`` gets the
        validation's loss, or the training's where no rows are held back.
    lrSchedulerInterval : {"epoch", "step"}, default ``"epoch"``
        When the scheduler makes its step. The history then has the ``learning_rate`` that each epoch ended with.
    metrics : list or dict, optional
        Names of torchmetrics' classes in any case, such as ``"accuracy"``, ``"auroc"`` and ``"mean_absolute_error"``;
        instances; or functions ``(predictions, labels)`` that return the mean over rows. Exact over all workers' rows.
    clipGradNorm, clipGradValue : float, optional
        Limits of the global batch's gradient (> 0), as ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``.
    mixedPrecision : {"no", "bf16", "fp16"}, default ``"no"``
        What ``torch.autocast`` computes in; ``"fp16"`` scales the loss, and needs GPUs.
    sharding : {"none", "fsdp"}, default ``"none"``
        With ``"fsdp"`` each worker holds a part of the parameters, gradients and optimizer's state (see Notes).
    stopWhen : callable, optional
        Asked after every epoch, with the history so far, whether training is to end: a function of that alone, so that
        a training that goes on after a failure decides the same.
    featuresCol, inputCols, inputs, labelCol, labels, weightCol : optional
        What is read, as in :class:`KerasEstimator`; strings are refused, since PyTorch has no tensors of them.
    predictionCol, probabilityCol, rawPredictionCol, outputKind, threshold, outputCols, predictBatchSize : optional
        What the model puts out, as there; ``"auto"`` goes by the loss (see Notes).
    validationFraction, validationIndicatorCol, handleInvalid : optional
        What is held back and what left out, as there.
    classWeights, epochs, stepsPerEpoch, batchSize, numWorkers, shuffle, seed, nonFiniteLoss : optional
        How training goes through the rows, as there.
    storeUrl, cache, collective, useGpu, timeout, maxRetries, checkpointInterval : optional
        How the gang runs, as there. ``collective="native"`` is DistributedDataParallel over NCCL between GPUs, and over
        Gloo between CPUs.
    logDir, tracking, verbose, followLogs : optional
        What is told of the fit, as there.

    Notes
    -----
    With ``outputKind="auto"`` squared, absolute, Huber and Poisson errors on one unit give ``prediction``, what the
    model puts out (for ``poisson_nll_loss`` with its default that is the logarithm of the rate);
    ``binary_cross_entropy_with_logits`` and ``binary_cross_entropy`` on one unit give a binary classifier's columns,
    ``cross_entropy`` and ``nll_loss`` on several a multiclass one's, from logits and log-probabilities. Anything else
    is ``"raw"``.

    A label with as many elements as the output takes the output's shape and type; one with an element less per class
    is a class, and becomes a whole number whatever the column's type.

    Each worker drops out rows of its own, and normalises by its own share of a batch. What layers track, as BatchNorm
    does, is a worker's own within an epoch, and the mean of all workers' from its end on, where
    DistributedDataParallel would keep the first worker's.

    Row weights multiply each row's loss, whose sum is divided by the number of rows.

    Without `loss` a LightningModule is trained by its ``training_step``, ``validation_step`` and
    ``configure_optimizers``: a batch is ``(inputs, labels)``, and what it logs is in the history, as the mean over the
    rows of all workers. `optimizer`, `learningRate`, `lrScheduler`, `metrics`, `weightCol`, `classWeights` and
    ``sharding="fsdp"`` do not go with that, and hooks that are not called are refused by name. No loss says what
    ``forward`` puts out, so that ``outputKind="auto"`` is ``"raw"``.

    With ``sharding="fsdp"`` training is the same but for rounding, by PyTorch's ``fully_shard``, over NCCL between GPUs
    and over Gloo between CPUs. Layers of a million elements and more are brought together one at a time, while they
    compute. Every batch must use the same layers. With one worker there is nothing to divide.

    Examples
    --------
    >>> def build(units):
    ...     from torch import nn
    ...     return nn.Sequential(nn.LazyLinear(units), nn.ReLU(), nn.Linear(units, 1))
    >>> estimator = TorchEstimator(
    ...     model=build, modelParams={"units": 16}, loss="binary_cross_entropy_with_logits", epochs=3, numWorkers=2,
    ... )
    >>> estimator.fit(train).transform(test).select("prediction")  # doctest: +SKIP
    """

    __module__ = "spark_nn"  # what is saved names the public package, so that rooms may move
    functionParams: ClassVar[frozenset[str]] = frozenset(
        {"model", "loss", "metrics", "optimizer", "lrScheduler", "stopWhen"}
    )
    _input_kwargs: dict[str, Any]

    @keyword_only
    def __init__(
        self,
        *,
        model: Any = None,
        modelParams: dict[str, Any] | None = None,
        initialModel: TorchModel | None = None,
        loss: Any = None,
        optimizer: Any = "adam",
        learningRate: float | None = None,
        optimizerParams: dict[str, Any] | None = None,
        lrScheduler: Any = None,
        lrSchedulerInterval: str = "epoch",
        metrics: list[Any] | dict[str, Any] | None = None,
        clipGradNorm: float | None = None,
        clipGradValue: float | None = None,
        mixedPrecision: str = "no",
        sharding: str = "none",
        stopWhen: Any = None,
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
        nonFiniteLoss: str = "error",
        storeUrl: str | None = None,
        cache: str = "auto",
        collective: str = "auto",
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
        initialModel: TorchModel | None = None,
        loss: Any = None,
        optimizer: Any = "adam",
        learningRate: float | None = None,
        optimizerParams: dict[str, Any] | None = None,
        lrScheduler: Any = None,
        lrSchedulerInterval: str = "epoch",
        metrics: list[Any] | dict[str, Any] | None = None,
        clipGradNorm: float | None = None,
        clipGradValue: float | None = None,
        mixedPrecision: str = "no",
        sharding: str = "none",
        stopWhen: Any = None,
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
        nonFiniteLoss: str = "error",
        storeUrl: str | None = None,
        cache: str = "auto",
        collective: str = "auto",
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

    def _check(self) -> None:
        model = self._ifGiven("model")
        check_network(model, self._ifGiven("initialModel"), self.getModelParams(), "torch.nn.Module")
        if is_module(model):
            refuse_arguments(model, self.getModelParams())
            codec.check_shaped(model)
        elif model is not None:
            check_arguments(model, self.getModelParams())
        if self.getMixedPrecision() == "fp16" and self.isDefined("useGpu") and not self.getUseGpu():
            raise ParamError("mixedPrecision='fp16' with useGpu=False: halves need GPUs; use 'bf16'")
        if isinstance(self.getOptimizer(), str):
            check_optimizer(self.getOptimizer())
        check_metrics(self._ifGiven("metrics"))
        if self.getSharding() == "fsdp" and self.getNumWorkers() > 1:
            if self.getCollective() == "ring":
                raise ParamError(
                    "sharding='fsdp' with collective='ring': it exchanges by torch.distributed, so 'auto' or 'native'"
                )
            if self.getMixedPrecision() == "fp16":
                raise ParamError("sharding='fsdp' with mixedPrecision='fp16': use 'bf16', whose loss needs no scaling")
        if not self.isDefined("loss"):
            if model is None:
                before = self.getInitialModel()._made()
                model = before.function if before.skeleton is None else before.skeleton
            lightning.check_given(model, self._lossOnly(), validates=self._validates())
            return
        weighted = self.isDefined("weightCol") or self.isDefined("classWeights")
        check_loss(self.getLoss(), weighted=weighted, workers=self.getNumWorkers())

    def _lossOnly(self) -> dict[str, Any]:
        """The params that say how to train by a loss, as far as they are set."""
        names = _LOSS_ONLY if self.getSharding() == "none" else (*_LOSS_ONLY, "sharding")
        return {name: self.getOrDefault(name) for name in names if self.isSet(name)}

    def _validates(self) -> bool:
        given = self.isDefined("validationIndicatorCol") and self.getValidationIndicatorCol()
        return bool(given) or self.getValidationFraction() > 0

    def _trainer(self, schedule: Schedule, run: RunDir) -> TorchTrainer:
        given = self._ifGiven
        blueprint, before = self._blueprint(), given("initialModel")
        left: Literal["model", "initialModel"] | None = None
        if before is not None:
            left = "initialModel"
            run.put(before.fitted.file.path, WEIGHTS)
        elif blueprint.skeleton is not None:
            left = "model"
            with TemporaryDirectory(prefix="spark_nn-") as folder:
                local = Path(folder) / WEIGHTS
                codec.save(self.getModel(), local)
                run.put(local, WEIGHTS)
        recipe = Recipe(
            blueprint=blueprint,
            weights=left,
            optimizer=self.getOptimizer(),
            optimizerParams=self.getOptimizerParams(),
            learningRate=given("learningRate"),
            lrScheduler=given("lrScheduler"),
            lrSchedulerInterval=self.getLrSchedulerInterval(),  # type: ignore[arg-type]
            clipGradNorm=given("clipGradNorm"),
            clipGradValue=given("clipGradValue"),
            mixedPrecision=self.getMixedPrecision(),  # type: ignore[arg-type]
            stopWhen=given("stopWhen"),
            collective=self.getCollective(),  # type: ignore[arg-type]
            sharding=self.getSharding(),  # type: ignore[arg-type]
            validates=self._validates(),
            outputs=self.outputChoice(),
        )
        return TorchTrainer(schedule, recipe)

    def _blueprint(self) -> Blueprint:
        model = self._ifGiven("model")
        if model is None:
            before: Blueprint = self.getInitialModel()._made()
            return replace(before, loss=self._ifGiven("loss"), metrics=self._ifGiven("metrics"))
        instance = is_module(model)
        return Blueprint(
            function=None if instance else model,
            arguments=self.getModelParams(),
            skeleton=skeleton_of(model) if instance else None,
            loss=self._ifGiven("loss"),
            metrics=self._ifGiven("metrics"),
        )

    def _newModel(self) -> TorchModel:
        return TorchModel()

    def _modelOf(self, trained: Trained, file: ModelFile, manifest: Manifest, summary: TrainingSummary) -> TorchModel:
        model = super()._modelOf(trained, file, manifest, summary)
        model._blueprint = self._blueprint()
        return model

    def _savedFiles(self) -> dict[str, ModelFile]:
        return {_INITIAL_FILE: self.getInitialModel().fitted.file} if self.isDefined("initialModel") else {}

    def _savedMetadata(self) -> dict[str, Any]:
        return {"initialModel": self.getInitialModel()._savedMetadata()} if self.isDefined("initialModel") else {}

    def _unsavedParams(self) -> set[str]:
        return {"initialModel"}

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if files:
            before = TorchModel()
            if self.isDefined("model"):
                before._blueprint = self._blueprint()  # of the same layers
            before._loadSaved(metadata["initialModel"], files)
            self._set(initialModel=before)
