"""The processes of ranks, found from outside and really killed."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import psutil


def named(name, session=True):
    """Processes of that name, of this test session or of any."""
    mark = os.environ.get("SPARK_WORKER_DIR")  # a directory of this test session's own, inherited by all of them
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            with open(f"/proc/{process.pid}/comm") as file:
                comm = file.read().strip()
            if process.status() == psutil.STATUS_ZOMBIE:
                continue  # it is gone, and whoever should bury it takes its time
            if comm.startswith(name) and (not session or process.environ().get("SPARK_WORKER_DIR") == mark):
                found.append(process)
    return found


def ranks():
    """The processes of ranks."""
    return named("spark_nn rank")


def servers():
    """The processes that ranks are forked from."""
    return named("spark_nn warm")


def rank_process(rank, seconds=60.0):
    """The process of a rank, once it is there."""
    return wait_for(lambda: next(iter(named(f"spark_nn rank {rank}")), None), seconds, f"a process of rank {rank}")


def wait_for(look, seconds, what):
    """What `look` returns, as soon as it is something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {seconds} s")


def no_rank_is_left(seconds=20.0):
    """Fail where ranks' processes stay."""
    deadline = time.monotonic() + seconds
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [process.as_dict(["pid", "ppid", "status"]) for process in ranks()]
    assert not left, f"processes of ranks are left: {left}"


class Later:
    """Something that happens in another thread while the block runs; its error is raised at the end."""

    def __init__(self, act, *args, **kwargs):
        self.error = None
        self.thread = threading.Thread(target=self._act, args=(act, args, kwargs), daemon=True)

    def _act(self, act, args, kwargs):
        try:
            act(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join(60)
        if self.error is not None:
            raise self.error
        assert not self.thread.is_alive()
