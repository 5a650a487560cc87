"""What may be loaded: files that were tampered with, manifest included, are refused before Keras opens them."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import marshal
import pickle
import stat
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from pyspark.ml import PipelineModel

from spark_nn import KerasEstimator, KerasModel
from spark_nn.columns import Tensor
from spark_nn.errors import ModelFileError
from spark_nn.keras import archive
from spark_nn.model import Fitted
from spark_nn.outputs import Output
from spark_nn.persistence import ModelFile
from spark_nn.summary import TrainingSummary
from tests.keras import models

pytestmark = pytest.mark.timeout(240)

CONFIG, WEIGHTS = "config.json", "model.weights.h5"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The bytes of a model as Keras saves it, nested and compiled."""
    import keras

    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.layers.Dense(4, "relu")])
    model = keras.Sequential([keras.Input((2, 3)), keras.layers.TimeDistributed(inner), keras.layers.Flatten()])
    model.add(keras.layers.Dense(1))
    model.compile("sgd", keras.losses.MeanSquaredError(), metrics=[keras.metrics.MeanAbsoluteError()])
    path = tmp_path_factory.mktemp("native") / "model.keras"
    model.save(path)
    return path.read_bytes()


@pytest.fixture
def saved(spark, native, tmp_path):
    """A fitted stage on its own and in a pipeline, saved; yields a function that puts another file into both."""
    file = ModelFile(".keras")
    file.path.write_bytes(native)
    summary = TrainingSummary({"loss": [1.0]}, 1, 0, 0, 1, 1.0, [1.0])
    model = KerasModel()
    tensor = Tensor("features", ("f",), "array", "float32", 2, (2, 3))
    model._fitted = Fitted(file.sealed(), (tensor,), {"": Output("regression", (1,))}, summary)
    model.save(str(tmp_path / "model"))
    PipelineModel([model]).save(str(tmp_path / "pipeline"))
    (stage,) = (tmp_path / "pipeline" / "stages").iterdir()

    def put(content, manifest=None):
        for folder in (tmp_path / "model", stage):
            for crc in [*folder.rglob(".*.crc")]:
                crc.unlink()
            (folder / "model" / "model.keras").write_bytes(content)
            listed = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            whole = {"format": 1, "model": {"model.keras": listed}} if manifest is None else manifest(listed)
            (folder / "manifest.json").write_text(whole if isinstance(whole, str) else json.dumps(whole))

    put.folders = [tmp_path / "model", stage]
    put.loads = [
        lambda: KerasModel.load(str(tmp_path / "model")),
        lambda: PipelineModel.load(str(tmp_path / "pipeline")),
    ]
    return put


