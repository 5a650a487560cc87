"""Models of the user's own classes: trained by two workers, scored on executors, saved, and loaded elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import cloudpickle
import numpy as np
import pytest
from pyspark.ml import Pipeline

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ModelFileError, ParamError, TrainingError
from spark_nn.keras.customs import Customs
from tests.keras import models
from tests.keras.test_fit import arrays, data, estimator

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def layers():
    """The user's module; executors do not have it, so it travels."""
    from tests.keras import layers

    cloudpickle.register_pickle_by_value(layers)
    yield layers
    cloudpickle.unregister_pickle_by_value(layers)


@pytest.fixture
def registry():
    """What is registered with Keras is as it was before afterwards."""
    import keras

    found = keras.saving.get_custom_objects()
    kept = dict(found)
    yield found
    found.clear()
    found.update(kept)


# Loads the model in each way that there is, in a process that knows nothing of the classes; prints JSON.
SCRIPT = """
import json, os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.ml import PipelineModel
from pyspark.sql import SparkSession
from spark_nn import KerasModel
from spark_nn.errors import ModelFileError
pipeline, stage, rows = sys.argv[1:]
spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
df, told = spark.read.parquet(rows), {}

def refused(load, *args):
    try:
        load(*args)
    except ModelFileError as error:
        return str(error)

def scores(model):
    return {row.id: row.prediction for row in model.transform(df).select("id", "prediction").collect()}

told["without"] = [refused(KerasModel.load, stage), refused(PipelineModel.load, pipeline)]
spark.conf.set("spark.nn.allowedModules", "tests.keras.layer, elsewhere")
told["another module"] = refused(PipelineModel.load, pipeline)
told["imported"] = "tests.keras.layers" in sys.modules
spark.conf.set("spark.nn.allowedModules", "elsewhere, tests.keras.layers")
told["allowed"] = scores(PipelineModel.load(pipeline))
spark.conf.unset("spark.nn.allowedModules")
from tests.keras.layers import OBJECTS
model = KerasModel.load(stage, customObjects=OBJECTS)
told["given"] = scores(model)
told["again"] = scores(model.copy())
told["layers"] = [type(layer).__name__ for layer in model.model.layers]
print(json.dumps(told))
"""


