"""Classes and functions of the user's own that a model consists of: how they are found, sent, and missed."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle

from spark_nn.allowed import MODULES_CONF
from spark_nn.errors import ModelFileError, ParamError

Find = Callable[[Iterable[str]], dict[str, Any]]


@dataclass(frozen=True)
class Customs:
    """Custom objects on their way to another process, equal where their content is.

    They travel inside the closure that Spark sends, as functions do, so that unpickling them trusts nobody new.
    Importable ones go by reference.

    Parameters
    ----------
    given : bytes
        Those that the user gave, a pickled dict; empty for none.
    spare : tuple of tuple of str and bytes
        Those that are registered on the driver, each pickled by itself: what nobody asks for is not even imported.
    places : tuple of tuple of str
        What a file may call those of either kind that are registered, and the names they are registered by.
    """

    given: bytes = b""
    spare: tuple[tuple[str, bytes], ...] = ()
    places: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls, given: Mapping[str, Any], registered: Mapping[str, Any], needed: Iterable[str] | None = None
    ) -> Customs:
        """Driver side: pickle those that are given, and of those that are registered what is needed, if that is known.

        Raises
        ------
        ParamError
            Some that were given cannot be pickled.
        """
        try:
            pickled = cloudpickle.dumps(dict(given)) if given else b""
        except Exception as error:
            raise ParamError(
                f"customObjects={dict(given)!r} cannot be sent to the executors ({type(error).__name__}: {error}): "
                "define them so that they hold no open files, locks or sessions"
            ) from error
        wanted = None if needed is None else set(needed)
        spare, places = {}, {}
        for name, value in sorted(registered.items()):
            called = {name, getattr(value, "__name__", name)}
            theirs = {alias for alias, each in given.items() if each is value}
            # Any library may have registered it, and the model be without it: else it will be named as missing.
            alone = _pickled(value) if not theirs and (wanted is None or wanted & called) else None
            if alone is not None:
                spare[name] = alone
            if theirs or alone is not None:
                # Two that are registered may have one bare name, which then is that of the one that was given.
                places.update({each: name for each in called | theirs if each not in places or each in theirs})
        return cls(pickled, tuple(spare.items()), tuple(sorted(places.items())))

    def find(self, needed: Iterable[str] = ()) -> dict[str, Any]:
        """Those that were given, and what else is needed and there."""
        given = cloudpickle.loads(self.given) if self.given else {}
        spare, places = dict(self.spare), dict(self.places)
        aliases = by_names(given)
        found = {}
        for name in needed:
            place = places.get(name)
            if name in aliases:
                found[name] = aliases[name]
            elif place in spare:
                found[name] = cloudpickle.loads(spare[place])
            elif place is not None:  # given under another name than the driver registered it by
                found.update([(name, given[each]) for each in given if places.get(each) == place][:1])
        return {**found, **given}

    def place(self, name: str) -> str | None:
        """The name by which one is registered on the driver, if it is."""
        return dict(self.places).get(name)


def registered() -> dict[str, Any]:
    """The classes and functions registered in this process with Keras, which is not imported to find out."""
    keras = sys.modules.get("keras")
    found = keras.saving.get_custom_objects() if keras is not None and hasattr(keras, "saving") else {}
    return {name: value for name, value in found.items() if hasattr(value, "__qualname__")}


def require(
    needed: Iterable[str],
    known: Mapping[str, Any],
    where: str,
    paths: Mapping[str, str],
    error: Callable[[str], Exception] = ModelFileError,
) -> None:
    """Refuse a model that needs what is not known.

    Parameters
    ----------
    needed : iterable of str
        The names that it uses.
    known : mapping
        What there is.
    where : str
        What the message calls the file or param.
    paths : mapping of str to str
        Where the missing ones were defined.
    error : callable
        Makes the error of a message.
    """
    missing = sorted(name for name in needed if name not in known)
    if not missing:
        return
    listed = ", ".join(f"{name} ({paths.get(name) or 'of an unknown module'})" for name in missing)
    example = ", ".join(f"{name!r}: {name.rpartition('>')[2]}" for name in missing)
    raise error(
        f"{where} names {listed}: module not allowed, for it is neither Keras's nor among the custom objects. If you "
        f"trust it, give customObjects={{{example}}} to the stage or to its load(path, customObjects=...), or register "
        "it on the driver with keras.saving.register_keras_serializable; where load is called for you, as by "
        f"PipelineModel.load, name its module in the Spark conf {MODULES_CONF}"
    )


def by_names(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Objects by all names that a file may call them: those given, registered, and Python's.

    Only what is needed may be taken from it: Keras would prefer a function of the bare name ``relu`` to its own.
    """
    keras = sys.modules.get("keras")
    found: dict[str, Any] = {}
    for name, value in objects.items():
        found.setdefault(getattr(value, "__name__", name), value)
        if keras is not None and hasattr(keras, "saving"):
            found.setdefault(keras.saving.get_registered_name(value), value)
    return {**found, **objects}


def _pickled(value: Any) -> bytes | None:
    try:
        pickled: bytes = cloudpickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError):
        return None
    return pickled