def rewritten(native, members=None, **changes):
    """The archive with some members' contents changed, or left out where they become None."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(native)) as old, zipfile.ZipFile(file, "w") as new:
        contents = {name: old.read(name) for name in old.namelist()} | (members or {}) | changes
        for name, content in contents.items():
            if content is not None:
                new.writestr(name, content)
    return file.getvalue()


def with_config(native, change):
    """The archive with its description changed in place."""
    with zipfile.ZipFile(io.BytesIO(native)) as old:
        config = json.loads(old.read(CONFIG))
    changed = change(config)
    return rewritten(native, {CONFIG: json.dumps(config if changed is None else changed)})


def with_weights(native, change):
    """The archive with its HDF5 file changed."""
    with zipfile.ZipFile(io.BytesIO(native)) as old:
        file = io.BytesIO(old.read(WEIGHTS))
    with h5py.File(file, "a") as weights:
        change(weights)
    return rewritten(native, {WEIGHTS: file.getvalue()})


def code(mark):
    """What a Lambda holds: code that writes a file."""
    compiled = compile(f"open({str(mark)!r}, 'w').write('ran')", "<payload>", "eval")
    function = base64.b64encode(marshal.dumps(compiled)).decode()
    return {"class_name": "__lambda__", "config": {"value": [function, None, None]}}


def lambda_layer(mark, module="keras.layers"):
    config = {"name": "lambda", "function": code(mark), "arguments": {}}
    return {"module": module, "class_name": "Lambda", "config": config, "registered_name": None}


def layer(module, name, config=None, registered=None):
    return {"module": module, "class_name": name, "config": config or {}, "registered_name": registered}


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def first_layer(value):
    def change(config):
        config["config"]["layers"][1] = value

    return change


def activation(value):
    def change(config):
        inner = config["config"]["layers"][1]["config"]["layer"]["config"]["layers"]
        inner[-1]["config"]["activation"] = value

    return change


def wrapped(value):
    def change(config):
        config["config"]["layers"][1]["config"]["layer"] = value

    return change


def compiled(key, value):
    def change(config):
        config["compile_config"][key] = value

    return change


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def torch_pickle(mark):
    return base64.b64encode(pickle.dumps(Payload(mark))).decode()


def shell(mark):
    return {"command": f"touch {mark}"}


# What is done to the description, given the path of a file that the payload would write; and the message.
DESCRIPTIONS = {
    "a Lambda layer": (lambda m: first_layer(lambda_layer(m)), r"config.layers\[1\] a Lambda, which is code"),
    "a Lambda by its inner path": (
        lambda m: first_layer(lambda_layer(m, "keras.src.layers.core.lambda_layer")),
        "a Lambda, which is code",
    ),
    "a Lambda of the old form": (
        lambda m: first_layer({"class_name": "Lambda", "config": {"function": code(m)}}),
        "a Lambda, which is code",
    ),
    "a Lambda under a registered name": (
        lambda m: first_layer({**lambda_layer(m), "registered_name": "mine>Fine"}),
        "a Lambda, which is code",
    ),
    "a wrapped Lambda": (lambda m: wrapped(lambda_layer(m)), r"layers\[1\].config.layer a Lambda, which is code"),
    "a lambda as an activation": (lambda m: activation(code(m)), "config.activation a Lambda, which is code"),
    "a lambda as a loss": (lambda m: compiled("loss", code(m)), "compile_config.loss a Lambda, which is code"),
    "a lambda in a list of metrics": (
        lambda m: compiled("metrics", ["mae", [code(m)]]),
        r"compile_config.metrics\[1\]\[0\] a Lambda, which is code",
    ),
    "a shell command as a layer": (
        lambda m: first_layer(layer("os", "system", shell(m))),
        r"names system \(os:system\): module not allowed.*customObjects=\{'system': system\}",
    ),
    "a shell command as a function": (
        lambda m: activation(function("os", "system")),
        r"names system \(os:system\): module not allowed",
    ),
    "a shell command under a package": (
        lambda m: first_layer(layer("subprocess", "Popen", shell(m), "mine>Popen")),
        r"names mine>Popen \(subprocess:Popen\): module not allowed",
    ),
    "eval as a class": (
        lambda m: first_layer(layer("builtins", "eval", {"source": "1"})),
        r"eval \(builtins:eval\): module not allowed",
    ),
    "eval as a function": (
        lambda m: activation(function("builtins", "eval")),
        r"eval \(builtins:eval\): module not allowed",
    ),
    "a function of Keras's that fetches files": (
        lambda m: activation(function("keras.utils", "get_file")),
        "the function keras.utils.get_file: module not allowed",
    ),
    "a function that loads models": (
        lambda m: first_layer(layer("keras.models", "load_model", {"filepath": str(m)})),
        "keras.models.load_model: module not allowed",
    ),
    "an inner class of Keras's": (
        lambda m: first_layer(layer("keras.src.saving.saving_lib", "DiskIOStore", {"root_path": str(m)})),
        "keras.src.saving.saving_lib.DiskIOStore: module not allowed",
    ),
    "a function among the layers": (
        lambda m: first_layer(layer("keras.layers", "deserialize", {"config": {}})),
        "keras.layers.deserialize: module not allowed",
    ),
    "a module beside Keras's": (
        lambda m: first_layer(layer("keras_hub.models", "Backbone")),
        r"Backbone \(keras_hub.models:Backbone\): module not allowed",
    ),
    "a SavedModel": (
        lambda m: first_layer(layer("keras.layers", "TFSMLayer", {"filepath": str(m)})),
        "a TFSMLayer, which loads and runs another file",
    ),
    "a pickle of torch's": (
        lambda m: first_layer(layer("keras.layers", "TorchModuleWrapper", {"module": torch_pickle(m)})),
        "a TorchModuleWrapper, which holds a pickle",
    ),
    "a function of JAX's": (lambda m: first_layer(layer("keras.layers", "JaxLayer")), "a JaxLayer, which calls"),
    "a layer under another's name": (
        lambda m: first_layer({**layer("keras.layers", "Dense", {"units": 1}), "registered_name": "lib>Other"}),
        "keras.layers.Dense under the registered name 'lib>Other': module not allowed",
    ),
    "a class under no name": (
        lambda m: first_layer({**layer("lib", "Other"), "registered_name": ""}),
        "registered_name is '': it must be a name",
    ),
    "a vocabulary of this machine": (
        lambda m: first_layer(layer("keras.layers", "StringLookup", {"vocabulary": "/etc/passwd"})),
        "a StringLookup whose vocabulary is the path '/etc/passwd'",
    ),
    "a type of TensorFlow's": (
        lambda m: activation({"class_name": "__typespec__", "spec_name": "x", "module": "os", "config": []}),
        "a __typespec__, which may not be loaded",
    ),
    "an unknown form": (lambda m: activation({"class_name": "__callable__", "config": {}}), "a __callable__, which"),
    "an array of objects": (
        lambda m: activation({"class_name": "__numpy__", "config": {"value": [1], "dtype": "object"}}),
        "a __numpy__ of dtype 'object'",
    ),
    "a name that is none": (lambda m: activation({"class_name": ["x"], "config": {}}), r"class_name is \['x'\]"),
    "no model": (lambda m: lambda config: [config], "describes no model, but is a list"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_that_holds_more_than_a_model_is_refused(saved, native, tmp_path, case):
    make, message = DESCRIPTIONS[case]
    mark = tmp_path / "mark"
    saved(with_config(native, make(mark)))
    for load in saved.loads:
        with pytest.raises(ModelFileError, match=message):
            load()
    assert not mark.exists()


def zip_with(native, name, *, mode=None, compress=zipfile.ZIP_STORED, content=b"x"):
    file = io.BytesIO(native)
    with zipfile.ZipFile(file, "a") as changed:
        member = zipfile.ZipInfo(name)
        if mode is not None:
            member.external_attr = mode << 16
        changed.writestr(member, content, compress)
    return file.getvalue()


def overlapping(native):
    """Many members that all point to the same bytes."""
    assets = {f"assets/{number}": b"x" for number in range(20)}
    file = rewritten(native, {"assets/big": bytes(len(native)), **assets})
    with zipfile.ZipFile(io.BytesIO(file)) as read:
        big = read.getinfo("assets/big")
    start = file.index(b"PK\x01\x02")
    head, tail = file[:start], file[start:]
    for name in assets:
        # Sizes are two numbers of four bytes, 26 before the name.
        place = tail.index(name.encode() + b"PK") if name.encode() + b"PK" in tail else tail.index(name.encode())
        entry = place - 46
        sizes = big.file_size.to_bytes(4, "little")
        tail = tail[: entry + 20] + sizes + sizes + tail[entry + 28 :]
    return head + tail


ARCHIVES = {
    "no zip": (lambda n: b"\x89HDF\r\n\x1a\n" + bytes(99), "is not a zip file, or has something"),
    "half a zip": (lambda n: n[: len(n) // 2], "is not a zip file, or not a whole one"),
    "nothing": (lambda n: b"", "is not a zip file"),
    "no weights": (lambda n: rewritten(n, {WEIGHTS: None}), "lacks the member model.weights.h5"),
    "no description": (lambda n: rewritten(n, {CONFIG: None}), "lacks the member config.json"),
    "a program": (lambda n: zip_with(n, "setup.py"), "has the member 'setup.py': Keras writes only"),
    "weights as NumPy writes them": (lambda n: zip_with(n, "model.weights.npz"), "member 'model.weights.npz': Keras"),
    "a path to the root": (lambda n: zip_with(n, "/etc/cron.d/x"), "'/etc/cron.d/x', whose name leads out"),
    "a path upwards": (lambda n: zip_with(n, "assets/../../x"), "'assets/../../x', whose name leads out"),
    "a path of Windows's": (lambda n: zip_with(n, "assets\\..\\x"), r"whose name leads out"),
    "a drive": (lambda n: zip_with(n, "C:x"), "'C:x', whose name leads out"),
    "a symbolic link": (
        lambda n: zip_with(n, "assets/x", mode=stat.S_IFLNK | 0o777, content=b"/etc/passwd"),
        "'assets/x', which is a symbolic link",
    ),
    "two descriptions": (lambda n: zip_with(n, CONFIG), "has two members of the name 'config.json'"),
    "a bomb": (
        lambda n: zip_with(n, "assets/x", compress=zipfile.ZIP_DEFLATED, content=bytes(50 << 20)),
        "'assets/x', which is compressed: its 5.... bytes would become 52428800",
    ),
    "members of shared content": (overlapping, "members that together are larger than the file"),
    "a long description": (
        lambda n: rewritten(n, {CONFIG: b" " * ((64 << 20) + 1) + b"{}"}),
        "config.json has 67108867 bytes, where at most 67108864 are read",
    ),
    "a description that is no JSON": (lambda n: rewritten(n, {CONFIG: b"{"}), "cannot be read as JSON"),
    "a description without a floor": (
        lambda n: rewritten(n, {CONFIG: b"[" * 100_000 + b"]" * 100_000}),
        r"cannot be read as JSON \(RecursionError",
    ),
    "weights that are no HDF5": (lambda n: rewritten(n, {WEIGHTS: b"x" * 999}), "model.weights.h5 is no HDF5 file"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_keras_does_not_write_is_refused(saved, native, case):
    make, message = ARCHIVES[case]
    saved(make(native))
    for load in saved.loads:
        with pytest.raises(ModelFileError, match=message):
            load()


def vars_of(weights):
    """The group and name of the last layer's weights."""
    found = []
    weights.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    parent, _, name = max(found, key=lambda each: weights[each].size).rpartition("/")
    return weights[parent], name


