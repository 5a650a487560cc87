"""Worker side: nested lists and dicts with tensors among their leaves <-> JSON and the tensors.

The states of optimizers and schedulers are such. Nothing is pickled: what is neither JSON nor a tensor is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spark_nn.errors import ParamError


def pack(value: Any, where: str = "the state") -> tuple[Any, list[Any]]:
    """A value as JSON can hold it, and the tensors that it refers to.

    Parameters
    ----------
    value : object
        Numbers, strings and tensors, in lists, tuples and dicts.
    where : str
        What messages call it.

    Raises
    ------
    ParamError
        It holds something else.
    """
    tensors: list[Any] = []

    def plain(item: Any, place: str) -> Any:
        if isinstance(item, torch.Tensor):
            tensors.append(item)
            return {"tensor": len(tensors) - 1}
        if isinstance(item, np.generic):
            item = item.item()
        if item is None or isinstance(item, (str, bool, int, float)):
            return item
        if isinstance(item, (list, tuple)):
            listed = [plain(each, f"{place}[{number}]") for number, each in enumerate(item)]
            return listed if isinstance(item, list) else {"tuple": listed}
        if isinstance(item, dict):
            # As pairs, since keys may be numbers.
            return {"dict": [[key, plain(each, f"{place}[{key!r}]")] for key, each in item.items()]}
        raise ParamError(
            f"{place} is a {type(item).__name__}, and only numbers, strings and tensors, in lists and dicts, can be "
            "kept: let its state_dict() leave it out"
        )

    return plain(value, where), tensors


def unpack(described: Any, tensors: Sequence[Any]) -> Any:
    """The value that :func:`pack` described."""
    if isinstance(described, list):
        return [unpack(each, tensors) for each in described]
    if not isinstance(described, dict):
        return described
    ((kind, value),) = described.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(unpack(each, tensors) for each in value)
    return {key: unpack(each, tensors) for key, each in value}
