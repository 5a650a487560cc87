"""Driver side: how the progress of fits looks on a terminal, in a notebook and in a log."""

from __future__ import annotations

import html
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from tqdm.std import tqdm

from spark_nn.gang.plain import plain

# Letters of a bar, at least and at most, and of a line where nobody knows how many there is room for.
_SHORT, _LONG = 8, 30
_WIDTH = 100
# Lines of a terminal that tells no size.
_HEIGHT = 24


@dataclass(frozen=True)
class View:
    """What there is to tell of a fit at a moment.

    Parameters
    ----------
    head : str
        Which fit it is, and where it stands.
    done, total : int
        How far, of what; no bar where there is nothing to count.
    facts : tuple of str
        What else there is to know, in the order of reading.
    weights : tuple of int
        How much each of them matters: where there is no room for all, those of the highest numbers go first.
    """

    head: str
    done: int = 0
    total: int = 0
    facts: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", plain(self.head))
        object.__setattr__(self, "facts", tuple(map(plain, self.facts)))

    def fitted(self, width: int) -> tuple[str, ...]:
        """The facts that fit into a line of so many letters, with a short bar."""
        left = list(zip(self.weights, self.facts, strict=True))
        fixed = len(self.head) + (len(self.count) + _SHORT + 4 if self.total else 0)
        while left and fixed + sum(len(fact) + 2 for _, fact in left) > width:
            left.remove(max(left))
        return tuple(fact for _, fact in left)

    @property
    def count(self) -> str:
        """How far, in figures."""
        return f"{self.done}/{self.total}" if self.total else ""


class Screen(Protocol):
    """Where progress is shown."""

    live: bool  # whether what was shown can be changed

    def show(self, views: Mapping[str, View]) -> None:
        """Show these, in place of those shown before."""

    def leave(self, text: str) -> None:
        """Leave a line there for good, of a fit."""

    def write(self, text: str) -> None:
        """Leave a line there for good, of what others have to tell."""

    def close(self) -> None:
        """Take away what is not there for good."""


class Lines:
    """A log: lines on standard error."""

    live = False

    def __init__(self) -> None:
        self._file = sys.stderr

    def show(self, views: Mapping[str, View]) -> None:
        """Nothing: what was written stays."""

    def leave(self, text: str) -> None:
        """Nothing: all of it has been written before."""

    def write(self, text: str) -> None:
        """A line, between the bars of others."""
        tqdm.write(plain(text, colours=self._file.isatty()), file=self._file)

    def close(self) -> None:
        """Nothing is to be taken away."""


class Terminal:
    """A terminal: bars at the bottom of what was written, those of several threads below each other."""

    live = True

    def __init__(self) -> None:
        self._file = sys.stderr
        self._bars: dict[str, _Bar] = {}

    def show(self, views: Mapping[str, View]) -> None:
        """Draw the bars."""
        for name in [name for name in self._bars if name not in views]:
            self._bars.pop(name).close()
        for name, view in views.items():
            if name not in self._bars:
                self._bars[name] = _Bar(self._file)
            self._bars[name].draw(view)

    def leave(self, text: str) -> None:
        """A line above the bars."""
        self.write(plain(text))

    def write(self, text: str) -> None:
        """A line above the bars."""
        tqdm.write(plain(text, colours=True), file=self._file)

    def close(self) -> None:
        """Take the bars away."""
        self.show({})


class _Bar(tqdm):  # type: ignore[type-arg]
    # Else tqdm starts a thread that stays as long as the process.
    monitor_interval = 0

    def __init__(self, file: TextIO) -> None:
        super().__init__(file=file, leave=False, dynamic_ncols=True, bar_format=" ")
        shape = self.dynamic_ncols

        def sized(terminal: TextIO) -> tuple[int, int]:
            # In a terminal without lines tqdm draws nothing.
            columns, lines = shape(terminal) if shape else (None, None)
            return max(columns or 0, 0) or _WIDTH, lines if lines and lines > 1 else _HEIGHT

        self.dynamic_ncols: Any = sized

    def draw(self, view: View) -> None:
        width = self.format_dict["ncols"] - 1
        facts = view.fitted(width)
        if view.total:
            room = width - len("  ".join([view.head, view.count, *facts])) - 3
            middle = f" |{{bar:{max(_SHORT, min(_LONG, room))}}}| {view.count}"
        else:
            middle = ""
        end = "".join("  " + fact for fact in facts)
        self.total, self.n = view.total, view.done
        self.bar_format = _plain(view.head) + middle + _plain(end)
        self.refresh()


def _plain(text: str) -> str:
    """Text as a format that gives it back."""
    return text.replace("{", "{{").replace("}", "}}")


class Notebook:
    """A notebook of Jupyter's: one output that is drawn again; it needs no widgets."""

    live = True

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._left: list[str] = []
        self._views: dict[str, View] = {}
        self._drawn = ""
        self._handle: Any = None

    def show(self, views: Mapping[str, View]) -> None:
        """Draw the bars."""
        self._views = dict(views)
        self._draw()

    def leave(self, text: str) -> None:
        """A line above the bars."""
        self._left.append(plain(text))
        self._draw()

    def write(self, text: str) -> None:
        """A line of its own, in the cell's other output."""
        self._file.write(plain(text) + "\n")

    def close(self) -> None:
        """Take the bars away."""
        self.show({})

    def _draw(self) -> None:
        from IPython.display import display

        lines = [html.escape(text) for text in self._left] + [_marked(view) for view in self._views.values()]
        texts = self._left + ["  ".join([view.head, view.count, *view.facts]) for view in self._views.values()]
        page = "".join(f'<div style="font-family:monospace;white-space:pre">{line}</div>' for line in lines)
        if page == self._drawn:
            return
        bundle = {"text/html": page, "text/plain": "\n".join(texts)}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        self._drawn = page


def _marked(view: View) -> str:
    done, total, count = (html.escape(str(each)) for each in (view.done, view.total, view.count))
    bar = f' <progress value="{done}" max="{total}"></progress> {count}' if view.total else ""
    return html.escape(view.head) + bar + html.escape("".join("  " + fact for fact in view.facts))


def screen(verbose: int) -> Screen:
    """Where to show progress.

    Parameters
    ----------
    verbose : {0, 1, 2}
        What the param says.
    """
    if verbose == 1 and _in_notebook():
        return Notebook(sys.stderr)
    if verbose == 1 and sys.stderr.isatty():
        return Terminal()
    return Lines()


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook; IPython on a terminal has none."""
    found = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(found() if found else None, "kernel", None) is not None
