"""The loss of a network: by name, module or function; for rows that count differently, and by columns of any shape.

What the driver asks of it needs no PyTorch.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from spark_nn.errors import ModelFileError, ParamError
from spark_nn.labels import Takes
from spark_nn.torch.blueprint import is_module

# The functions of torch.nn.functional that compare an output with a target and average over rows.
NAMES = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "hinge_embedding_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
)
_MEANS = ("mean", "batchmean")
_REGRESSION = {"mse", "l1", "smoothl1", "huber", "poissonnll"}
_BINARY = ("binarycrossentropy", "binarycrossentropywithlogits")
# A module's short name for what the function spells out.
_SPELT = {"bce": "binarycrossentropy", "bcewithlogits": "binarycrossentropywithlogits"}


def check_loss(loss: Any, *, weighted: bool, workers: int) -> None:
    """Driver side: refuse a loss that is unknown, or that cannot do what is asked.

    Parameters
    ----------
    loss : str, torch.nn.Module, callable, or dict of them
        The param's value.
    weighted : bool
        Whether rows count differently.
    workers : int
        How many share a batch.

    Raises
    ------
    ParamError
        It is unknown, or cannot.
    """
    for each in loss.values() if isinstance(loss, dict) else [loss]:
        if isinstance(each, str) and each not in NAMES:
            near = difflib.get_close_matches(each.lower(), NAMES, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(NAMES)}"
            raise ParamError(
                f"loss={each!r}: torch.nn.functional has no loss of this name that takes an output and a target; {hint}"
            )
        reduction = getattr(each, "reduction", "mean")
        if reduction == "none" or (reduction not in _MEANS and workers > 1):
            raise ParamError(
                f"loss {type(each).__name__} has reduction={reduction!r}, which "
                + ("is no scalar" if reduction == "none" else "several workers cannot share")
                + ": use 'mean' (PyTorch's default)"
                + (", or numWorkers=1" if reduction != "none" else "")
            )
        if weighted and counts_classes(each):
            raise ParamError(
                f"weightCol and classWeights weight the loss of each row, and loss {type(each).__name__} weights "
                "classes itself (weight or ignore_index): use one of them"
            )
        if weighted and not isinstance(each, str) and not _has_reduction(each):
            raise ParamError(
                f"weightCol and classWeights weight the loss of each row, and loss={each!r} does not tell it: give a "
                "loss by name, a module that has a reduction, or a function with an argument of that name, as those of "
                "torch.nn.functional have"
            )


def counts_classes(loss: Any) -> bool:
    """Whether a loss is a mean over rows of which some count more, or not at all, by their class."""
    ignored = getattr(loss, "ignore_index", -100) if is_module(loss) else -100
    return is_module(loss) and (getattr(loss, "weight", None) is not None or ignored != -100)


def check_measurable(loss: Any) -> None:
    """Driver side: refuse a loss whose value over many rows is not the mean of its values over parts of them.

    Raises
    ------
    ModelFileError
        It is such a one.
    """
    for each in loss.values() if isinstance(loss, dict) else [loss]:
        if getattr(each, "reduction", "mean") not in _MEANS or counts_classes(each):
            raise ModelFileError(
                f"the model's loss {type(each).__name__} is no plain mean over rows (its reduction, weight or "
                "ignore_index), and its value would depend on how the rows are partitioned: measure with another, as "
                "TorchModel.load(path, model=..., loss=...) or TorchModel.fromTorch(..., loss=...)"
            )


def describe(put_out: dict[str, Any], loss: Any) -> dict[str, dict[str, Any]]:
    """What a network puts out, read from its losses and the shapes of its outputs.

    Parameters
    ----------
    put_out : dict of str to tensor
        What it puts out for some rows, by the outputs' names.
    loss : object or None
        The param's value.

    Returns
    -------
    dict of str to dict
        Arguments of :class:`spark_nn.outputs.Output` by the outputs' names.

    Raises
    ------
    ParamError
        There are losses for other outputs.
    """
    given = _of_outputs(put_out, loss)
    if set(given) != set(put_out):
        raise ParamError(
            f"loss names the outputs {', '.join(map(repr, given))}, and the model has {', '.join(map(repr, put_out))}: "
            "give one for each, or a function of the dicts of outputs and labels"
        )
    return {name: _kind(given[name], tuple(output.shape[1:])) for name, output in put_out.items()}


def takes(put_out: dict[str, Any], loss: Any) -> dict[str, Takes | None]:
    """What the losses of a network's outputs take for labels, None where it is not known; arguments as there."""
    given = _of_outputs(put_out, loss)
    return {name: _taken(given[name], tuple(output.shape[1:])) for name, output in put_out.items()}


def _of_outputs(put_out: dict[str, Any], loss: Any) -> dict[str, Any]:
    """The loss of each output, as far as it is named right."""
    given = loss if isinstance(loss, dict) else dict.fromkeys(put_out, loss)
    return dict.fromkeys(put_out, *given.values()) if len(given) == len(put_out) == 1 else given


