"""Worker side: what a Keras model puts out, and which of Spark's columns suit it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spark_nn.dataset.manifest import Manifest
from spark_nn.labels import Takes, check_values
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
# Losses of probabilities, and the others that compare number with number.
_PROBABILITIES = {
    "binarycrossentropy",
    "binaryfocalcrossentropy",
    "categoricalcrossentropy",
    "categoricalfocalcrossentropy",
}
_PAIRWISE = {"cosinesimilarity", "kldivergence", "hinge", "squaredhinge", "categoricalhinge"}
# Hinges make -1 and 1 of 0 and 1.
_BETWEEN = {
    "poisson": (0, math.inf),
    "meansquaredlogarithmicerror": (0, math.inf),
    "hinge": (-1, 1),
    "squaredhinge": (-1, 1),
}


def by_name(model: Any, outputs: Any) -> dict[str, Any]:
    """What a model put out by its names for it; the only output by the empty name."""
    if isinstance(outputs, dict):
        return dict(outputs) if len(outputs) != 1 else {"": next(iter(outputs.values()))}
    if not isinstance(outputs, (list, tuple)):
        return {"": outputs}
    names = getattr(model, "output_names", None) or [f"output_{place}" for place in range(len(outputs))]
    return dict(zip(names, outputs, strict=True)) if len(outputs) != 1 else {"": outputs[0]}


def describe_outputs(
    model: Any, put_out: Any, manifest: Manifest, weights: Mapping[int, float]
) -> dict[str, dict[str, Any]]:
    """What a compiled model puts out, read from its losses and the shapes of its outputs.

    Parameters
    ----------
    model : keras.Model
        Built and compiled.
    put_out : tensor, or list or dict of tensors
        What it puts out for some rows.
    manifest : Manifest
        The rows, whose labels it is to learn.
    weights : mapping of int to float
        How much the rows of each class count.

    Returns
    -------
    dict of str to dict
        Arguments of :class:`spark_nn.outputs.Output` by the outputs' names.

    Raises
    ------
    ParamError
        There is no label for an output, or no output for a label; or a loss of classes has one unit.
    ColumnError
        The loss of an output cannot be taken of its labels.
    """
    outputs = by_name(model, put_out)
    check_labels(outputs, [tensor.key for tensor in manifest.role("label")])
    if not _own_step(model):
        counting = [name for name in outputs if _weight_of(model, name, list(outputs))]
        losses = {name: loss_of(model, name, list(outputs)) for name in counting}
        check_values({name: _taken(outputs[name], loss) for name, loss in losses.items()}, manifest, weights)
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


def _weight_of(model: Any, output: str, outputs: Sequence[str]) -> float:
    """How much the loss of an output counts."""
    weights = model.get_compile_config().get("loss_weights")
    if isinstance(weights, dict):
        return float(weights.get(output, 1.0))
    if isinstance(weights, (list, tuple)):
        return float(weights[list(outputs).index(output)])
    return 1.0 if weights is None else float(weights)


def other_reduction(loss: Any) -> str | None:
    """A loss among those of a compiled model that is no mean over rows, and what it is; None where there is none."""
    losses = loss.values() if isinstance(loss, dict) else loss if isinstance(loss, (list, tuple)) else [loss]
    for each in losses:
        reduction = getattr(each, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean", "auto"):
            return f"{type(each).__name__} has reduction={reduction!r}"
    return None


def _own_step(model: Any) -> bool:
    """Whether a model computes its loss by code of its own, and its labels may be anything."""
    import keras

    return any(
        getattr(getattr(model, each), "__func__", None) is not getattr(keras.Model, each)
        for each in ("train_step", "compute_loss")
    )


def _taken(output: Any, loss: Any) -> Takes | None:
    """What a loss of Keras's takes for labels; None for others."""
    kind = loss if hasattr(loss, "__name__") else type(loss)
    if not (getattr(kind, "__module__", None) or "").startswith("keras."):
        return None
    shape = tuple(int(size) for size in output.shape[1:])
    size, name = int(np.prod(shape)), _plain_name(loss)
    if name == "sparsecategoricalcrossentropy":
        if not shape or getattr(loss, "_fn_kwargs", {}).get("axis", -1) not in (-1, len(shape)):
            return None
        taken = Takes(
            *(kind.__name__, size // shape[-1], shape, 0, shape[-1] - 1),
            classes=shape[-1],
            numbered=True,
            ignored=getattr(loss, "ignore_class", None),
        )
    elif name in _PROBABILITIES:
        classes = shape[-1] if shape and name.startswith("categorical") else None
        taken = Takes(kind.__name__, size, shape, 0, 1, classes=classes)
    elif name in _REGRESSION | _PAIRWISE:
        least, most = _BETWEEN.get(name, (-math.inf, math.inf))
        taken = Takes(kind.__name__, size, shape, least, most)
    else:
        return None
    # What a mask leaves out may have any label.
    masked = getattr(output, "_keras_mask", None) is not None
    return replace(taken, least=-math.inf, most=math.inf, numbered=False) if masked else taken


def _plain_name(loss: Any) -> str:
    """The name that a loss has as a function and as a class."""
    name: str = getattr(loss, "__name__", type(loss).__name__)
    return name.replace("_", "").lower()


def _describe(output: Any, loss: Any) -> dict[str, Any]:
    shape = tuple(int(size) for size in output.shape[1:])
    name = _plain_name(loss)
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