def in_its_place(make):
    def change(weights):
        group, name = vars_of(weights)
        shape = group[name].shape
        del group[name]
        make(group, name, shape)

    return change


def virtual(group, name, shape):
    layout = h5py.VirtualLayout(shape, "float32")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", shape)
    group.create_virtual_dataset(name, layout)


def external(group, name, shape):
    group.create_dataset(name, shape, "float32", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


WEIGHT_FILES = {
    "an external link": (
        in_its_place(lambda g, n, s: g.__setitem__(n, h5py.ExternalLink("/etc/other.h5", "/x"))),
        "a link into another file at /",
    ),
    "a soft link": (in_its_place(lambda g, n, s: g.__setitem__(n, h5py.SoftLink("/x"))), "a soft link at /"),
    "external storage": (in_its_place(external), "keeps the values of /.* in another file"),
    "virtual sources": (in_its_place(virtual), "puts /.* together from other files"),
    "a type on its own": (lambda w: w.__setitem__("kind", np.dtype("f4")), "has TypeFloatID at /kind"),
    "a claim of gigabytes": (
        in_its_place(lambda g, n, s: g.create_dataset(n, (1 << 30,), "float32", chunks=(1 << 20,))),
        "claims 4294967296 bytes for /.* and holds 0",
    ),
}


@pytest.mark.parametrize("case", WEIGHT_FILES)
def test_weights_that_are_elsewhere_are_refused(saved, native, case):
    make, message = WEIGHT_FILES[case]
    saved(with_weights(native, make))
    for load in saved.loads:
        with pytest.raises(ModelFileError, match=f"model.weights.h5 .*{message}"):
            load()


MANIFESTS = {
    "no JSON": (lambda m: "{", "manifest.json cannot be read as JSON"),
    "a list": (lambda m: [], "manifest.json lists no files"),
    "another file": (lambda m: {"model": {"other": m}}, "does not list the file model.keras with its size"),
    "no digest": (lambda m: {"model": {"model.keras": {"bytes": 1}}}, "does not list the file model.keras with its"),
    "another size": (
        lambda m: {"model": {"model.keras": {**m, "bytes": 7}}},
        "model.keras was changed since it was saved, or not copied as a whole: it has .* bytes, not 7",
    ),
    "another digest": (
        lambda m: {"model": {"model.keras": {**m, "sha256": "0" * 64}}},
        "model.keras was changed since it was saved: .* not 0000",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_does_not_suit_the_files_is_refused(saved, native, case):
    make, message = MANIFESTS[case]
    saved(native, make)
    for load in saved.loads:
        with pytest.raises(ModelFileError, match=message):
            load()


def rewrite_metadata(saved, change):
    for folder in saved.folders:
        (part,) = (folder / "metadata").glob("part-*")
        metadata = json.loads(part.read_text())
        change(metadata)
        for crc in (folder / "metadata").glob(".*.crc"):
            crc.unlink()
        part.write_text(json.dumps(metadata))


@pytest.mark.parametrize("name", ["../model.keras", "/etc/passwd", "..", "a\\b", "C:model.keras"])
def test_files_outside_the_stages_folder_are_not_fetched(saved, name):
    rewrite_metadata(saved, lambda metadata: metadata["spark_nn"].update(files=[name]))
    for load in saved.loads:
        with pytest.raises(ModelFileError, match="which is a path out of the stage's folder and no name"):
            load()


def test_a_file_that_keras_would_read_otherwise_is_refused(saved, native, tmp_path):
    """Keras goes by the suffix, and a zip file may have something before it."""
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        file["other"] = np.zeros(3)
    both = weights.getvalue() + native
    assert zipfile.is_zipfile(io.BytesIO(both))
    saved(both)
    for load in saved.loads:
        with pytest.raises(ModelFileError, match="has something before it"):
            load()
    for folder in saved.folders:
        listed = {"sha256": hashlib.sha256(both).hexdigest(), "bytes": len(both)}
        (folder / "model" / "model.keras").rename(folder / "model" / "model.h5")
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "model": {"model.h5": listed}}))
        (metadata,) = (folder / "metadata").glob("part-*")
        for crc in [*folder.rglob(".*.crc")]:
            crc.unlink()
        metadata.write_text(metadata.read_text().replace('"model.keras"', '"model.h5"'))
    for load in saved.loads:
        with pytest.raises(ModelFileError, match="a KerasModel has a .keras file, and the metadata lists model.h5"):
            load()
    path = tmp_path / "model.h5"
    path.write_bytes(native)
    with pytest.raises(ModelFileError, match="ends in '.h5', by which Keras would read it as another format"):
        archive.inspect(path)


