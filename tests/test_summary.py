from __future__ import annotations

import math
import sys
from html.parser import HTMLParser

import pytest

from spark_nn import TrainingSummary
from spark_nn.errors import ParamError

HISTORY = {
    "loss": [0.9, 0.5, 0.3, 0.2],
    "val_loss": [0.8, 0.4, 0.45, 0.5],
    "auc": [0.6, 0.7, 0.8, 0.9],
    "recall": [[0.1, 0.2]] * 4,
    "val_<i>": [1e-5, math.nan, 2.0],
}


def summary(**changes):
    given = {
        "history": HISTORY,
        "rows": 12345,
        "validationRows": 100,
        "skippedRows": 0,
        "numWorkers": 2,
        "rowsPerSecond": 6172.5,
        "epochSeconds": [2.0, 1.0, 1.5, 1.5],
        "restarts": ["rank 1 <died>"],
        "seconds": {"check": 0.01, "materialize": 3.0, "train": 6.0, "total": 9.5},
    }
    return TrainingSummary.fromDict(TrainingSummary(**{**given, **changes}).toDict())


def test_the_history_is_a_table_with_a_row_per_epoch():
    table = summary().toPandas()
    assert list(table.columns) == ["epoch", "seconds", *HISTORY]
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert table["seconds"].tolist() == [2.0, 1.0, 1.5, 1.5]
    assert table["val_loss"].tolist() == HISTORY["val_loss"]
    assert table["recall"].tolist() == HISTORY["recall"]
    assert table["val_<i>"].isna().tolist() == [False, True, False, True]


def test_the_text_says_the_figures():
    assert str(summary()).splitlines() == [
        "TrainingSummary",
        "  rows 12,345, validation rows 100, workers 2, epochs 4, best epoch 2, rows/s 6,172, restarts 1",
        "  last epoch: loss 0.2000, val_loss 0.5000, auc 0.9000, val_<i> 2.0000",
        "  seconds: materialize 3.0, train 6.0, total 9.5",
        "  begun again after: rank 1 <died>",
    ]
    assert "epochs 0" in str(summary(history={}, epochSeconds=[], seconds={}, restarts=[]))


class Page(HTMLParser):
    """The rows of tables, the bold, the shapes and the text of a page, whose tags must all be closed."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.shapes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag in ("polyline", "circle"):
            self.shapes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][1][-1] += data


def test_a_notebook_shows_figures_history_and_curves_with_everything_escaped():
    found = Page(summary()._repr_html_())
    assert "rows 12,345" in found.text
    assert "rank 1 <died>" in found.text
    rows = [cells for _, cells in found.rows]
    assert rows[0] == ["epoch", "seconds", *HISTORY]
    assert rows[1] == ["1", "2.0000", "0.9000", "0.8000", "0.6000", "[0.1, 0.2]", "1.0000e-05"]
    assert rows[4] == ["4", "1.5000", "0.2000", "0.5000", "0.9000", "[0.1, 0.2]", ""]
    assert [cells[0] for attrs, cells in found.rows if "bold" in attrs.get("style", "")] == ["2 ★"]
    assert rows[5:] == [["materialize", "3.0 s", ""], ["train", "6.0 s", ""], ["total", "9.5 s", ""]]
    lines = [attrs["points"].split() for tag, attrs in found.shapes if tag == "polyline"]
    assert [len(points) for points in lines] == [4, 4, 4, 2]  # loss, val_loss, auc, and what there is of val_<i>
    loss = [tuple(map(float, point.split(","))) for point in lines[0]]
    (left, top), (right, bottom) = loss[0], loss[-1]
    for epoch, (x, y) in enumerate(loss):
        assert x == pytest.approx(left + (right - left) * epoch / 3, abs=0.1)
        assert y == pytest.approx(top + (bottom - top) * (0.9 - HISTORY["loss"][epoch]) / 0.7, abs=0.1)
    assert bottom > top


def test_a_page_of_many_epochs_shows_the_last_and_the_best():
    losses = [abs(epoch - 7) + 1.0 for epoch in range(120)]
    found = Page(summary(history={"loss": losses}, epochSeconds=[1.0] * 120)._repr_html_())
    numbers = [cells[0] for _, cells in found.rows[1:] if "." not in cells[1][-3:-2]]
    assert numbers[:51] == ["8 ★", *map(str, range(71, 121))]
    assert "51 of 120 epochs" in found.text
    assert Page(summary(history={}, epochSeconds=[], seconds={})._repr_html_()).shapes == []


def test_plots_show_a_metric_with_its_validation():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def lines(axis):
        return {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}

    axes = summary().plot()
    assert [lines(axis) for axis in axes][:2] == [
        {"loss": HISTORY["loss"], "val_loss": HISTORY["val_loss"]},
        {"auc": HISTORY["auc"]},
    ]
    assert list(lines(axes[2])) == ["val_<i>"]
    assert axes[0].get_lines()[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert axes[2].get_lines()[0].get_xdata().tolist() == [1, 3]  # joined where an epoch has none
    _, given = pyplot.subplots(2)
    assert summary().plot(["auc", "loss"], given) == list(given)
    assert [list(lines(axis)) for axis in given] == [["auc"], ["loss", "val_loss"]]
    _, one = pyplot.subplots()
    summary().plot(["auc", "loss"], one)
    assert list(lines(one)) == ["auc", "loss", "val_loss"]
    with pytest.raises(ParamError, match="metrics names 'recall': must be of 'loss', 'auc', 'val_<i>'"):
        summary().plot(["recall"])
    with pytest.raises(ParamError, match="ax has 2 axes for 3 metrics"):
        summary().plot(ax=given)
    pyplot.close("all")


def test_plots_without_matplotlib_name_the_cure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        summary().plot()
