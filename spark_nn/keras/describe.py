"""Worker side: what a Keras model puts out, and which of Spark's columns suit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spark_nn.columns import Tensor
from spark_nn.outputs import check_labels

# Losses whose models predict a number.
_REGRESSION = {
    "meansquarederror",
    "meanabsoluteerror",
    "meanabsolutepercentageerror",
    "meansquaredlogarithmicerror",
    "huber",
    "logcosh",
    "poisson",
}


def by_name(model: Any, outputs: Any) -> dict[str, Any]:
    """What a model put out by its names for it; the only output by the empty name."""
    if isinstance(outputs, dict):
        return dict(outputs) if len(outputs) != 1 else {"": next(iter(outputs.values()))}
    if not isinstance(outputs, (list, tuple)):
        return {"": outputs}
    names = getattr(model, "output_names", None) or [f"output_{place}" for place in range(len(outputs))]
    return dict(zip(names, outputs, strict=True)) if len(outputs) != 1 else {"": outputs[0]}


def describe_outputs(model: Any, put_out: Any, labels: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """What a compiled model puts out, read from its losses and the shapes of its outputs.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    put_out : tensor, or list or dict of tensors
        What it puts out for some rows.
    labels : sequence of Tensor
        What the columns offer it to learn.

    Returns
    -------
    dict of str to dict
        Arguments of :class:`spark_nn.outputs.Output` by the outputs' names.

    Raises
    ------
    ParamError
        There is no label for an output, or no output for a label.
    """
    outputs = by_name(model, put_out)
    check_labels(outputs, [tensor.key for tensor in labels])
    return describe_model(model, put_out)


def describe_model(model: Any, put_out: Any) -> dict[str, dict[str, Any]]:
    """The same without a look at labels; a model that is not compiled has no losses, and its outputs are raw."""
    outputs = by_name(model, put_out)
    return {name: _describe(output, loss_of(model, name, list(outputs))) for name, output in outputs.items()}


def loss_of(model: Any, output: str, outputs: Sequence[str]) -> Any:
    """The loss of one of a compiled model's outputs."""
    import keras

    given = model.loss
    if isinstance(given, dict) and "class_name" not in given:
        given = given.get(output, next(iter(given.values())) if len(outputs) == 1 else None)
    elif isinstance(given, (list, tuple)):
        given = given[list(outputs).index(output)]
    while isinstance(given, (list, tuple)) and len(given) == 1:
        (given,) = given
    return keras.losses.get(given)


def other_reduction(loss: Any) -> str | None:
    """A loss among those of a compiled model that is no mean over rows, and what it is; None where there is none."""
    losses = loss.values() if isinstance(loss, dict) else loss if isinstance(loss, (list, tuple)) else [loss]
    for each in losses:
        reduction = getattr(each, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean", "auto"):
            return f"{type(each).__name__} has reduction={reduction!r}"
    return None


def _describe(output: Any, loss: Any) -> dict[str, Any]:
    shape = tuple(int(size) for size in output.shape[1:])
    name = getattr(loss, "__name__", type(loss).__name__).replace("_", "").lower()
    logits = bool(getattr(loss, "from_logits", False))
    size = int(np.prod(shape))
    if name in _REGRESSION and size == 1:
        kind = "regression"
    elif name == "binarycrossentropy" and size == 1:
        kind = "binary"
    elif name in ("categoricalcrossentropy", "sparsecategoricalcrossentropy") and len(shape) == 1:
        kind = "multiclass"
    else:
        kind = "raw"
    return {"kind": kind, "shape": list(shape), "logits": logits}
