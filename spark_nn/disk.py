"""Copies files between this machine and the filesystem that Spark resolves a path on.

A classic session has Hadoop's filesystems at hand, the same that Spark writes the metadata with. A Spark Connect
client has none: it asks where Spark has put the metadata, ships files as artifacts, and lets tasks on the server's
side copy them with fsspec.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
from pyspark import SparkFiles

from spark_nn.errors import ModelFileError
from spark_nn.store import digest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Where Spark's writers leave a stage's metadata: it is there before anything else is.
_METADATA = "metadata"
# What Hadoop calls filesystems that fsspec knows by another name.
_SCHEMES = {"s3a": "s3", "s3n": "s3"}
# Bytes that one job brings to the client; more at a time would fill the heap of a server of the default size.
_JOB_BYTES = 32 << 20
_ROW_BYTES = 4 << 20
# What tasks report: a problem that another attempt would meet again, or the next bytes of a file.
_REPORT = "problem string, data binary"


class Disk(ABC):
    """The filesystem that Spark resolves a saved stage's path on; names of files are relative to that path."""

    @staticmethod
    def of(spark: SparkSession, path: str) -> Disk:
        """The disk of a path, on which Spark has put the stage's metadata or is about to."""
        session = getattr(spark, "_jsparkSession", None)
        return _Connect(spark, path) if session is None else _Hadoop(spark, session, path)

    @abstractmethod
    def put(self, local: Path, name: str) -> None:
        """Copy a local file there.

        Raises
        ------
        ModelFileError
            It cannot be written there.
        """

    @abstractmethod
    def get(self, name: str, local: Path) -> None:
        """Copy a file from there to a local path.

        Raises
        ------
        ModelFileError
            There is no such file, or it cannot be read.
        """


class _Hadoop(Disk):
    """Through the JVM of a classic session, so that every URL that Spark can save to works."""

    def __init__(self, spark: SparkSession, session: Any, path: str) -> None:
        self._root = path
        self._path = spark._jvm.org.apache.hadoop.fs.Path  # type: ignore[union-attr]
        self._conf = session.sessionState().newHadoopConf()

    def put(self, local: Path, name: str) -> None:
        target = self._path(f"{self._root}/{name}")
        with self._told("write", name):
            target.getFileSystem(self._conf).copyFromLocalFile(False, True, self._local(local), target)

    def get(self, name: str, local: Path) -> None:
        source = self._path(f"{self._root}/{name}")
        with self._told("read", name):
            files = source.getFileSystem(self._conf)
            if not files.exists(source):
                raise _missing(self._root, name)
            files.copyToLocalFile(False, source, self._local(local), True)

    @contextlib.contextmanager
    def _told(self, verb: str, name: str) -> Iterator[None]:
        from py4j.protocol import Py4JError

        try:
            yield
        except Py4JError as error:
            # Of the JVM's words the first line says what it is.
            words = str(getattr(error, "java_exception", error)).partition("\n")[0]
            raise ModelFileError(
                f"cannot {verb} {self._root}/{name}: {words}; look at the path, and at who may {verb} there"
            ) from error

    def _local(self, path: Path) -> Any:
        return self._path(f"file://{path}")  # Hadoop takes it as it stands, blanks and all


