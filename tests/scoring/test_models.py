"""What a Python worker keeps of the models that it has loaded."""

from __future__ import annotations

import hashlib
import os

import pytest

from spark_nn.dataset import memory
from spark_nn.errors import ModelFileError
from spark_nn.scoring.models import Kept
from spark_nn.share import Share

pytestmark = pytest.mark.timeout(30)

ONE_CORE = Share()


class Models:
    """Files, and what was loaded of them."""

    def __init__(self, folder):
        self.folder = folder
        self.loaded = []

    def load(self, path, share):
        self.loaded.append(os.path.basename(path))
        return object()

    def get(self, kept, name, size=100, share=ONE_CORE):
        path = self.folder / name
        path.write_bytes(name.encode().ljust(size))
        return kept.get(self.load, path, hashlib.sha256(path.read_bytes()).hexdigest(), share)


@pytest.fixture
def models(tmp_path):
    return Models(tmp_path)


def test_a_model_is_loaded_once_and_those_used_last_are_kept(models):
    kept = Kept(most=2)
    first = models.get(kept, "a")
    models.get(kept, "b")
    assert models.get(kept, "a") is first
    models.get(kept, "c")  # of a and b, b was used longer ago
    assert models.get(kept, "a") is first
    models.get(kept, "b")
    assert models.loaded == ["a", "b", "c", "b"]


def test_they_take_a_share_of_the_free_memory_at_most(models, monkeypatch):
    workers = os.cpu_count() or 1
    monkeypatch.setattr(memory, "free_bytes", lambda: 2000 * workers / memory.FRACTION)
    kept = Kept()
    for name, size in (("a", 900), ("b", 900), ("a", 900), ("c", 900), ("huge", 90_000), ("huge", 90_000), ("a", 900)):
        models.get(kept, name, size)
    assert models.loaded == ["a", "b", "c", "huge", "a"]


def test_where_nobody_can_tell_the_free_memory_their_number_decides(models, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    kept = Kept(most=3)
    for name in "abcabc":
        models.get(kept, name)
    assert models.loaded == ["a", "b", "c"]


def test_each_gpu_has_a_model_of_its_own(models):
    kept = Kept()
    shares = [Share(1, "0"), Share(1, "1"), Share(1, "0"), Share(2)]
    found = [models.get(kept, "a", share=share) for share in shares]
    assert found[0] is found[2]
    assert len(set(map(id, found))) == 3


def test_a_file_that_arrived_changed_is_refused(models, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"other")
    with pytest.raises(ModelFileError, match="the model file a arrived changed: its SHA-256 is .*, not 123"):
        Kept().get(models.load, path, "123", Share())
    assert not models.loaded
