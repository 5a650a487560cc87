"""What backends have in common whose steps Python runs one by one, with gradients and batches as NumPy's arrays."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

# Nowhere else does Keras show what `fit` reads its batches by; a `PyDataset` would copy them for PyTorch.
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from spark_nn.errors import ColumnError
from spark_nn.gang.collective import Average, Collective
from spark_nn.keras.feed import Feed
from spark_nn.trainer import non_finite

# Python sees every step.
TOGETHER = False


class Averager:
    """Averages arrays over the ranks through the gang's own collective.

    Parameters
    ----------
    collective : Collective
        Exchange with the other ranks.
    """

    def __init__(self, collective: Collective) -> None:
        self.collective = collective
        self._works: dict[tuple[np.dtype[Any], tuple[int, ...]], Average] = {}

    def mean(self, given: Sequence[np.ndarray], filled: Sequence[np.ndarray]) -> None:
        """Fill arrays of one dimension and type, perhaps the same ones, with the means over the ranks."""
        key = filled[0].dtype, tuple(each.size for each in filled)
        if key not in self._works:
            self._works[key] = self.collective.averaging(*key)
        self._works[key](given, filled)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Run the steps of a fit."""
        yield


class Watch:
    """Counts the steps of an epoch up to the first whose loss is not finite.

    Parameters
    ----------
    world : int
        How many ranks there are.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.good = 0
        self.bad = False
        self.rate = np.nan  # of the bad step

    def begin(self, step: int) -> None:
        """Begin an epoch at a step."""
        self.good = step

    def note(self, bad: bool, rate: float) -> None:
        """A step was made, with this learning rate; of no use is the loss where any rank's was not finite."""
        if bad and not self.bad:
            self.bad, self.rate = True, rate
        self.good += not self.bad

    def due(self) -> bool:
        """Whether it is time to look."""
        return True

    def look(self, epoch: int, model: keras.Model) -> None:
        """Raise `NonFiniteLoss` if a step of this epoch was bad."""
        if self.bad:
            raise non_finite(epoch, self.good, self.rate, "clipnorm of the optimizer")


def check_range(what: str, array: np.ndarray, kept: Any) -> None:
    """Refuse whole numbers that a backend would take for others.

    Parameters
    ----------
    what : str
        What they are, for the error.
    array : numpy.ndarray
        The numbers.
    kept : numpy.dtype
        What the backend makes of the array's type.

    Raises
    ------
    ColumnError
        One of them lies beyond that.
    """
    if array.dtype.kind not in "iu" or array.dtype == kept or not array.size:
        return
    limits = np.iinfo(kept)
    for value in (int(array.min()), int(array.max())):
        if not limits.min <= value <= limits.max:
            raise ColumnError(
                f"{what} holds the whole number {value}, and JAX takes those from {limits.min} to {limits.max}: make "
                "indices of such numbers before, as StringIndexer does, or set backend='tensorflow' or 'torch'"
            )


class Batches(DataAdapter):  # type: ignore[misc]
    """A feed's batches, an epoch at a time, as Keras's trainers ask for them.

    Parameters
    ----------
    feed : Feed
        The batches.
    start : int
        How many of them are left out at the beginning of an epoch.
    """

    def __init__(self, feed: Feed, start: int) -> None:
        self.feed = feed
        self.start = start

    def get_numpy_iterator(self) -> Iterator[Any]:
        """Batches of arrays."""
        return self.feed.batches(self.start)

    def get_jax_iterator(self) -> Iterator[Any]:
        """Batches of arrays, which JAX takes as they are, but for large whole numbers."""
        from spark_nn.keras.backends.jax import check_block

        return self.feed.batches(self.start, functools.partial(check_block, self.feed.stream.manifest.tensors))

    def get_torch_dataloader(self) -> Iterator[Any]:
        """Batches of tensors."""
        from spark_nn.keras.backends.torch import tensors

        return map(tensors, self.feed.batches(self.start))

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return self.feed.stream.steps - self.start

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.feed.stream.batch

    @property
    def has_partial_batch(self) -> bool:
        """Whether the last batch may be smaller."""
        return True

    @property
    def partial_batch_size(self) -> None:
        """Rows of that one; unknown."""


def dataset(feed: Feed, start: int = 0) -> Batches:
    """What ``fit`` reads a feed by."""
    return Batches(feed, start)


def first(feed: Feed, start: int) -> Any:
    """The first batch after so many."""
    return next(feed.batches(start))
