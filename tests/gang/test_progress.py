from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import types

import pytest

from spark_nn.errors import StoreError
from spark_nn.gang.board import Board, number
from spark_nn.gang.logs import Follower, pumped
from spark_nn.gang.plain import plain
from spark_nn.gang.progress import PROGRESS, Reporter, State
from spark_nn.store import RunDir

pytestmark = pytest.mark.timeout(60)


def finished(epochs):
    history = {"loss": [0.5, 0.25][:epochs], "val_loss": [0.75, 0.125][:epochs]}
    return {"history": history, "seconds": [2.0, 4.0][:epochs], "rows": 1000}


def state(**changes):
    """A state as rank 0 would publish it: steps of 10 rows, 100 of them in an epoch."""
    return vars(State(**{"epochs": 2, "steps": 100, "rows": 1000, "phase": "training", **changes}))


@pytest.fixture
def run(tmp_path):
    before = set(threading.enumerate())
    with RunDir.open(f"file://{tmp_path}") as run:
        yield run
    left = [each for each in set(threading.enumerate()) - before if each.name != "spark_nn-alive"]
    assert not left


def test_rank_0_publishes_its_latest_state_and_nobody_else_does(run):
    silent = Reporter(run, 1)
    silent.update(epoch=9)
    silent.close()
    assert run.readJson(PROGRESS) is None
    reporter = Reporter(run, 0)
    for step in range(100):
        reporter.update(epoch=1, step=step)
    reporter.update(**finished(2))
    reporter.close()
    state = State(**run.readJson(PROGRESS))
    assert (state.epoch, state.step, state.seconds) == (1, 99, [2.0, 4.0])
    assert state.rowsPerSecond == 2000 / 6


@contextlib.contextmanager
def shown(run, verbose):
    """A board and its fit, as a call of ``fit`` has them."""
    with Board({run.url: ""}, verbose=verbose) as board, board.attempt({run.url: run}, {}):
        yield board


@pytest.mark.parametrize("verbose", [1, 2])  # standard error is no terminal here
def test_finished_epochs_are_lines_on_standard_error(run, capsys, verbose):
    with shown(run, verbose):
        reporter = Reporter(run, 0)
        reporter.update(epoch=1, epochs=2, **finished(1))
        time.sleep(1.2)
        reporter.update(**finished(2))
        reporter.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "epoch 1/2  loss 0.5000  val_loss 0.7500  500 rows/s",
        "epoch 2/2  loss 0.2500  val_loss 0.1250  250 rows/s",
    ]


def test_verbose_0_says_nothing_and_reads_nothing(run, capsys, monkeypatch):
    run.writeJson(PROGRESS, state(epoch=2, **{"history": {}, "seconds": [1.0]}))
    monkeypatch.setattr(RunDir, "readJson", lambda self, name: pytest.fail("read"))
    with shown(run, 0) as board:
        assert threading.active_count() == len([each for each in threading.enumerate() if each.name != "progress"])
        board.done(run.url)
    assert capsys.readouterr().err == ""


def lines_of_a_second_attempt(run, capsys, taken_over):
    """What a second attempt prints that takes over so many finished epochs of one that had finished the first."""
    with Board({run.url: ""}, verbose=2) as board:
        for attempt, before, after in [("a", 0, 1), ("b", taken_over, 2)]:
            run.mkdir(attempt)
            folder = run.below(attempt)
            with board.attempt({run.url: folder}, {}):
                reporter = Reporter(folder, 0)
                reporter.update(epochs=2, phase="start", **finished(before))
                time.sleep(1.2)
                reporter.update(epoch=before + 1)
                time.sleep(1.2)
                reporter.update(**finished(after))
                reporter.close()
            printed = capsys.readouterr().err.splitlines()
    return [line.partition("  ")[0] for line in printed]


def test_epochs_that_an_attempt_takes_over_are_not_told_again(run, capsys):
    assert lines_of_a_second_attempt(run, capsys, 1) == ["epoch 2/2"]


def test_epochs_that_are_trained_again_are_told_again(run, capsys):
    assert lines_of_a_second_attempt(run, capsys, 0) == ["epoch 1/2", "epoch 2/2"]


class Screen:
    """A terminal of so many letters, which standard error is."""

    def __init__(self, monkeypatch, width, height):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        os.set_blocking(self.master, False)
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", self.file)
        self.raw = ""

    def drawn(self):
        """What was drawn since the last look, in the order of drawing, without what erases."""
        self.file.flush()
        text = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.master, 1 << 16):
                text += part
        self.raw += text.decode()
        return [part for part in re.split(r"\r|\n|\x1b\[A", text.decode()) if part.strip()]

    def close(self):
        self.file.close()
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch):
    with contextlib.ExitStack() as stack:

        def make(width, height=24):
            screen = Screen(monkeypatch, width, height)
            stack.callback(screen.close)
            return screen

        yield make


