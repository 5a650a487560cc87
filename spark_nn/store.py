"""Run directories: the one place where driver and gang leave files for each other.

A run directory lives on any filesystem that fsspec knows. The driver makes it, tells every rank its URL, and
removes it when the fit ends, however it ends. Files appear in it whole or not at all. As long as its driver lives, a
directory's file ``alive`` is renewed; those of drivers that died are removed when the next one comes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import fsspec

from spark_nn.errors import StoreError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STORE_CONF = "spark.nn.storeUrl"
# Seconds after which a directory whose driver gives no sign of life is taken to be left behind.
TTL = 3600.0
# Seconds between attempts at something that the store has refused.
_PAUSES = (0.2, 1.0)
# What another attempt does not change.
_LASTING = {
    errno.ENOENT,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
}
_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^/@]*@")
_CONTAINER = re.compile(r"(abfs|wasb)s?://[^:]*@")
_QUERY = re.compile(r"\?.*?(?=::|$)")
_ALIVE = "alive"
_OURS = re.compile(r"(run|data)-[0-9a-f]{32}")
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def store_url(spark: SparkSession, url: str | None) -> str:
    """The store's URL: the one given, or the session's, or a local directory where all tasks are local.

    Raises
    ------
    StoreError
        No store is given and the executors may be on other machines.
    """
    url = url or spark.conf.get(STORE_CONF, None)
    if url:
        return as_url(url, "storeUrl")
    master = spark.conf.get("spark.master", "") or ""
    if master.startswith("local"):
        return _file_url(_own_folder())
    raise StoreError(
        f"no store: on master {master!r} the executors may run on other machines, so a fit needs a "
        "directory that the driver and all of them can read and write. Set the param storeUrl or the Spark "
        f"conf {STORE_CONF} to a path on a shared disk or to an fsspec URL such as s3://bucket/dir"
    )


def as_url(url: str, param: str) -> str:
    """A param's path or URL as a URL.

    Raises
    ------
    StoreError
        It is neither.
    """
    if re.match(r"[A-Za-z][\w+.-]*:(?!//)", url):
        raise StoreError(f"{param}={url!r}: write it as scheme://..., such as file:///shared/dir or hdfs://host/dir")
    return url if "://" in url else _file_url(Path(url).expanduser().absolute())


def public_url(url: str) -> str:
    """A path or URL as others may see it: without user, password and query.

    What stands before the ``@`` of Azure's URLs is a container.
    """
    if "://" not in url or url.startswith("file:"):
        return url
    return _QUERY.sub("", _USER.sub(lambda found: found[0] if _CONTAINER.fullmatch(found[0]) else found[1], url))


def _file_url(path: Path) -> str:
    # Not `as_uri`: fsspec takes what follows the scheme as it stands, blanks and all.
    return f"file://{path}"


def _own_folder() -> Path:
    """A directory under the system's temporary one that is this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"spark_nn-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StoreError(f"{folder} belongs to another user: set storeUrl to a directory of your own")
    return folder


def is_lasting(error: BaseException) -> bool:
    """Whether what a store has refused will be refused another time, too."""
    return getattr(error, "errno", None) in _LASTING


