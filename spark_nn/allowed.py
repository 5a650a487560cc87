"""Which modules a session lets saved models name: classes and functions of others' are imported only from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pyspark.sql import SparkSession

from spark_nn.errors import ModelFileError
from spark_nn.persistence import import_path, load_import

MODULES_CONF = "spark.nn.allowedModules"


def allowed_modules() -> list[str]:
    """Driver side: the modules that the active session's conf names."""
    conf = SparkSession.active().conf.get(MODULES_CONF, "") or ""
    return [each.strip() for each in conf.split(",") if each.strip()]


def within(path: Any, allowed: Iterable[str]) -> bool:
    """Whether an import path is of a module that the user has named, or of one inside it."""
    module = path.partition(":")[0] if isinstance(path, str) else ""
    return any(module == each or module.startswith(f"{each}.") for each in allowed)


def from_allowed(path: str, allowed: Sequence[str]) -> Any:
    """Import an object from a module that the user has named."""
    found = load_import(path)
    # What such a module has imported from elsewhere is not of it.
    if not callable(found) or not within(import_path(found) if hasattr(found, "__qualname__") else "", allowed):
        raise ModelFileError(
            f"the model names {path}, which is no class or function of the modules in {MODULES_CONF}, but comes from "
            "elsewhere: name the module that defines it"
        )
    return found
