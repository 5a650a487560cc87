"""Worker side: how many steps Keras runs in one call."""

from __future__ import annotations


def steps_per_execution(parameters: int, batch: int, steps: int) -> int:
    """Steps to run in one call of Keras's training function (to be measured)."""
    return max(1, min(16, steps // 10))