def digest(path: Path) -> str:
    """SHA-256 of a local file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunDir:
    """A directory of one run, addressed by URL, used by driver and ranks alike.

    Parameters
    ----------
    url : str
        An fsspec URL.
    param : str
        The param that it comes from, for the error of one that fsspec cannot open.

    Raises
    ------
    StoreError
        fsspec does not know the scheme, or lacks its package.
    """

    def __init__(self, url: str, param: str = "storeUrl") -> None:
        self.url = url.rstrip("/")
        self._removed = threading.Event()
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"{param}={url!r}: {error}. Install the filesystem's package, or use another URL"
            ) from error

    def __reduce__(self) -> tuple[type[RunDir], tuple[str]]:
        return RunDir, (self.url,)

    @classmethod
    @contextlib.contextmanager
    def open(cls, store: str) -> Iterator[RunDir]:
        """A new directory in the store at this URL, removed at the end of the block; the store is swept first.

        Raises
        ------
        StoreError
            The store cannot be written or read back.
        """
        run = cls.create(store)
        try:
            sweep(store)
            yield run
        finally:
            run.remove()

    @classmethod
    def create(cls, store: str, kind: Literal["run", "data"] = "run") -> RunDir:
        """A new directory in the store at this URL, kept alive until it is removed.

        Parameters
        ----------
        store : str
            The store's URL.
        kind : {"run", "data"}
            What it is for, as its name tells: one run, or a dataset.

        Raises
        ------
        StoreError
            The store cannot be written.
        """
        run = cls(f"{store.rstrip('/')}/{kind}-{uuid.uuid4().hex}")
        try:
            run.fs.makedirs(run.root, exist_ok=False)
            run._sign()
        except Exception as error:
            run.remove()
            raise StoreError(
                f"the store {store!r} cannot be written: {type(error).__name__}: {error}. Set storeUrl "
                "to a directory that the driver and every executor can write"
            ) from error
        threading.Thread(target=run._keep_alive, name="spark_nn-alive", daemon=True).start()
        return run

    def below(self, name: str) -> RunDir:
        """A directory below this one, which goes with it; it need not exist."""
        return RunDir(f"{self.url}/{name}")

    def path(self, name: str) -> str:
        """The path of a file on the directory's filesystem."""
        return f"{self.root}/{name}"

    def mkdir(self, name: str) -> None:
        """Make a directory below this one."""
        self._patiently("make", name, lambda: self.fs.makedirs(self.path(name), exist_ok=True))

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that nobody ever sees a part of it.

        Raises
        ------
        StoreError
            It could not be written, several times over. The other methods raise it likewise.
        """
        self._publish(name, lambda draft: self.fs.pipe_file(draft, data))

    def read(self, name: str, *, patient: bool = True) -> bytes | None:
        """The bytes of a file, None where there is none; asked for only once where nobody is to wait."""

        def read() -> bytes | None:
            try:
                data: bytes = self.fs.cat_file(self.path(name))
            except FileNotFoundError:
                return None
            return data

        return self._patiently("read", name, read, patient)

    def writeJson(self, name: str, value: Any) -> None:
        """Write a value as JSON, whole or not at all."""
        self.write(name, json.dumps(value).encode())

    def readJson(self, name: str) -> Any | None:
        """The value of a JSON file, None where there is none."""
        data = self.read(name)
        return None if data is None else json.loads(data)

    def put(self, local: Path, name: str) -> None:
        """Copy a local file into the directory, whole or not at all."""
        self._publish(name, lambda draft: self.fs.put_file(str(local), draft))

    def get(self, name: str, local: Path) -> None:
        """Copy a file of the directory to a local path."""
        self._patiently("read", name, lambda: self.fs.get_file(self.path(name), str(local)))

    def names(self, folder: str, *, patient: bool = True) -> list[str]:
        """Names of the files in a directory below this one, sorted; none where there is no such directory."""

        def names() -> list[str]:
            self.fs.invalidate_cache()
            try:
                paths = self.fs.ls(self.path(folder), detail=False)
            except FileNotFoundError:
                return []
            return sorted(str(path).rpartition("/")[2] for path in paths)

        return self._patiently("list", folder, names, patient)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def _publish(self, name: str, write: Callable[[str], object]) -> None:
        def publish() -> None:
            draft = self.path(f"{name}.{uuid.uuid4().hex}.draft")
            try:
                write(draft)
                self.fs.mv(draft, self.path(name))
            except BaseException:
                with contextlib.suppress(Exception):  # it may not even be there, and the error to tell is the first one
                    self.fs.rm_file(draft)
                raise

        self._patiently("write", name, publish)

    def _patiently(self, verb: str, name: str, act: Callable[[], T], patient: bool = True) -> T:
        """Do something with the store, again where it failed in a way that may pass."""
        for pause in (*_PAUSES, None) if patient else (None,):
            try:
                return act()
            except Exception as error:
                lasting = is_lasting(error)
                if lasting or pause is None:
                    cure = "make room or give it another storeUrl" if lasting else "look at what serves the store"
                    raise StoreError(
                        f"cannot {verb} {name!r} in the store, {self.url}: {type(error).__name__}: {error}; {cure}",
                        transient=not lasting,
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def remove(self) -> None:
        """Remove the directory and all that is in it; never raises, since it runs after other errors too."""
        trouble: Exception | None = None
        self._removed.set()
        # A straggler may still write while its directory goes: what it leaves is removed in another round.
        for pause in (0.0, 0.0, 0.2, 1.0):
            time.sleep(pause)
            try:
                self.fs.invalidate_cache()
                if not self.fs.exists(self.root):
                    return
                self.fs.rm(self.root, recursive=True)
            except Exception as error:  # noqa: BLE001  (every store has errors of its own)
                trouble = error
        if trouble is not None:
            _LOG.warning("%s could not be removed (%s): remove it by hand", self.url, trouble)

    def _sign(self) -> None:
        self.write(_ALIVE, str(time.time()).encode())

    def _keep_alive(self) -> None:
        while not self._removed.wait(TTL / 8):
            try:
                self._sign()
            except Exception:  # noqa: BLE001  (every store has errors of its own; the next sign may get through)
                _LOG.debug("%s could not be kept alive", self.url, exc_info=True)


def sweep(store: str) -> None:
    """Remove what drivers that died have left in a store; never raises, for a fit must not fail of others' leavings.

    Parameters
    ----------
    store : str
        The store's URL.
    """
    try:
        home = RunDir(store)
        home.fs.invalidate_cache()
        names = [str(path).rstrip("/").rpartition("/")[2] for path in home.fs.ls(home.root, detail=False)]
        for name in filter(_OURS.fullmatch, names):
            sign = home.read(f"{name}/{_ALIVE}")
            # Without a sign it is being made, or being removed.
            if sign is not None and float(sign) < time.time() - TTL:
                _LOG.warning("removing %s/%s: its driver has given no sign of life for an hour", home.url, name)
                RunDir(f"{home.url}/{name}").remove()
    except Exception:  # noqa: BLE001  (every store has errors of its own)
        _LOG.debug("%s could not be swept", store, exc_info=True)
