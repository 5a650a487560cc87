"""Saving and loading stages: Spark's metadata, native model files, and a manifest of digests.

Layout of a saved stage::

    path/metadata/        Spark's own: class, uid, params, as JSON
    path/model/...        the framework's native file, readable without Spark and without spark_nn
    path/manifest.json    size and SHA-256 of every file under path/model

Nothing is pickled. A function given as a param is saved as its import path; what has none is refused. Loading an
estimator imports the functions that it names, and fitting it calls them: load estimators of authors you trust. None
of them may be Python's own, where ``os:system`` is one. A fitted model names none.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable
from importlib import metadata as distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pyspark.ml import util
from pyspark.ml.util import (
    DefaultParamsReader,
    DefaultParamsWriter,
    MLReadable,
    MLReader,
    MLWriter,
)

import spark_nn
from spark_nn.disk import Disk
from spark_nn.errors import ModelFileError, ParamError
from spark_nn.store import RunDir, digest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

FORMAT_VERSION = 1
_IMPORT = "spark_nn.import"
S = TypeVar("S", bound=MLReadable[Any])


class ModelFile:
    """A model's native file, kept on this machine for as long as something uses it.

    Parameters
    ----------
    suffix : str
        The file's suffix.
    """

    def __init__(self, suffix: str) -> None:
        folder = tempfile.mkdtemp(prefix="spark_nn-model-")
        self.path = Path(folder) / f"model{suffix}"
        self.origin = str(self.path)  # what messages call it
        self.sha256 = ""
        # Runs when the last stage that shares the file is gone, and at the interpreter's exit.
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def fetch(cls, run: RunDir, name: str, sha256: str) -> ModelFile:
        """The file that a rank published in its run directory."""
        file = cls(Path(name).suffix)
        file.origin = f"{run.url}/{name}"
        run.get(name, file.path)
        return file.sealed(sha256)

    def sealed(self, sha256: str | None = None) -> ModelFile:
        """Take the file as complete; give it a name that tells its content.

        Raises
        ------
        ModelFileError
            It is not the file that was expected.
        """
        found = digest(self.path)
        if sha256 is not None and found != sha256:
            raise ModelFileError(
                f"the model file is not the one that was written: its SHA-256 is {found}, not {sha256}"
            )
        self.sha256 = found
        named = self.path.with_name(f"spark_nn-{found}{self.path.suffix}")
        self.path = self.path.rename(named)
        return self


class StageWriter(MLWriter):
    """Saves a stage.

    Parameters
    ----------
    stage : Params
        The estimator or model. It offers ``_savedFiles()``, the files to save under ``model/`` by name,
        ``_unsavedParams()``, the params that those files stand for, ``_savedMetadata()``, and ``libraries``, the
        distributions whose versions are noted.
    """

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.stage = stage

    def _handleOverwrite(self, path: str) -> None:
        # The inherited one reaches for the JVM, which Spark Connect does not have; 4.0 has nothing else.
        remove = getattr(util, "_remove_dfs_dir", None)
        if remove is None:
            if getattr(self.sparkSession, "_jsparkSession", None) is None:
                raise ModelFileError(
                    f"{path} cannot be overwritten over Spark Connect by pyspark 4.0: remove the directory first, save "
                    "to another one, or use pyspark 4.1 or newer"
                )
            super()._handleOverwrite(path)
        else:
            remove(path, self.sparkSession)

    def saveImpl(self, path: str) -> None:
        """Save the stage; the manifest is written last.

        Raises
        ------
        ParamError
            A param holds what cannot be saved safely.
        """
        skipped = self.stage._unsavedParams()
        params = {
            param.name: encode(param.name, value)
            for param, value in self.stage._paramMap.items()
            if param.name not in skipped
        }
        files: dict[str, ModelFile] = self.stage._savedFiles()
        extra = {
            "spark_nn": {
                "format": FORMAT_VERSION,
                "version": spark_nn.__version__,
                "libraries": versions(self.stage.libraries),
                "files": sorted(files),
                **self.stage._savedMetadata(),
            }
        }
        DefaultParamsWriter.saveMetadata(self.stage, path, self.sparkSession, extra, params)
        if files:
            disk = Disk.of(self.sparkSession, path)
            manifest = {
                name: {"sha256": file.sha256, "bytes": file.path.stat().st_size} for name, file in files.items()
            }
            for name, file in files.items():
                disk.put(file.path, f"model/{name}")
            with tempfile.TemporaryDirectory(prefix="spark_nn-") as folder:
                local = Path(folder) / "manifest.json"
                local.write_text(json.dumps({"format": FORMAT_VERSION, "model": manifest}, indent=2))
                disk.put(local, "manifest.json")


class StageReader(MLReader[S], Generic[S]):
    """Loads a stage that :class:`StageWriter` saved.

    Parameters
    ----------
    cls : type
        The stage's class. Its instances take what was saved through ``_loadSaved(metadata, files)``.
    given : dict, optional
        Values of params in place of those that were saved.
    make : callable, optional
        Returns an empty stage, where what was saved needs something that the user gives.
    """

    def __init__(self, cls: type[S], given: dict[str, Any] | None = None, make: Callable[[], S] | None = None) -> None:
        super().__init__()
        self.cls = cls
        self.given = given or {}
        self.make = make or cls

    def load(self, path: str) -> S:
        """Load the stage.

        Raises
        ------
        ModelFileError
            The directory holds another kind of stage, a newer format, files that were changed, or what may not be
            loaded.
        """
        spark = self.sparkSession
        metadata = DefaultParamsReader.loadMetadata(path, spark)
        expected = f"{self.cls.__module__}.{self.cls.__name__}"
        if metadata["class"] != expected:
            raise ModelFileError(f"{path} holds a {metadata['class']}, not a {expected}: load it with its own class")
        own = metadata.get("spark_nn", {})
        if own.get("format") != FORMAT_VERSION:
            raise ModelFileError(
                f"{path} was saved by spark_nn {own.get('version')} in format {own.get('format')}; this "
                f"version reads format {FORMAT_VERSION}. Load it with a version of spark_nn that matches"
            )
        stage: Any = self.make()
        stage._resetUid(metadata["uid"])
        for saved, put in (
            (metadata["defaultParamMap"], stage._setDefault),
            (metadata["paramMap"], stage._set),
        ):
            for name, value in saved.items():
                if name in self.given:
                    continue  # what it names must not even be imported
                if stage.hasParam(name):
                    put(**{name: decode(value) if name in stage.functionParams else value})
                else:
                    warnings.warn(f"{path}: this version has no param {name}; left out", stacklevel=2)
        stage._set(**self.given)
        stage._loadSaved(own, _fetch(spark, path, own.get("files")))
        return stage  # type: ignore[no-any-return]


def encode(param: str, value: Any) -> Any:
    """A param's value as JSON can hold it, functions as their import path.

    Raises
    ------
    ParamError
        The value, or a part of it, cannot be saved safely.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [encode(param, item) for item in value]
    if isinstance(value, dict):
        return {key: encode(param, item) for key, item in value.items()}
    if callable(value) and hasattr(value, "__qualname__"):
        where = import_path(value)
        if _own(value):
            raise ParamError(
                f"{param} is {where}, which is Python's own and would not be loaded again: give a function of yours "
                "that calls it, defined at the top level of a module"
            )
        if value.__module__ != "__main__" and "<" not in value.__qualname__ and _imported(where) == value:
            return {_IMPORT: where}
        raise ParamError(
            f"{param} is the function {where}, which another process could not import: define it at the top "
            "level of a module that is installed where the stage will be loaded. What was fitted, such as the "
            "bestModel of a search, is saved without it"
        )
    raise ParamError(
        f"{param} holds a {type(value).__name__}, which cannot be saved without pickling it: pass a function "
        "that returns it, defined at the top level of a module"
    )