def _taken(loss: Any, shape: tuple[int, ...]) -> Takes | None:
    kind = type(loss) if is_module(loss) else loss
    if not isinstance(loss, str) and not (getattr(kind, "__module__", None) or "").startswith("torch."):
        return None
    name, size = _plain_name(loss), int(np.prod(shape))
    shown = loss if isinstance(loss, str) else kind.__name__
    if name in ("crossentropy", "nll", "multimargin") and shape:
        return Takes(
            *(shown, size // shape[0], shape, 0, shape[0] - 1),
            classes=shape[0],
            numbered=True,
            ignored=getattr(loss, "ignore_index", -100) if name != "multimargin" else None,
            soft=name == "crossentropy",
        )
    if name in _BINARY:
        return Takes(shown, size, shape, 0, 1)
    if name in ("softmargin", "hingeembedding"):
        return Takes(shown, size, shape, signs=True)
    if name in _REGRESSION:
        return Takes(shown, size, shape, least=0 if name == "poissonnll" else -math.inf)
    return None


def _plain_name(loss: Any) -> str:
    """The name that a loss has as a function and as a module."""
    name = loss if isinstance(loss, str) else type(loss).__name__ if is_module(loss) else getattr(loss, "__name__", "")
    name = name.lower().replace("_", "").removesuffix("loss")
    return _SPELT.get(name, name)


def _kind(loss: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """What a network with this loss puts out: arguments of :class:`spark_nn.outputs.Output`.

    Log-probabilities count as logits: what turns these into probabilities leaves them what they are.
    """
    name, size = _plain_name(loss), int(np.prod(shape))
    kind = "raw"
    if name in _REGRESSION and size == 1:
        kind = "regression"
    elif name in _BINARY and size == 1:
        kind = "binary"
    elif name in ("crossentropy", "nll") and len(shape) == 1 and size > 1:
        kind = "multiclass"
    logits = name in ("binarycrossentropywithlogits", "crossentropy", "nll")
    return {"kind": kind, "shape": list(shape), "logits": logits}


class Criterion:
    """Worker side: the loss of a batch, as a scalar.

    Parameters
    ----------
    loss : str, torch.nn.Module, callable, or dict of them by the outputs' names
        The param's value.
    """

    def __init__(self, loss: Any) -> None:
        self._plain = {name: _function(each) for name, each in _each(loss).items()}
        self._loss = loss
        self._rowwise: dict[str, Callable[..., Any]] = {}

    def __call__(self, put_out: Any, targets: Any, weights: Any = None) -> Any:
        """The mean over the rows of a batch, each times its weight; of several outputs their sum.

        Parameters
        ----------
        put_out : tensor or dict of tensors
            What the network put out.
        targets : tensor or dict of tensors
            The labels; they are given the shape and type that the output asks for (see :func:`fitted`).
        weights : tensor, optional
            Of each row.
        """
        if not isinstance(put_out, dict):
            return self._one("", put_out, targets, weights)
        if not isinstance(self._loss, dict):
            if weights is not None:
                raise ParamError(
                    "the loss of several outputs is one function, which tells no row's part of it: give a dict of "
                    "losses by the outputs' names, or leave weightCol and classWeights out"
                )
            (function,) = self._plain.values()
            return function(put_out, {name: fitted(each, put_out[name]) for name, each in targets.items()})
        several = isinstance(targets, dict)
        parts = [self._one(name, put_out[name], targets[name] if several else targets, weights) for name in self._plain]
        return sum(parts[1:], parts[0])

    def to(self, device: Any) -> None:
        """Move what the losses hold, such as weights of classes."""
        for each in _each(self._loss).values():
            if is_module(each):
                each.to(device)

    def _one(self, name: str, output: Any, target: Any, weights: Any) -> Any:
        target = fitted(target, output)
        if weights is None:
            return self._plain[name](output, target)
        if name not in self._rowwise:
            self._rowwise[name] = _row_by_row(_each(self._loss)[name])
        each = self._rowwise[name](output, target).reshape(len(weights), -1)
        of_rows = each.sum(1) if getattr(_each(self._loss)[name], "reduction", "mean") == "batchmean" else each.mean(1)
        return (of_rows * weights).mean()


def fitted(target: Any, output: Any) -> Any:
    """A label as losses want it beside an output.

    One with as many elements takes the output's shape, and its type; one that has an element for every group of
    classes holds the class's number. Anything else is left as it is.
    """
    import torch

    if target.numel() == output.numel():
        kind = output.dtype if output.dtype in (torch.float32, torch.float64) else torch.float32
        return target.reshape(output.shape).to(kind)
    if output.ndim > 1 and target.numel() * output.shape[1] == output.numel():
        return target.reshape(output.shape[0], *output.shape[2:]).long()
    return target


def _each(loss: Any) -> dict[str, Any]:
    return loss if isinstance(loss, dict) else {"": loss}


def _function(loss: Any) -> Callable[..., Any]:
    import torch

    found: Callable[..., Any] = getattr(torch.nn.functional, loss) if isinstance(loss, str) else loss
    return found


def _row_by_row(loss: Any) -> Callable[..., Any]:
    """The loss of every row, or of its elements."""
    if is_module(loss):
        single = copy.deepcopy(loss)
        single.reduction = "none"
        return single  # type: ignore[no-any-return]
    function = _function(loss)
    return lambda output, target: function(output, target, reduction="none")


def _has_reduction(loss: Any) -> bool:
    if is_module(loss):
        return hasattr(loss, "reduction")
    try:
        return "reduction" in inspect.signature(loss).parameters
    except ValueError:
        return False
