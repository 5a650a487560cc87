"""What a function of the user's returns, on its way from rank 0 to the driver: JSON, arrays and bytes in a file."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from spark_nn.gang.context import GangContext, attempt_name
from spark_nn.store import RunDir

_FILE = "value.npz"
_ALLOWED = (
    "None, booleans, numbers, strings, bytes, NumPy arrays of numbers or strings, and lists, tuples (which become "
    "lists) and dicts with string keys of such; write anything else to storage of your own and return its place"
)


def left(gang: GangContext, value: Any) -> dict[str, Any]:
    """Worker side: what stands for a value in JSON; its arrays are left in the run directory.

    Raises
    ------
    TypeError
        It holds what cannot travel.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _tree(value, "its value", arrays)
    if not arrays:
        return {"tree": tree, "file": None}
    local, name = gang.scratch / _FILE, f"{attempt_name(gang.attempt)}/{_FILE}"
    np.savez(local, allow_pickle=False, **arrays)
    gang.run.put(local, name)
    return {"tree": tree, "file": name}


def fetched(run: RunDir, found: dict[str, Any]) -> Any:
    """Driver side: the value that :func:`left` described."""
    if found["file"] is None:
        return _value(found["tree"], {})
    with TemporaryDirectory(prefix="spark_nn-") as folder:
        local = Path(folder) / _FILE
        run.get(found["file"], local)
        with np.load(local, allow_pickle=False) as file:
            return _value(found["tree"], {name: file[name] for name in file.files})


def _tree(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        json.dumps(value)  # refuses what calls itself a number and is none
        return value
    if isinstance(value, (list, tuple)):
        return [_tree(each, f"{where}[{place}]", arrays) for place, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _tree(each, f"{where}[{key!r}]", arrays) for key, each in value.items()}}
    kind = "array" if isinstance(value, np.ndarray) and value.dtype.kind in "biufcUSMm" else None
    kind = "bytes" if isinstance(value, (bytes, bytearray)) else kind
    if kind is None:
        raise TypeError(
            f"the function given to run returned {type(value).__name__} as {where}: what can travel to the driver are "
            + _ALLOWED
        )
    name = f"array_{len(arrays)}"
    arrays[name] = np.frombuffer(value, np.uint8) if kind == "bytes" else value
    return {kind: name}


def _value(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(tree, list):
        return [_value(each, arrays) for each in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, given),) = tree.items()
    if kind == "dict":
        return {key: _value(each, arrays) for key, each in given.items()}
    return arrays[given].tobytes() if kind == "bytes" else arrays[given]
