"""Exports, read by programs that know nothing of Spark, against the model's own predictions."""

from __future__ import annotations

import subprocess
import sys

import fsspec
import numpy as np
import pytest

from spark_nn import KerasModel
from spark_nn.errors import ParamError, StoreError
from tests.keras import models

pytestmark = pytest.mark.timeout(180)

RELOAD = """
import sys
import numpy as np
import tensorflow as tf
x = np.load(sys.argv[2])
loaded = tf.saved_model.load(sys.argv[1])
np.save(sys.argv[3], loaded.serve(x).numpy())
assert "pyspark" not in sys.modules and "spark_nn" not in sys.modules
"""


@pytest.fixture(scope="module")
def native():
    native = models.mlp(batch_norm=True, outputs=2)
    native(np.zeros((1, 3)))
    native.compile("sgd", "mse")
    return native


def test_a_saved_model_predicts_the_same_in_a_process_with_tensorflow_alone(spark, native, tmp_path):
    model = KerasModel.fromKeras(native)
    path = tmp_path / "saved model"
    model.export(str(path))
    assert (path / "saved_model.pb").is_file()
    x = np.random.default_rng(1).random((7, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    names = [str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run([sys.executable, "-c", RELOAD, *names], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), native.predict(x, verbose=0), rtol=1e-6)
    # Replaced as a whole: what was there is gone, and no draft is left.
    (path / "stale").write_text("old")
    with pytest.raises(StoreError, match="saved model' exists: choose another one, or replace it"):
        model.export(str(path))
    model.export(f"file://{path}", overwrite=True)
    assert (path / "saved_model.pb").is_file()
    assert not (path / "stale").exists()
    assert [each.name for each in tmp_path.iterdir() if "draft" in each.name] == []


def test_the_native_file_goes_to_any_filesystem(native):

    model = KerasModel.fromKeras(native)
    model.export("memory://exports/folder/model.keras", "keras")
    with fsspec.open("memory://exports/folder/model.keras") as file:
        assert file.read() == model.fitted.file.path.read_bytes()
    model.export("memory://exports/folder/saved")
    assert fsspec.filesystem("memory").exists("/exports/folder/saved/variables/variables.index")
    names = {name.rpartition("/")[2] for name in fsspec.filesystem("memory").ls("/exports/folder", detail=False)}
    assert names == {"model.keras", "saved"}


def test_what_is_there_is_replaced_as_a_whole_or_stays(native, tmp_path, monkeypatch):
    model = KerasModel.fromKeras(native)
    path = tmp_path / "model.keras"
    path.write_bytes(b"before")
    target = type(fsspec.filesystem("file"))
    move = target.mv

    def fails(self, old, new, **kwargs):
        if str(old).endswith(".draft"):
            raise OSError("no room")
        return move(self, old, new, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, "mv", fails)
        with pytest.raises(StoreError, match="no room"):
            model.export(str(path), "keras", overwrite=True)
    assert path.read_bytes() == b"before"
    model.export(str(path), "keras", overwrite=True)
    assert path.read_bytes() == model.fitted.file.path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["model.keras"]


def test_an_onnx_file_computes_the_same(native, tmp_path):
    pytest.importorskip("tf2onnx", reason="the extra onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    path = tmp_path / "model.onnx"
    KerasModel.fromKeras(native).export(str(path), "onnx")
    run = ReferenceEvaluator(str(path))
    x = np.random.default_rng(1).random((7, 3)).astype("float32")
    (found,) = run.run(None, {run.input_names[0]: x})
    np.testing.assert_allclose(found, native.predict(x, verbose=0), rtol=1e-5)


def test_what_cannot_be_exported_is_refused_before_anything_is_done(native, tmp_path, monkeypatch):
    import importlib.util

    model = KerasModel.fromKeras(native)
    with pytest.raises(ParamError, match="format='h5': must be one of 'tf_saved_model', 'onnx', 'keras'"):
        model.export(str(tmp_path / "model"), "h5")
    with pytest.raises(StoreError, match="nosuch"):
        model.export("nosuch://bucket/model")
    text = KerasModel.fromKeras(models.hashing())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ParamError, match=r"needs tf2onnx and onnx, .*not installed here: pip install 'spark-nn\[onnx\]'"
    ):
        model.export(str(tmp_path / "model"), "onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ParamError, match="format='onnx' takes no strings"):
        text.export(str(tmp_path / "model"), "onnx")
    assert list(tmp_path.iterdir()) == []