def test_they_are_trained_by_two_workers_and_loaded_in_another_process(spark, store, tmp_path, layers):
    df = data(spark, 200)
    x, y, _ = arrays(df)
    given = {**layers.OBJECTS, "Cubic": layers.Cubic, "Near": layers.Near}
    settings = {"optimizer": "sgd", "loss": layers.Cubic(), "metrics": [layers.Near(name="near")]}
    fitted = Pipeline(stages=[estimator(store, model=layers.gated, customObjects=given, numWorkers=2, **settings)]).fit(
        df
    )
    (model,) = fitted.stages
    settings = {"optimizer": "sgd", "loss": layers.Cubic(), "metrics": [layers.Near(name="near")]}
    expected = models.single_process(layers.gated, settings, x, y, 2, 32, 2, 11)
    assert models.relative(model.model.get_weights(), expected.get_weights()) < 1e-5
    assert model.model.loss.__class__ is layers.Cubic  # compiled as it was trained
    assert 0 < model.summary.history["near"][-1] <= 1
    predicted = expected.predict(x, verbose=0)[:, 0]
    rows = [row.id for row in df.collect()]
    here = {row.id: row.prediction[0] for row in fitted.transform(df).collect()}
    np.testing.assert_allclose([here[i] for i in rows], predicted, atol=1e-5)

    fitted.save(str(tmp_path / "pipeline"))
    df.write.parquet(str(tmp_path / "rows"))
    (stage,) = (tmp_path / "pipeline" / "stages").iterdir()
    arguments = [str(tmp_path / "pipeline"), str(stage), str(tmp_path / "rows")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for refusal in (*told["without"], told["another module"]):
        for part in (
            "Gate (tests.keras.layers:Gate)",
            "bent (tests.keras.layers:bent)",
            "module not allowed",
            "customObjects={'Gate': Gate, 'bent': bent}",
            "spark.nn.allowedModules",
        ):
            assert part in refusal
    assert told["imported"] is False
    assert told["layers"] == ["Dense", "Gate", "Dense"]
    for way in ("allowed", "given", "again"):
        np.testing.assert_allclose([told[way][str(i)][0] for i in rows], predicted, atol=1e-5)


def test_a_model_of_them_is_loaded_once_per_python_worker(spark, store, tmp_path, layers):
    mark = tmp_path / "loads"
    df = data(spark, 64)
    given = {"model": layers.counted, "modelParams": {"mark": str(mark)}, "loss": "mse"}
    model = estimator(store, customObjects={"Counted": layers.Counted}, epochs=1, **given).fit(df)
    mark.write_text("")
    model.save(str(tmp_path / "model"))
    loaded = KerasModel.load(str(tmp_path / "model"), customObjects={"Counted": layers.Counted})
    asked = [model] * 7 + [model.copy(), loaded, loaded]
    mark.write_text("")
    scores = [[row.prediction for row in each.transform(df).collect()] for each in asked]
    scores.append([row.p for row in df.select(model.udf()(*model.getInputCols()).prediction.alias("p")).collect()])
    assert all(each == scores[0] for each in scores)
    pids = mark.read_text().split()
    assert pids
    assert len(pids) == len(set(pids))


def test_what_is_registered_on_the_driver_needs_no_naming(spark, store, tmp_path, registry):
    import keras

    @keras.saving.register_keras_serializable("tests")
    class Tripled(keras.layers.Layer):
        def call(self, x):
            return 3.0 * x

    def build():
        return keras.Sequential([Tripled(), keras.layers.Dense(1)])

    lock = threading.Lock()

    @keras.saving.register_keras_serializable("tests")
    def holding(x):  # nobody uses it, and it cannot even be sent
        return x if lock else None

    df = data(spark, 64)
    x, _, _ = arrays(df)
    model = estimator(store, model=build, loss="mse", epochs=1).fit(df)
    kernel, bias = model.model.get_weights()
    scored = [row.prediction for row in model.transform(df).collect()]
    np.testing.assert_allclose(scored, (3.0 * x @ kernel + bias)[:, 0], atol=1e-5)
    path = str(tmp_path / "model")
    model.save(path)
    # Plain Keras finds the class by the name that it was registered by.
    native = keras.saving.load_model(f"{path}/model/model.keras")
    assert type(native.layers[0]) is Tripled
    loaded = KerasModel.load(path)
    assert loaded.getCustomObjects() == {}
    assert [row.prediction for row in loaded.transform(df).collect()] == scored
    del registry["tests>Tripled"]
    message = r"tests>Tripled \(tests.keras.test_custom_objects:test_what_is_.*Tripled\)"
    with pytest.raises(ModelFileError, match=message):
        KerasModel.load(path)
    loaded = KerasModel.load(path, customObjects={"tests>Tripled": Tripled})
    assert [row.prediction for row in loaded.transform(df).collect()] == scored


def test_what_is_missing_is_named_before_training(spark, store, layers):
    import keras

    df = data(spark, 64)
    message = r"names Gate \(tests.keras.layers:Gate\).*module not allowed.*customObjects=\{'Gate': Gate\}"
    with pytest.raises(TrainingError, match=f"ParamError: .*{message}") as caught:
        estimator(store, model=layers.gated, loss="mse", customObjects={"bent": layers.bent}).fit(df)
    assert "model.fit" not in caught.value.workerTraceback
    native = keras.Sequential([keras.Input((3,)), layers.Gate(), keras.layers.Dense(1)])
    with pytest.raises(ParamError, match=f"the model {message}"):
        estimator(store, model=native, loss="mse").fit(df)
    with pytest.raises(ParamError, match=r"loss names Cubic \(tests.keras.layers:Cubic\)"):
        estimator(store, loss=layers.Cubic()).fit(df)
    lock = threading.Lock()

    def holding(x):
        return x if lock else None

    with pytest.raises(ParamError, match="customObjects=.*cannot be sent to the executors .*lock"):
        estimator(store, customObjects={"holding": holding}).fit(df)


@pytest.mark.parametrize("value", [[1], {"a": 3}, {3: int}, {"": int}, "Gate"])
def test_other_values_are_refused(value):
    with pytest.raises(TypeError, match="customObjects"):
        KerasEstimator(customObjects=value)


def test_an_estimator_names_them_by_import_path(spark, tmp_path, layers):
    import keras

    path = str(tmp_path / "estimator")

    class Local(keras.layers.Layer):
        pass

    with pytest.raises(ParamError, match=r"customObjects is .*<locals>.Local.*top level of a module"):
        KerasEstimator(model=models.mlp, customObjects={"Local": Local}).save(path)
    native = layers.gated()
    native(np.zeros((1, 3)))
    native.compile("sgd", layers.Cubic())
    with pytest.raises(ParamError, match=r"the model names Cubic \(.*, Gate \(.*, bent \("):
        KerasEstimator(model=native).write().overwrite().save(path)
    given = {**layers.OBJECTS, "Cubic": layers.Cubic}
    KerasEstimator(model=native, customObjects=given).write().overwrite().save(path)
    loaded = KerasEstimator.load(path)
    assert loaded.getCustomObjects() == given
    assert type(loaded.getModel().loss) is layers.Cubic
    for found, expected in zip(loaded.getModel().get_weights(), native.get_weights(), strict=True):
        np.testing.assert_array_equal(found, expected)

    class Gate(layers.Gate):
        pass

    loaded = KerasEstimator.load(path, customObjects={**given, "Gate": Gate})
    assert type(loaded.getModel().layers[1]) is Gate


def test_going_on_from_a_model_of_them(spark, store, tmp_path, layers):
    df = data(spark, 64)
    first = estimator(store, model=layers.gated, loss="mse", customObjects=layers.OBJECTS, epochs=1).fit(df)
    further = {"model": layers.gated, "initialModel": first, "loss": "mse", "epochs": 1, "learningRate": 1e-9}
    # What initialModel was given need not be given again.
    plain = estimator(store, **further).fit(df)
    assert plain.getCustomObjects() == layers.OBJECTS
    assert models.relative(plain.model.get_weights(), first.model.get_weights()) < 1e-4
    assert [row.prediction for row in plain.transform(df).limit(3).collect()]
    forgetful = first.copy()
    forgetful.clear(forgetful.customObjects)
    with pytest.raises(ParamError, match="initialModel names Gate"):
        estimator(store, **{**further, "initialModel": forgetful}).fit(df)
    again = estimator(store, customObjects=layers.OBJECTS, **further)
    assert models.relative(again.fit(df).model.get_weights(), first.model.get_weights()) < 1e-4
    path = str(tmp_path / "estimator")
    again.save(path)
    loaded = KerasEstimator.load(path).getInitialModel()
    assert models.relative(loaded.model.get_weights(), first.model.get_weights()) == 0


def absolute(y, p):
    import keras

    return keras.ops.mean(keras.ops.abs(keras.ops.cast(y, p.dtype) - p), axis=-1)


def test_settings_may_name_them(spark, store, layers):
    df = data(spark, 64)
    given = {"model": models.mlp, "epochs": 1, "customObjects": {"mine": absolute}}
    named = estimator(store, **given, loss="mine", metrics=["mine"]).fit(df)
    known = estimator(store, model=models.mlp, epochs=1, loss="mae").fit(df)
    assert named.summary.history["loss"] == pytest.approx(known.summary.history["loss"], rel=1e-5)
    assert models.relative(named.model.get_weights(), known.model.get_weights()) < 1e-5


def test_customs_are_equal_where_their_content_is(layers):
    import keras

    class Local(keras.layers.Layer):
        pass

    objects = {"Gate": layers.Gate, "Local": Local}
    one, two = Customs.of(objects, {}), Customs.of(dict(objects), {})
    assert one == two
    assert hash(one) == hash(two)
    assert one != Customs.of({"Gate": layers.Gate}, {})


def test_a_bare_name_shadows_nothing_of_keras(layers):
    def relu(x):
        return -x

    customs = Customs.of({"mine": relu}, {"package>relu": relu, "package>Gate": layers.Gate})
    assert set(customs.find()) == {"mine"}
    assert set(customs.find(["relu"])) == {"mine", "relu"}
    assert set(customs.find(["package>relu", "Gate", "other"])) == {"mine", "package>relu", "Gate"}
    assert customs.place("mine") == customs.place("relu") == "package>relu"
    assert KerasEstimator(customObjects={"mine": relu})._known().keys() == {"mine"}
    assert KerasEstimator(customObjects={"mine": relu})._known(["relu"]).keys() == {"mine", "relu"}


def test_a_module_that_is_allowed_gives_nothing_of_others(spark, tmp_path, layers):
    """An import path that leads through a module out of it."""
    from tests.keras.test_archive import rewrite_metadata

    native = layers.gated()
    native(np.zeros((1, 3)))
    path = tmp_path / "estimator"
    KerasEstimator(model=native, loss="mse", customObjects=layers.OBJECTS).save(str(path))

    class Put:
        folders = [path]

    spark.conf.set("spark.nn.allowedModules", "tests.keras")
    try:
        for where, message in (
            ("tests.keras.layers:os.system", "belongs to Python's own library"),
            ("tests.keras.layers:keras.utils.get_file", "no class or function of the modules in spark.nn.allowed"),
        ):

            def change(metadata, where=where):
                metadata["paramMap"].pop("customObjects", None)
                metadata["spark_nn"]["customObjects"]["bent"] = where

            rewrite_metadata(Put, change)
            with pytest.raises(ModelFileError, match=message):
                KerasEstimator.load(str(path))
    finally:
        spark.conf.unset("spark.nn.allowedModules")


def test_pipelines_of_several_models_of_them(cluster, store):
    """The same name stands for another class in each stage; executors are processes with no more than spark_nn."""
    import keras

    df = data(cluster, 64)
    stages = []
    for factor in (1.0, 2.0):

        class Scaled(keras.layers.Layer):
            by = factor

            def call(self, x):
                return x * self.by

        given = {"model": keras.Sequential([keras.Input((3,)), Scaled()]), "customObjects": {"Scaled": Scaled}}
        name = f"p{factor:.0f}"
        labelled = {"loss": "mse", "labelCol": "abc", "epochs": 1, "predictionCol": name}
        stages.append(estimator(store, **given, **labelled))
    df = df.selectExpr("*", "array(a, b, c) abc")
    scored = Pipeline(stages=stages).fit(df).transform(df).collect()
    np.testing.assert_allclose([row.p2 for row in scored], 2 * np.array([row.p1 for row in scored]), rtol=1e-6)
    np.testing.assert_allclose([row.p1 for row in scored], [row.abc for row in scored], rtol=1e-6)
