"""Worker side: a rank that runs a function of the user's, or serves those that do."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from spark_nn.errors import PeerLost
from spark_nn.gang.context import GangContext, attempt_folder
from spark_nn.gang.failure import Failure
from spark_nn.gang.ports import LOOPBACK, Port, numeric
from spark_nn.ranks import values
from spark_nn.ranks.context import Framework, RankContext, Reading, Seat
from spark_nn.ranks.roles import Cast

_DONE = "done"
# Seconds between two looks at whether the others are done, at first and at most.
_SOON, _SELDOM = 0.05, 1.0
# Seconds that the news of another rank's failure may lag behind its consequences, and between two looks for it.
_GRACE, _LOOK = 2.0, 0.1
# How frameworks put it that another process is gone: the cause is then elsewhere.
_CONNECTION = re.compile(
    r"connect|unavailable|aborted|cancel|timed? ?out|deadline|peer|gloo|nccl|collective|coordination|socket",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RankTask:
    """What each rank of the gang does.

    Parameters
    ----------
    function : callable
        The user's; takes the :class:`~spark_nn.ranks.context.RankContext` and the arguments.
    arguments : tuple
        Its further arguments.
    cast : Cast
        The ranks' roles.
    framework : {"tensorflow", "torch", "jax"}
        Whose environment is set up.
    reading : Reading or None
        How to read the rows, where there are some.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    cast: Cast
    framework: Framework
    reading: Reading | None

    def __call__(self, gang: GangContext) -> dict[str, Any] | None:
        """Do this rank's part; what the function returned, as :func:`values.left` describes it."""
        room = _room(self.framework)
        with ExitStack() as stack:
            host, addresses, port = introduced(gang)
            stack.enter_context(closing(port))
            context = RankContext(gang, self.cast, self.framework, _seated(host, gang, addresses), self.reading, stack)
            gang.progress.update(phase="setup")
            os.environ.update(room.environment(context))
            # What holds the server is kept as long as the rank.
            server = room.served(context, port) if self.cast.serves(gang.rank) else room.opened(context, port)
            value = None
            if self.cast.serves(gang.rank):
                gang.progress.update(phase="serving")
            else:
                gang.progress.update(phase="function")
                value = self._run(gang, context)
                gang.progress.update(phase="end")
            result = values.left(gang, value) if gang.rank == 0 else None
            _leave_together(gang)
            for act in context.atEnd:
                act()
            del server
        return result

    def _run(self, gang: GangContext, context: RankContext) -> Any:
        try:
            return self.function(context, *self.arguments)
        except Exception as error:
            cause = _cause(gang) if _CONNECTION.search(f"{type(error).__name__} {error}") else None
            if cause is None:
                raise
            raise PeerLost(f"rank {cause.rank} on {cause.host} failed: {cause.reason}") from error


def _room(framework: Framework) -> ModuleType:
    """The module that sets up a framework: ``environment``, ``opened`` and ``served``."""
    return importlib.import_module(f"spark_nn.ranks.{framework}")


def introduced(gang: GangContext) -> tuple[str, list[dict[str, Any]], Port]:
    """The address to be reached at, those of all ranks with their hosts, and this rank's port."""
    hosts = [each.decode() for each in gang.collective.all_gather(gang.host.encode())]
    # One machine needs no network, and nobody else gets in.
    host = LOOPBACK if len(set(hosts)) == 1 else numeric(gang.host)
    port = Port(host)
    try:
        card = json.dumps({"host": gang.host, "address": port.address}).encode()
        return host, [json.loads(each) for each in gang.collective.all_gather(card)], port
    except BaseException:
        port.close()
        raise


def _seated(host: str, gang: GangContext, cards: list[dict[str, Any]]) -> Seat:
    here = [rank for rank, card in enumerate(cards) if card["host"] == gang.host]
    return Seat(host, here.index(gang.rank), len(here), [card["address"] for card in cards])


def _leave_together(gang: GangContext) -> None:
    """Wait until every rank has come to its end, however long that takes: who dies is noticed by its Spark task.

    Servers wait here while others work. Exchanges of the gang's own have a time limit, which these must not have.
    """
    folder = attempt_folder(gang.run, gang.attempt)
    folder.mkdir(_DONE)
    folder.write(f"{_DONE}/rank-{gang.rank}", b"")
    pause = _SOON
    names = {f"rank-{rank}" for rank in range(gang.world)}
    while not names <= set(folder.names(_DONE)):
        time.sleep(pause)
        pause = min(_SELDOM, 1.2 * pause)


def _cause(gang: GangContext) -> Failure | None:
    """The failure of another rank, as soon as it is known; None where there is none."""
    folder = attempt_folder(gang.run, gang.attempt)
    others = [rank for rank in range(gang.world) if rank != gang.rank]
    until = time.monotonic() + _GRACE
    while others and time.monotonic() < until:
        for rank in others:
            if (found := Failure.load(folder, rank)) is not None and found.kind != "peer":
                return found
        time.sleep(_LOOK)
    return None
