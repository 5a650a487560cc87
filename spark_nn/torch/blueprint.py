"""Where a network comes from: the function that returns it, or a module without its weights.

Weights are files, but what computes with them is code. In the session that has it, code travels inside the closure
that Spark sends, as functions do. What is saved names it, and nothing more.

The driver imports this module without PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cloudpickle

from spark_nn.errors import ParamError
from spark_nn.persistence import import_path
from spark_nn.share import Share

# An input by the model's name for it, None for the only one: its shape and dtype.
Specs = Mapping[str | None, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Blueprint:
    """What makes a network, and what measures it.

    Parameters
    ----------
    function : callable or None
        Returns the network.
    arguments : dict
        Keyword arguments of the function.
    skeleton : torch.nn.Module or None
        In place of the function: the network without its weights.
    loss : object or None
        As the param `loss` takes it.
    metrics : list or dict or None
        As the param `metrics` takes them.
    """

    function: Callable[..., Any] | None
    arguments: dict[str, Any] = field(default_factory=dict)
    skeleton: Any = None
    loss: Any = None
    metrics: Any = None

    @functools.cached_property
    def pickled(self) -> bytes:
        """The blueprint as it travels in Spark's closure; made once, so that executors know it again.

        Raises
        ------
        ParamError
            It holds what cannot be sent.
        """
        try:
            data: bytes = cloudpickle.dumps(self)
        except Exception as error:
            raise ParamError(
                f"the model cannot be sent to the executors ({type(error).__name__}: {error}): define it so that it "
                "holds no open files, locks or sessions"
            ) from error
        return data

    def build(self, device: str = "cpu") -> Any:
        """Worker side: the network; the weights of a skeleton's are yet to come.

        Parameters
        ----------
        device : str
            Where tensors are made that are not told otherwise; on ``"meta"`` they have no values.

        Raises
        ------
        ParamError
            The function returns something else.
        """
        import torch

        if self.function is None:
            return _exchanged(self.skeleton, lambda tensor: torch.empty_like(tensor, device=device))
        with contextlib.nullcontext() if device == "cpu" else torch.device(device):
            module = self.function(**self.arguments)
        if not isinstance(module, torch.nn.Module):
            raise ParamError(f"the function given as model returned {module!r}, not a torch.nn.Module")
        return module

    def toDict(self) -> dict[str, Any]:
        """What names the network and its loss and metrics, as JSON can hold it."""
        return {
            "function": None if self.function is None else _path(self.function),
            "class": None if self.skeleton is None else import_path(type(self.skeleton)),
            "arguments": self.arguments,
            "loss": _named(self.loss),
            "metrics": _named(self.metrics),
        }


@dataclass(frozen=True)
class BlueprintLoader:
    """Executor side: a loader for a model whose blueprint comes along; equal where both are, so that it loads once.

    Parameters
    ----------
    load : callable
        An importable function that takes the local path, the task's share, and the blueprint.
    pickled : bytes
        The blueprint.
    """

    load: Callable[[str, Share, Blueprint], Any]
    pickled: bytes

    def __call__(self, path: str, share: Share) -> Any:
        """Load the model."""
        return self.load(path, share, cloudpickle.loads(self.pickled))


def is_module(value: Any) -> bool:
    """Whether a value is a network of PyTorch's; does not import PyTorch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "nn") and isinstance(value, torch.nn.Module)


def weights_of(module: Any) -> dict[str, Any]:
    """The parameters and buffers that make up a network, by PyTorch's names; one that is used twice by its first."""
    kept = module.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    return {**dict(module.named_parameters()), **buffers}


def skeleton_of(module: Any) -> Any:
    """Driver side: a copy of a network without its weights."""
    import torch

    return _exchanged(module, lambda tensor: torch.empty_like(tensor, device="meta"))


def _exchanged(module: Any, replace: Callable[[Any], Any]) -> Any:
    """A copy of a network with other tensors in the place of its weights, wherever it refers to them."""
    import torch

    memo: dict[int, Any] = {}
    for tensor in weights_of(module).values():
        if torch.nn.parameter.is_lazy(tensor):
            continue
        other = replace(tensor.detach())
        if isinstance(tensor, torch.nn.Parameter):
            other = torch.nn.Parameter(other, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = other
    return copy.deepcopy(module, memo)


def _path(function: Any) -> str | None:
    return import_path(function) if hasattr(function, "__qualname__") else None


def _named(value: Any) -> Any:
    """Names as they are, functions by their import paths, in a dict of their own, and None for what has neither."""
    if isinstance(value, dict):
        return {name: _named(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(each) for each in value]
    if value is None or isinstance(value, str):
        return value
    return {"import": _path(value)}
