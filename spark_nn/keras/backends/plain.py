"""What backends have in common on which Keras's variables are all that a model and its random numbers are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def buffers(model: Any) -> list[Any]:
    """What a model keeps besides variables: nothing."""
    return []


def random_state() -> dict[str, np.ndarray]:
    """The state of generators of the backend's own: none."""
    return {}


def set_random_state(arrays: Mapping[str, np.ndarray]) -> None:
    """Go on from that state."""
