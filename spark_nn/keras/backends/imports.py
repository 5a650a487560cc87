"""Importing Keras without the packages that it only offers an interface to.

Where scikit-learn, matplotlib or JAX are installed, Keras and TensorFlow import them for wrappers, galleries of images
and converters that no training calls. That is two fifths of the time that a process needs before it can train.

Keras looks for them once, so that its wrappers stay without them for the life of the process. So this is for processes
of our own, and not for Spark's Python workers, which others use as well.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_OFFERED = ("sklearn", "matplotlib", "jax")


class _Refused(importlib.abc.Loader):
    """Fails as where the module is not installed."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Never called: there is no module."""


class _Refusing(importlib.abc.MetaPathFinder):
    """Finds packages for who asks whether they are there, and refuses to import them in one thread."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._thread = threading.get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names or threading.get_ident() != self._thread:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _Refused()
        return spec


@contextlib.contextmanager
def lean(backend: str) -> Iterator[None]:
    """Import Keras in the block as where none of these packages is installed; who imports them later has them.

    Where Keras is there already, nothing is different.

    Parameters
    ----------
    backend : {"tensorflow", "jax", "torch"}
        What it runs on, which it needs.
    """
    if "keras" in sys.modules:
        yield
        return
    finder = _Refusing([name for name in _OFFERED if name != backend])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
