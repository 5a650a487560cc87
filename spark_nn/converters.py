"""Converters of Params: what a value may be, and what it becomes.

A converter raises ``TypeError`` for a value of the wrong type (pyspark adds the param's name) and
:class:`~spark_nn.errors.ParamError` for a value out of range. Unlike pyspark's own converters they take
NumPy scalars, which is what a loop over ``np.logspace`` hands out.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pyspark.ml.param import Param, Params

from spark_nn.errors import ParamError


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


def number(
    name: str,
    *,
    above: float | None = None,
    low: float | None = None,
    below: float | None = None,
    high: float | None = None,
) -> Any:
    """Converter for finite numbers in an interval: `above` and `below` are excluded, `low` and `high` are included."""

    def convert(value: Any) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} takes a number, not {value!r} ({type(value).__name__})")
        result = float(value)
        limits = [
            (above is not None and not result > above, f"above {above}"),
            (low is not None and not result >= low, f"at least {low}"),
            (below is not None and not result < below, f"below {below}"),
            (high is not None and not result <= high, f"at most {high}"),
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


def checkpoint_interval(value: Any) -> int:
    """Converter for numbers of steps, or -1 for never, as in the rest of Spark ML."""
    steps = integer("checkpointInterval")(value)
    if steps < 1 and steps != -1:
        raise ParamError(f"checkpointInterval={steps}: must be a number of steps, at least 1, or -1 for no checkpoints")
    return steps


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


def columns_dict(name: str, *, several: bool) -> Callable[[Any], dict[str, Any]]:
    """Converter for a dict of the model's names to columns, or to lists of them where `several` may go together."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise TypeError(f"{name} takes a dict with at least one entry, not {value!r} ({type(value).__name__})")
        result: dict[str, Any] = {}
        for key, given in value.items():
            listed = several and isinstance(given, (list, tuple)) and len(given) > 0
            names = given if listed else [given]
            if not isinstance(key, str) or not all(isinstance(each, str) for each in names):
                lists = " or a non-empty list of such names" if several else ""
                raise TypeError(f"{name}[{key!r}] takes a column's name{lists}, not {given!r}")
            if not key or ":" in key:
                raise ParamError(f"{name} has the key {key!r}: must be a name of the model's, not empty, without ':'")
            result[key] = list(given) if listed else given
        return result

    return convert


def class_weights(value: Any) -> dict[int, float]:
    """Converter for a dict of classes to weights; the classes may come as the strings that JSON makes of them."""
    if not isinstance(value, dict) or not value:
        raise TypeError(f"classWeights takes a dict of classes to weights, such as {{0: 1.0, 1: 5.0}}, not {value!r}")
    as_class = integer("classWeights' class", low=0)
    as_weight = number("classWeights' weight", low=0.0)
    keys = [int(key) if isinstance(key, str) and key.isdigit() else key for key in value]
    return {as_class(key): as_weight(weight) for key, weight in zip(keys, value.values(), strict=True)}


def by_output(name: str, convert: Callable[[Any], Any], what: str) -> Callable[[Any], Any]:
    """Converter for one value, or for a dict of them by the names of a model's outputs.

    Parameters
    ----------
    name : str
        The param, for messages.
    convert : callable
        Converter of one value.
    what : str
        What one value is, for messages.
    """

    def converter(value: Any) -> Any:
        if not isinstance(value, dict):
            return convert(value)
        if not value or not all(isinstance(key, str) and key for key in value):
            raise TypeError(f"{name} takes {what}, or a dict of outputs' names to such, not {value!r}")
        return {key: convert(each) for key, each in value.items()}

    return converter


def loss_weights(value: Any) -> Any:
    """Converter for a number, a list of numbers, or a dict of outputs' names to numbers."""
    weight = by_output("lossWeights", number("lossWeights", low=0.0), "a number")
    if isinstance(value, (list, tuple, np.ndarray)):
        return [number("lossWeights", low=0.0)(each) for each in value]
    return weight(value)


def param(name: str, doc: str, converter: Callable[[Any], Any]) -> Param[Any]:
    """Declare a Param, as pyspark.ml does it."""
    return Param(Params._dummy(), name, doc, typeConverter=converter)