def until(screen, text):
    """What is drawn until a text is."""
    parts, limit = [], time.monotonic() + 20
    while not any(text in part for part in parts):
        assert time.monotonic() < limit, f"{text!r} is not among {parts}"
        parts += screen.drawn()
        time.sleep(0.05)
    return next(part for part in parts if text in part).rstrip()


BEGUN = {"epoch": 1, "step": 10, "busy": 0.5}
GONE_ON = {"epoch": 1, "step": 60, "busy": 3.0, "loss": 0.4}
VALIDATED = {
    "epoch": 2,
    "step": 20,
    "busy": 6.0,
    "loss": 0.3,
    "history": {"loss": [0.5], "val_auc": [0.75], "val_loss": [0.6]},
    "seconds": [5.0],
    "pause": 2.0,
}


@pytest.mark.parametrize(("width", "height"), [(0, 0), (120, 0), (0, 40)])
def test_a_terminal_that_tells_no_size_shows_bars_all_the_same(run, terminal, width, height):
    screen = terminal(width, height)
    with Board({run.url: ""}, verbose=1) as board, board.attempt({run.url: run}, {}):
        run.writeJson(PROGRESS, state(**GONE_ON))
        assert until(screen, "60/100").endswith("| 60/100  loss 0.4000")


def test_a_fit_is_a_bar_from_its_first_moment_to_the_line_that_it_leaves(run, terminal):
    screen = terminal(130)
    with Board({run.url: ""}, verbose=1) as board:
        board.phase("materializing rows")
        assert until(screen, "materializing rows").startswith("materializing rows  0 s")
        with board.attempt({run.url: run}, {}):
            assert until(screen, "starting").startswith("starting  0 s")
            run.writeJson(PROGRESS, state(phase="trace"))
            assert re.match(r"starting \(first step\)  \d s", until(screen, "("))
            run.writeJson(PROGRESS, state(**BEGUN))
            assert until(screen, "10/100") == f"epoch 1/2 |{'█' * 3}{' ' * 27}| 10/100"
            # 50 steps of 10 rows in 2.5 s of training; 40 and 100 steps are left.
            run.writeJson(PROGRESS, state(**GONE_ON))
            expected = f"epoch 1/2 |{'█' * 18}{' ' * 12}| 60/100  loss 0.4000  200 rows/s  0:07 left"
            assert until(screen, "60/100") == expected
            run.writeJson(PROGRESS, state(phase="validating", **{**GONE_ON, "step": 100, "busy": 5.0}))
            assert "epoch 1/2, validating |" in until(screen, "100/100")
            # 110 steps in 5.5 s; 80 steps and a validation are left.
            run.writeJson(PROGRESS, state(**VALIDATED))
            assert until(screen, "20/100") == (
                f"epoch 2/2 |{'█' * 6}{' ' * 24}| 20/100  loss 0.3000  val_loss 0.6000  val_auc 0.7500  200 rows/s  "
                "0:06 left"
            )
            run.writeJson(PROGRESS, state(**{**VALIDATED, "phase": "publish", "step": 100, **finished(2)}))
            assert "epoch 2/2, publishing |" in until(screen, "publishing")
        board.done(run.url)
    drawn = screen.drawn()
    line = next(part for part in drawn if "epochs in" in part)
    assert re.fullmatch(r"2 epochs in \d+\.\d s  loss 0\.2500  val_loss 0\.1250  333 rows/s", line.strip())
    assert drawn[-1] == line  # the bar is gone
    assert not re.search(r"^epoch \d/2  ", screen.raw, re.M)


def test_what_matters_least_goes_first_where_there_is_no_room(run, terminal):
    screen = terminal(64)
    with shown(run, 1):
        run.writeJson(PROGRESS, state(**BEGUN))
        until(screen, "10/100")
        run.writeJson(PROGRESS, state(**VALIDATED))
        line = until(screen, "20/100")
    assert re.fullmatch(r"epoch 2/2 \|█+.? +\| 20/100  loss 0\.3000  0:06 left", line), line
    assert len(line) < 64


