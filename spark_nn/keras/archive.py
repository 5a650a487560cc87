"""What a ``.keras`` file holds, read before Keras opens it, and refused unless all of it is what Keras writes.

The file is a zip of ``metadata.json``, ``config.json``, ``model.weights.h5`` and perhaps ``assets/``. Everything in it
is taken as written by someone who wants to run code here or to read files. So what is allowed is listed, and the rest
refused: a digest in a manifest tells nothing where the manifest was written by the same hand.

Neither Keras nor TensorFlow is imported here. Which names are Keras's own is read from the text of the installed one.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import json
import math
import re
import stat
import struct
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from spark_nn.errors import ModelFileError

_CONFIG = "config.json"
_MAGIC = b"PK\x03\x04"
_WEIGHTS = "model.weights.h5"
_MEMBERS = frozenset({"metadata.json", _CONFIG, _WEIGHTS})
_ASSETS = "assets"
# The largest networks of Keras's own applications take one or two megabytes; a vocabulary of a million words fits too.
_CONFIG_BYTES = 64 << 20
# Keras writes weights as they are. What claims to be so much larger than it is would fill the memory.
_EXPANSION = 100
_PARSING = threading.Lock()
_SMALL = 16 << 20

# Modules whose public classes make up models. Of others single classes.
_MODULES = frozenset(
    f"keras.{name}"
    for name in (
        "constraints",
        "dtype_policies",
        "initializers",
        "layers",
        "losses",
        "metrics",
        "optimizers",
        "optimizers.schedules",
        "quantizers",
        "regularizers",
    )
)
_CLASSES = {
    "keras": frozenset(
        {"DTypePolicy", "FloatDTypePolicy", "Functional", "Layer", "Loss", "Metric", "Model", "Sequential"}
    ),
    "keras.models": frozenset({"Functional", "Model", "Sequential"}),
    "keras.random": frozenset({"SeedGenerator"}),
    "keras.utils": frozenset({"FeatureSpace"}),
    "keras.src.activations.activations": frozenset({"Mish", "ReLU"}),
    "keras.src.applications.convnext": frozenset({"LayerScale", "StochasticDepth"}),
    "keras.src.applications.inception_resnet_v2": frozenset({"CustomScaleLayer"}),
    "keras.src.layers.preprocessing.feature_space": frozenset({"Cross", "Feature", "TFDConcat", "TFDIdentity"}),
    "keras.src.models.functional": frozenset({"Functional"}),
}
# The operations of functional models, such as adding two tensors.
_OPERATIONS = re.compile(r"keras\.src\.ops\.\w+")
# Public layers that bring with them what nobody can check.
_UNSAFE = {
    "FlaxLayer": "calls functions that the file brings along",
    "JaxLayer": "calls functions that the file brings along",
    "TFSMLayer": "loads and runs another file, by its path",
    "TorchModuleWrapper": "holds a pickle, which runs code when it is loaded",
}
# Where Keras looks for a function that it knows by its bare name.
_FUNCTION_MODULES = (
    "keras.activations",
    "keras.constraints",
    "keras.initializers",
    "keras.losses",
    "keras.metrics",
    "keras.optimizers",
    "keras.regularizers",
)
# Values that JSON does not have.
_VALUES = frozenset({"__bytes__", "__ellipsis__", "__keras_tensor__", "__numpy__", "__slice__", "__tensor__"})
_DTYPE = re.compile(r"bool|string|bfloat16|(u?int|float|complex)\d{1,3}(_\w+)?")
# Settings of preprocessing layers that may be the path of a file in place of the values.
_FILES = ("vocabulary", "idf_weights")


@dataclass(frozen=True)
class Named:
    """Classes and functions that a model names and Keras does not have.

    Parameters
    ----------
    network : dict of str to str
        Those of the layers: by the name that Keras knows them by the import path, as far as the file tells it.
    compiled : dict of str to str
        Those of the settings that the model was compiled with, which scoring does without.
    """

    network: dict[str, str] = field(default_factory=dict)
    compiled: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, str]:
        """All of them."""
        return {**self.compiled, **self.network}


def inspect(path: str | Path, origin: str | None = None) -> Named:
    """Check a ``.keras`` file; return what it needs besides Keras.

    Parameters
    ----------
    path : str or Path
        The local file.
    origin : str, optional
        What messages call it, where that is not the path.

    Returns
    -------
    Named
        The custom objects that it names, whoever may have them.

    Raises
    ------
    ModelFileError
        It is not what ``keras.Model.save`` writes, or holds what may not be loaded.
    """
    name = origin or str(path)
    if Path(path).suffix != ".keras":
        raise ModelFileError(
            f"{name} ends in {Path(path).suffix!r}, by which Keras would read it as another format, unchecked: only "
            ".keras files are loaded. Save the model as one"
        )
    with Path(path).open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelFileError(
                f"{name} is not a zip file, or has something before it: a .keras file is one from its first byte. Copy "
                "or save it again"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, Path(path).stat().st_size, name)
                config = _read_config(archive, name)
                weights = archive.getinfo(_WEIGHTS)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise ModelFileError(
                f"{name} is not a zip file, or not a whole one ({error}): a .keras file is. Copy or save it again"
            ) from error
        named = examine(config, f"{name}: {_CONFIG}")
        _check_weights(_Window(file, _data_offset(file, weights, name), weights.file_size), f"{name}: {_WEIGHTS}")
    return named


def examine(config: Any, where: str) -> Named:
    """Check a description that Keras is to make objects from; return what it needs besides Keras.

    Parameters
    ----------
    config : object
        Of JSON's kinds. Functions, which the settings of a fit may hold, are passed over.
    where : str
        What messages call it.

    Raises
    ------
    ModelFileError
        It holds code, or names what no model consists of.
    """
    named = Named()
    stack: list[tuple[str, Any, bool]] = [("", config, False)]
    while stack:
        place, value, compiled = stack.pop()
        if isinstance(value, (list, tuple)):
            stack.extend((f"{place}[{number}]", each, compiled) for number, each in enumerate(value))
        elif isinstance(value, dict):
            if "class_name" in value:
                custom = _custom(value, f"{where} holds at {place or 'its top'}")
                (named.compiled if compiled else named.network).update(custom)
            for key, each in value.items():
                # A part's own settings are needed: Keras compiles it together with the whole.
                stack.append((f"{place}.{key}" if place else key, each, compiled or (place, key) == _COMPILED))
    return named


_COMPILED = ("", "compile_config")


def _check_members(archive: zipfile.ZipFile, size: int, name: str) -> None:
    """Refuse members that Keras does not write, or not in this way."""
    seen = set()
    for member in archive.infolist():
        found = member.filename
        # Windows's parts are looked at everywhere: the file may have been made for another machine.
        parts = re.split(r"[/\\]", found)
        if found.startswith("/") or "\\" in found or ".." in parts or re.match(r"[A-Za-z]:", found):
            raise ModelFileError(
                f"{name} has the member {found!r}, whose name leads out of the archive: unpacked it would overwrite "
                "other files. Keras writes no such names; get the file from its author again"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ModelFileError(
                f"{name} has the member {found!r}, which is a symbolic link: it would stand for another file of this "
                "machine. Keras writes none; get the file from its author again"
            )
        if found in seen:
            raise ModelFileError(
                f"{name} has two members of the name {found!r}: one would be checked, and the other be loaded. Keras "
                "writes each once; get the file from its author again"
            )
        seen.add(found)
        if found not in _MEMBERS and PurePosixPath(found).parts[:1] != (_ASSETS,):
            raise ModelFileError(
                f"{name} has the member {found!r}: Keras writes only {', '.join(sorted(_MEMBERS))} and files under "
                f"{_ASSETS}/. Save the model again with keras.Model.save"
            )
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ModelFileError(
                f"{name} has the member {found!r}, which is compressed: its {member.compress_size} bytes would become "
                f"{member.file_size}, and may be made to fill the memory. Keras compresses nothing; save the model "
                "again with keras.Model.save"
            )
    if sum(member.file_size for member in archive.infolist()) > size:
        raise ModelFileError(
            f"{name} has members that together are larger than the file of {size} bytes: they share their content, as "
            "in a bomb that fills the memory. Get the file from its author again"
        )
    if missing := _MEMBERS - seen:
        raise ModelFileError(
            f"{name} lacks the member {', '.join(sorted(missing))}: it is no model that Keras saved, or not all of "
            "it. Save it again with keras.Model.save"
        )


def _read_config(archive: zipfile.ZipFile, name: str) -> Any:
    size = archive.getinfo(_CONFIG).file_size
    if size > _CONFIG_BYTES:
        raise ModelFileError(
            f"{name}: {_CONFIG} has {size} bytes, where at most {_CONFIG_BYTES} are read: it describes layers, and "
            "holds no weights. Move large vocabularies out of the layers' arguments with adapt()"
        )
    try:
        config = json.loads(archive.read(_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{name}: {_CONFIG} cannot be read as JSON ({type(error).__name__}: {error}): save the model again"
        ) from error
    if not isinstance(config, dict):
        raise ModelFileError(
            f"{name}: {_CONFIG} describes no model, but is a {type(config).__name__}: save the model again"
        )
    return config


def _custom(described: dict[str, Any], place: str) -> dict[str, str]:
    """What one object's description needs besides Keras: a name and where it comes from, or nothing."""
    name, module, inner = described["class_name"], described.get("module"), described.get("config")
    if not isinstance(name, str) or not isinstance(module, (str, type(None))):
        raise ModelFileError(
            f"{place} an object whose class_name is {name!r} and whose module is {module!r}: both must be text. Save "
            "the model again"
        )
    if name in ("Lambda", "__lambda__"):
        raise ModelFileError(
            f"{place} a Lambda, which is code: loading it would run what its author wrote. Lambdas are never loaded; "
            "write a layer or a function of your own instead, and name it with customObjects"
        )
    if name.startswith("__"):
        if name not in _VALUES:
            raise ModelFileError(
                f"{place} a {name}, which may not be loaded: only the values {', '.join(sorted(_VALUES))} may. Save "
                "the model again without it"
            )
        dtype = inner.get("dtype", "float32") if isinstance(inner, dict) else None
        if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
            raise ModelFileError(
                f"{place} a {name} of dtype {dtype!r}: only plain numbers, booleans and strings may be loaded. Save "
                "the model again"
            )
        return {}
    if name == "function":
        return _custom_function(described, place)
    registered = described.get("registered_name")
    if module is None or not (module == "keras" or module.startswith("keras.")):
        registered = name if registered is None else registered
        if not isinstance(registered, str) or not registered:
            raise ModelFileError(f"{place} an object whose registered_name is {registered!r}: it must be a name")
        # Keras leaves out the module of what was defined in a script.
        return {registered: f"{'__main__' if module is None else module}:{name}"}
    if registered not in (None, name):
        # Keras looks for that first.
        raise ModelFileError(
            f"{place} {module}.{name} under the registered name {registered!r}: module not allowed, for Keras would "
            "load what is registered by that name in its place. Save the model again without it"
        )
    if module == "keras.layers" and name in _UNSAFE:
        raise ModelFileError(
            f"{place} a {name}, which {_UNSAFE[name]}: it is never loaded. Build the model from other layers of "
            "Keras's, or from your own and name these with customObjects"
        )
    own = name in _CLASSES.get(module, ()) or (module in _MODULES and name[:1].isupper() and name in _public(module))
    if not own and not (_OPERATIONS.fullmatch(module) and re.fullmatch(r"[A-Z]\w*", name)):
        raise ModelFileError(
            f"{place} {module}.{name}: module not allowed, for it is of Keras, but no part that a model may have. Save "
            "the model again without it"
        )
    for setting in _FILES:
        if module == "keras.layers" and isinstance(inner, dict) and isinstance(inner.get(setting), str):
            raise ModelFileError(
                f"{place} a {name} whose {setting} is the path {inner[setting]!r}: loading it would read that file of "
                "this machine. Give the layer the values themselves, as a list, or adapt it"
            )
    return {}