def decode(value: Any) -> Any:
    """The value that :func:`encode` described.

    Raises
    ------
    ModelFileError
        It names a function of Python's own, or one that cannot be imported.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_IMPORT}:
            return load_import(value[_IMPORT])
        return {key: decode(item) for key, item in value.items()}
    return value


def import_path(value: Any) -> str:
    """Where a class or function is defined, as ``module:name``."""
    return f"{getattr(value, '__module__', None) or 'builtins'}:{value.__qualname__}"


def load_import(where: Any) -> Any:
    """The class or function at an import path that was saved.

    Raises
    ------
    ModelFileError
        It is Python's own, where ``os:system`` is one, or is not there.
    """
    module, _, name = where.partition(":") if isinstance(where, str) else ("", "", "")
    if not module or not name:
        raise ModelFileError(f"{where!r} was saved as an import path, which is written module:name: save it again")
    refusal = (
        f"the stage names {where}, which belongs to Python's own library: it would be called when the stage is used, "
        "and no stage that spark_nn saved names such a function. Do not load it, unless you know who wrote it"
    )
    if _standard(module):
        raise ModelFileError(refusal)
    try:
        found = _imported(where)
    except (ImportError, AttributeError) as error:
        raise ModelFileError(
            f"the stage names {where}, which cannot be imported here ({error}): install what defines it, in the "
            "version that the stage was saved with"
        ) from error
    # A module of anyone's may have imported os.
    if _own(found):
        raise ModelFileError(refusal)
    return found


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _own(value: Any) -> bool:
    """Whether a class or function is Python's own, wherever it was found; some builtin ones name no module."""
    return _standard(getattr(value, "__module__", None) or "builtins")


