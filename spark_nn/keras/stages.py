"""What the estimator and the model share: backend and custom objects, and what they let in when they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params

from spark_nn.allowed import allowed_modules, from_allowed, within
from spark_nn.columns import Tensor
from spark_nn.converters import choice, param
from spark_nn.errors import ColumnError
from spark_nn.keras import archive
from spark_nn.keras.backends import BACKENDS
from spark_nn.keras.customs import by_names, registered, require
from spark_nn.persistence import ModelFile, StageReader, import_path
from spark_nn.stage import LIBRARIES

C = TypeVar("C", bound="HasCustomObjects")
B = TypeVar("B", bound="HasBackend")


def _custom_objects(value: Any) -> dict[str, Any]:
    """Converter for what Keras's functions take as ``custom_objects``."""
    if not isinstance(value, Mapping):
        raise TypeError(f"customObjects takes a dict of names to classes or functions, not {value!r}")
    for name, each in value.items():
        if not isinstance(name, str) or not name or not callable(each) or not hasattr(each, "__qualname__"):
            raise TypeError(
                f"customObjects[{name!r}] takes a class or function by its name, such as {{'MyLayer': MyLayer}}, not "
                f"{each!r}"
            )
    return dict(value)


class HasBackend(Params):
    """A stage whose Keras runs on one of several backends."""

    backend: Param[str] = param(
        "backend",
        "What Keras runs on in the workers: 'tensorflow', 'jax' (with the extra jax) or 'torch' (with the extra "
        "torch). A fitted model scores on that of its estimator, unless it is set.",
        choice("backend", BACKENDS),
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(backend="tensorflow")

    def getBackend(self) -> str:
        """Get :py:attr:`backend`."""
        return self.getOrDefault(self.backend)

    def setBackend(self: B, value: str) -> B:
        """Set :py:attr:`backend`."""
        return self._set(backend=value)

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions are noted in what is saved: Keras's, and that of the backend."""
        return (*LIBRARIES, "keras", self.getBackend())


def check_numbers(backend: str, tensors: Sequence[Tensor]) -> None:
    """Refuse inputs that only TensorFlow takes.

    Raises
    ------
    ColumnError
        One of them holds strings.
    """
    for tensor in tensors:
        if not tensor.numeric:
            raise ColumnError(
                f"column {tensor.columns[0]!r} holds {tensor.dtype} values, and with backend={backend!r} a model takes "
                "numbers only: turn them into numbers before, as with StringIndexer, or set backend='tensorflow'"
            )


class HasCustomObjects(Params):
    """A stage whose Keras model may consist of classes and functions of the user's own."""

    customObjects: Param[dict[str, Any]] = param(
        "customObjects",
        "Classes and functions of your own that the model consists of, as Keras's custom_objects: a dict of names to "
        "layers, models, activations, losses, metrics and others, such as {'MyLayer': MyLayer}. Those that were "
        "registered on the driver with keras.saving.register_keras_serializable count without being named.",
        _custom_objects,
    )

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._setDefault(customObjects={})

    def getCustomObjects(self) -> dict[str, Any]:
        """Get :py:attr:`customObjects`."""
        return self.getOrDefault(self.customObjects)

    def setCustomObjects(self: C, value: dict[str, Any]) -> C:
        """Set :py:attr:`customObjects`."""
        return self._set(customObjects=value)

    @classmethod
    def load(cls: type[C], path: str, customObjects: dict[str, Any] | None = None) -> C:
        """Load a stage.

        Parameters
        ----------
        path : str
            Where it was saved.
        customObjects : dict, optional
            Classes and functions of your own that its model consists of, by their names, in place of those that were
            saved.

        Returns
        -------
        KerasEstimator or KerasModel
            The stage, of the class that load was called on.

        Raises
        ------
        ModelFileError
            The stage is not as it was saved, or holds what may not be loaded: code, or classes and functions that are
            neither Keras's, nor given here, nor registered in this process with
            ``keras.saving.register_keras_serializable``, nor of a module that the Spark conf
            ``spark.nn.allowedModules`` names.
        """
        given = {} if customObjects is None else {"customObjects": customObjects}
        return StageReader(cls, given).load(path)  # type: ignore[type-var]

    def _given(self) -> dict[str, Any]:
        """The custom objects that the stage was given, in whatever way."""
        return self.getCustomObjects()

    def _known(self, needed: Iterable[str] = ()) -> dict[str, Any]:
        """Driver side: the custom objects that were given, and what else is needed and registered in this process."""
        given = self._given()
        aliases = {**by_names(registered()), **by_names(given)}
        return {**{name: aliases[name] for name in needed if name in aliases}, **given}

    def _recorded(self, named: archive.Named) -> dict[str, str]:
        """The import paths of what a model needs, to be saved as text."""
        known = self._known(named.all)
        return {name: import_path(known[name]) for name in sorted(named.all) if name in known}

    def _admit(self, file: ModelFile, recorded: Any, *, compiled: bool = False) -> None:
        """Driver side: check a file that was saved, before Keras opens it; import what the session allows.

        Parameters
        ----------
        file : ModelFile
            The file.
        recorded : dict
            Import paths of what it needs, as they were saved.
        compiled : bool
            Whether it is to be compiled as it was saved, and not only to score.
        """
        named = archive.inspect(file.path, file.origin)
        paths = {**named.all, **(recorded if isinstance(recorded, dict) else {})}
        known = self._known(named.all)
        allowed = allowed_modules()
        found = {
            name: from_allowed(paths[name], allowed)
            for name in named.all
            if name not in known and within(paths[name], allowed)
        }
        if found:
            self._set(customObjects={**self.getCustomObjects(), **found})
        require(named.all if compiled else named.network, {**known, **found}, file.origin, paths)