def _custom_function(described: dict[str, Any], place: str) -> dict[str, str]:
    name, module = described.get("config"), described.get("module")
    if not isinstance(name, str):
        raise ModelFileError(f"{place} a function whose name is {name!r}: it must be text. Save the model again")
    if module in (None, "builtins"):  # which is what Keras writes for each
        return {} if any(name in _functions(each) for each in _FUNCTION_MODULES) else {name: f"builtins:{name}"}
    if module == "keras" or module.startswith("keras."):
        if module in _FUNCTION_MODULES and name in _functions(module):
            return {}
        raise ModelFileError(
            f"{place} the function {module}.{name}: module not allowed, for it is of Keras, but no part that a model "
            "may have. Save the model again without it"
        )
    return {name: f"{module}:{name}"}


@functools.cache
def _public(module: str) -> frozenset[str]:
    """The public names of one of Keras's modules, without importing it."""
    found = importlib.util.find_spec("keras")  # finds the package, and runs nothing of it
    if found is None or not found.submodule_search_locations:
        raise ModelFileError("Keras is not installed here, and the model is one of Keras's: pip install keras")
    text = Path(found.submodule_search_locations[0], *module.split(".")[1:], "__init__.py").read_text("utf-8")
    # Python 3.11 counts the depth of all threads' parsing as one, and fails where two parse at once (SystemError).
    with _PARSING:
        body = ast.parse(text).body
    imports = [each for each in body if isinstance(each, ast.ImportFrom)]
    return frozenset(alias.asname or alias.name for each in imports for alias in each.names)


