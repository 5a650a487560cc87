"""Params of a Keras estimator: what to train and how, as ``keras.Model.compile`` and ``fit`` take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from pyspark.ml.param import Param

from spark_nn.converters import choice, loss_weights, param, plain_dict
from spark_nn.errors import ParamError
from spark_nn.keras import codec
from spark_nn.keras.model import KerasModel
from spark_nn.keras.sharding import Sharding
from spark_nn.keras.stages import HasBackend, HasCustomObjects
from spark_nn.network import NetworkParams, fitted

E = TypeVar("E", bound="KerasParams")


def _model(value: Any) -> Any:
    if not codec.is_model(value) and not callable(value):
        raise TypeError(
            f"model takes a keras.Model or a function that returns one, not {value!r} ({type(value).__name__})"
        )
    return value


def _settings(name: str, example: str, kinds: tuple[type, ...] = ()) -> Callable[[Any], Any]:
    """Converter for what ``keras.Model.compile`` takes, turned into JSON where Keras can.

    Parameters
    ----------
    name, example : str
        For messages.
    kinds : tuple of type
        The collections it may come in, lists and dicts by the outputs' names; none where it is always one.
    """

    def check(item: Any) -> None:
        if isinstance(item, kinds) and "class_name" not in (several := cast(Any, item)):
            for part in several.values() if isinstance(item, dict) else several:
                if part is not None:
                    check(part)
        elif isinstance(item, (type, list)) or not (isinstance(item, (str, dict)) or callable(item)):
            raise TypeError(f"{name} takes what keras.Model.compile takes, such as {example}, not {item!r}")

    def convert(value: Any) -> Any:
        result = codec.plain(value)
        check(result)
        return result

    return convert


def _metrics(value: Any) -> Any:
    if not isinstance(value, (list, tuple, dict)):
        raise TypeError(
            f"metrics takes a list, such as ['auc'], or a dict of lists by the outputs' names, not {value!r}"
        )
    return _settings("metrics", "['auc'] or [keras.metrics.AUC()]", (list, dict))(value)


def _callbacks(value: Any) -> Any:
    if callable(value):
        return value
    if not isinstance(value, (list, tuple)) or any(
        not hasattr(item, "on_epoch_end") or isinstance(item, type) for item in value
    ):
        raise TypeError(
            f"callbacks takes a list of keras.callbacks.Callback objects, or a function that returns one, not {value!r}"
        )
    return list(value)


class KerasParams(HasCustomObjects, HasBackend, NetworkParams):
    """What to train, and how."""

    model: Param[Any] = param(
        "model",
        "The Keras model to train: a keras.Model, or a function that returns one and is called on each "
        "worker with modelParams.",
        _model,
    )
    optimizer: Param[Any] = param(
        "optimizer",
        "The optimizer, by name or as a keras.optimizers.Optimizer. Default: that of the compiled model, "
        "else 'rmsprop'.",
        _settings("optimizer", "'adam' or keras.optimizers.Adam(1e-3)"),
    )
    loss: Param[Any] = param(
        "loss",
        "The loss, by name, as a keras.losses.Loss or a function. Default: that of the compiled model. It "
        "decides the output columns. For several outputs a dict of losses by their names, or a list.",
        _settings("loss", "'mse' or keras.losses.MeanSquaredError()", (list, dict)),
    )
    lossWeights: Param[Any] = param(
        "lossWeights",
        "How much the loss of each output counts (>= 0): a number, a list in the order of the outputs, or a dict of "
        "their names. Default: those of the compiled model, else 1.",
        loss_weights,
    )
    metrics: Param[Any] = param(
        "metrics",
        "List of metrics, by name, as keras.metrics.Metric or as functions; for several outputs a dict of such lists "
        "by their names. Default: those of the compiled model.",
        _metrics,
    )
    initialModel: Param[Any] = param(
        "initialModel",
        "A fitted KerasModel to go on from: training begins with its weights, and with the state of its optimizer "
        "where that is of the same kind. The param model must then give a network of the same layers, or be left out.",
        fitted(KerasModel),
    )
    callbacks: Param[Any] = param(
        "callbacks",
        "List of keras.callbacks.Callback, or a function that returns one. They run on every worker; "
        "ModelCheckpoint, CSVLogger, TensorBoard and RemoteMonitor on the first alone.",
        _callbacks,
    )

    modelParallel: Param[dict[str, Any]] = param(
        "modelParallel",
        "With backend='jax', how the model is cut over the workers where it is too large for one: a dict of a mesh, "
        "which gives axes and how many workers there are along each, and a layout, which gives for patterns of the "
        "variables' paths the axis that each dimension is cut along, or None, such as {'mesh': {'data': 1, 'model': "
        "2}, 'layout': {'.*kernel': [None, 'model']}}. Workers take different rows along the axis 'data'.",
        plain_dict("modelParallel"),
    )
    parameterServers: Param[int] = param(
        "parameterServers",
        "1 for asynchronous training: one more Spark task holds the weights and applies the optimizer to each worker's "
        "gradients as they come, and workers do not wait for each other. 0 for training in step.",
        choice("parameterServers", (0, 1)),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(parameterServers=0)

    def getParameterServers(self) -> int:
        """Get :py:attr:`parameterServers`."""
        return self.getOrDefault(self.parameterServers)

    def setParameterServers(self: E, value: int) -> E:
        """Set :py:attr:`parameterServers`."""
        return self._set(parameterServers=value)

    def getModelParallel(self) -> dict[str, Any]:
        """Get :py:attr:`modelParallel`."""
        return self.getOrDefault(self.modelParallel)

    def setModelParallel(self: E, value: dict[str, Any]) -> E:
        """Set :py:attr:`modelParallel`."""
        return self._set(modelParallel=value)

    def checkModelParallel(self) -> None:
        """Refuse a model that cannot be cut so, and what such a training could not honour.

        Raises
        ------
        ParamError
            The mesh does not fit the workers, the layout not the mesh, or another param not this one.
        """
        if not self.isDefined("modelParallel"):
            return
        sharding = Sharding.of(self.getModelParallel())
        if self.getBackend() != "jax":
            raise ParamError(
                f"modelParallel with backend={self.getBackend()!r}: only JAX computes models that are cut; set "
                "backend='jax'"
            )
        sharding.check(self.getOrDefault("numWorkers"), self.getOrDefault("batchSize"))
        reasons = {
            "collective": "the ranks exchange by JAX's own collectives",
            "checkpointInterval": "no checkpoints are written: after a failure training begins again",
        }
        if sharding.replicas > 1:
            several = "the axis 'data' is longer than 1, and validation rows may not divide: use the model's evaluate"
            reasons |= {"validationIndicatorCol": several, "validationFraction": several}
        for name, reason in reasons.items():
            if self.isSet(name) and self.getOrDefault(name) not in ("auto", "", 0, -1):
                raise ParamError(
                    f"{name}={self.getOrDefault(name)!r} with modelParallel: {reason}; leave one of them out"
                )

    def checkBackend(self) -> None:
        """Refuse what only another backend can do.

        Raises
        ------
        ParamError
            A param is set that this one could not honour.
        """
        backend = self.getBackend()
        if backend == "tensorflow":
            return
        if self.getOrDefault("collective") == "native":
            raise ParamError(
                f"collective='native' with backend={backend!r}: these are TensorFlow's collective operations; use "
                "'ring' or 'auto', or backend='tensorflow'"
            )
        if self.getParameterServers():
            raise ParamError(
                f"parameterServers={self.getParameterServers()} with backend={backend!r}: asynchronous training needs "
                "backend='tensorflow'; or train in step, with parameterServers=0"
            )

    def checkParameterServers(self) -> None:
        """Refuse what only training in step can do.

        Raises
        ------
        ParamError
            A param is set that asynchronous training could not honour.
        """
        if not self.getParameterServers():
            return
        reasons = {
            "callbacks": "callbacks would act on what a single worker sees",
            "collective": "workers exchange nothing with each other",
            "checkpointInterval": "no checkpoints are written: what was lost is begun again from the beginning",
            "validationIndicatorCol": "workers end their epochs at different times: use the fitted model's evaluate",
            "validationFraction": "workers end their epochs at different times: use the fitted model's evaluate",
        }
        for name, reason in reasons.items():
            if self.isSet(name) and self.getOrDefault(name) not in ("auto", 0):
                raise ParamError(
                    f"{name}={self.getOrDefault(name)!r} with parameterServers=1: {reason}; leave one of them out"
                )

    def getLossWeights(self) -> Any:
        """Get :py:attr:`lossWeights`."""
        return self.getOrDefault(self.lossWeights)

    def setLossWeights(self: E, value: float | list[float] | dict[str, float]) -> E:
        """Set :py:attr:`lossWeights`."""
        return self._set(lossWeights=value)

    def getCallbacks(self) -> Any:
        """Get :py:attr:`callbacks`."""
        return self.getOrDefault(self.callbacks)

    def setCallbacks(self: E, value: Any) -> E:
        """Set :py:attr:`callbacks`."""
        return self._set(callbacks=value)
