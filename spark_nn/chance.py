"""Worker side: the state of the generators of random numbers that user's code may draw from, kept and brought back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np

from spark_nn.checkpoint import Arrays

# An odd number: whatever the rank, its multiples differ, and they lie far apart.
STRIDE = 0x9E3779B1


def random_state() -> Arrays:
    """The state of Python's and NumPy's generators."""
    _, numbers, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state()
    return {
        "python-state": np.array(numbers, np.uint32),
        "python-gauss": np.array([] if gauss is None else [gauss]),
        "numpy-state": np.asarray(keys),
        "numpy-place": np.array([place, has_gauss]),
        "numpy-gauss": np.array([cached]),
    }


def set_random_state(arrays: Arrays) -> None:
    """Go on from the state that :func:`random_state` gave."""
    gauss = arrays["python-gauss"]
    random.setstate((random.getstate()[0], tuple(arrays["python-state"].tolist()), gauss[0] if gauss.size else None))
    place, has_gauss = arrays["numpy-place"].tolist()
    np.random.set_state(("MT19937", arrays["numpy-state"], place, has_gauss, float(arrays["numpy-gauss"][0])))


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Let the block draw none of Python's and NumPy's random numbers: ranks must go on alike."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
