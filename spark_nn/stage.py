"""What an estimator and a model have in common as stages: they are saved and loaded alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import pyspark
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter

from spark_nn.errors import meant
from spark_nn.persistence import ModelFile, StageReader, StageWriter

LIBRARIES = ("spark_nn", "pyspark", "numpy")


def keyword_only(method: Callable[..., Any]) -> Callable[..., Any]:
    """PySpark's ``keyword_only``, which says of a param that there is not which one may be meant."""
    known = list(inspect.signature(method).parameters)[1:]
    taking = pyspark.keyword_only(method)

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no param {name!r}{meant(name, known)}; explainParams() tells of all"
                )
        return taking(self, *args, **kwargs)

    return checked


class Stage(MLReadable[Any], MLWritable):
    """Saving and loading, alike for estimators and models."""

    # Params whose values may be functions, or hold some.
    functionParams: ClassVar[frozenset[str]] = frozenset()

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions are noted in what is saved."""
        return LIBRARIES

    def write(self) -> MLWriter:
        """Writer that saves this stage.

        Returns
        -------
        pyspark.ml.util.MLWriter
            ``save(path)`` writes, ``overwrite().save(path)`` replaces what is there.
        """
        return StageWriter(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        """Reader that loads a stage of this class.

        Returns
        -------
        pyspark.ml.util.MLReader
            ``load(path)`` reads.
        """
        return StageReader(cls)

    def _savedFiles(self) -> dict[str, ModelFile]:
        """Files to save under ``model/``, by name."""
        return {}

    def _unsavedParams(self) -> set[str]:
        """Params that the files stand for."""
        return set()

    def _savedMetadata(self) -> dict[str, Any]:
        """What else to save, as JSON can hold it."""
        return {}

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        """Take what was saved beside the params."""
