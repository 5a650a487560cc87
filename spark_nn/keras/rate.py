"""Worker side: the learning rate of a Keras optimizer."""

from __future__ import annotations

import math
from typing import Any


def learning_rate(optimizer: Any) -> float:
    """The learning rate as it is now, whoever turns it; NaN for an optimizer made of several."""
    import keras

    rate = getattr(optimizer, "learning_rate", math.nan)
    return float(rate if isinstance(rate, float) else keras.ops.convert_to_numpy(rate))