def test_fits_side_by_side_have_a_line_each(run, terminal):
    screen = terminal(100)
    folders = {}
    for name in "abc":
        run.mkdir(name)
        folders[run.below(name).url] = run.below(name)
    labels = dict(zip(folders, ["1/3 rate={0.1}", "2/3 rate={0.2}", "3/3 rate={0.3}"], strict=True))
    first, second, third = folders
    with Board(labels, verbose=1) as board, board.attempt(folders, {}):
        assert until(screen, "starting").startswith("[1/3 rate={0.1}] starting")
        for url, step in [(first, 30), (second, 70)]:
            folders[url].writeJson(PROGRESS, state(epoch=1, step=step))
        assert until(screen, "70/100") == f"[2/3 rate={{0.2}}] epoch 1/2 |{'█' * 21}{' ' * 9}| 70/100"
        assert "[1/3 rate={0.1}] epoch 1/2 |" in screen.raw
        assert "\x1b[A" in screen.raw  # below each other
        assert "3/3" not in screen.raw  # it waits
        board.taken(second)
        board.done(second, failed=True)
        line = until(screen, "failed")
        assert re.fullmatch(r"\[2/3 rate=\{0\.2\}\] failed after \d+\.\d s \(epoch 1/2, training\)", line)
        folders[third].writeJson(PROGRESS, state(epoch=2, step=10))
        assert until(screen, "[3/3").startswith("[3/3 rate={0.3}] epoch 2/2 |███")


def test_a_store_is_not_asked_for_long(run, monkeypatch, capsys):
    monkeypatch.setattr("spark_nn.gang.board.INTERVAL", 60)
    folders = {run.below(name).url: run.below(name) for name in "abcdefghijklmnopqrst"}
    asked, read, answer = [], run.fs.cat_file, threading.Event()

    def told(path):
        asked.append(path.split("/")[-2])
        return read(path)

    def attempt(board, store):
        monkeypatch.setattr(run.fs, "cat_file", told)
        with board.attempt(folders, {}):
            asked.clear()
            board._look()
            yield "".join(asked)
            asked.clear()
            board._look()
            yield "".join(asked)
            board._look()
            monkeypatch.setattr(run.fs, "cat_file", lambda path: asked.append("-") or store())
            asked.clear()
            board.taken(run.below("c").url)
            board.taken(run.below("d").url)
        yield "".join(asked)

    with Board(dict.fromkeys(folders, ""), verbose=2) as board:
        steps = attempt(board, lambda: 1 / 0)
        assert next(steps) == "abcdefgh"
        run.mkdir("b")
        run.below("b").writeJson(PROGRESS, state(epoch=1, **finished(1)))
        assert next(steps) == "abcdefgh"
        assert next(steps) == "-"
        monkeypatch.setattr("spark_nn.gang.board._PATIENCE", 0.1)
        run.below("b").writeJson(PROGRESS, state(epoch=1, **finished(2)))
        steps = attempt(board, lambda: answer.wait(60))
        assert next(steps) == "abcdefgh"
        assert next(steps) == "bacdefghi"
        assert next(steps) == "-"
        answer.set()
    assert [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()] == ["epoch 1/2", "epoch 2/2"]


def test_another_attempt_says_after_what_and_a_failure_leaves_a_line(run, terminal):
    screen = terminal(100)
    with pytest.raises(ValueError, match="broken"), Board({run.url: ""}, verbose=1) as board:
        with board.attempt({run.url: run}, {run.url: "attempt 2 of 4, after: training failed on rank 1: killed"}):
            line = until(screen, "attempt 2")
            assert line.startswith("starting, attempt 2 of 4, after: training failed on rank 1: killed  0 s")
            run.writeJson(PROGRESS, state(**GONE_ON))
            assert until(screen, "60/100").endswith("loss 0.4000  attempt 2 of 4")
        raise ValueError("broken")
    assert re.search(r"failed after \d+\.\d s \(epoch 1/2, training\)", screen.drawn()[-1])


def test_a_screen_that_is_gone_and_news_that_make_no_sense_end_no_fit(run, terminal):
    screen = terminal(100)
    with shown(run, 1) as board:
        run.writeJson(PROGRESS, {"nonsense": 1})
        time.sleep(0.7)
        run.writeJson(PROGRESS, state(epoch=1))
        screen.file.close()
        time.sleep(0.7)
        board.done(run.url)


# Colours; what writes to the clipboard, titles, clears; letters that turn the direction of reading.
FOUL = "\x1b[1;31mred\x1b[0m \x1b]52;c;eHg=\x07\x1b]0;title\x1b\\\x1b[2J\x1b[3A\x1bc\u202e\x9b2J<b>"