def test_a_newer_format_is_refused_and_a_newer_param_left_out(saved):
    rewrite_metadata(saved, lambda metadata: metadata["paramMap"].update(futureParam=3, predictionCol="guess"))
    for load in saved.loads:
        with pytest.warns(UserWarning, match="this version has no param futureParam; left out"):
            loaded = load()
        stage = loaded.stages[0] if isinstance(loaded, PipelineModel) else loaded
        assert stage.getPredictionCol() == "guess"
    rewrite_metadata(saved, lambda metadata: metadata["spark_nn"].update(format=99, version="9.9"))
    for load in saved.loads:
        with pytest.raises(ModelFileError, match="was saved by spark_nn 9.9 in format 99; this version reads format 1"):
            load()


def test_what_was_not_changed_loads_and_tells_its_versions(saved, native):
    from importlib.metadata import version

    saved(native)
    with zipfile.ZipFile(io.BytesIO(native)) as file:
        expected = json.loads(file.read(CONFIG))["config"]["name"]
    assert KerasModel.load(str(saved.folders[0])).model.name == expected
    assert saved.loads[1]().stages[0].model.name == expected
    (part,) = (saved.folders[0] / "metadata").glob("part-*")
    libraries = json.loads(part.read_text())["spark_nn"]["libraries"]
    assert set(libraries) == {"python", "spark_nn", "pyspark", "numpy", "keras", "tensorflow"}
    assert libraries["keras"] == version("keras")
    assert libraries["numpy"] == np.__version__
    assert libraries["python"] == sys.version.split()[0]
    for stage in (KerasModel(), KerasEstimator()):
        assert stage.setBackend("jax").libraries == ("spark_nn", "pyspark", "numpy", "keras", "jax")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("os:system", "names os:system, which belongs to Python's own library"),
        ("builtins:eval", "names builtins:eval, which belongs to Python's own library"),
        ("tests.conftest:os.system", "names tests.conftest:os.system, which belongs to Python's own library"),
        ("tests.keras.models:no_such", "names tests.keras.models:no_such, which cannot be imported here"),
        ("no_such_module:f", "names no_such_module:f, which cannot be imported here"),
        ("os", "'os' was saved as an import path"),
        (["os", "system"], "was saved as an import path"),
    ],
)
@pytest.mark.parametrize("param", ["model", "callbacks", "customObjects"])
def test_an_estimator_names_no_function_of_pythons_own(spark, tmp_path, where, message, param):
    path = tmp_path / "estimator"
    KerasEstimator(model=models.mlp, callbacks=models.mlp, customObjects={"x": models.mlp}).save(str(path))

    class Put:
        folders = [path]

    value = {"spark_nn.import": where}
    given = {"x": value} if param == "customObjects" else value
    rewrite_metadata(Put, lambda metadata: metadata["paramMap"].update({param: given}))
    with pytest.raises(ModelFileError, match=message):
        KerasEstimator.load(str(path))


