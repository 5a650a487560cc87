"""What a function that runs on a gang sees of it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from spark_nn.gang.collective import Collective
from spark_nn.gang.progress import Reporter
from spark_nn.store import RunDir

# Where rank 0 leaves what the function returned.
RESULT = "result.json"
# Where the tasks leave which rank runs where.
CARDS = "ranks.json"


def attempt_folder(run: RunDir, attempt: int) -> RunDir:
    """Directory of what one attempt at a run leaves: a late sign of an earlier one must not be taken for this one's."""
    return run.below(attempt_name(attempt))


def attempt_name(attempt: int) -> str:
    """Name of that folder in the run directory."""
    return f"attempt-{attempt}"


@dataclass(frozen=True)
class Peers:
    """How ranks that have no collective reach rank 0.

    Parameters
    ----------
    secret : bytes
        What callers and rank 0 prove to each other to know.
    address : tuple of (str, int)
        Where rank 0 listens.
    listener : socket.socket or None
        The socket that it listens on; on rank 0 alone.
    """

    secret: bytes = field(repr=False)
    address: tuple[str, int]
    listener: socket.socket | None = None


@dataclass(frozen=True)
class GangContext:
    """One rank's view of its gang.

    Parameters
    ----------
    rank : int
        This process, from 0.
    world : int
        How many there are.
    host : str
        The host it runs on.
    cpus : int
        Cores that Spark gives it (``spark.task.cpus``).
    neighbours : int
        Ranks on this machine, this one included.
    attempt : int
        How often the run was begun before.
    timeout : float
        Seconds that a rank waits for anything.
    scratch : Path
        A folder on the local disk that goes with the rank.
    run : RunDir
        The run directory, shared by all ranks and the driver.
    collective : Collective
        Exchange with the other ranks.
    progress : Reporter
        Tells the driver how far training is.
    peers : Peers or None
        How to reach rank 0, where the ranks have no collective.
    """

    rank: int
    world: int
    host: str
    cpus: int
    neighbours: int
    attempt: int
    timeout: float
    scratch: Path
    run: RunDir
    collective: Collective
    progress: Reporter
    peers: Peers | None = None
