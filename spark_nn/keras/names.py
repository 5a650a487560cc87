"""Whether Keras knows what a param names, said in the param's words and before anything is started or traced."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from spark_nn.errors import ParamError
from spark_nn.keras import backends
from spark_nn.keras.backends.imports import lean
from spark_nn.keras.known import BY_SHAPE, SHORT

_HELPERS = ("deserialize", "get", "serialize")
_KINDS = {"optimizer": "optimizer", "loss": "loss", "metrics": "metric"}
_CROSS_ENTROPY = ("crossentropy", "ce")
_LOG = logging.getLogger(__name__)
# Seconds that a process may take to import Keras and judge names, which mostly takes five.
_PATIENCE = 120


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
        A string names nothing, or what cannot be made without arguments.
    """
    import keras

    if isinstance(value, dict):
        # What has a class was an object, and Keras's own.
        value = [] if "class_name" in value else list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            check_name(param, each)
        return
    if not isinstance(value, str) or (param == "metrics" and value.lower() in BY_SHAPE):
        return
    if param == "loss" and value.lower() in _CROSS_ENTROPY:
        raise ParamError(
            f"loss={value!r}: Keras chooses among its cross-entropies by the labels of a batch, and here the loss is "
            "known before: name 'binary_crossentropy', 'categorical_crossentropy' or 'sparse_categorical_crossentropy'"
        )
    module = {"optimizer": keras.optimizers, "loss": keras.losses, "metrics": keras.metrics}[param]
    kind = _KINDS[param]
    try:
        module.get(value)
    except (KeyError, TypeError):
        raise ParamError(
            f"{param}={value!r}: the {kind} of this name needs arguments; give an instance of it"
        ) from None
    except ValueError:
        known = sorted(
            name
            for name, each in vars(module).items()
            if not name.startswith("_")
            and name not in _HELPERS
            and (inspect.isfunction(each) if param == "loss" else inspect.isclass(each))
        )
        short = {"optimizer": (), "loss": SHORT, "metrics": (*SHORT, *BY_SHAPE)}[param]
        lowered = {name.lower(): name for name in [*known, *short]}
        near = difflib.get_close_matches(value.lower(), lowered, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(lowered[each]) for each in near)}?" if near else ""
        raise ParamError(
            f"{param}={value!r}: Keras has no {kind} of this name; {hint or 'known are ' + ', '.join(known)}"
        ) from None


def check_names(names: Sequence[tuple[str, str]], backend: str) -> None:
    """Driver side: refuse names that Keras does not know, without importing it where nobody has.

    A process of its own imports it then, so that neither the environment of the driver changes nor the backend is
    settled that Keras will run on there. Where that is not possible, as without Keras, workers find out.

    Parameters
    ----------
    names : sequence of tuple of str
        Params, and a name that each has.
    backend : str
        What Keras runs on in the workers.

    Raises
    ------
    ParamError
        A name is that of nothing, or of what cannot be made without arguments.
    """
    if hasattr(sys.modules.get("keras"), "saving"):  # one that could not be imported leaves less
        for param, name in names:
            check_name(param, name)
        return
    try:
        refusal = _refusal(tuple(names), backend)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        _LOG.info("names of Keras's are left to the workers to judge: %s", error)
        return
    if refusal:
        raise ParamError(refusal)


@functools.cache
def _refusal(names: tuple[tuple[str, str], ...], backend: str) -> str:
    """What Keras in another process has against names: empty for nothing, and where there is none to ask."""
    if not sys.executable or importlib.util.find_spec("keras") is None:  # finds the package, and runs nothing of it
        return ""
    command = [sys.executable, "-P", "-c", f"from {__name__} import answer; answer()"]
    with TemporaryDirectory(prefix="spark_nn-") as folder:
        environment = {
            **os.environ,
            **backends.environment(backend),
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "CUDA_VISIBLE_DEVICES": "",  # an optimizer is made to see whether it can be, and needs no card for that
            # What Keras and its backend leave behind where they are imported.
            "KERAS_HOME": folder,
            "TMPDIR": folder,
        }
        done = subprocess.run(
            command,
            input=json.dumps(names),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
        )
    refusal: str = json.loads(done.stdout.splitlines()[-1])
    return refusal


def answer() -> None:
    """In a process of its own: judge the names that come by standard input."""
    refusal = ""
    with lean(os.environ["KERAS_BACKEND"]):
        import keras  # noqa: F401
    try:
        for param, name in json.load(sys.stdin):
            check_name(param, name)
    except ParamError as error:
        refusal = str(error)
    sys.stdout.write(f"\n{json.dumps(refusal)}\n")  # after whatever a backend may have printed
