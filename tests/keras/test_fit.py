"""A fit on a gang against plain Keras in one process, on the batches that the ranks have together."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import functions as F

from spark_nn import KerasEstimator, KerasModel
from spark_nn.errors import ModelFileError, ParamError, TrainingError
from spark_nn.keras import names
from tests.keras import models

pytestmark = pytest.mark.timeout(240)

ROWS = 403


def data(spark, rows=ROWS):
    return (
        spark.range(0, rows, 1, 3)
        .select(
            "id",
            F.rand(1).alias("a"),
            F.rand(2).alias("b"),
            F.rand(3).alias("c"),
            (F.rand(4) + 0.5).alias("w"),
        )
        .withColumn("label", F.expr("cast(a * a + b > 0.8 as int)"))
    )


def arrays(df, columns="abc"):
    rows = df.collect()
    x = np.array([[row[name] for name in columns] for row in rows], np.float32)
    return x, np.array([row.label for row in rows]), np.array([row.w for row in rows], np.float32)


def estimator(store, **kwargs):
    settings = {
        "model": models.mlp,
        "loss": "binary_crossentropy",
        "inputCols": ["a", "b", "c"],
        "batchSize": 32,
        "epochs": 2,
        "seed": 11,
        "verbose": 0,
        "shuffle": False,
        "storeUrl": store,
        **kwargs,
    }
    return KerasEstimator(**settings)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_two_workers_equal_one_process_on_the_global_batches(spark, store, name):
    df = data(spark)
    x, y, _ = arrays(df)
    model = estimator(store, numWorkers=2, optimizer=name, learningRate=0.01).fit(df)
    import keras

    optimizer = keras.optimizers.get(name)
    optimizer.learning_rate = 0.01
    compiled = {"optimizer": optimizer, "loss": "binary_crossentropy"}
    expected = models.single_process(models.mlp, compiled, x, y, 2, 32, 2, 11)
    assert models.relative(model.model.get_weights(), expected.get_weights()) < 1e-5


def test_a_pipeline_on_a_cluster_of_processes(cluster, store):
    """Executors with no more than spark_nn installed; sample weights and the last, smaller batch included."""
    df = data(cluster)
    x, y, w = arrays(df)
    stages = [
        VectorAssembler(inputCols=["a", "b", "c"], outputCol="features"),
        estimator(store, featuresCol="features", numWorkers=2, weightCol="w", optimizer="sgd"),
    ]
    stages[1].clear(stages[1].inputCols)
    model = Pipeline(stages=stages).fit(df)
    compiled = {"optimizer": "sgd", "loss": "binary_crossentropy"}
    expected = models.single_process(models.mlp, compiled, x, y, 2, 32, 2, 11, weight=w)
    assert models.relative(model.stages[1].model.get_weights(), expected.get_weights()) < 1e-5
    scored = model.transform(df)
    assert scored.columns == [*df.columns, "features", "rawPrediction", "probability", "prediction"]
    by_id = {row.id: row.probability[1] for row in scored.repartition(5).collect()}
    order = [row.id for row in df.collect()]
    np.testing.assert_allclose([by_id[i] for i in order], expected.predict(x, verbose=0)[:, 0], atol=1e-6)


def test_one_worker_equals_keras_fit_on_the_whole_data(spark, store):
    import keras

    df = data(spark)
    x, y, w = arrays(df)
    model = estimator(store, optimizer="sgd", metrics=["accuracy"], weightCol="w").fit(df)
    keras.utils.set_random_seed(11)
    reference = models.mlp()
    reference(x[:1])
    reference.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
    history = reference.fit(x, y, sample_weight=w, batch_size=32, epochs=2, shuffle=False, verbose=0).history
    assert models.relative(model.model.get_weights(), reference.get_weights()) < 1e-5
    for name, values in history.items():
        np.testing.assert_allclose(model.summary.history[name], values, rtol=1e-5)


def test_metrics_of_two_workers_are_those_of_all_rows(spark, store):
    import keras

    df = data(spark).withColumn("held", F.expr("id % 4 = 1"))
    x, y, _ = arrays(df.where("held"))
    model = estimator(
        store,
        numWorkers=2,
        metrics=["accuracy", keras.metrics.AUC(name="auc")],
        validationIndicatorCol="held",
    ).fit(df)
    native = model.model
    expected = native.evaluate(x, y, verbose=0, return_dict=True)
    history = model.summary.history
    assert set(history) == {"loss", "accuracy", "auc", "val_loss", "val_accuracy", "val_auc"}
    for name in ("loss", "accuracy", "auc"):
        assert history[f"val_{name}"][-1] == pytest.approx(expected[name], rel=1e-5)
    assert model.summary.validationRows == len(x)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(spark, store):
    df = data(spark)

    def weights(seed):
        settings = {"modelParams": {"dropout": 0.3}, "optimizer": "adam", "shuffle": True, "numWorkers": 2}
        return estimator(store, seed=seed, **settings).fit(df).model.get_weights()

    first, again, other = weights(5), weights(5), weights(6)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_sparse_gradients_equal_one_process(spark, store):
    df = (
        spark.range(0, 200, 1, 2)
        .select(F.expr("id % 7").alias("a"), F.expr("id * id % 50").alias("b"), F.lit(1.0).alias("w"))
        .withColumn("label", F.expr("a * 0.1 + b * 0.01"))
    )
    x, y, _ = arrays(df, "ab")
    model = estimator(store, model=models.embedding, loss="mse", inputCols=["a", "b"], numWorkers=2).fit(df)
    compiled = {"optimizer": "adam", "loss": "mse"}
    expected = models.single_process(models.embedding, compiled, x, y.astype(np.float32), 2, 32, 2, 11)
    assert models.relative(model.model.get_weights(), expected.get_weights()) < 1e-5


def test_batch_normalisation_ends_with_the_mean_of_the_ranks_statistics(spark, store):
    df = data(spark)
    model = estimator(store, modelParams={"batch_norm": True}, numWorkers=2, validationFraction=0.2).fit(df)
    assert len(model.summary.history["val_loss"]) == 2  # the digests of both ranks agreed


def test_weights_that_differ_between_ranks_fail_the_fit(spark, store):
    with pytest.raises(TrainingError, match=r"hold different weights \(rank 0: [0-9a-f]{12}, rank 1: "):
        estimator(store, numWorkers=2, callbacks=models.drifting).fit(data(spark))


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_function_that_raises_is_shown_as_it_raised(spark, store, world):
    with pytest.raises(TrainingError, match="ValueError: no model today") as caught:
        estimator(store, model=models.raises, numWorkers=world).fit(data(spark))
    assert caught.value.rank in range(world)
    assert 'raise ValueError("no model today")' in caught.value.workerTraceback
    if world == 1:  # of several, another may have ended the gang before this one's words are there
        assert "The last lines it printed:" in str(caught.value)
        assert "it is about to break" in str(caught.value)


def test_a_function_that_returns_no_model_is_named(spark, store):
    with pytest.raises(TrainingError, match="the function given as model returned 3, not a keras.Model"):
        estimator(store, model=models.not_a_model).fit(data(spark))


def test_metrics_with_a_value_per_class_are_kept(spark, store):
    import keras

    df = data(spark).withColumn("label", F.expr("array(cast(a > 0.5 as float), cast(b > 0.5 as float))"))
    metrics = [keras.metrics.F1Score(threshold=0.5, name="f1")]
    model = estimator(store, modelParams={"outputs": 2}, metrics=metrics, numWorkers=2).fit(df)
    last = model.summary.history["f1"][-1]
    assert len(last) == 2
    assert all(0 <= value <= 1 for value in last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": models.with_lambda}, "not be loaded for scoring: .*\n?.*without Lambda layers"),
        ({"model": models.with_own_layer}, "not be loaded for scoring"),
        ({"model": models.two_outputs, "loss": "mse"}, "the model has 2 outputs"),
        ({"loss": models.summed_loss}, "reduction='sum', which several workers cannot share"),
        ({"callbacks": models.terminates_on_nan}, "callbacks holds a TerminateOnNaN"),
        ({"callbacks": models.stops_early}, "monitors 'val_loss', but no rows are held back.*set validationFraction"),
    ],
)
def test_what_could_not_be_honoured_is_refused_before_training(spark, store, settings, message):
    given = {name: value() if value is models.summed_loss else value for name, value in settings.items()}
    with pytest.raises(TrainingError, match=f"ParamError: .*{message}") as caught:
        estimator(store, numWorkers=2, **given).fit(data(spark))
    assert "model.fit" not in caught.value.workerTraceback


def test_a_subclassed_model_instance_can_be_fitted_where_it_can_be_saved(spark, store):
    import keras

    class Sub(keras.Model):
        def call(self, x):
            return x

    native = Sub()
    native(np.zeros((1, 3)))
    KerasEstimator(model=native, loss="mse")._check()


def test_early_stopping_stops_all_ranks_alike(spark, store):
    import keras

    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, min_delta=10.0)
    model = estimator(store, numWorkers=2, epochs=9, validationFraction=0.3, callbacks=[stop]).fit(data(spark))
    assert model.summary.epochs == 2


def test_a_compiled_model_keeps_its_own_settings_but_for_the_params(spark, store):
    import keras

    native = models.mlp()
    native(np.zeros((1, 3)))
    native.compile(keras.optimizers.SGD(0.5, momentum=0.9), keras.losses.BinaryCrossentropy(), metrics=["accuracy"])
    before = native.get_weights()
    settings = {"model": native, "labelCol": "label", "inputCols": ["a", "b", "c"], "batchSize": 32}
    model = KerasEstimator(**settings, learningRate=0.25, verbose=0, storeUrl=store).fit(data(spark))
    trained = model.model
    assert type(trained.optimizer).__name__ == "SGD"
    assert trained.optimizer.momentum == 0.9
    assert float(trained.optimizer.learning_rate) == 0.25
    assert set(model.summary.history) == {"loss", "accuracy"}
    # The model that was handed in is left as it was.
    assert all(np.array_equal(a, b) for a, b in zip(before, native.get_weights(), strict=True))
    assert float(native.optimizer.learning_rate) == 0.5


@pytest.mark.parametrize(
    ("model_args", "loss", "kind"),
    [
        ({"outputs": 3, "activation": "softmax"}, "sparse_categorical_crossentropy", "probability"),
        ({"outputs": 3, "activation": None}, "from_logits", "logits"),
    ],
)
def test_multiclass_outputs_suit_sparks_evaluators(spark, store, model_args, loss, kind):
    import keras

    if loss == "from_logits":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    df = data(spark).withColumn("label", F.expr("id % 3"))
    model = estimator(store, modelParams=model_args, loss=loss).fit(df)
    scored = model.transform(df)
    assert 0 <= MulticlassClassificationEvaluator().evaluate(scored) <= 1
    x, _, _ = arrays(df)
    raw = model.model.predict(x, verbose=0)
    rows = scored.collect()
    np.testing.assert_allclose([row.rawPrediction.toArray() for row in rows], raw, atol=1e-6)
    np.testing.assert_allclose([row.probability.toArray().sum() for row in rows], 1.0, atol=1e-6)
    assert [row.prediction for row in rows] == raw.argmax(axis=1).astype(float).tolist()


def test_epochs_of_so_many_steps_equal_keras_on_the_same_batches(spark, store):
    df = data(spark)
    x, y, _ = arrays(df)
    fitted = estimator(store, optimizer="sgd", epochs=3, stepsPerEpoch=9, validationFraction=0.0).fit(df)
    import keras

    keras.utils.set_random_seed(11)
    model = models.mlp()
    model.compile("sgd", "binary_crossentropy")
    batches = [slice(start, start + 32) for start in range(0, len(x), 32)]  # 13, the last of 19 rows
    losses = []
    for step in range(27):
        rows = batches[step % 13]
        losses.append((model.train_on_batch(x[rows], y[rows]), len(x[rows])))
        model.reset_metrics()
    assert models.relative(fitted.model.get_weights(), model.get_weights()) < 1e-5
    for epoch in range(3):
        parts = losses[epoch * 9 : (epoch + 1) * 9]
        mean = sum(loss * rows for loss, rows in parts) / sum(rows for _, rows in parts)
        assert fitted.summary.history["loss"][epoch] == pytest.approx(mean, rel=1e-5)


def test_the_kind_and_the_threshold_decide_the_output_columns(spark, store):
    df = data(spark)
    hinge = estimator(store, model=models.mlp, loss="mse", outputKind="binary", threshold=0.55, epochs=2)
    model = hinge.fit(df)
    rows = model.transform(df).collect()
    one = model.model.predict(arrays(df)[0], verbose=0)[:, 0]
    np.testing.assert_allclose([row.probability[1] for row in rows], one, rtol=1e-6)
    assert [row.prediction for row in rows] == [float(each > 0.55) for each in one]
    assert 0 < sum(row.prediction for row in rows) < len(rows)
    # A model's params may be changed after the fit, which changes columns and not weights.
    number = model.copy({model.outputKind: "regression", model.threshold: 0.5})
    number.clear(number.threshold)
    scored = number.transform(df)
    assert scored.columns == [*df.columns, "prediction"]
    np.testing.assert_allclose([row.prediction for row in scored.collect()], one, rtol=1e-6)
    with pytest.raises(ParamError, match="outputKind='multiclass' needs one element per class"):
        model.copy({model.outputKind: "multiclass"}).transform(df)
    with pytest.raises(TrainingError, match="outputKind='multiclass' needs one element per class"):
        hinge.copy({hinge.outputKind: "multiclass"}).fit(df)


def test_names_that_keras_does_not_know_are_told_with_near_ones(spark, store, monkeypatch):
    import keras  # noqa: F401

    df = data(spark)
    tracker = spark.sparkContext.statusTracker()
    before = tracker.getJobIdsForGroup()
    wrong = {"loss": "binary_crosentropy"}
    message = "loss='binary_crosentropy': Keras has no loss.*did you mean 'binary_crossentropy'"
    for settings, found in (
        (wrong, message),
        ({"optimizer": "adamm"}, "optimizer='adamm': Keras has no optimizer.*'Adam'"),
        ({"metrics": ["auc", "acuracy"]}, "metrics='acuracy': Keras has no metric.*'accuracy'"),
    ):
        with pytest.raises(ParamError, match=found):
            estimator(store, **settings).fit(df)
    # A driver that has not imported Keras does not import it for that.
    monkeypatch.delitem(sys.modules, "keras")
    with pytest.raises(ParamError, match=message):
        estimator(store, **wrong).fit(df)
    assert "keras" not in sys.modules
    assert tracker.getJobIdsForGroup() == before
    assert not list(Path(store).iterdir())
    # Where it cannot find out, the workers do.
    monkeypatch.setattr(names, "_refusal", lambda *_: "")
    with pytest.raises(TrainingError, match=message) as caught:
        estimator(store, **wrong).fit(df)
    assert caught.value.phase == "build"
    assert "cuInit" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"loss": lambda y, p: (y - p) ** 2}, {"metrics": ["mae", lambda y, p: y]}])
def test_lambdas_are_refused_where_the_file_would_have_to_name_them(spark, store, settings):
    with pytest.raises(
        ParamError, match="is a lambda, which the model's file cannot name: give a function with a name"
    ):
        estimator(store, **settings).fit(data(spark))


def test_names_that_keras_knows_pass():
    for param, value in (
        ("loss", ["mse", "MeanSquaredError", {"a": "kl_divergence"}]),
        ("optimizer", "rmsprop"),
        ("metrics", {"a": ["acc", "mae", "AUC", None]}),
    ):
        names.check_name(param, value)


def test_an_unknown_loss_gives_the_raw_output(spark, store):
    df = data(spark).withColumn("label", F.expr("array(a, b)"))
    model = estimator(store, modelParams={"outputs": 2}, loss="hinge").fit(df)
    scored = model.transform(df)
    assert scored.schema["prediction"].dataType.simpleString() == "array<float>"
    x, _, _ = arrays(df)
    np.testing.assert_allclose(
        [row.prediction for row in scored.collect()], model.model.predict(x, verbose=0), atol=1e-6
    )


def test_a_pipeline_saves_and_loads_with_equal_predictions(spark, store, tmp_path):
    df = data(spark)
    stages = [
        VectorAssembler(inputCols=["a", "b", "c"], outputCol="features"),
        KerasEstimator(model=models.mlp, loss="binary_crossentropy", storeUrl=store, verbose=0),
    ]
    model = Pipeline(stages=stages).fit(df)
    path = str(tmp_path / "pipeline")
    model.write().overwrite().save(path)
    model.write().overwrite().save(path)
    loaded = PipelineModel.load(path)
    scored, again = model.transform(df), loaded.transform(df)
    assert scored.columns == [*df.columns, "features", "rawPrediction", "probability", "prediction"]
    assert scored.collect() == again.collect()
    assert 0 < BinaryClassificationEvaluator().evaluate(again) <= 1
    (saved,) = (tmp_path / "pipeline" / "stages").glob("1_*/model/model.keras")
    import keras

    native = keras.saving.load_model(saved)  # readable without Spark
    x, _, _ = arrays(df)
    found = [row.probability[1] for row in again.collect()]
    np.testing.assert_allclose(native.predict(x, verbose=0)[:, 0], found, atol=1e-6)
    saved.write_bytes(saved.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelFileError, match="was changed since it was saved"):
        PipelineModel.load(path)


def test_an_estimator_saves_and_loads(spark, store, tmp_path):
    import keras

    path = str(tmp_path / "estimator")
    by_function = estimator(store, optimizer=keras.optimizers.Adam(0.125), modelParams={"units": 4})
    by_function.save(path)
    loaded = KerasEstimator.load(path)
    assert loaded.uid == by_function.uid
    assert loaded.getModel() is models.mlp
    assert loaded.extractParamMap() == by_function.extractParamMap()
    with pytest.raises(ModelFileError, match=r"holds a spark_nn.KerasEstimator, not a spark_nn.KerasModel"):
        KerasModel.load(path)

    native = models.mlp()
    native(np.zeros((1, 3)))
    KerasEstimator(model=native, loss="mse").write().overwrite().save(path)
    loaded = KerasEstimator.load(path)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.getModel().get_weights(), native.get_weights(), strict=True))


def test_what_cannot_be_saved_safely_is_refused(spark, tmp_path):
    import keras

    path = str(tmp_path / "estimator")
    with pytest.raises(ParamError, match=r"model is the function .*<lambda>.*top level of a module"):
        KerasEstimator(model=lambda: None).save(path)
    stop = keras.callbacks.EarlyStopping()
    with pytest.raises(ParamError, match="callbacks holds a EarlyStopping.*pass a function that returns it"):
        KerasEstimator(model=models.mlp, callbacks=[stop]).save(path)


def test_models_that_cannot_be_trained_are_refused_on_the_driver(spark, store):
    import keras

    native = models.mlp()
    with pytest.raises(ParamError, match="model is not set"):
        KerasEstimator(loss="mse").fit(data(spark))
    with pytest.raises(ParamError, match="loss is not set and the model is not compiled"):
        KerasEstimator(model=native).fit(data(spark))
    with pytest.raises(ParamError, match="modelParams=.* are arguments of a function, but model is a Sequential"):
        KerasEstimator(model=native, loss="mse", modelParams={"units": 1}).fit(data(spark))
    with pytest.raises(ParamError, match="modelParams=.*'unit'.* are not arguments of the function .*'unit'"):
        KerasEstimator(model=models.mlp, loss="mse", modelParams={"unit": 1}).fit(data(spark))
    first, second = keras.Input((1,), name="first"), keras.Input((1,), name="second")
    two = keras.Model([first, second], keras.layers.Dense(1)(keras.layers.Concatenate()([first, second])))
    with pytest.raises(ParamError, match="model has the inputs 'first', 'second', and inputs names none: set"):
        KerasEstimator(model=two, loss="mse").fit(data(spark))


def test_what_callbacks_print_is_followed_while_they_run(spark, store, tmp_path, capsys):
    told, states = [], []

    def read():
        while not {"[rank 0] the end of epoch 0", "[rank 1] the end of epoch 0"} <= set(told):
            told.extend(capsys.readouterr().err.splitlines())
            time.sleep(0.1)
        states.extend(json.loads(path.read_text()) for path in Path(store).glob("run-*/attempt-0/progress.json"))
        (tmp_path / "read").touch()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    callbacks = functools.partial(models.telling, str(tmp_path / "read"))
    model = estimator(store, numWorkers=2, followLogs=True, callbacks=callbacks).fit(data(spark))
    reader.join(10)
    told += capsys.readouterr().err.splitlines()
    assert sorted(line for line in told if "the end" in line) == [
        f"[rank {rank}] the end of epoch {epoch}" for rank in range(2) for epoch in range(2)
    ]
    # Whoever watches knows the loss of the first epoch before it is over.
    (state,) = states
    assert state["loss"] == pytest.approx(model.summary.history["loss"][0], abs=0.2)
    assert state["history"] == {}
