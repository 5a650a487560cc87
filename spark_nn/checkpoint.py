"""Worker side: what training needs to go on after a failure as if nothing had happened.

Rank 0 writes it, for all ranks, into the run directory: one file of arrays, then, with its digest, a file of JSON
that makes it count. Where ranks hold parts of a model that is too large for one, each writes a file of its own.

Each attempt at a run has a folder of its own, so that a straggler of an earlier one can change nothing; the next
attempt goes on from the newest that is whole.

When to write one, all ranks must agree upon, as each adds what it alone holds. Either it is due at fixed steps; or
rank 0 looks at its clock, at steps that it has announced the time before.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spark_nn.errors import CheckpointError, StoreError
from spark_nn.gang.collective import Collective
from spark_nn.gang.context import GangContext, attempt_folder
from spark_nn.store import RunDir, digest

FOLDER = "checkpoints"
# How many are kept: the newest, and one in case that cannot be read.
_KEPT = 2
# Seconds between two of them, or so many times what writing one takes where that is more: 5 % at most.
_PERIOD, _SHARE = 60.0, 20.0
# Looking at the clock costs an exchange; so near to its time, one may as well be written.
_EARLY = 0.05
_OWN = "rank-{}:"
_PART = "{}.rank-{}.npz"
_LOG = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where training stands.

    Parameters
    ----------
    epoch : int
        The epoch, from 0.
    step : int
        Steps done in it.
    """

    epoch: int
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Parameters
    ----------
    place : Place
        Where training goes on.
    state : dict
        What JSON can hold, the same on all ranks.
    arrays : dict of str to numpy.ndarray
        What is the same on all ranks; on rank 0 alone.
    own : dict of str to numpy.ndarray
        What this rank gave.
    part : dict of str to numpy.ndarray
        What this rank wrote itself.
    """

    place: Place
    state: dict[str, Any]
    arrays: Arrays
    own: Arrays
    part: Arrays


class Checkpoints:
    """The checkpoints of a run, as one rank sees them.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    interval : int or None
        Steps between two; None for about a minute; 0 for none.
    identity : dict
        What must be the same for a training to go on from one, as JSON can hold it.
    """

    def __init__(self, gang: GangContext, interval: int | None, identity: Mapping[str, Any]) -> None:
        self.gang = gang
        self.identity = {"world": gang.world, **identity}
        self.rhythm = _Fixed(interval) if interval is not None else _Clock(gang.collective)
        self._run = self._folder(gang.attempt)
        self._written: list[str] = []

    def begin(self, done: int) -> None:
        """Training begins, or goes on, after so many steps."""
        self.rhythm.begin(done)

    def due(self, done: int) -> bool:
        """Whether to save one now; to be asked by all ranks after the same steps.

        Parameters
        ----------
        done : int
            Steps since the first epoch began.
        """
        return self.rhythm.due(done)

    def save(
        self, place: Place, state: Mapping[str, Any], arrays: Arrays, own: Arrays, part: Arrays | None = None
    ) -> None:
        """Save a checkpoint; all ranks call it at the same step, and rank 0 writes.

        Parameters
        ----------
        place : Place
            Where training goes on from it.
        state : dict
            What JSON can hold, the same on all ranks.
        arrays : dict of str to numpy.ndarray
            What is the same on all ranks.
        own : dict of str to numpy.ndarray
            What only this rank knows; it goes through rank 0.
        part : dict of str to numpy.ndarray, optional
            What only this rank has, and writes itself; all ranks have some, or none has.

        Raises
        ------
        StoreError
            It cannot be written.
        """
        began = time.monotonic()
        name = f"{place.epoch:06d}-{place.step:09d}"
        digests = []
        if part:
            if not self._written:
                self._run.mkdir("")
            mine = self._put(_PART.format(name, self.gang.rank), part)
            digests = [each.decode() for each in self.gang.collective.all_gather(mine.encode())]
        parts = self.gang.collective.all_gather(_packed(own))
        if self.gang.rank == 0:
            named = {_OWN.format(rank): np.frombuffer(each, np.uint8) for rank, each in enumerate(parts)}
            self._write(name, place, state, {**arrays, **named}, digests)
        elif part:
            self._thin([_PART.format("{}", self.gang.rank)])
            self._written.append(name)  # later than that, as rank 0 has not yet made it count
        self.rhythm.saved(time.monotonic() - began)

    def restore(self, **identity: Any) -> Checkpoint | None:
        """The newest whole checkpoint of the attempts before this one, None where there is none.

        Parameters
        ----------
        **identity : object
            What else must be the same, as JSON can hold it.

        Raises
        ------
        CheckpointError
            It is of another training.
        """
        self.identity.update(identity)
        candidates = self._candidates() if self.gang.rank == 0 and self.gang.attempt else iter(())
        while True:
            found = next(candidates, None)
            answer = b"" if found is None else json.dumps(found[2]).encode()
            answer = self.gang.collective.all_gather(answer)[0]
            if not answer:
                return None
            place, state, attempt, name, digests = json.loads(answer)
            part: Arrays | None = {}
            if digests:
                rank = self.gang.rank
                part = self._get(self._folder(attempt), _PART.format(name, rank), digests[rank])
            if all(self.gang.collective.all_gather(b"" if part is None else b"1")):
                break
            self._damaged(attempt, name)
        arrays = {} if found is None else found[1]
        parts = [_OWN.format(rank) for rank in range(self.gang.world)]
        # From rank 0 to each its own.
        packed = self.gang.collective.all_gather(_packed({name: arrays.pop(name) for name in parts if name in arrays}))
        own = _unpacked(_unpacked(packed[0])[parts[self.gang.rank]].tobytes())
        return Checkpoint(Place(*place), state, arrays, own, part or {})

    def _folder(self, attempt: int) -> RunDir:
        return RunDir(f"{attempt_folder(self.gang.run, attempt).url}/{FOLDER}")

    def _write(self, name: str, place: Place, state: Mapping[str, Any], arrays: Arrays, parts: Sequence[str]) -> None:
        if not self._written:
            self._run.mkdir("")
        described = {
            "identity": self.identity,
            "place": [place.epoch, place.step],
            "state": dict(state),
            "sha256": self._put(f"{name}.npz", arrays),
            "parts": list(parts),
        }
        self._run.writeJson(f"{name}.json", described)
        self._written.append(name)
        # First what makes it count.
        self._thin(["{}.json", "{}.npz", *([_PART.format("{}", 0)] if parts else [])])

    def _thin(self, files: Sequence[str]) -> None:
        """Delete the files of this rank's of all checkpoints but the newest."""
        while len(self._written) > _KEPT:
            old = self._written.pop(0)
            for file in files:
                self._run.delete(file.format(old))

    def _put(self, file: str, arrays: Arrays) -> str:
        """Write a file of arrays; return its digest."""
        local = self.gang.scratch / file
        try:
            # By way of the local disk, for memory holds the model already.
            np.savez(local, allow_pickle=False, **arrays)
            sha256 = digest(local)
            self._run.put(local, file)
        finally:
            local.unlink(missing_ok=True)
        return sha256

    def _get(self, run: RunDir, file: str, sha256: str) -> Arrays | None:
        """What a file of arrays holds, None where it is not what was written."""
        local = self.gang.scratch / file
        try:
            run.get(file, local)
            if digest(local) != sha256:
                return None
            with np.load(local, allow_pickle=False) as arrays:
                return {each: arrays[each] for each in arrays.files}
        except (StoreError, ValueError, KeyError, TypeError):
            return None
        finally:
            local.unlink(missing_ok=True)

    def _candidates(self) -> Iterator[tuple[dict[str, Any], Arrays, Any]]:
        for attempt in reversed(range(self.gang.attempt)):
            run = self._folder(attempt)
            for name in reversed([name for name in run.names("") if name.endswith(".json")]):
                name = name.removesuffix(".json")
                found = self._read(run, name)
                if found is None:
                    self._damaged(attempt, name)
                    continue
                described, arrays = found
                self._check(described["identity"])
                yield described, arrays, [described["place"], described["state"], attempt, name, described.get("parts")]

    def _damaged(self, attempt: int, name: str) -> None:
        if self.gang.rank == 0:
            url = self._folder(attempt).url
            _LOG.warning("the checkpoint %s in %s is damaged: going on from the one before", name, url)

    def _read(self, run: RunDir, name: str) -> tuple[dict[str, Any], Arrays] | None:
        """What a checkpoint holds, None where it is damaged."""
        try:
            described = json.loads(run.read(f"{name}.json") or b"")
            arrays = self._get(run, f"{name}.npz", described["sha256"])
        except (StoreError, ValueError, KeyError, TypeError):
            return None
        return None if arrays is None else (described, arrays)

    def _check(self, identity: Mapping[str, Any]) -> None:
        for name in {**identity, **self.identity}:
            theirs, ours = identity.get(name), self.identity.get(name)
            if theirs != ours:
                raise CheckpointError(
                    f"cannot go on from a checkpoint whose {name} is {theirs!r}, where this training's is {ours!r}: "
                    "something that decides it differs from one call to the next, such as a model function that draws "
                    "random sizes or reads a file that has changed"
                )


