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
from spark_nn.dataset.manifest import Manifest
from spark_nn.errors import ColumnError


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
    whole : bool
        Whether they number classes.
    ignored : float or None
        A value that the loss passes over.
    soft : bool
        Whether it takes probabilities of the classes as well, one for each number that the model puts out.
    """

    loss: str
    elements: int
    shape: tuple[int, ...]
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    ignored: float | None = None
    soft: bool = False


def check_values(takes: Mapping[str, Takes | None], manifest: Manifest) -> None:
    """Hold the labels that were written against the losses.

    Parameters
    ----------
    takes : mapping of str to Takes or None
        What the loss of each output takes, by the outputs' names (the only one's is empty); None where it is not known.
    manifest : Manifest
        The rows.

    Raises
    ------
    ColumnError
        A label has another number of elements than its loss compares, or values that mean nothing to it.
    """
    labels = manifest.role("label")
    for name, wanted in takes.items():
        label = next((each for each in labels if each.key == name or len(labels) == len(takes) == 1), None)
        if wanted is not None and label is not None:
            _check_one(label, wanted, manifest)


def _check_one(label: Tensor, wanted: Takes, manifest: Manifest) -> None:
    column = f"label column {label.columns[0]!r}"
    if wanted.soft and label.size == math.prod(wanted.shape):
        wanted = replace(wanted, elements=label.size, most=1, whole=False)
    if label.size != wanted.elements:
        raise ColumnError(
            f"{column} has {_numbers(label.size)} for each row, and the loss {wanted.loss} compares "
            f"{_numbers(wanted.elements)} with the model's output of shape {wanted.shape}: give the last layer the "
            "label's shape, or choose another loss. One number that names a class goes with sparse categorical "
            "cross-entropy (Keras) or cross_entropy (PyTorch), and with one unit per class"
        )
    extent = manifest.labels.get(label.name)
    if extent is None:
        return
    low = extent.least < wanted.least and extent.least != wanted.ignored
    high = extent.most > wanted.most and extent.most != wanted.ignored
    if not low and not high and (extent.whole or not wanted.whole):
        return
    found = f"values from {extent.least:g} to {extent.most:g}" + ("" if extent.whole else ", not all of them whole")
    if wanted.whole:
        allowed = f"the number of a class, 0 to {wanted.most:g}, as the model's output has the shape {wanted.shape}"
        cure = (
            "number the classes from 0 (StringIndexer does), and give the last layer one unit per class"
            if extent.whole
            else "number the classes from 0, or choose a loss for quantities, such as mean squared error"
        )
    else:
        allowed = f"numbers from {wanted.least:g} to {wanted.most:g}" if wanted.most < math.inf else "no negative ones"
        cure = (
            "recode the column, or choose another loss: (sparse) categorical cross-entropy for more than two classes, "
            "mean squared error for quantities"
        )
    raise ColumnError(f"{column} has {found}, and the loss {wanted.loss} takes {allowed}: {cure}")


def _numbers(count: int) -> str:
    return "one number" if count == 1 else f"{count} numbers"
