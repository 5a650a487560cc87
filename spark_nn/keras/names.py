"""Whether Keras knows what a param names, said in the param's words and before anything is traced."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from spark_nn.errors import ParamError

# Shorthands that Keras resolves by the shapes that it meets.
_BY_SHAPE = ("accuracy", "acc", "crossentropy", "ce")
_HELPERS = ("deserialize", "get", "serialize")


def check_name(param: str, value: Any) -> None:
    """Refuse names that Keras does not know.

    Parameters
    ----------
    param : {"optimizer", "loss", "metrics"}
        The param.
    value : object
        Its value as ``compile`` takes it; only strings are looked at, in lists and dicts too.

    Raises
    ------
    ParamError
        A string names nothing.
    """
    import keras

    if isinstance(value, dict):
        # What has a class was an object, and Keras's own.
        value = [] if "class_name" in value else list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            check_name(param, each)
        return
    if not isinstance(value, str) or (param == "metrics" and value in _BY_SHAPE):
        return
    module = {"optimizer": keras.optimizers, "loss": keras.losses, "metrics": keras.metrics}[param]
    try:
        module.get(value)
    except ValueError:
        kind = {"optimizer": "optimizer", "loss": "loss", "metrics": "metric"}[param]
        known = sorted(
            name
            for name, each in vars(module).items()
            if not name.startswith("_")
            and name not in _HELPERS
            and (inspect.isfunction(each) if param == "loss" else inspect.isclass(each))
        )
        lowered = {name.lower(): name for name in [*known, *(_BY_SHAPE if param == "metrics" else ())]}
        near = difflib.get_close_matches(value.lower(), lowered, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(lowered[each]) for each in near)}?" if near else ""
        raise ParamError(
            f"{param}={value!r}: Keras has no {kind} of this name; {hint or 'known are ' + ', '.join(known)}"
        ) from None
