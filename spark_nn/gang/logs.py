"""What ranks print, through the run directory to the driver, while they run.

A rank's process prints into a file without a name, on its own machine. Its task copies what is new there into small
numbered files in the run directory; the driver reads them and removes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator

from spark_nn.errors import StoreError
from spark_nn.gang.plain import plain
from spark_nn.store import RunDir

FOLDER = "logs"
# Seconds between two looks at what was printed, and how much of it goes to the driver each time.
_INTERVAL = 0.5
_MOST_LINES = 1_000
_MOST_BYTES = 1 << 18
_LEFT_OUT = b"[lines were left out here: more were printed than are followed]"
_NAME = re.compile(r"(\d+)-\d+")
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def pumped(run: RunDir, rank: int, log: int) -> Iterator[None]:
    """Executor side: copy what a rank prints while the block runs.

    Parameters
    ----------
    run : RunDir
        The attempt's folder.
    rank : int
        Whose print it is.
    log : int
        File descriptor of the file that it prints into, whose place is left as it is.
    """
    pump = _Pump(run, rank, log)
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(_INTERVAL):
            pump.send()

    thread = threading.Thread(target=work, name="logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        pump.send(last=True)


class _Pump:
    """What was copied of a log so far."""

    def __init__(self, run: RunDir, rank: int, log: int) -> None:
        self._run = run
        self._rank = rank
        self._log = log
        self._at = 0
        self._sent = 0

    def send(self, *, last: bool = False) -> None:
        """Copy the lines that are new, at the end an unfinished one too."""
        end = os.fstat(self._log).st_size
        start = max(self._at, end - _MOST_BYTES)
        data = os.pread(self._log, end - start, start)
        skipped = start > self._at
        if skipped:
            data = data.partition(b"\n")[2] or data
        if not last and len(data) < _MOST_BYTES:
            rest = len(data) - (data.rfind(b"\n") + 1)
            data, end = data[: len(data) - rest], end - rest
        if not data:
            return
        lines = data.removesuffix(b"\n").split(b"\n")
        if skipped or len(lines) > _MOST_LINES:
            lines = [_LEFT_OUT, *lines[-_MOST_LINES:]]
        # It is a courtesy: a store that is away for a moment takes it the next time, and must not end the training.
        try:
            if not self._sent:
                self._run.mkdir(FOLDER)
            self._run.write(f"{FOLDER}/{self._rank:05d}-{self._sent:09d}", b"\n".join(lines))
        except StoreError:
            _LOG.debug("what rank %d prints could not be sent", self._rank, exc_info=True)
            return
        self._at = end
        self._sent += 1


class Follower:
    """Driver side: what the ranks of an attempt have printed.

    Parameters
    ----------
    run : RunDir
        The attempt's folder.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def lines(self) -> list[tuple[int, str]]:
        """The lines that are new: the rank of each, and its text.

        Raises
        ------
        StoreError
            The store does not answer. Lines that were read before are returned first, and what was not read comes
            another time.
        """
        found: list[tuple[int, str]] = []
        with self._lock:
            for name in self._run.names(FOLDER, patient=False):
                match = _NAME.fullmatch(name)
                if match is None or name in self._seen:
                    continue
                try:
                    data = self._run.read(f"{FOLDER}/{name}", patient=False)
                except StoreError:
                    if found:
                        break
                    raise
                if data is None:
                    continue
                self._seen.add(name)
                found += [(int(match[1]), _shown(line)) for line in data.decode(errors="replace").split("\n")]
                # Every store has errors of its own, and it goes with the run directory, too.
                with contextlib.suppress(Exception):
                    self._run.delete(f"{FOLDER}/{name}")
        return found


def _shown(line: str) -> str:
    """A line as a terminal would show it in the end: bars that are drawn again and again leave their last state."""
    last = next((part for part in reversed(line.split("\r")) if part.strip()), "")
    return plain(last, colours=True)
