"""Params of a PyTorch estimator: what to train and how, in PyTorch's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pyspark.ml.param import Param

from spark_nn.converters import choice, number, param, plain_dict
from spark_nn.network import NetworkParams, fitted
from spark_nn.torch.blueprint import is_module
from spark_nn.torch.model import TorchModel
from spark_nn.torch.stages import TorchColumns

E = TypeVar("E", bound="TorchParams")


def _model(value: Any) -> Any:
    if not is_module(value) and not callable(value):
        raise TypeError(
            f"model takes a torch.nn.Module or a function that returns one, not {value!r} ({type(value).__name__})"
        )
    return value


def _function(name: str, what: str) -> Callable[[Any], Any]:
    """Converter for functions."""

    def convert(value: Any) -> Any:
        if not callable(value):
            raise TypeError(f"{name} takes {what}, not {value!r} ({type(value).__name__})")
        return value

    return convert


def _named(name: str, example: str) -> Callable[[Any], Any]:
    """Converter for what is given by name, or as an object that can be called."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str) and not callable(value):
            raise TypeError(f"{name} takes a name or something to call, such as {example}, not {value!r}")
        return str(value) if isinstance(value, str) else value

    return convert


def _loss(value: Any) -> Any:
    one = _named("loss", "'mse_loss', torch.nn.MSELoss() or a function of output and target")
    if isinstance(value, type):
        raise TypeError(f"loss takes an instance of a class, not the class {value.__name__}: make one")
    return {str(key): one(each) for key, each in value.items()} if isinstance(value, dict) else one(value)


def _metrics(value: Any) -> Any:
    if not isinstance(value, (list, tuple, dict)):
        raise TypeError(f"metrics takes a list, such as ['auroc'], or a dict of names to metrics, not {value!r}")
    one = _named("metrics", "'auroc', torchmetrics.AUROC('binary') or a function of predictions and labels")
    return {str(key): one(each) for key, each in value.items()} if isinstance(value, dict) else list(map(one, value))