def test_nothing_of_what_ranks_tell_moves_the_cursor(run, capsys, terminal):
    assert plain(FOUL) == "red 2J<b>"
    assert plain(FOUL, colours=True) == "\x1b[1;31mred\x1b[0m 2J<b>\x1b[0m"
    told = {"epoch": 1, "seconds": [1.0], "history": {FOUL: [1.0]}, "phase": FOUL}
    run.mkdir("logs")

    def follow(verbose):
        run.write("logs/00000-000000000", FOUL.encode())
        run.writeJson(PROGRESS, state(**told))
        with Board({run.url: ""}, verbose=verbose, followLogs=True) as board:
            with board.attempt({run.url: run}, {run.url: f"attempt 2 of 2, after: {FOUL}"}):
                time.sleep(0.2)
            board.done(run.url, failed=True)

    follow(2)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/2  red 2J<b> 1.0000  1,000 rows/s",
        "[rank 0] red 2J<b>",
    ]
    screen = terminal(100)
    follow(1)
    screen.drawn()
    assert "(epoch 1/2, red 2J<b>)" in screen.raw
    assert re.findall(r"[\x1b\x9b][^\[]|\x1b\[[0-9;]*[^0-9;Am]", screen.raw) == []
    assert "[rank 0] \x1b[1;31mred\x1b[0m 2J<b>\x1b[0m" in screen.raw


@pytest.mark.parametrize(
    "changes", [{"step": "<b>"}, {"epochs": "<b>"}, {"seconds": ["<b>"]}, {"loss": "<b>"}, {"steps": [1]}]
)
def test_numbers_that_are_none_are_refused(changes):
    with pytest.raises((TypeError, ValueError)):
        State.fromDict(state(**changes))
    assert State.fromDict(state(step="7")).step == 7


def test_a_notebook_shows_html_that_is_drawn_again(run, monkeypatch, capsys):
    pages = []

    class Handle:
        def update(self, bundle, raw):
            pages.append(bundle["text/html"])

    def display(bundle, raw, display_id):
        assert raw and display_id
        pages.append(bundle["text/html"])
        return Handle()

    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    with Board({run.url: "1/2 <b>"}, verbose=1) as board:
        with board.attempt({run.url: run}, {}):
            run.writeJson(PROGRESS, state(**GONE_ON))
            limit = time.monotonic() + 20
            while "60/100" not in pages[-1]:
                assert time.monotonic() < limit
                time.sleep(0.05)
        assert "[1/2 &lt;b&gt;] epoch 1/2" in pages[-1]
        assert '<progress value="60" max="100"></progress> 60/100  loss 0.4000' in pages[-1]
        board.done(run.url)
    assert re.search(r"\[1/2 &lt;b&gt;\] 0 epochs in \d+\.\d s  0 rows/s", pages[-1])
    assert "<progress" not in pages[-1]
    assert capsys.readouterr().err == ""


def test_what_a_rank_prints_is_followed_line_by_line(run, tmp_path):
    follower = Follower(run)
    with (tmp_path / "log").open("wb", buffering=0) as log, (tmp_path / "log").open("rb") as read:

        def lines(count):
            found, limit = [], time.monotonic() + 20
            while len(found) < count:
                assert time.monotonic() < limit
                found += follower.lines()
                time.sleep(0.05)
            return found

        with pumped(run, 3, read.fileno()):
            log.write("first\nå\x07 \x1b[1msecond\n1/10\r5/10\r10/10\r\nunfin".encode())
            assert lines(3) == [(3, "first"), (3, "å \x1b[1msecond\x1b[0m"), (3, "10/10")]
            log.write(b"ished\n" + b"".join(b"%d\n" % number for number in range(5000)))
            found = lines(1000)
            assert found[0] == (3, "[lines were left out here: more were printed than are followed]")
            assert found[1:] == [(3, str(number)) for number in range(4000, 5000)]
            log.write(b"the end")
        assert follower.lines() == [(3, "the end")]
    assert run.names("logs") == []


def test_lines_that_were_read_outlive_a_store_that_refuses_the_rest(run, monkeypatch):
    run.mkdir("logs")
    for rank in range(3):
        run.write(f"logs/{rank:05d}-000000000", b"line")
    follower, read, delete = Follower(run), run.fs.cat_file, run.fs.rm_file
    monkeypatch.setattr(run.fs, "rm_file", lambda path: 1 / 0)
    monkeypatch.setattr(run.fs, "cat_file", lambda path: 1 / 0 if "/00001-" in path else read(path))
    assert follower.lines() == [(0, "line")]
    with pytest.raises(StoreError, match="division by zero"):
        follower.lines()
    monkeypatch.setattr(run.fs, "rm_file", delete)
    monkeypatch.setattr(run.fs, "cat_file", read)
    assert follower.lines() == [(1, "line"), (2, "line")]


def test_counts_are_told_as_counts_and_small_numbers_with_their_power():
    assert [number(value) for value in (821, 821.0, 0.00025)] == ["821", "821.0000", "2.5000e-04"]
