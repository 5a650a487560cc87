"""Whether a loss can be taken of the labels that the rows hold.

Frameworks compare whatever they are given: cross-entropy of two classes with a label of 5 trains without a word, and an
array of three numbers is spread over one unit. So what a loss takes is held against what was written, before the first
step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spark_nn.columns import Tensor
from spark_nn.dataset.extent import Extent
from spark_nn.dataset.manifest import Manifest
from spark_nn.errors import ColumnError, ParamError

# What the rounding of 32-bit floats may add to a bound.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Takes:
    """What a loss takes for the label of a row.

    Parameters
    ----------
    loss : str
        The loss's name, for the message.
    elements : int
        How many numbers.
    shape : tuple of int
        What the model puts out for a row, for the message.
    least, most : float
        Between which values.
    classes : int or None
        How many classes the model tells apart, where labels are of such.
    numbered : bool
        Whether a label is the number of its class.
    ignored : float or None
        A value that the loss passes over.
    soft : bool
        Whether it takes probabilities of the classes as well, one for each number that the model puts out.
    signs : bool
        Whether a label is -1 or 1.
    """

    loss: str
    elements: int
    shape: tuple[int, ...]
    least: float = -math.inf
    most: float = math.inf
    classes: int | None = None
    numbered: bool = False
    ignored: float | None = None
    soft: bool = False
    signs: bool = False


def check_values(takes: Mapping[str, Takes | None], manifest: Manifest, weights: Mapping[int, float]) -> None:
    """Hold the labels that were written against the losses.

    Parameters
    ----------
    takes : mapping of str to Takes or None
        What the loss of each output takes, by the outputs' names (the only one's is empty); None where it is not known.
    manifest : Manifest
        The rows.
    weights : mapping of int to float
        How much the rows of each class count. Where one does not at all, labels may have any value.

    Raises
    ------
    ParamError
        A loss that tells classes apart has one unit to do so.
    ColumnError
        A label has another number of elements than its loss compares, or values that mean nothing to it.
    """
    labels = manifest.role("label")
    for name, wanted in takes.items():
        label = next((each for each in labels if each.key == name or len(labels) == len(takes) == 1), None)
        if wanted is None or label is None:
            continue
        wanted = _check_shape(label, wanted)
        extent = manifest.labels.get(label.name)
        if extent is not None and all(weights.values()):
            _check_extent(f"label column {label.columns[0]!r}", extent, wanted)


def _check_shape(label: Tensor, wanted: Takes) -> Takes:
    """What is wanted of the label's values."""
    if wanted.classes == 1:
        raise ParamError(
            f"loss {wanted.loss} tells classes apart by one unit for each, and the model's output has the shape "
            f"{wanted.shape}, with which nothing can be learned: use binary cross-entropy for two classes and one "
            "unit, or give the last layer as many units as there are classes"
        )
    if wanted.soft and label.size == math.prod(wanted.shape):
        return replace(wanted, least=0, most=1, numbered=False)
    if label.size != wanted.elements:
        raise ColumnError(
            f"label column {label.columns[0]!r} has {_numbers(label.size)} for each row, and the loss {wanted.loss} "
            f"compares {_numbers(wanted.elements)} with the model's output of shape {wanted.shape}: give the last "
            "layer the label's shape, or choose another loss. One number that names a class goes with sparse "
            "categorical cross-entropy (Keras) or cross_entropy (PyTorch), and with one unit per class"
        )
    return wanted


def _check_extent(column: str, extent: Extent, wanted: Takes) -> None:
    least, most = extent.but(wanted.ignored)
    if wanted.numbered:
        right = extent.whole and wanted.least <= least and most <= wanted.most
        allowed = f"the number of a class, 0 to {wanted.most:g}, as the model's output has the shape {wanted.shape}"
        cure = (
            "number the classes from 0 (StringIndexer does), and give the last layer one unit per class"
            if extent.whole
            else "number the classes from 0, or choose a loss for quantities, such as mean squared error"
        )
    elif wanted.signs:
        right, allowed = {least, most} <= {-1.0, 1.0}, "-1 and 1"
        cure = "recode the column (2 * label - 1 makes such of 0 and 1), or choose a cross-entropy"
    else:
        right = wanted.least - _ROUNDING <= least and most <= wanted.most + _ROUNDING
        allowed = f"numbers from {wanted.least:g} to {wanted.most:g}" if wanted.most < math.inf else "no negative ones"
        cure = (
            "recode the column, or choose another loss: a cross-entropy with one unit per class for more than two "
            "classes, mean squared error for quantities"
        )
    if not right:
        found = f"values from {least:.7g} to {most:.7g}" + ("" if extent.whole else ", not all of them whole")
        raise ColumnError(f"{column} has {found}, and the loss {wanted.loss} takes {allowed}: {cure}")


def _numbers(count: int) -> str:
    return "one number" if count == 1 else f"{count} numbers"