def test_an_estimators_model_is_looked_at_before_keras_opens_it(spark, tmp_path, native):
    import keras

    path, mark = tmp_path / "estimator", tmp_path / "mark"
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    KerasEstimator(model=model, loss="mse").save(str(path))
    content = with_config(native, first_layer(lambda_layer(mark)))
    for crc in path.rglob(".*.crc"):
        crc.unlink()
    (path / "model" / "model.keras").write_bytes(content)
    listed = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "model": {"model.keras": listed}}))
    with pytest.raises(ModelFileError, match=r"/estimator/model/model.keras: config.json holds .* a Lambda"):
        KerasEstimator.load(str(path))
    assert not mark.exists()


def everyday():
    """Models of most kinds of layers."""
    import keras

    L = keras.layers
    sequence = keras.Input((4, 6))
    x = L.Bidirectional(L.LSTM(3, return_sequences=True))(sequence)
    x = L.RNN([L.GRUCell(2), L.LSTMCell(3)])(L.TimeDistributed(L.Dense(2, "gelu"))(x))
    x = keras.ops.reshape(keras.ops.tanh(x + 1)[:, 0:2], (-1, 2))
    regular = {"kernel_regularizer": keras.regularizers.L2(0.1), "kernel_constraint": keras.constraints.MaxNorm(2)}
    x = L.Dense(2, keras.activations.selu, kernel_initializer=keras.initializers.HeNormal(seed=3), **regular)(x)
    recurrent = keras.Model(sequence, L.LeakyReLU()(x))
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    recurrent.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae", keras.metrics.AUC()])

    text = keras.Input((1,), dtype="string")
    y = L.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4)(text)
    y = L.Embedding(9, 4)(y)
    y = L.GlobalAveragePooling1D()(L.LayerNormalization()(L.MultiHeadAttention(2, 2)(y, y)))
    words = keras.Model(text, L.Dense(1, dtype="mixed_float16")(L.Dropout(0.1, seed=3)(y)))
    words.compile("sgd", keras.losses.mean_squared_error)

    numbers = L.Normalization(mean=np.zeros(3), variance=np.ones(3))
    image = [L.RandomFlip(), L.Rescaling(1 / 255), L.SpectralNormalization(L.Conv2D(2, 2)), L.GroupNormalization(1)]
    return [
        recurrent,
        words,
        keras.Sequential([keras.Input((3,)), numbers, L.Discretization([0.0, 1.0]), L.CategoryEncoding(4)]),
        keras.Sequential([keras.Input((8, 8, 3)), *image, L.Flatten(), L.Activation(keras.ops.relu6)]),
        keras.applications.ConvNeXtTiny(weights=None, input_shape=(32, 32, 3), classes=2),
        models.embedding(),
        models.several(["a", "b"]),
        models.remembering(),
    ]


