"""What a rank that fails leaves in the run directory, and which of several failures came first."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Literal

from spark_nn.errors import PeerLost, StoreError
from spark_nn.store import RunDir

FOLDER = "failures"
LOST = "lost"
_MARK = "spark_nn failure: "


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
        It raised an error; its process died or was stopped; it lost another rank, so that the cause is elsewhere.
    reason : str
        One line.
    traceback : str
        The traceback, empty where the process just died.
    log : str
        The last lines that it printed.
    when : float
        Seconds since the epoch, by the clock of its host.
    phase : str
        What it was doing.
    transient : bool
        Whether the same may succeed another time: a machine's failure and no mistake of the user's.
    """

    rank: int
    host: str
    kind: Literal["error", "died", "peer"]
    reason: str
    traceback: str = ""
    log: str = ""
    when: float = 0.0
    phase: str = ""
    transient: bool = False

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
            transient=isinstance(error, PeerLost) or (isinstance(error, StoreError) and error.transient),
        )

    def save(self, run: RunDir) -> None:
        """Leave it for the driver."""
        run.writeJson(f"{FOLDER}/rank-{self.rank}.json", asdict(self))

    def toText(self) -> str:
        """The failure as a line among others, for where the store cannot take it."""
        return f"{_MARK}{json.dumps(asdict(self))}"

    def note(self, run: RunDir) -> None:
        """Leave it for the others, who go on without this rank."""
        run.writeJson(f"{LOST}/rank-{self.rank}.json", asdict(self))

    @classmethod
    def fromText(cls, text: str) -> Failure | None:
        """The failure in a text, None where it holds none."""
        for line in text.splitlines():
            _, mark, value = line.partition(_MARK)
            if mark:
                with contextlib.suppress(ValueError, TypeError):  # somebody may have cut it off
                    return cls(**json.JSONDecoder().raw_decode(value)[0])
        return None

    @classmethod
    def load(cls, run: RunDir, rank: int) -> Failure | None:
        """The failure that a rank left, None where it left none."""
        value = run.readJson(f"{FOLDER}/rank-{rank}.json")
        return None if value is None else cls(**value)


def lost_ranks(run: RunDir) -> set[int]:
    """Ranks that died, and that the others go on without."""
    return {int(name.removeprefix("rank-").removesuffix(".json")) for name in run.names(LOST) if name.endswith(".json")}


def all_failed(run: RunDir, world: int, patience: float) -> bool:
    """Worker side: whether every rank has left a failure, waiting for them for at most so many seconds."""
    deadline = time.monotonic() + patience
    while len([name for name in run.names(FOLDER) if name.endswith(".json")]) < world:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


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
