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
    second, penult : float
        The smallest but for those that equal `least`, and the largest but for those that equal `most`: what counts
        where the outermost stands for no value. `least` and `most` where there are no others.
    """

    least: float
    most: float
    whole: bool
    second: float
    penult: float

    def __or__(self, other: Extent) -> Extent:
        values = [each for part in (self, other) for each in (part.least, part.second, part.penult, part.most)]
        least, most = min(values), max(values)
        second = min((each for each in values if each > least), default=least)
        penult = max((each for each in values if each < most), default=most)
        return Extent(least, most, self.whole and other.whole, second, penult)

    @classmethod
    def of(cls, values: np.ndarray) -> Extent:
        """The extent of some numbers, at least one."""
        whole = values.dtype.kind in "iub" or bool((values == np.floor(values)).all())
        least, most = values.min(), values.max()
        above, below = values[values > least], values[values < most]
        second, penult = (above.min() if above.size else least), (below.max() if below.size else most)
        return cls(float(least), float(most), whole, float(second), float(penult))

    @classmethod
    def fromDict(cls, value: Mapping[str, Any]) -> Extent:
        """The extent that :meth:`toDict` described."""
        return cls(**value)

    def toDict(self) -> dict[str, Any]:
        """The extent as JSON can hold it."""
        return asdict(self)

    def but(self, value: float | None) -> tuple[float, float]:
        """The smallest and the largest number that is not this one."""
        return self.second if self.least == value else self.least, self.penult if self.most == value else self.most


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
