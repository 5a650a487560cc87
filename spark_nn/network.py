"""What every estimator of a framework's networks is given, and its checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params

from spark_nn.converters import param, plain_dict
from spark_nn.errors import ParamError
from spark_nn.model import NeuralModel

E = TypeVar("E", bound="NetworkParams")


class NetworkParams(Params):
    """What to train, and by which loss; what the values may be, each framework says."""

    model: Param[Any]
    optimizer: Param[Any]
    loss: Param[Any]
    metrics: Param[Any]
    initialModel: Param[Any]
    modelParams: Param[dict[str, Any]] = param(
        "modelParams",
        "Keyword arguments of the function given as model, as a dict of numbers, strings, lists and dicts.",
        plain_dict("modelParams"),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(modelParams={})

    def getModel(self) -> Any:
        """Get :py:attr:`model`."""
        return self.getOrDefault(self.model)

    def setModel(self: E, value: Any) -> E:
        """Set :py:attr:`model`."""
        return self._set(model=value)

    def getModelParams(self) -> dict[str, Any]:
        """Get :py:attr:`modelParams`."""
        return self.getOrDefault(self.modelParams)

    def setModelParams(self: E, value: dict[str, Any]) -> E:
        """Set :py:attr:`modelParams`."""
        return self._set(modelParams=value)

    def getOptimizer(self) -> Any:
        """Get :py:attr:`optimizer`."""
        return self.getOrDefault(self.optimizer)

    def setOptimizer(self: E, value: Any) -> E:
        """Set :py:attr:`optimizer`."""
        return self._set(optimizer=value)

    def getLoss(self) -> Any:
        """Get :py:attr:`loss`."""
        return self.getOrDefault(self.loss)

    def setLoss(self: E, value: Any) -> E:
        """Set :py:attr:`loss`."""
        return self._set(loss=value)

    def getMetrics(self) -> Any:
        """Get :py:attr:`metrics`."""
        return self.getOrDefault(self.metrics)

    def setMetrics(self: E, value: Any) -> E:
        """Set :py:attr:`metrics`."""
        return self._set(metrics=value)

    def getInitialModel(self) -> Any:
        """Get :py:attr:`initialModel`."""
        return self.getOrDefault(self.initialModel)

    def setInitialModel(self: E, value: Any) -> E:
        """Set :py:attr:`initialModel`."""
        return self._set(initialModel=value)

    def _ifGiven(self, name: str) -> Any:
        """A param's value, None where there is none."""
        return self.getOrDefault(name) if self.isDefined(name) else None


def fitted(kind: type[NeuralModel]) -> Callable[[Any], Any]:
    """Converter of the param `initialModel`: lets fitted models of a class through."""

    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"initialModel takes a fitted {kind.__name__}, not {value!r} ({type(value).__name__})")
        value.fitted  # noqa: B018  (refuses an empty one)
        return value

    return convert


def check_network(model: Any, before: Any, arguments: Mapping[str, Any], kind: str) -> None:
    """Refuse to train without a network, and arguments where there is no function.

    Parameters
    ----------
    model, before : object or None
        The params model and initialModel.
    arguments : mapping
        The param modelParams.
    kind : str
        The class of the framework's networks.

    Raises
    ------
    ParamError
        There is neither, or there are arguments without a function.
    """
    if model is None and before is None:
        raise ParamError(f"model is not set: give a {kind}, or a function that returns one")
    if model is None and arguments:
        raise ParamError(
            f"modelParams={dict(arguments)!r} are arguments of a function, and model is not set: set it, or leave "
            "modelParams out, to go on with initialModel's own network"
        )


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that the function given as model does not take.

    Raises
    ------
    ParamError
        It does not.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ParamError(
            f"modelParams={dict(arguments)!r} are not arguments of the function given as model: {error}"
        ) from None
    except ValueError:
        pass  # some callables tell no signature


def refuse_arguments(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments for a model that is no function.

    Raises
    ------
    ParamError
        There are some.
    """
    if arguments:
        raise ParamError(
            f"modelParams={dict(arguments)!r} are arguments of a function, but model is a {type(model).__name__}: give "
            "a function, or leave modelParams out"
        )