class TorchParams(TorchColumns, NetworkParams):
    """What to train, and how."""

    model: Param[Any] = param(
        "model",
        "The network to train: a torch.nn.Module, or a function (or class) that returns one and is called on each "
        "worker with modelParams. Several inputs come as keyword arguments of its forward; it returns a tensor, or a "
        "dict of tensors by the outputs' names.",
        _model,
    )
    initialModel: Param[Any] = param(
        "initialModel",
        "A fitted TorchModel to go on from: training begins with its weights. The param model must then give a network "
        "of the same layers, or be left out.",
        fitted(TorchModel),
    )
    optimizer: Param[Any] = param(
        "optimizer",
        "The optimizer: the name of a class of torch.optim in any case, such as 'adamw'; a class; or a function of the "
        "parameters that returns one.",
        _named("optimizer", "'adam', torch.optim.Adam or a function of the parameters"),
    )
    optimizerParams: Param[dict[str, Any]] = param(
        "optimizerParams",
        "Keyword arguments of the optimizer besides the parameters and the learning rate, such as "
        "{'weight_decay': 0.01}.",
        plain_dict("optimizerParams"),
    )
    loss: Param[Any] = param(
        "loss",
        "The loss: the name of a function of torch.nn.functional, such as 'cross_entropy'; a module; or a function of "
        "output and target that returns the mean over the rows. It decides the output columns. For several outputs a "
        "dict of losses by their names, which are added up, or a function of the dicts of outputs and targets. "
        "Without one a LightningModule is trained by its own steps.",
        _loss,
    )
    metrics: Param[Any] = param(
        "metrics",
        "List of metrics: names of torchmetrics' classes in any case, such as 'auroc', instances of them, or functions "
        "of predictions and labels whose means over the rows are told; or a dict of names to such.",
        _metrics,
    )
    lrScheduler: Param[Any] = param(
        "lrScheduler",
        "What turns the learning rate: a function of the optimizer that returns one of torch.optim.lr_scheduler.",
        _function("lrScheduler", "a function of the optimizer"),
    )
    lrSchedulerInterval: Param[str] = param(
        "lrSchedulerInterval",
        "When the lrScheduler makes its step: after every 'epoch', or after every 'step' of the optimizer.",
        choice("lrSchedulerInterval", ("epoch", "step")),
    )
    sharding: Param[str] = param(
        "sharding",
        "What of the network each worker holds: 'none' for all of it, or 'fsdp' for a part of every large layer, with "
        "its gradients and the optimizer's state, for networks that one worker's memory cannot hold.",
        choice("sharding", ("none", "fsdp")),
    )
    clipGradNorm: Param[float] = param(
        "clipGradNorm",
        "Largest norm of the gradient of the global batch, all parameters together (> 0), as by "
        "torch.nn.utils.clip_grad_norm_.",
        number("clipGradNorm", above=0.0),
    )
    clipGradValue: Param[float] = param(
        "clipGradValue",
        "Largest absolute value of an element of the gradient of the global batch (> 0), as by "
        "torch.nn.utils.clip_grad_value_; before clipGradNorm, where both are set.",
        number("clipGradValue", above=0.0),
    )
    mixedPrecision: Param[str] = param(
        "mixedPrecision",
        "What the network computes in, by torch.autocast: 'no', 32-bit floats; 'bf16', bfloat16 where PyTorch holds it "
        "safe; 'fp16', the same in halves with a scaled loss, on GPUs only.",
        choice("mixedPrecision", ("no", "bf16", "fp16")),
    )
    stopWhen: Param[Any] = param(
        "stopWhen",
        "A function that is asked after every epoch whether training is to end: it gets the history, a dict of each "
        "metric's values so far, and is called alike on every worker.",
        _function("stopWhen", "a function of the history"),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(optimizer="adam", optimizerParams={}, lrSchedulerInterval="epoch")
        self._setDefault(mixedPrecision="no", sharding="none")

    def getOptimizerParams(self) -> dict[str, Any]:
        """Get :py:attr:`optimizerParams`."""
        return self.getOrDefault(self.optimizerParams)

    def setOptimizerParams(self: E, value: dict[str, Any]) -> E:
        """Set :py:attr:`optimizerParams`."""
        return self._set(optimizerParams=value)

    def getLrScheduler(self) -> Any:
        """Get :py:attr:`lrScheduler`."""
        return self.getOrDefault(self.lrScheduler)

    def setLrScheduler(self: E, value: Any) -> E:
        """Set :py:attr:`lrScheduler`."""
        return self._set(lrScheduler=value)

    def getLrSchedulerInterval(self) -> str:
        """Get :py:attr:`lrSchedulerInterval`."""
        return self.getOrDefault(self.lrSchedulerInterval)

    def setLrSchedulerInterval(self: E, value: str) -> E:
        """Set :py:attr:`lrSchedulerInterval`."""
        return self._set(lrSchedulerInterval=value)

    def getSharding(self) -> str:
        """Get :py:attr:`sharding`."""
        return self.getOrDefault(self.sharding)

    def setSharding(self: E, value: str) -> E:
        """Set :py:attr:`sharding`."""
        return self._set(sharding=value)

    def getClipGradNorm(self) -> float:
        """Get :py:attr:`clipGradNorm`."""
        return self.getOrDefault(self.clipGradNorm)

    def setClipGradNorm(self: E, value: float) -> E:
        """Set :py:attr:`clipGradNorm`."""
        return self._set(clipGradNorm=value)

    def getClipGradValue(self) -> float:
        """Get :py:attr:`clipGradValue`."""
        return self.getOrDefault(self.clipGradValue)

    def setClipGradValue(self: E, value: float) -> E:
        """Set :py:attr:`clipGradValue`."""
        return self._set(clipGradValue=value)

    def getMixedPrecision(self) -> str:
        """Get :py:attr:`mixedPrecision`."""
        return self.getOrDefault(self.mixedPrecision)

    def setMixedPrecision(self: E, value: str) -> E:
        """Set :py:attr:`mixedPrecision`."""
        return self._set(mixedPrecision=value)

    def getStopWhen(self) -> Any:
        """Get :py:attr:`stopWhen`."""
        return self.getOrDefault(self.stopWhen)

    def setStopWhen(self: E, value: Any) -> E:
        """Set :py:attr:`stopWhen`."""
        return self._set(stopWhen=value)
