"""Executor side: what a Spark task may use of its machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pyspark import TaskContext


@dataclass(frozen=True)
class Share:
    """What a task may use of its machine.

    Parameters
    ----------
    cpus : int, default 1
        Its cores.
    gpu : str or None
        The address of its GPU, where Spark has assigned one. A Python worker serves one task after the other, and the
        next one's may be another.
    """

    cpus: int = 1
    gpu: str | None = None

    @classmethod
    def ofTask(cls) -> Share:
        """The share of the task that this is called in."""
        context = TaskContext.get()
        if context is None:
            return cls()
        resources = context.resources()
        addresses = resources["gpu"].addresses if "gpu" in resources else []
        return cls(context.cpus(), addresses[0] if addresses else None)

    def card(self, cards: int) -> int:
        """The number of the task's GPU, as a framework counts those, so many, that this process sees.

        Spark's addresses are the cards' own numbers, and CUDA_VISIBLE_DEVICES may let a process see only some.
        """
        seen = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        address = self.gpu or "0"
        return (seen.index(address) if address in seen else int(address) if address.isdigit() else 0) % cards
