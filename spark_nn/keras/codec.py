"""Keras objects <-> JSON and files: what travels, and what may be loaded.

Nothing here unpickles, and Keras's own ``safe_mode`` stays on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_nn.errors import ModelFileError, ParamError
from spark_nn.keras import archive
from spark_nn.keras.customs import Customs, Find, require
from spark_nn.share import Share

SUFFIX = ".keras"


def is_model(value: Any) -> bool:
    """Whether a value is a Keras model; does not import Keras to find out."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(value, keras.Model)


def plain(value: Any) -> Any:
    """A Keras object (an optimizer, a loss, a metric) as the dict that Keras can make it from again.

    Strings, dicts and functions stay what they are.
    """
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict) and "class_name" not in value:
        return {name: plain(item) for name, item in value.items()}
    if hasattr(value, "get_config") and not isinstance(value, type):
        import keras

        _name_optimizers()
        return keras.saving.serialize_keras_object(value)
    return value


def save(model: Any, path: str | Path) -> None:
    """Save a model so that Keras on any backend can load it."""
    _name_optimizers()
    model.save(path)


def _name_optimizers() -> None:
    """Have Keras on PyTorch write the public names of its optimizers, in place of those of their classes there."""
    import keras

    if keras.backend.backend() != "torch":
        return
    from keras.src.api_export import REGISTERED_OBJS_TO_NAMES as NAMES

    base = keras.optimizers.Optimizer
    public: list[Any] = [each for each in NAMES if isinstance(each, type) and issubclass(each, base)]
    for kind in public:
        for own in kind.__subclasses__():
            if own.__module__.startswith("keras.src.backend.torch."):
                NAMES[own] = NAMES[kind]


def nothing(needed: Iterable[str]) -> dict[str, Any]:
    """Find no custom objects."""
    return {}


def restore(value: Any, find: Find = nothing) -> Any:
    """The Keras object that :func:`plain` turned into a dict.

    Parameters
    ----------
    value : object
        What :func:`plain` returned.
    find : callable
        Takes the names of the custom objects that are needed, and returns those that there are, or more.
    """
    if isinstance(value, str):
        return find([value]).get(value, value)
    if isinstance(value, list):
        return [restore(item, find) for item in value]
    if isinstance(value, dict) and "class_name" in value:
        named = archive.examine(value, "a setting").all
        known = find(named)
        require(named, known, "a setting", named)
        import keras

        return keras.saving.deserialize_keras_object(value, custom_objects=known, safe_mode=True)
    if isinstance(value, dict):
        return {name: restore(item, find) for name, item in value.items()}
    return value


def load_model(path: str, find: Find = nothing, *, compiled: bool = False) -> Any:
    """The Keras model in a ``.keras`` file, which is checked first.

    Parameters
    ----------
    path : str
        The local file.
    find : callable
        Takes the names of the custom objects that are needed, and returns those that there are, or more.
    compiled : bool
        Whether to compile it as it was saved.

    Raises
    ------
    ModelFileError
        It holds what may not be loaded.
    """
    named = archive.inspect(path)
    needed = named.all if compiled else named.network
    known = find(needed)
    require(needed, known, path, needed)
    import keras

    return keras.saving.load_model(path, custom_objects=known, compile=compiled, safe_mode=True)


def load_compiled(path: str, find: Find = nothing) -> Any:
    """The Keras model in a file, compiled unless its loss or a metric is a function that nobody gave."""
    compiled = archive.inspect(path).compiled
    known = find(compiled)
    if any(name not in known for name in compiled):
        return load_model(path, find)
    try:
        return load_model(path, find, compiled=True)
    except (TypeError, ValueError):
        return load_model(path, find)


def check_loadable(model: Any, customs: Customs) -> None:
    """Refuse a model that could be trained, but not be loaded where it is to score.

    Parameters
    ----------
    model : keras.Model
        The model.
    customs : Customs
        What an executor that scores will know besides Keras.

    Raises
    ------
    ParamError
        It holds code (a Lambda layer) or classes that only this process knows.
    """
    import keras

    # An executor that scores has imported Keras, and of the user's only what is sent there.
    registered = keras.saving.get_custom_objects()
    kept = dict(registered)
    with tempfile.TemporaryDirectory(prefix="spark_nn-") as folder:
        path = str(Path(folder) / f"check{SUFFIX}")
        save(model, path)
        registered.clear()
        try:
            load_model(path, customs.find)
        except Exception as error:
            raise ParamError(
                f"the model could be trained, but not be loaded for scoring: {error}\nBuild it without Lambda layers, "
                "and name layers of your own with customObjects"
            ) from error
        finally:
            registered.update(kept)
        named = archive.inspect(path).all
    for name, value in customs.find(named).items():
        place = customs.place(name) if name in named else None
        # What came by value is registered where it came from, and the file should call it so.
        if place is not None and keras.saving.get_registered_name(value) != place and ">" in place:
            keras.saving.register_keras_serializable(*place.split(">", 1))(value)


def check_saved(path: str | Path, what: str, find: Find, *, compiled: bool) -> None:
    """Driver side: refuse a model, saved for other processes, that none of them could load.

    Parameters
    ----------
    path : str or Path
        The local file.
    what : str
        What the message calls it.
    find : callable
        Finds custom objects by their names.
    compiled : bool
        Whether they are to compile it as it was saved.

    Raises
    ------
    ParamError
        It holds code (a Lambda layer), or classes that nobody gave.
    """
    try:
        named = archive.inspect(path, what)
    except ModelFileError as error:
        raise ParamError(str(error)) from error
    needed = named.all if compiled else named.network
    require(needed, find(needed), what, needed, ParamError)


@dataclass(frozen=True)
class ModelLoader:
    """Executor side: a loader of a model file; equal where all that it is made of is, so that a model is loaded once.

    Parameters
    ----------
    load : callable
        An importable function that takes the local path, the task's share, the backend, and what finds custom objects
        by name.
    backend : str
        What Keras is to run on.
    customs : Customs
        The custom objects.
    """

    load: Callable[[str, Share, str, Find], Any]
    backend: str
    customs: Customs

    def __call__(self, path: str, share: Share) -> Any:
        """Load the model."""
        return self.load(path, share, self.backend, self.customs.find)