class _Fixed:
    """Due every so many steps.

    Parameters
    ----------
    interval : int
        The steps; 0 for never.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.passed = 0

    def begin(self, done: int) -> None:
        self.passed = done // self.interval if self.interval else 0

    def due(self, done: int) -> bool:
        if not self.interval:
            return False
        before, self.passed = self.passed, done // self.interval
        return self.passed > before

    def saved(self, seconds: float) -> None:
        """What it took changes nothing."""


class _Clock:
    """Due after some time by the clock of rank 0, which tells the others when it will look at it next."""

    def __init__(self, collective: Collective) -> None:
        self.collective = collective
        self.period = _PERIOD
        self.begin(0)

    def begin(self, done: int) -> None:
        self.began = self.last = time.monotonic()
        self.first = self.look = done

    def due(self, done: int) -> bool:
        if done < self.look:
            return False
        answer = b""
        if self.collective.rank == 0:
            now = time.monotonic()
            left = self.last + self.period - now
            due = left <= _EARLY * self.period
            rate = (done - self.first) / max(now - self.began, 1e-9)
            # Half of the way each time, as speed may change.
            steps = max(1, math.ceil(rate * (self.period if due else left) / 2))
            answer = json.dumps([due, done + steps]).encode()
        decided, self.look = json.loads(self.collective.all_gather(answer)[0])
        return bool(decided)

    def saved(self, seconds: float) -> None:
        self.last = time.monotonic()
        self.period = max(_PERIOD, _SHARE * seconds)


def _packed(arrays: Arrays) -> bytes:
    """Arrays as the bytes of an ``npz`` file."""
    if not arrays:
        return b""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _unpacked(data: bytes) -> Arrays:
    if not data:
        return {}
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