class _Connect(Disk):
    """Through tasks on the server's side, which is all that a Connect client can reach the path by."""

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._spark = spark
        self._root = path
        self._url: str | None = None

    def put(self, local: Path, name: str) -> None:
        # Spark takes a name only once in a session, so it tells the content.
        shipped = f"spark_nn-{digest(local)}{local.suffix}"
        with tempfile.TemporaryDirectory(prefix="spark_nn-") as folder:
            link = Path(folder) / shipped
            try:
                link.hardlink_to(local)  # costs no disk
            except OSError:
                shutil.copyfile(local, link)
            self._spark.addArtifacts(str(link), file=True)
        self._run(_Put(self._resolved(), name, shipped), name)

    def get(self, name: str, local: Path) -> None:
        url = self._resolved()
        with local.open("wb") as file:
            while True:
                count = sum(file.write(part) for part in self._run(_Get(url, name, file.tell()), name))
                if count < _JOB_BYTES:
                    return

    def _resolved(self) -> str:
        """Where Spark has put the metadata, as a URL that fsspec understands."""
        if self._url is None:
            found = unquote(self._spark.read.text(f"{self._root}/{_METADATA}").inputFiles()[0])
            scheme, _, rest = found.rpartition(f"/{_METADATA}/")[0].partition(":")
            self._url = f"{_SCHEMES.get(scheme, scheme)}:{rest}"
        return self._url

    def _run(self, task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], name: str) -> list[pa.Buffer]:
        """Run a task on the server's side; what it brings."""
        try:
            table = self._spark.range(0, 1, 1, 1).mapInArrow(task, _REPORT).toArrow()
        except Exception as error:
            raise ModelFileError(f"{self._root}/{name} cannot be copied by a Spark task: {error}") from error
        for problem in table["problem"].drop_null():
            raise _missing(self._root, name) if problem.as_py() == _MISSING else ModelFileError(problem.as_py())
        return [part.as_buffer() for part in table["data"].drop_null()]


_MISSING = "missing"


def _missing(root: str, name: str) -> ModelFileError:
    return ModelFileError(f"{root}/{name} does not exist: the stage is incomplete. Save it again")


@dataclass(frozen=True)
class _Put:
    """Executor side: copies a file that was shipped to the path, whole or not at all.

    Parameters
    ----------
    url : str
        Where the stage is.
    name : str
        The file's name there.
    shipped : str
        Its name among the session's artifacts.
    """

    url: str
    name: str
    shipped: str

    def __call__(self, _: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        yield _report(problem=self.copy())

    def copy(self) -> str | None:
        """Copy the file; what stands in the way."""
        try:
            files, root = _filesystem(self.url)
        except ModelFileError as error:
            return str(error)
        if not files.exists(f"{root}/{_METADATA}"):
            return (
                f"a Spark task does not find {self.url}/{_METADATA}, which Spark has just written: the path is not the "
                "same directory on all machines. Save to storage that they share"
            )
        target = f"{root}/{self.name}"
        draft = f"{target}.{uuid.uuid4().hex}.draft"
        files.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        try:
            files.put_file(SparkFiles.get(self.shipped), draft)
            files.mv(draft, target)
        except BaseException:
            with contextlib.suppress(Exception):  # it may not even be there, and the error to tell is the first one
                files.rm_file(draft)
            raise
        return None


@dataclass(frozen=True)
class _Get:
    """Executor side: brings the bytes of a file from a place on, as many as one job may.

    Parameters
    ----------
    url : str
        Where the stage is.
    name : str
        The file's name there.
    start : int
        How many bytes of it are there already.
    """

    url: str
    name: str
    start: int

    def __call__(self, _: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            files, root = _filesystem(self.url)
            file = files.open(f"{root}/{self.name}", "rb", block_size=_ROW_BYTES)
        except ModelFileError as error:
            yield _report(problem=str(error))
        except FileNotFoundError:
            yield _report(problem=_MISSING)
        else:
            with file:
                file.seek(self.start)
                left = _JOB_BYTES
                while left and (part := file.read(min(left, _ROW_BYTES))):
                    left -= len(part)
                    yield _report(data=part)


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and the path on it."""
    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ModelFileError(
            f"the path is {url}, which the Python of the Spark tasks cannot reach: {error}. Install the filesystem's "
            "fsspec package where tasks run, use another path, or do it in a classic session"
        ) from error
    return files, root


def _report(problem: str | None = None, data: bytes | None = None) -> pa.RecordBatch:
    arrays = [pa.array([problem], pa.string()), pa.array([data], pa.binary())]
    return pa.RecordBatch.from_arrays(arrays, ["problem", "data"])