def test_threads_that_look_at_once_parse_one_after_the_other(tmp_path, native, monkeypatch):
    path = tmp_path / "model.keras"
    path.write_bytes(native)
    at_once, most, parse = 0, 0, ast.parse

    def noted(text):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.001)
        at_once -= 1
        return parse(text)

    def look(_):
        archive._public.cache_clear()  # as it is for those of a grid's models that come first
        return archive.inspect(path).all

    monkeypatch.setattr(archive.ast, "parse", noted)
    with ThreadPoolExecutor(8) as pool:
        assert set(map(tuple, pool.map(look, range(16)))) == {()}
    assert most == 1


def test_everyday_models_pass_and_name_nothing(tmp_path):
    for number, model in enumerate(everyday()):
        path = tmp_path / f"{number}.keras"
        model.save(path)
        assert archive.inspect(path) == archive.Named()


def test_looking_imports_no_framework_and_takes_no_gigabyte(tmp_path, native):
    """In a process of its own, on weights of a gigabyte that take no memory to look at."""
    path = tmp_path / "large.keras"
    weights = tmp_path / "weights.h5"
    with zipfile.ZipFile(io.BytesIO(native)) as old:
        weights.write_bytes(old.read(WEIGHTS))
        with h5py.File(weights, "a") as file:
            created = file.create_dataset("large", (1 << 28,), "float32")
            created[-1] = 1  # allocated as a hole in the file
        with zipfile.ZipFile(path, "w") as new:
            for name in ("metadata.json", CONFIG):
                new.writestr(name, old.read(name))
            new.write(weights, WEIGHTS)
    weights.unlink()
    script = (
        "import resource, sys\n"
        "from spark_nn.keras import archive\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = archive.inspect(sys.argv[1])\n"
        "import h5py\n"
        "print(found == archive.Named(), any(m in sys.modules for m in ('keras', 'tensorflow')),\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    same, imported, kilobytes = done.stdout.split()
    assert (same, imported) == ("True", "False")
    assert int(kilobytes) < 200_000
