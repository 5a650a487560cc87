"""Worker side: what a function of the user's keeps for another attempt, should this one fail."""

from __future__ import annotations

import logging
import re
import shutil
import tarfile
import uuid
from pathlib import Path

from spark_nn.errors import ParamError, StoreError
from spark_nn.gang.context import GangContext, attempt_name
from spark_nn.store import RunDir, digest

_FOLDER = "saved"
_KEPT = 2  # the newest, and one in case that cannot be read
_NAME = re.compile(r"[A-Za-z0-9_.]+")
_DATA, _TAR = "data", "tar"
_LOG = logging.getLogger(__name__)


class Saves:
    """Checkpoints of the user's making, kept in the run directory until `run` ends.

    Each attempt writes to a folder of its own, so that a straggler of an earlier one cannot change what is there. A
    checkpoint appears whole or not at all, and one that is damaged is passed over for the one before.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    """

    def __init__(self, gang: GangContext) -> None:
        self._gang = gang
        self._written: dict[str, list[str]] = {}

    def save(self, content: bytes | str | Path, name: str = "checkpoint") -> None:
        """Keep bytes, a file or a folder; commonly on rank 0 alone.

        Parameters
        ----------
        content : bytes, str or Path
            The bytes, or the path of a local file or folder.
        name : str, default ``"checkpoint"``
            What to restore it by: letters, digits, ``_`` and ``.``. Ranks that keep things of their own give names of
            their own.

        Raises
        ------
        ParamError
            The name cannot be one.
        StoreError
            It cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise ParamError(f"name={name!r}: must consist of letters, digits, '_' and '.'")
        written = self._written.setdefault(name, [])
        local = self._gang.scratch / f"save-{uuid.uuid4().hex}"
        folder = self._folder(self._gang.attempt)
        try:
            if isinstance(content, bytes):
                local.write_bytes(content)
                suffix = _DATA
            else:
                with tarfile.open(local, "w") as tar:
                    tar.add(content, Path(content).name)
                suffix = _TAR
            if not written:
                folder.mkdir("")
            file = f"{name}-{len(written):09d}-{digest(local)}.{suffix}"
            folder.put(local, file)
        finally:
            local.unlink(missing_ok=True)
        written.append(file)
        if len(written) > _KEPT:
            folder.delete(written[-_KEPT - 1])

    def restore(self, name: str = "checkpoint") -> bytes | Path | None:
        """The newest that this attempt or an earlier one has kept under a name, on every rank that asks.

        Parameters
        ----------
        name : str, default ``"checkpoint"``
            That under which it was kept.

        Returns
        -------
        bytes, Path or None
            The bytes; or the path of a copy of the file or folder, which goes with the rank; None where there is none.
        """
        for attempt in reversed(range(self._gang.attempt + 1)):
            folder = self._folder(attempt)
            whole = re.compile(rf"{re.escape(name)}-\d{{9}}-[0-9a-f]{{64}}\.({_DATA}|{_TAR})")
            for file in reversed([each for each in folder.names("") if whole.fullmatch(each)]):
                found = self._read(folder, file)
                if found is not None:
                    return found
                _LOG.warning("the checkpoint %s in %s is damaged: going on from the one before", file, folder.url)
        return None

    def _folder(self, attempt: int) -> RunDir:
        return self._gang.run.below(f"{attempt_name(attempt)}/{_FOLDER}")

    def _read(self, folder: RunDir, file: str) -> bytes | Path | None:
        local = self._gang.scratch / f"saved-{uuid.uuid4().hex}"
        sha256, _, suffix = file.rpartition("-")[2].partition(".")
        try:
            folder.get(file, local)
            if digest(local) != sha256:
                return None
            if suffix == _DATA:
                return local.read_bytes()
            target = local.with_suffix(".folder")
            with tarfile.open(local) as tar:
                tar.extractall(target, filter="data")
            (content,) = target.iterdir()
            return content
        except (StoreError, tarfile.TarError):
            shutil.rmtree(local.with_suffix(".folder"), ignore_errors=True)
            return None
        finally:
            local.unlink(missing_ok=True)
