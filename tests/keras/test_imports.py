"""What Keras only offers an interface to is not imported with it, and is there for whoever wants it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading

import pytest

from spark_nn.keras.backends.imports import lean

pytestmark = pytest.mark.timeout(120)

SCRIPT = """
import sys
from spark_nn.keras.training import prepare
prepare()
print(sorted({"keras", "sklearn", "matplotlib", "jax", "torch", "tensorflow"} & set(sys.modules)))
import jax, matplotlib
print([each.__spec__.loader is None for each in (jax, matplotlib)])
"""


@pytest.mark.parametrize(
    ("backend", "imported"),
    [("tensorflow", ["keras", "tensorflow"]), ("jax", ["jax", "keras"]), ("torch", ["keras", "torch"])],
)
def test_a_backend_comes_without_what_it_does_not_need(backend, imported):
    command = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.stdout.splitlines() == [str(imported), "[False, False]"], done.stderr


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A package of that name which nobody has imported, and no Keras."""
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setattr("spark_nn.keras.backends.imports._OFFERED", ("offered", "never_there"))
    (tmp_path / "offered.py").write_text("ANSWER = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("offered", None)


def test_only_the_block_and_its_thread_go_without(offered):
    found = []
    with lean("tensorflow"):
        with pytest.raises(ModuleNotFoundError, match="No module named 'offered'") as caught:
            import offered  # noqa: F401
        assert caught.value.name == "offered"
        assert importlib.util.find_spec("offered") is not None, "who only asks is told the truth"
        assert importlib.util.find_spec("never_there") is None
        thread = threading.Thread(target=lambda: found.append(importlib.import_module("offered").ANSWER))
        thread.start()
        thread.join(30)
    assert found == [42]
    del sys.modules["offered"]
    assert importlib.import_module("offered").ANSWER == 42


def test_where_keras_is_there_nothing_is_different(offered, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", object())
    with lean("tensorflow"):
        assert importlib.import_module("offered").ANSWER == 42


def test_the_backend_itself_is_imported(offered):
    with lean("offered"):
        assert importlib.import_module("offered").ANSWER == 42
