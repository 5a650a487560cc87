"""Driver side: shows the fits of one call, from the first moment to the last.

One thread reads what rank 0 of each fit has published, and what the ranks have printed, and draws it. It is a
courtesy: whatever goes wrong with it, the fits go on, and none of them waits long for a store.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from spark_nn.gang.logs import Follower
from spark_nn.gang.progress import INTERVAL, PROGRESS, State
from spark_nn.gang.screen import Lines, Screen, View, screen
from spark_nn.store import RunDir

# States that the present rate goes by, and seconds in which a thread that draws or takes the last news has to end.
_WINDOW = 20
_PATIENCE = 10.0
# Fits that have given no sign yet and are looked at, too: those of a long grid begin in their order.
_AHEAD = 8
_LOG = logging.getLogger(__name__)
# What a rank says it is doing, in the words of a fit.
_PHASES = {
    "start": "starting",
    "import": "starting (importing)",
    "build": "starting (building)",
    "trace": "starting (first step)",
    "setup": "starting",
    "serving": "training",
    "function": "running",
    "publish": "publishing",
    "end": "publishing",
}

F = TypeVar("F", bound=Callable[..., None])


def _courteous(method: F) -> F:
    """Let nothing that goes wrong in a method reach the fit."""

    @functools.wraps(method)
    def act(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception:  # noqa: BLE001  (stores and terminals have errors of their own)
            _LOG.debug("progress could not be shown", exc_info=True)

    return cast(F, act)


class Board:
    """Shows fits while the block runs.

    Parameters
    ----------
    labels : mapping
        By the URL of its run directory, what tells each fit from the others; empty for a single one.
    verbose : {0, 1, 2}
        Nothing; a live bar on a terminal or in a notebook, elsewhere a line per epoch; a line per epoch everywhere.
    followLogs : bool
        Whether to show what the ranks print.
    """

    def __init__(self, labels: Mapping[str, str], *, verbose: int = 0, followLogs: bool = False) -> None:
        self.followLogs = followLogs
        self._verbose = verbose
        self._fits = {url: _Fit(f"[{label}] " if label else "") for url, label in labels.items()}
        self._followers: dict[str, Follower] = {}
        self._screen: Screen = Lines()
        self._away = False  # whether the store has left a last question of this attempt without an answer
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Board:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)
        self._close(failed=kind is not None and kind is not GeneratorExit)

    @_courteous
    def _open(self) -> None:
        self._screen = screen(self._verbose)
        if self._verbose or self.followLogs:
            self._thread.start()

    @_courteous
    def _close(self, *, failed: bool) -> None:
        with self._lock:
            try:
                if failed:
                    self._screen.show({})
                    for url, fit in self._fits.items():
                        if fit.state is not None or len(self._fits) == 1:
                            self.done(url, failed=True)
            finally:
                self._screen.close()

    @_courteous
    def phase(self, words: str) -> None:
        """Tell what the driver is doing, for the fits that do not yet tell of themselves."""
        with self._lock:
            for fit in self._fits.values():
                fit.wait(words)
            self._show()

    @contextlib.contextmanager
    def attempt(self, folders: Mapping[str, RunDir], notes: Mapping[str, str]) -> Iterator[None]:
        """Show an attempt at some of the fits; epochs that it takes over from the last one have been told.

        Parameters
        ----------
        folders : mapping
            For each fit, where its ranks leave their news.
        notes : mapping
            For each fit, which attempt it is, and after what; nothing for the first.
        """
        with self._lock:
            for url, folder in folders.items():
                self._fits.setdefault(url, _Fit("")).begin(folder, notes.get(url, ""))
            self._followers = {url: Follower(folder) for url, folder in folders.items()}
            self._away = False
        self.phase("starting")
        try:
            yield
        finally:
            self._read_last([url for url in folders if self._fits[url].folder is not None], self._followers)
            with self._lock:
                for url in folders:
                    self._fits[url].folder = None
                self._followers = {}

    @_courteous
    def taken(self, url: str) -> None:
        """Read what a fit's ranks have published for the last time."""
        self._read_last([url], ())
        with self._lock:
            self._fits[url].leave()

    @_courteous
    def _read_last(self, published: Sequence[str], printed: Collection[str]) -> None:
        """Read for the last time, within a limit: the fit, or the error that it ended with, waits for it."""
        if self._away or not (self._verbose or self.followLogs):
            return
        answered = threading.Event()

        @_courteous
        def work() -> None:
            self._ask(published, list(printed))
            answered.set()

        thread = threading.Thread(target=work, name="progress", daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        self._away = not answered.is_set()

    @_courteous
    def done(self, url: str, *, failed: bool = False) -> None:
        """A fit is over: leave a line of it."""
        with self._lock:
            fit = self._fits[url]
            if fit.over or not self._verbose:
                return
            fit.over = True
            self._show()
            self._screen.leave(fit.failed() if failed else fit.finished())

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Let others write to standard error while the block runs, without drawing into it."""
        with self._lock:
            self._clear()
            yield

    @_courteous
    def _clear(self) -> None:
        self._screen.show({})

    def _watch(self) -> None:
        self._look()
        while not self._stop.wait(INTERVAL):
            self._look()

    @_courteous
    def _look(self) -> None:
        with self._lock:
            there = [url for url, fit in self._fits.items() if fit.folder is not None]
            begun = [url for url in there if self._fits[url].begun]
            begun += [url for url in there if not self._fits[url].begun][:_AHEAD]
            left = [url for url, fit in self._fits.items() if time.monotonic() < fit.left + _PATIENCE]
        try:
            self._ask(begun, begun + left)
        finally:
            with self._lock:
                self._show()

    def _ask(self, published: Sequence[str], printed: Sequence[str]) -> None:
        """Read what some fits have published and what ranks have printed, until the store does not answer."""
        for url in published:
            folder = self._fits[url].folder
            if folder is not None and self._verbose and (data := folder.read(PROGRESS, patient=False)) is not None:
                self._take(url, folder, data)
        for url in printed if self.followLogs else ():
            if (follower := self._followers.get(url)) is not None:
                self._print(url, follower, follower.lines())

    @_courteous
    def _take(self, url: str, folder: RunDir, data: bytes) -> None:
        with self._lock:
            fit = self._fits[url]
            if fit.folder is not folder:  # another has read the last of it meanwhile
                return
            fit.begun = True
            for line in fit.take(State.fromDict(json.loads(data))):
                if not self._screen.live or not fit.counted:
                    self._screen.write(fit.label + line)

    @_courteous
    def _print(self, url: str, follower: Follower, lines: Sequence[tuple[int, str]]) -> None:
        with self._lock:
            if self._followers.get(url) is not follower:  # the answer came too late
                return
            fit = self._fits[url]
            fit.begun = fit.begun or bool(lines)
            for rank, line in lines:
                self._screen.write(f"{fit.label}[rank {rank}] {line}")

    def _show(self) -> None:
        if not self._verbose or self._stop.is_set():
            return
        left = [url for url, fit in self._fits.items() if not fit.over]
        known = [url for url in left if self._fits[url].state is not None]
        # The others wait, and there may be many of them: the first stands for all.
        self._screen.show({url: self._fits[url].view() for url in known or left[:1]})


class _Fit:
    """What is known of a fit."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.folder: RunDir | None = None
        self.state: State | None = None
        self.over = False
        self.begun = False  # whether this attempt has given a sign
        self.left = float("-inf")  # when its result was there, since when its ranks may print a last word
        self._since = time.monotonic()
        # One of several waits for the others first.
        self._began = None if label else self._since
        self._waiting = "checking"
        self._note = ""
        self._lines = 0  # epochs that were told, of this attempt
        self._told = 0  # and of those before
        self._seen: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    @property
    def counted(self) -> bool:
        """Whether it goes by epochs; a function of the user's own need not."""
        return self.state is not None and self.state.rows > 0

    def wait(self, words: str) -> None:
        """Another phase of the driver's begins."""
        if words != self._waiting:
            self._waiting = words
            self._since = time.monotonic()

    def begin(self, folder: RunDir, note: str) -> None:
        """Another attempt begins."""
        self.folder = folder
        self.begun = False
        self.state = None
        self._note = note
        self._since = time.monotonic()
        self._told = max(self._told, self._lines)
        self._lines = 0
        self._seen.clear()

    def leave(self) -> None:
        """Its result is there."""
        self.folder = None
        self.left = time.monotonic()

    def take(self, state: State) -> list[str]:
        """Take what was published; the lines of the epochs that are new."""
        if self._began is None:
            self._began = time.monotonic()
        self.state = state
        if state.busy and (not self._seen or self._seen[-1][0] < state.busy):
            self._seen.append((state.busy, (state.epoch - 1) * state.steps + state.step))
        lines: list[str] = []
        if state.epoch or state.seconds:  # training has begun, and what is finished by now was taken over
            self._lines = max(self._lines, min(self._told, len(state.seconds)))
            self._told = 0
            for epoch in range(self._lines, len(state.seconds)):
                lines.append(_line(state, epoch))
                self._lines += 1
        return lines

    def view(self) -> View:
        """Where it stands."""
        state, note = self.state, self._note and f", {self._note}"
        phase = self._waiting if state is None else _PHASES.get(state.phase, state.phase)
        if state is None or not state.epoch or phase.startswith("starting"):
            passed = time.monotonic() - self._since
            waited = f"{passed:.0f} s" if passed < 60 else _clock(passed)
            return View(f"{self.label}{phase}{note}", facts=(waited,), weights=(0,))
        head = f"{self.label}epoch {state.epoch}/{state.epochs}" + ("" if phase == "training" else f", {phase}")
        facts = [(_values(loss=state.loss), 1)] if state.loss is not None else []
        last = {name: series[-1] for name, series in state.history.items() if series}
        held = {name: last[name] for name in sorted(last, key="val_loss".__ne__) if name.startswith("val_")}
        facts += [(_values(**{name: value}), 3 if name == "val_loss" else 5) for name, value in held.items()]
        if not held and state.loss is None and "loss" in last:
            facts.append((_values(loss=last["loss"]), 1))
        rate = self._rate()
        if rate and state.rows and state.steps:
            facts.append((f"{rate * state.rows / state.steps:,.0f} rows/s", 4))
        elif state.seconds:
            facts.append((f"{state.rowsPerSecond:,.0f} rows/s", 4))
        if rate and state.steps:
            steps = (state.epochs - state.epoch + 1) * state.steps - state.step
            left = steps / rate + (state.epochs - len(state.seconds)) * state.pause
            facts.append((f"{_clock(left)} left", 2))
        if self._note:
            facts.append((self._note.partition(",")[0], 6))
        known = [(text, weight) for text, weight in facts if text]
        total = state.steps or state.epochs
        return View(
            head,
            state.step if state.steps else min(len(state.seconds), total),
            total,
            tuple(text for text, _ in known),
            tuple(weight for _, weight in known),
        )

    def finished(self) -> str:
        """What is left of it."""
        state = self.state or State()
        if not self.counted:
            return f"{self.label}finished in {self._took}"
        epochs = len(state.seconds)
        last = {name: series[-1] for name, series in state.history.items() if series}
        values = _values(**{name: last[name] for name in ("loss", "val_loss") if name in last})
        parts = [
            f"{epochs} epoch{'s' if epochs != 1 else ''} in {self._took}",
            values,
            f"{state.rowsPerSecond:,.0f} rows/s",
        ]
        return self.label + "  ".join(part for part in parts if part)

    def failed(self) -> str:
        """What is left of it where it failed."""
        state = self.state or State(phase="")
        phase = _PHASES.get(state.phase, state.phase) or self._waiting
        where = f"epoch {state.epoch}/{state.epochs}, {phase}" if state.epoch and self.counted else phase
        return f"{self.label}failed after {self._took} ({where})"

    @property
    def _took(self) -> str:
        return _span(time.monotonic() - (self._began or self._since))

    def _rate(self) -> float | None:
        """Steps per second at present; None where that is not known yet."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if after > before else None


def _line(state: State, epoch: int) -> str:
    values = _values(**{name: series[epoch] for name, series in state.history.items() if epoch < len(series)})
    if not state.rows:  # what the user's own function reports need not be an epoch
        return f"report {epoch + 1}  {values}"
    speed = state.rows / state.seconds[epoch] if state.seconds[epoch] else 0.0
    return f"epoch {epoch + 1}/{state.epochs}  {values}  {speed:,.0f} rows/s"


def _values(**values: Any) -> str:
    """Metrics and their values, those that are single numbers."""
    return "  ".join(f"{name} {number(value)}" for name, value in values.items() if isinstance(value, (int, float)))


def number(value: float) -> str:
    """A metric's value, as Keras writes it, or a count."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value == 0 or not abs(value) <= 1e-3 else f"{value:.4e}"


def _span(seconds: float) -> str:
    """Seconds that something took."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{_clock(seconds)} {'min' if seconds < 3600 else 'h'}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