def _functions(module: str) -> frozenset[str]:
    """The functions among the public names that models may name; classes begin with a capital."""
    return _public(module) - {"get", "serialize", "deserialize"}


class _Window(io.RawIOBase):
    """A part of a file as a file of its own; zipfile's would read its way through gigabytes at every step."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = max(0, min(len(buffer), self._size - self._at))
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _data_offset(file: BinaryIO, member: zipfile.ZipInfo, name: str) -> int:
    """Where a stored member's bytes begin: behind a header that has the name and some more once again."""
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ModelFileError(f"{name} is not a whole zip file: the header of {member.filename} is missing")
    lengths: tuple[int, int] = struct.unpack("<HH", header[26:])
    return member.header_offset + 30 + sum(lengths)


def _check_weights(file: _Window, name: str) -> None:
    """Refuse an HDF5 file that would make its reader open others, or claim memory that it does not fill."""
    import h5py

    try:
        with h5py.File(file, "r") as weights:
            for place, dataset in _datasets(h5py, weights.id, name):
                creation = dataset.get_create_plist()
                if creation.get_external_count():
                    raise ModelFileError(
                        f"{name} keeps the values of {place} in another file of this machine, which loading would "
                        "read. Keras writes no such thing; get the file from its author again"
                    )
                if creation.get_layout() == h5py.h5d.VIRTUAL:
                    raise ModelFileError(
                        f"{name} puts {place} together from other files of this machine, which loading would read. "
                        "Keras writes no such thing; get the file from its author again"
                    )
                stored, claimed = dataset.get_storage_size(), math.prod(dataset.shape) * dataset.dtype.itemsize
                if claimed > max(_SMALL, _EXPANSION * stored):
                    raise ModelFileError(
                        f"{name} claims {claimed} bytes for {place} and holds {stored}: loading it could fill the "
                        "memory. Save the model again with keras.Model.save"
                    )
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ModelFileError(
            f"{name} is no HDF5 file, or not a whole one ({error}): copy or save the model again"
        ) from error


def _datasets(h5py: Any, root: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every dataset under a group, with its path; looks at links, and follows none that is not a plain one."""
    stack, seen = [("", h5py.h5g.open(root, b"/"))], set()
    while stack:
        place, group = stack.pop()
        if (address := h5py.h5o.get_info(group).addr) in seen:
            continue  # a group may contain itself
        seen.add(address)
        for each in group:
            here = f"{place}/{each.decode(errors='replace')}"
            kind = group.links.get_info(each).type
            if kind != h5py.h5l.TYPE_HARD:
                what = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link into another file"}
                raise ModelFileError(
                    f"{name} has {what.get(kind, 'a link of an unknown kind')} at {here}: it may lead to another file "
                    "of this machine. Keras writes none; get the file from its author again"
                )
            found = h5py.h5o.open(group, each)
            if isinstance(found, h5py.h5g.GroupID):
                stack.append((here, found))
            elif isinstance(found, h5py.h5d.DatasetID):
                yield here, found
            else:
                raise ModelFileError(
                    f"{name} has {type(found).__name__} at {here}, where Keras writes only groups and datasets: save "
                    "the model again"
                )
