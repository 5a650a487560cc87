"""How a training summary looks: as a table, a plot, text, and in a notebook. Imported only where one is looked at."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from spark_nn.errors import ParamError

if TYPE_CHECKING:
    import pandas as pd

    from spark_nn.summary import TrainingSummary

_VALIDATION = "val_"
# Size of a panel: in inches by matplotlib, in pixels on a page.
_INCHES = (4.8, 3.2)
_WIDTH, _HEIGHT, _MARGIN = 320, 180, 34
# Of training and of validation: matplotlib's first two, told apart by the colour-blind too.
_COLOURS = ("#1f77b4", "#ff7f0e")
# Epochs that a page shows, at most; toPandas has all.
_ROWS = 50


def table(summary: TrainingSummary) -> pd.DataFrame:
    """The history, a row per epoch."""
    import pandas as pd

    epochs = max(summary.epochs, len(summary.epochSeconds))

    def column(values: Sequence[Any]) -> list[Any]:
        return [*values, *[math.nan] * (epochs - len(values))]

    columns = {"epoch": list(range(1, epochs + 1)), "seconds": column(summary.epochSeconds)}
    return pd.DataFrame({**columns, **{name: column(values) for name, values in summary.history.items()}})


def plot(summary: TrainingSummary, metrics: Sequence[str] | None, ax: Any) -> list[Any]:
    """Draw the history by matplotlib; see :meth:`TrainingSummary.plot`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "plot needs matplotlib, which is not installed here: pip install matplotlib, or look at toPandas()"
        )
    panels = _panels(summary.history, metrics)
    axes = _axes(ax, len(panels))
    for axis, (name, series) in zip(axes, panels.items(), strict=False):
        for label, values in series.items():
            style = {"color": _COLOURS[label.startswith(_VALIDATION)]} if len(set(map(id, axes))) == len(axes) else {}
            known = _known(values)
            epochs, numbers = [epoch for epoch, _ in known], [value for _, value in known]
            axis.plot(epochs, numbers, label=label, marker="." if len(known) < 30 else None, **style)
        axis.set_xlabel("epoch")
        if len(panels) == 1 or axes.count(axis) == 1:
            axis.set_ylabel(name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return axes[: len(panels)]


def _axes(ax: Any, count: int) -> list[Any]:
    """As many axes as there are panels."""
    if ax is None:
        from matplotlib import pyplot

        _, found = pyplot.subplots(
            1, count, figsize=(_INCHES[0] * count, _INCHES[1]), squeeze=False, layout="constrained"
        )
        return list(found.flat)
    if hasattr(ax, "plot"):
        return [ax] * count
    axes = list(getattr(ax, "flat", ax))
    if len(axes) < count:
        raise ParamError(f"ax has {len(axes)} axes for {count} metrics: give one for all, one for each, or none")
    return axes


def _panels(history: Mapping[str, list[Any]], metrics: Sequence[str] | None = None) -> dict[str, dict[str, list[Any]]]:
    """What is drawn together: a metric of training, and the same of validation."""
    usable = {name: values for name, values in history.items() if values and all(map(_is_number, values))}
    known = sorted(dict.fromkeys(_base(name, usable) for name in usable), key=lambda name: name != "loss")
    if metrics is not None:
        metrics = [metrics] if isinstance(metrics, str) else list(metrics)
        if unknown := [name for name in metrics if name not in known]:
            raise ParamError(f"metrics names {unknown[0]!r}: must be of {', '.join(map(repr, known)) or 'none'}")
        known = metrics
    return {name: {label: usable[label] for label in (name, _VALIDATION + name) if label in usable} for name in known}


def _base(name: str, history: Mapping[str, list[Any]]) -> str:
    """The metric that a series belongs to."""
    bare = name.removeprefix(_VALIDATION)
    return bare if bare in history else name


def text(summary: TrainingSummary) -> str:
    """A few lines."""
    last = {name: values[-1] for name, values in summary.history.items() if values and _is_number(values[-1])}
    lines = ["TrainingSummary", "  " + ", ".join(f"{name} {value}" for name, value in _figures(summary).items())]
    if last:
        lines.append(f"  last epoch: {', '.join(f'{name} {_number(value)}' for name, value in last.items())}")
    if phases := _phases(summary):
        lines.append("  seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in phases.items()))
    lines += [f"  begun again after: {reason}" for reason in summary.restarts]
    return "\n".join(lines)


def _figures(summary: TrainingSummary) -> dict[str, str]:
    """The figures of a summary's first line, by what they are."""
    figures = {"rows": f"{summary.rows:,}"}
    if summary.validationRows:
        figures["validation rows"] = f"{summary.validationRows:,}"
    if summary.skippedRows:
        figures["skipped rows"] = f"{summary.skippedRows:,}"
    figures |= {"workers": str(summary.numWorkers), "epochs": str(summary.epochs)}
    if summary.bestEpoch is not None:
        figures["best epoch"] = str(summary.bestEpoch)
    return {**figures, "rows/s": f"{summary.rowsPerSecond:,.0f}", "restarts": str(len(summary.restarts))}


def _phases(summary: TrainingSummary) -> dict[str, float]:
    """Seconds of the phases that took any, and their total at the end."""
    phases = {name: value for name, value in summary.seconds.items() if name != "total" and value >= 0.05}
    return {**phases, "total": summary.seconds["total"]} if "total" in summary.seconds else phases


def page(summary: TrainingSummary) -> str:
    """HTML for notebooks, whole in itself."""
    figures = " &nbsp; ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in _figures(summary).items())
    plots = "".join(_drawing(series) for series in _panels(summary.history).values())
    reasons = "".join(f"<div>begun again after: {escape(reason)}</div>" for reason in summary.restarts)
    return (
        f'<div class="spark_nn-summary"><div>{figures}</div>{reasons}<div>{plots}</div>'
        f"{_history(summary)}{_durations(summary)}</div>"
    )


def _history(summary: TrainingSummary) -> str:
    """A table of the epochs, the best of them marked."""
    names = ["seconds", *summary.history]
    columns = [summary.epochSeconds, *summary.history.values()]
    epochs = max(summary.epochs, len(summary.epochSeconds))
    chosen = [each for each in range(epochs) if each >= epochs - _ROWS or each + 1 == summary.bestEpoch]
    rows = []
    for epoch in chosen:
        cells = [_cell(values[epoch]) if epoch < len(values) else "" for values in columns]
        best = epoch + 1 == summary.bestEpoch
        style = ' style="font-weight:bold" title="best epoch"' if best else ""
        rows.append(
            f"<tr{style}><td>{epoch + 1}{' ★' if best else ''}</td>"
            + "".join(f"<td>{each}</td>" for each in cells)
            + "</tr>"
        )
    left_out = f"<caption>{len(chosen)} of {epochs} epochs</caption>" if len(chosen) < epochs else ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ["epoch", *names])
    return f"<table>{left_out}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _durations(summary: TrainingSummary) -> str:
    """Where the time went, as bars."""
    phases = _phases(summary)
    longest = max(phases.values(), default=0.0) or 1.0
    bar = "display:inline-block;height:0.7em;background:" + _COLOURS[0]
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td>{value:.1f} s</td><td style="text-align:left">'
        f'<span style="{bar};width:{100 * value / longest:.0f}px"></span></td></tr>'
        for name, value in phases.items()
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else ""


def _drawing(series: Mapping[str, list[Any]]) -> str:
    """A metric over the epochs, as SVG."""
    finite = [value for values in series.values() for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    last = max(len(values) for values in series.values())

    def place(epoch: int, value: float) -> str:
        across = (epoch - 1) / (last - 1) if last > 1 else 0.5
        up = (value - low) / (high - low) if high > low else 0.5
        x = _MARGIN + 14 + across * (_WIDTH - 2 * _MARGIN - 14)
        return f"{x:.1f},{_HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN):.1f}"

    parts = []
    left, bottom = _MARGIN + 10, _HEIGHT - _MARGIN + 6
    parts.append(f'<path d="M{left},{_MARGIN - 6}V{bottom}H{_WIDTH - _MARGIN + 6}" stroke="currentColor" fill="none"/>')
    for value, y in ((high, _MARGIN + 4), (low, bottom - 4)):
        parts.append(f'<text x="{left - 3}" y="{y}" text-anchor="end">{value:.3g}</text>')
    for epoch, x in {1: left + 4, last: _WIDTH - _MARGIN}.items():
        parts.append(f'<text x="{x}" y="{bottom + 12}" text-anchor="middle">{epoch}</text>')
    for number, (label, values) in enumerate(series.items()):
        colour = _COLOURS[label.startswith(_VALIDATION)]
        known = _known(values)
        points = " ".join(place(epoch, value) for epoch, value in known)
        parts.append(f'<polyline points="{points}" stroke="{colour}" stroke-width="1.5" fill="none"/>')
        if len(known) < 30:
            dots = (place(epoch, value).split(",") for epoch, value in known)
            parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>' for x, y in dots]
        x, anchor = (_WIDTH - _MARGIN, "end") if number else (left, "start")
        parts.append(
            f'<text x="{x}" y="16" text-anchor="{anchor}" font-weight="bold" fill="{colour}">{escape(label)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="10" fill="currentColor">{"".join(parts)}</svg>'
    )


def _known(values: Sequence[float]) -> list[tuple[int, float]]:
    """The epochs that have a number, and what it is."""
    return [(epoch, value) for epoch, value in enumerate(values, 1) if math.isfinite(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or not abs(value) <= 1e-3 else f"{value:.4e}"


def _cell(value: Any) -> str:
    return escape(_number(value) if _is_number(value) else str(value))
