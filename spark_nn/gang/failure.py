"""What a rank that fails leaves in the run directory, and which of several failures came first."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, dataclass
from typing import Literal

from spark_nn.errors import PeerLost
from spark_nn.store import RunDir

FOLDER = "failures"


@dataclass(frozen=True)
class Failure:
    """Why a rank failed.

    Parameters
    ----------
    rank : int
        Which.
    host : str
        Where it ran.
    kind : {"error", "died", "peer"}
        It raised an error; its process died; it lost another rank, so that the cause is elsewhere.
    reason : str
        One line.
    traceback : str
        The traceback, empty where the process just died.
    log : str
        The last lines that it printed.
    when : float
        Seconds since the epoch, by the clock of its host.
    """

    rank: int
    host: str
    kind: Literal["error", "died", "peer"]
    reason: str
    traceback: str = ""
    log: str = ""
    when: float = 0.0

    @classmethod
    def of(cls, error: BaseException, rank: int, host: str) -> Failure:
        """The failure that an exception describes."""
        return cls(
            rank=rank,
            host=host,
            kind="peer" if isinstance(error, PeerLost) else "error",
            reason="".join(traceback.format_exception_only(error)).strip(),
            traceback="".join(traceback.format_exception(error)),
            when=time.time(),
        )

    def save(self, run: RunDir) -> None:
        """Leave it for the driver."""
        run.writeJson(f"{FOLDER}/rank-{self.rank}.json", asdict(self))

    @classmethod
    def load(cls, run: RunDir, rank: int) -> Failure | None:
        """The failure that a rank left, None where it left none."""
        value = run.readJson(f"{FOLDER}/rank-{rank}.json")
        return None if value is None else cls(**value)


def first_failure(run: RunDir, world: int, patience: float) -> Failure | None:
    """The failure that the others follow from.

    Parameters
    ----------
    run : RunDir
        Where the ranks left theirs.
    world : int
        How many ranks there are.
    patience : float
        Seconds to wait for the cause while only survivors, or nobody, have reported.
    """
    deadline = time.monotonic() + patience
    while True:
        run.fs.invalidate_cache()
        found = [failure for rank in range(world) if (failure := Failure.load(run, rank)) is not None]
        causes = [failure for failure in found if failure.kind != "peer"]
        if causes or time.monotonic() > deadline:
            # A process that just died says less than one that raised: the exception is the better answer.
            return min(causes or found, key=lambda f: (f.kind == "died", f.when), default=None)
        time.sleep(0.1)
