"""Putting files where other programs find them: whole or not at all, on any filesystem that fsspec knows."""

from __future__ import annotations

import contextlib
import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from spark_nn.errors import ParamError, StoreError


def check_format(format: str, formats: Sequence[str], packages: Mapping[str, Sequence[str]], cure: str) -> None:
    """Refuse a format that cannot be written here, before anything is done.

    Parameters
    ----------
    format : str
        The format.
    formats : sequence of str
        Those that there are.
    packages : mapping
        The packages that some of them need.
    cure : str
        What installs these, for the message.

    Raises
    ------
    ParamError
        The format is unknown, or a package that it needs is missing.
    """
    if format not in formats:
        raise ParamError(f"format={format!r}: must be one of {', '.join(map(repr, formats))}")
    if missing := [each for each in packages.get(format, ()) if not importlib.util.find_spec(each)]:
        raise ParamError(f"format={format!r} needs {' and '.join(missing)}, which is not installed here: {cure}")


class Target:
    """Where an export goes.

    Parameters
    ----------
    path : str
        A local path or an fsspec URL.
    overwrite : bool
        Whether what is there may be replaced.

    Raises
    ------
    StoreError
        The filesystem is unknown or cannot be reached, or something is there and may not be replaced.
    """

    def __init__(self, path: str, *, overwrite: bool) -> None:
        self.path = path
        url = path if "://" in path else str(Path(path).expanduser().absolute())
        try:
            self._fs, root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as error:
            raise StoreError(f"path={path!r}: {error}. Install the filesystem's package, or use another URL") from error
        self._root: str = root
        if self._exists() and not overwrite:
            raise StoreError(f"path={path!r} exists: choose another one, or replace it with overwrite=True")

    def put(self, local: Path) -> None:
        """Copy a local file or folder there, under another name until it is complete.

        Raises
        ------
        StoreError
            It could not be written.
        """
        draft, old = (f"{self._root}.{uuid.uuid4().hex}.{kind}" for kind in ("draft", "old"))
        try:
            self._fs.makedirs(self._root.rpartition("/")[0] or "/", exist_ok=True)
            # With an end of its own the copy's name is what it is told, whatever is there.
            self._fs.put(f"{local}/" if local.is_dir() else str(local), draft, recursive=local.is_dir())
            if self._exists():
                self._fs.mv(self._root, old, recursive=True)
            try:
                self._fs.mv(draft, self._root, recursive=local.is_dir())
            except Exception:
                if self._fs.exists(old):
                    self._fs.mv(old, self._root, recursive=True)
                raise
            if self._fs.exists(old):
                self._fs.rm(old, recursive=True)
        except Exception as error:
            with contextlib.suppress(Exception):  # it may not even be there, and the error to tell is the first one
                self._fs.rm(draft, recursive=True)
            raise StoreError(f"cannot write {self.path!r}: {type(error).__name__}: {error}") from error

    def _exists(self) -> Any:
        self._fs.invalidate_cache()
        return self._fs.exists(self._root)
