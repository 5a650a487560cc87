"""Which rank of a gang plays which role: a pure function of how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["chief", "worker", "ps", "evaluator"]


@dataclass(frozen=True)
class Cast:
    """The roles of a gang.

    Parameters
    ----------
    workers : int
        Ranks that train. Without parameter servers the first of them is the chief; with some, the chief comes besides,
        as it only hands out work.
    parameterServers : int
        Ranks that hold the weights.
    evaluator : bool
        Whether one more rank looks on, which is none of those that train.
    """

    workers: int
    parameterServers: int = 0
    evaluator: bool = False

    @property
    def world(self) -> int:
        """Ranks in all."""
        return len(self.parts)

    @property
    def parts(self) -> list[tuple[Role, int]]:
        """The role of each rank, and its place among those of the same role."""
        workers = self.workers if self.parameterServers else self.workers - 1
        counts: list[tuple[Role, int]] = [
            ("chief", 1),
            ("worker", workers),
            ("ps", self.parameterServers),
            ("evaluator", int(self.evaluator)),
        ]
        return [(role, index) for role, count in counts for index in range(count)]

    def serves(self, rank: int) -> bool:
        """Whether a rank runs a server that the chief gives work, and not the user's function."""
        return bool(self.parameterServers) and self.parts[rank][0] in ("worker", "ps")

    @property
    def readers(self) -> int:
        """Ranks that share the rows: those that run the user's function, but for the evaluator."""
        return 1 if self.parameterServers else self.workers

    def spec(self, addresses: Sequence[str]) -> dict[str, list[str]]:
        """The addresses of each role, from those of all ranks."""
        found: dict[str, list[str]] = {}
        for (role, _), address in zip(self.parts, addresses, strict=True):
            found.setdefault(role, []).append(address)
        return found