def _standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def versions(libraries: Iterable[str]) -> dict[str, str | None]:
    """The versions of Python and of distributions, None where there is none of the name; imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in libraries:
        # TensorFlow's are called by what they are built for.
        names = [each for each in (name, f"{name}-cpu", f"{name}-intel", f"{name}-macos") if _version(each)]
        found[name] = _version(names[0]) if names else None
    return found


def _version(distribution: str) -> str | None:
    try:
        return distributions.version(distribution)
    except distributions.PackageNotFoundError:
        return None


def _fetch(spark: SparkSession, path: str, names: Any) -> dict[str, ModelFile]:
    """The stage's files, checked against the manifest."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelFileError(f"{path}/metadata lists its files as {names!r}: it must be a list of names; save it again")
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
            raise ModelFileError(
                f"{path}/metadata lists the file {name!r}, which is a path out of the stage's folder and no name: "
                "get the stage from its author again"
            )
    if not names:
        return {}
    disk = Disk.of(spark, path)
    manifest = _manifest(disk, path)
    files = {}
    for name in names:
        entry = manifest.get(name)
        if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
            raise ModelFileError(
                f"{path}/manifest.json does not list the file {name} with its size and SHA-256: the stage is "
                "incomplete; save it again"
            )
        file = ModelFile(Path(name).suffix)
        file.origin = f"{path}/model/{name}"
        disk.get(f"model/{name}", file.path)
        size = file.path.stat().st_size
        if size != entry["bytes"]:
            raise ModelFileError(
                f"{file.origin} was changed since it was saved, or not copied as a whole: it has {size} bytes, not "
                f"{entry['bytes']}. Copy or save it again"
            )
        try:
            files[name] = file.sealed(entry["sha256"])
        except ModelFileError as error:
            raise ModelFileError(f"{file.origin} was changed since it was saved: {error}") from None
    return files


def _manifest(disk: Disk, path: str) -> dict[str, Any]:
    """What the manifest says of each file."""
    with tempfile.TemporaryDirectory(prefix="spark_nn-") as folder:
        local = Path(folder) / "manifest.json"
        disk.get("manifest.json", local)
        try:
            manifest = json.loads(local.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelFileError(
                f"{path}/manifest.json cannot be read as JSON ({error}): the stage is incomplete; save it again"
            ) from error
    listed = manifest.get("model") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        raise ModelFileError(f"{path}/manifest.json lists no files: the stage is incomplete; save it again")
    return listed
