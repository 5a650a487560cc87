"""Between which numbers the labels lie, taken by the executors while they write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Extent:
    """What is known of numbers without a look at them.

    Parameters
    ----------
    least, most : float
        The smallest and the largest.
    whole : bool
        Whether all are whole numbers.
    """

    least: float
    most: float
    whole: bool

    def __or__(self, other: Extent) -> Extent:
        return Extent(min(self.least, other.least), max(self.most, other.most), self.whole and other.whole)

    @classmethod
    def of(cls, values: np.ndarray) -> Extent:
        """The extent of some numbers, at least one."""
        whole = values.dtype.kind in "iub" or bool((values == np.floor(values)).all())
        return cls(float(values.min()), float(values.max()), whole)

    @classmethod
    def fromDict(cls, value: Mapping[str, Any]) -> Extent:
        """The extent that :meth:`toDict` described."""
        return cls(**value)

    def toDict(self) -> dict[str, Any]:
        """The extent as JSON can hold it."""
        return asdict(self)


def label_extents(block: Mapping[str, np.ndarray]) -> dict[str, Extent]:
    """The extent of each label among a block's arrays, over the rows that count.

    Parameters
    ----------
    block : mapping of str to numpy.ndarray
        Arrays of shape ``(rows,) + shape`` by the tensors' names. Where one is named ``"weight"``, rows that weigh
        nothing are left out.
    """
    labels = {name: values for name, values in block.items() if name.partition(":")[0] == "label"}
    if (weight := block.get("weight")) is not None and not weight.all():
        labels = {name: values[weight != 0] for name, values in labels.items()}
    return {name: Extent.of(values) for name, values in labels.items() if values.size and values.dtype.kind != "O"}


def together(one: Mapping[str, Extent], other: Mapping[str, Extent]) -> dict[str, Extent]:
    """The extents of what two parts hold."""
    return {**one, **other, **{name: one[name] | other[name] for name in one if name in other}}
