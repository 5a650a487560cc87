"""The course of a training as TensorBoard reads it.

The driver names a run's folder (:func:`run_folder`); rank 0 writes there (:class:`Events`): two folders, ``train`` and
``validation``, with the tags that ``keras.callbacks.TensorBoard`` uses, whatever the framework. Each attempt writes
files of its own. Those after the first say with which epoch they begin or go on, and TensorBoard then drops what
earlier ones told from there on.

A thread of its own writes, so that training never waits for a disk or a store.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from spark_nn.errors import ParamError, StoreError
from spark_nn.gang.context import GangContext, attempt_name
from spark_nn.store import RunDir, as_url, public_url

# A network, as a serialised GraphDef, and what Keras says of its layers, as JSON.
Drawing = tuple[bytes | None, str | None]
_FOLDERS = ("train", "validation")
_VALIDATION = "val_"
# Epochs that may wait to be written, and seconds that the end of a training waits for the last of them.
_MOST = 10_000
_PATIENCE = 10.0
_LOG = logging.getLogger(__name__)


def run_name(uid: str) -> str:
    """The name of a call of fit: when it began, and whose it is."""
    return f"{datetime.now().astimezone():%Y%m%d-%H%M%S.%f}-{uid}"


def run_folder(log_dir: str, name: str) -> str:
    """Driver side: the URL of a run's folder, which is there afterwards if it is on a disk.

    Raises
    ------
    ParamError
        It is no URL that can be opened here, or cannot be written.
    """
    try:
        folder = RunDir(f"{as_url(log_dir, 'logDir').rstrip('/')}/{name}", "logDir")
    except StoreError as error:
        raise ParamError(str(error)) from error
    try:
        if _is_local(folder):
            folder.fs.makedirs(folder.root, exist_ok=True)
    except OSError as error:
        raise ParamError(
            f"logDir={log_dir!r} cannot be written: {error}. Give a directory, or an fsspec URL, that the driver and "
            "the executors can write"
        ) from error
    return folder.url


class Events:
    """Worker side: writes the epochs of a training; rank 0 alone has one.

    Parameters
    ----------
    url : str
        The run's folder.
    gang : GangContext
        Rank 0's view of its gang.
    first : int
        The epoch, from 0, that this attempt begins with, or goes on with.
    draw : callable, optional
        Draws the network, at the latest once the first epoch is over. What it raises is logged, and there is no
        drawing.

    Raises
    ------
    ParamError
        The package tensorboard is missing here, or the folder.
    StoreError
        fsspec lacks the package of the folder's filesystem here.
    """

    def __init__(self, url: str, gang: GangContext, first: int, draw: Callable[[], Drawing] | None = None) -> None:
        try:
            import tensorboard.summary.writer.record_writer  # noqa: F401
        except ImportError as error:
            raise ParamError(
                f"logDir is set, and the package tensorboard cannot be imported on {gang.host} ({error}): install it "
                "where tasks run, with pip install 'spark-nn[tensorboard]', or clear logDir"
            ) from error
        self._folder = RunDir(url, "logDir")
        self._shown = public_url(url)
        if _is_local(self._folder) and not Path(self._folder.root).is_dir():
            raise ParamError(
                f"logDir: {gang.host}, where the first worker runs, does not see {self._folder.root}, which the driver "
                "has made: give a directory that they share, or an fsspec URL such as s3://bucket/logs"
            )
        self._file = f"events.out.tfevents.{attempt_name(gang.attempt)}"
        self._scratch = gang.scratch / "events"
        self._again = first if gang.attempt else None
        self._draw = draw
        self._opened: dict[str, _Writer] = {}
        self._waiting: deque[Callable[[], None]] = deque()
        self._last = first  # of the epochs that were told
        self._copied = True
        self._slow = False
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left, within a limit; what could not be copied before is tried again."""
        self._closed.set()
        self._changed.set()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            _LOG.warning(
                "logDir: the last epochs are not yet written to %s after %g s, and may be missing there",
                *(self._shown, _PATIENCE),
            )

    def network(self) -> None:
        """Draw the network, if there is anything to draw it with and nobody has."""
        draw, self._draw = self._draw, None
        if draw is None:
            return
        # Here and not in the other thread: to trace a model uses its framework's random numbers.
        try:
            graph, layers = draw()
        except Exception as error:  # noqa: BLE001  (whatever a network makes of being traced)
            _LOG.warning("logDir: the network cannot be drawn, and is left out (%s: %s)", type(error).__name__, error)
            return
        self._tell(lambda: self._writer("train").network(graph, layers))

    def epoch(self, epoch: int, logs: Mapping[str, Any], rate: float | None, rows_per_second: float) -> None:
        """Take an epoch's values; they are written soon.

        Parameters
        ----------
        epoch : int
            The epoch, from 0.
        logs : mapping of str to float or list of float
            Its metrics; those that begin with ``val_`` are of the validation rows.
        rate : float or None
            The learning rate that it ended with; None where there is no one rate.
        rows_per_second : float
            Training rows per second, all ranks together.
        """
        values: dict[str, dict[str, float]] = {name: {} for name in _FOLDERS}
        if rate is not None and math.isfinite(rate):
            values["train"]["epoch_learning_rate"] = rate
        values["train"]["rows_per_second"] = rows_per_second
        for name, value in logs.items():
            held = name.startswith(_VALIDATION)
            folder, tag = _FOLDERS[held], f"epoch_{name.removeprefix(_VALIDATION) if held else name}"
            for place, each in enumerate(np.ravel(value).tolist()):  # one per class, of some metrics
                values[folder][f"{tag}/{place}" if np.ndim(value) else tag] = float(each)
        if epoch == 0:
            self.network()
        self._tell(functools.partial(self._write, epoch, values, time.time()))

    def _tell(self, write: Callable[[], None]) -> None:
        if len(self._waiting) < _MOST:
            self._waiting.append(write)
            self._changed.set()
        elif not self._slow:
            self._slow = True
            _LOG.warning("logDir: %s is too slow: %d epochs wait, and others are left out", self._shown, _MOST)

    def _work(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            closing = self._closed.is_set()
            # The model is worth more than what is told of it; what was not copied is with the next epoch, or the end.
            try:
                while self._waiting:
                    self._copied = False
                    self._waiting.popleft()()
                if not self._copied:
                    self._publish()
                    self._copied = True
            except Exception as error:  # noqa: BLE001  (every store has errors of its own)
                _LOG.warning("logDir: epoch %d could not be written to %s (%s)", self._last + 1, self._shown, error)
            if closing:
                return

    def _write(self, epoch: int, values: Mapping[str, Mapping[str, float]], when: float) -> None:
        self._last = epoch
        for folder, scalars in values.items():
            if scalars:
                self._writer(folder).scalars(epoch, scalars, when)

    def _writer(self, folder: str) -> _Writer:
        if folder not in self._opened:
            home = Path(self._folder.root) if _is_local(self._folder) else self._scratch
            (home / folder).mkdir(parents=True, exist_ok=True)
            self._opened[folder] = _Writer(home / folder / self._file, self._again)
        return self._opened[folder]

    def _publish(self) -> None:
        if not _is_local(self._folder):
            for folder, writer in self._opened.items():
                self._folder.mkdir(folder)
                self._folder.put(writer.path, f"{folder}/{self._file}")


class _Writer:
    """A file of events.

    Parameters
    ----------
    path : Path
        Where it is.
    again : int or None
        The epoch that another attempt begins or goes on with; None for the first one.
    """

    def __init__(self, path: Path, again: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.path = path
        path.write_bytes(b"")
        self._write(file_version="brain.Event:2")
        if again is not None:
            self._write(step=again, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(when, step=step, summary=summary)

    def network(self, graph: bytes | None, layers: str | None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        if graph is not None:
            self._write(graph_def=graph)
        if layers is not None:
            plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="graph_keras_model"))
            tensor = TensorProto(dtype=DT_STRING, string_val=[layers.encode()])
            self._write(summary=Summary(value=[Summary.Value(tag="keras", metadata=plugin, tensor=tensor)]))

    def _write(self, when: float | None = None, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self.path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=when or time.time(), **fields).SerializeToString())


def _is_local(folder: RunDir) -> bool:
    return isinstance(folder.fs, LocalFileSystem)
