"""A fitted network as a file, in other processes, in SQL and for other programs; and what is not let in."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from pyspark.sql import functions as F
from safetensors.torch import load_file

from spark_nn import TorchModel
from spark_nn.errors import ModelFileError, ParamError
from tests.keras.test_fit import data
from tests.torch import models
from tests.torch.test_fit import estimator

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def fitted(sessions, tmp_path_factory):
    spark = sessions.get("local[2]")
    settings = {"model": models.lazy, "modelParams": {"units": 5}, "metrics": ["auroc"], "numWorkers": 2}
    return estimator(str(tmp_path_factory.mktemp("store")), **settings).fit(data(spark))


def test_a_loaded_model_scores_and_measures_equal_to_the_bit(spark, fitted, tmp_path):
    """In this process, with a function that gives the network; see contract/ for a fresh one."""
    df = data(spark).coalesce(1)  # sums in the same order
    fitted.save(str(tmp_path / "model"))
    loaded = TorchModel.load(str(tmp_path / "model"), model=models.lazy)
    here = fitted.transform(df).orderBy("id").collect()
    assert loaded.transform(df).orderBy("id").collect() == here
    assert loaded.evaluate(df) == fitted.evaluate(df)
    spark.udf.register("score", fitted.udf())
    df.createOrReplaceTempView("rows")
    found = spark.sql("SELECT id, score(a, b, c).probability AS p FROM rows ORDER BY id").collect()
    assert [row.p[1] for row in found] == [row.probability[1] for row in here]


def looks_at_its_weights(**arguments):
    """A network whose making needs numbers, which there are none of without weights."""
    net = models.lazy(**arguments)
    assert float(torch.zeros(1)) == 0.0
    return net


def test_what_makes_the_network_is_let_in_by_name_only(spark, fitted, tmp_path, monkeypatch, caplog):
    path = str(tmp_path / "model")
    fitted.save(path)
    assert not caplog.records
    with monkeypatch.context() as patch:
        patch.setattr(models.lazy, "__module__", "__main__")
        fitted.save(str(tmp_path / "of a script"))
    assert "__main__:lazy makes the saved network, and is not there in another process: load it by" in caplog.text
    with pytest.raises(
        ModelFileError, match=r"names tests.torch.models:lazy, .* module not allowed; give what returns"
    ):
        TorchModel.load(path)
    with pytest.raises(ModelFileError, match=r"holds the weights of another network than the model gives: .*running_"):
        TorchModel.load(path, model=models.mlp_of)
    with pytest.raises(ModelFileError, match=r"shape \(5, 3\), and the model's has \(6, 3\): give the function"):
        TorchModel.load(path, model=lambda units: models.lazy(units + 1))
    sealed = TorchModel.load(path, model=looks_at_its_weights)
    assert models.weights(sealed.model)[0].tolist() == models.weights(fitted.model)[0].tolist()
    net = fitted.model
    assert TorchModel.load(path, model=net).model.state_dict().keys() == net.state_dict().keys()
    spark.conf.set("spark.nn.allowedModules", "tests.torch")
    try:
        assert models.weights(TorchModel.load(path).model)[0].tolist() == models.weights(net)[0].tolist()
        metadata = next((tmp_path / "model" / "metadata").glob("part-*"))
        saved = metadata.read_text()
        for named, message in (
            ("os:system", "module not allowed"),
            ("subprocess:run", "module not allowed"),
            ("tests.torch.models:relative", "comes from elsewhere"),
        ):
            metadata.write_text(saved.replace("tests.torch.models:lazy", named))
            (metadata.parent / f".{metadata.name}.crc").unlink(missing_ok=True)
            with pytest.raises(ModelFileError, match=message):
                TorchModel.load(path)
        spark.conf.set("spark.nn.allowedModules", "os")
        metadata.write_text(saved.replace("tests.torch.models:lazy", "os:system"))
        with pytest.raises(ModelFileError, match="belongs to Python's own library"):
            TorchModel.load(path)
    finally:
        spark.conf.unset("spark.nn.allowedModules")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_file_that_was_changed_is_refused_and_pickles_are_never_read(spark, fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted.save(str(tmp_path / "model"))
    file = tmp_path / "model" / "model" / "model.safetensors"
    saved = file.read_bytes()
    assert {name: tensor.tolist() for name, tensor in load_file(file).items()} == {
        name: tensor.tolist() for name, tensor in fitted.model.state_dict().items()
    }
    file.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
    with pytest.raises(ModelFileError, match="was changed since it was saved"):
        TorchModel.load(str(tmp_path / "model"), model=models.lazy)
    torch.save({"0.weight": Trap()}, "trap.pt")
    for content in (pickle.dumps(Trap()), (tmp_path / "trap.pt").read_bytes(), saved[:100]):
        file.write_bytes(content)
        manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
        from spark_nn.store import digest

        manifest["model"]["model.safetensors"] = {"sha256": digest(file), "bytes": len(content)}
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / "model" / ".manifest.json.crc").unlink(missing_ok=True)
        (file.parent / f".{file.name}.crc").unlink(missing_ok=True)
        with pytest.raises(ModelFileError, match="cannot be read as a safetensors file"):
            TorchModel.load(str(tmp_path / "model"), model=models.lazy)
    assert not (tmp_path / "trapped").exists()


def test_a_network_that_no_estimator_fitted_scores_and_is_measured(spark, tmp_path):
    df = data(spark)
    net = models.tied()
    loss = "binary_cross_entropy_with_logits"
    example = np.zeros((1, 3), "float32")
    model = TorchModel.fromTorch(net, example, loss=loss, metrics=["accuracy"], inputCols=["a", "b", "c"])
    rows = df.collect()
    x = torch.tensor([[row.a, row.b, row.c] for row in rows], dtype=torch.float32)
    y = torch.tensor([float(row.label) for row in rows])
    with torch.inference_mode():
        output = net(x)[:, 0]
    np.testing.assert_allclose([row.probability[1] for row in model.transform(df).collect()], output.sigmoid(), 1e-5)
    measured = model.evaluate(df)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output, y)
    np.testing.assert_allclose(measured["loss"], float(expected), rtol=1e-5)
    np.testing.assert_allclose(measured["accuracy"], float(((output > 0) == y.bool()).float().mean()), rtol=1e-6)
    assert not model.hasSummary
    model.export(str(tmp_path / "weights.safetensors"), "safetensors")
    assert load_file(tmp_path / "weights.safetensors")["into.bias"].tolist() == net.into.bias.tolist()
    with pytest.raises(ParamError, match="format='pickle': must be one of 'safetensors', 'onnx'"):
        model.export(str(tmp_path / "other"), "pickle")
    model.save(str(tmp_path / "model"))
    with pytest.raises(ModelFileError, match="was made of an instance of tests.torch.models:tied.<locals>.Tied"):
        TorchModel.load(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), model=models.tied()).transform(df).select("prediction")
    assert again.collect() == model.transform(df).select("prediction").collect()
    raw = TorchModel.fromTorch(torch.nn.Embedding(9, 2), np.zeros((1, 4), "int64"), featuresCol="ids")
    found = raw.transform(df.select(F.expr("array(1, 2, 3, 8)").alias("ids"))).first().prediction
    assert np.shape(found) == (4, 2)
    with pytest.raises(ModelFileError, match="the model's loss is not known"):
        raw.evaluate(df)
    for arguments, message in (
        ({"example": np.zeros((1, 4), "float32"), "inputCols": ["a", "b", "c"]}, "makes an input of shape"),
        ({"example": np.zeros((1, 4), "float32")}, "the model does not take its example"),
        ({"example": np.array([["x"]])}, "the example is of <U1, which no column holds"),
        ({"example": example, "nonsense": 3}, "has no param 'nonsense'"),
    ):
        with pytest.raises(ParamError, match=message):
            TorchModel.fromTorch(net, **arguments)


def test_onnx_is_written_or_refused(spark, fitted, tmp_path):
    path = str(tmp_path / "model.onnx")
    missing = [each for each in ("onnx", "onnxscript") if __import__("importlib.util").util.find_spec(each) is None]
    if missing:
        with pytest.raises(ParamError, match=f"format='onnx' needs {' and '.join(missing)}, which is not installed"):
            fitted.export(path, "onnx")
        return
    from onnx.reference import ReferenceEvaluator

    fitted.export(path, "onnx")
    x = np.random.default_rng(1).random((5, 3), np.float32)
    session = ReferenceEvaluator(path)
    (found,) = session.run(None, {session.input_names[0]: x})
    with torch.inference_mode():
        np.testing.assert_allclose(found, fitted.model(torch.from_numpy(x)), rtol=1e-5)
