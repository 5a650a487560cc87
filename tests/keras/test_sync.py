"""Fits in step against plain Keras in one process on the same global batches, in a gang without Spark.

The functions that return a `Case` run in the processes of `tests.keras.ranks`, where Keras is.

Where nothing else is said, the largest difference allowed is 1e-5 of a tensor's largest weight: single precision
leaves some 1e-7 a step to the order in which rows are summed, which is the one thing that differs.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spark_nn.gang.collective import Alone
from spark_nn.keras.gradients import Averager
from tests.keras.models import relative
from tests.keras.ranks import BATCH, ROWS, Case, Ranks

pytestmark = pytest.mark.timeout(120)

EXACT = 1e-5

OPTIMIZERS = {
    "Adadelta": {"learning_rate": 1.0},
    "Adafactor": {"learning_rate": 0.05},
    "Adagrad": {"learning_rate": 0.1},
    "Adam": {"learning_rate": 0.05, "amsgrad": True},
    "AdamW": {"learning_rate": 0.05, "weight_decay": 0.1},
    "Adamax": {"learning_rate": 0.05},
    "Ftrl": {"learning_rate": 0.1, "l1_regularization_strength": 0.001, "l2_regularization_strength": 0.01},
    "Lamb": {"learning_rate": 0.05},
    "Lion": {"learning_rate": 0.01},
    "LossScaleOptimizer": {"inner_optimizer": "sgd", "initial_scale": 1024.0, "dynamic_growth_steps": 3},
    "MultiOptimizer": {},
    "Muon": {"learning_rate": 0.01, "exclude_layers": ["second"]},
    "Nadam": {"learning_rate": 0.05},
    "RMSprop": {"learning_rate": 0.05, "momentum": 0.9, "centered": True},
    "SGD": {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True},
    "ScheduleFreeAdamW": {"learning_rate": 0.05, "warmup_steps": 4, "weight_decay": 0.01},
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as processes:
        yield processes


def closeness(found, expected):
    """The largest difference between weights, relative to the largest weight of each tensor."""
    assert list(found.weights) == list(expected.weights)
    return relative(list(found.weights.values()), list(expected.weights.values()))


def equals_single(ranks, world, case, limit=EXACT, **arguments):
    """Fit on a gang and alone; compare the weights, and return what both gave."""
    outcomes, expected = ranks.both(world, case, **arguments)
    assert closeness(outcomes[0], expected) < limit
    return outcomes, expected


def same_history(outcomes, expected, rel=1e-6):
    for outcome in outcomes:
        assert outcome.history == outcomes[0].history
    found = outcomes[0].history
    assert set(found) == set(expected.history)
    for name, values in expected.history.items():
        np.testing.assert_allclose(found[name], np.reshape(values, np.shape(found[name])), rtol=rel, err_msg=name)


# ---------------------------------------------------------------- models and rows


def rows(count=ROWS, seed=3):
    """Inputs away from zero and targets above what the model begins with: no gradient is near zero.

    An optimizer that divides a gradient by its size, Lion's sign the most, would make much of a rounding there.
    """
    chance = np.random.default_rng(seed)
    x = chance.uniform(0.5, 1.5, (count, 4)).astype("float32")
    y = (8 + x @ [3, 1, 2, 4] + chance.normal(0, 2, count)).astype("float32")[:, None]
    return x, y


def smooth(outputs=1, **settings):
    import keras

    positive = keras.initializers.RandomUniform(0.1, 0.5, seed=1)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, "softplus", kernel_initializer=positive, name="first", **settings),
            keras.layers.Dense(outputs, kernel_initializer=positive, name="second"),
        ]
    )


def compiled(optimizer, model=None, loss="mse", **settings):
    model = model or smooth()
    model.compile(optimizer, loss, **settings)
    return model


def every_optimizer(name):
    import keras

    kinds = keras.optimizers
    settings = dict(OPTIMIZERS[name])
    if name == "MultiOptimizer":
        settings["optimizer_map"] = kinds.OptimizerMap(kinds.SGD(0.01), {"first/.*": kinds.Adam(0.05)})
    if name == "LossScaleOptimizer":
        settings["inner_optimizer"] = kinds.SGD(0.01)
    return Case(compiled(getattr(kinds, name)(**settings)), *rows())


# ---------------------------------------------------------------- optimizers


def test_no_optimizer_of_keras_is_forgotten():
    from keras import optimizers

    found = {
        name
        for name, kind in vars(optimizers).items()
        if isinstance(kind, type) and issubclass(kind, optimizers.Optimizer) and kind is not optimizers.Optimizer
    }
    assert found == set(OPTIMIZERS)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gives_what_one_process_gives_on_the_global_batches(ranks, name, world):
    equals_single(ranks, world, "every_optimizer", name=name)


def unsynchronised():
    class Own(Averager):
        def average(self, grads):
            return list(grads)

    case = every_optimizer("SGD")
    case.sync = {"averager": Own(Alone())}
    return case


def test_without_the_averaging_these_comparisons_would_fail(ranks):
    outcomes = ranks.gang(2, "unsynchronised")
    assert outcomes[0].digest != outcomes[1].digest
    assert closeness(outcomes[0], ranks.single("every_optimizer", name="SGD")) > 100 * EXACT


OPTIONS = {
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.3},
    "global_clipnorm": {"global_clipnorm": 0.7},
    "weight_decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema that overwrites": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation with clipping": {"gradient_accumulation_steps": 2, "global_clipnorm": 0.7},
    "fixed loss scale": {"loss_scale_factor": 128.0},
    "schedule": {"learning_rate": "cosine"},
    "loss scaling over clipping and ema": {"wrapped": True, "clipnorm": 0.5, "use_ema": True},
}


def with_options(name, embedded=False):
    import keras

    settings = {"learning_rate": 0.05, **OPTIONS[name]}
    wrapped = settings.pop("wrapped", False)
    if settings["learning_rate"] == "cosine":
        settings["learning_rate"] = keras.optimizers.schedules.CosineDecay(0.1, 10)
    # Plain descent with momentum: what clipping takes away stays visible, where Adam would scale it up again.
    optimizer = keras.optimizers.SGD(momentum=0.5, **settings)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    return embeddings(optimizer) if embedded else Case(compiled(optimizer), *rows())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_an_optimizer_acts_on_the_averaged_gradient(ranks, name):
    equals_single(ranks, 2, "with_options", name=name)


def embeddings(optimizer):
    """Few of many rows are looked up, some by several ranks, and one table is looked up twice."""
    import keras

    chance = np.random.default_rng(5)
    ids = chance.integers(0, 40, (ROWS, 2))
    given = keras.Input((2,), dtype="int32")
    vectors = keras.layers.Embedding(40, 4)(given)
    other = keras.layers.Embedding(40, 3)
    joined = keras.layers.Concatenate()([vectors, other(given), other((given + 1) % 40)])
    model = keras.Model(given, keras.layers.Dense(1)(keras.layers.Flatten()(joined)))
    y = (ids @ [0.1, 0.05] + 2).astype("float32")[:, None]
    return Case(compiled(optimizer, model), ids.astype("int32"), y)


def adam_of_embeddings():
    # A larger epsilon: where a row's gradients almost cancel, Adam would else divide a rounding by itself.
    import keras

    return embeddings(keras.optimizers.Adam(0.05, epsilon=1e-3))


@pytest.mark.parametrize("world", [2, 3])
def test_sparse_gradients_stay_sparse(ranks, world):
    equals_single(ranks, world, "adam_of_embeddings")


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm", "accumulation"])
def test_options_act_on_sparse_gradients_too(ranks, name):
    equals_single(ranks, 2, "with_options", name=name, embedded=True)


# ---------------------------------------------------------------- precision


def half(policy, outlier=False):
    import keras

    keras.config.set_dtype_policy(policy)
    x, y = rows()
    if outlier:
        # In the second batch of each epoch, in rank 1's rows: large enough for the gradient to leave the range of
        # halves, which ends at 65504, when scaled, while the loss, in single precision, does not.
        x[22] = 60.0
        y[22] = -600.0
    model = compiled(keras.optimizers.SGD(1e-4), loss=single_precision_mse)
    if policy == "mixed_float16":
        assert type(model.optimizer).__name__ == "LossScaleOptimizer"
        model.optimizer.initial_scale = 1024.0
    # That the gradients leave the range is no error: it is what loss scaling is there for.
    return Case(model, x, y, probe=scaling, sync={"nonFinite": "error"})


def single_precision_mse(y, predicted):
    import keras

    return keras.ops.mean(
        keras.ops.square(keras.ops.cast(predicted, "float32") - keras.ops.cast(y, "float32")), axis=-1
    )


def scaling(model):
    optimizer = model.optimizer
    scale = getattr(optimizer, "dynamic_scale", None)
    return int(optimizer.iterations), scale is not None and float(scale)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_averages_in_single_precision(ranks, policy):
    """Against the ranks' own computation: sums over rows in halves depend on which rows a process has."""
    outcomes = ranks.alike(2, "half", policy=policy)
    expected = ranks.by_hand(2, "half", policy=policy)
    assert closeness(outcomes[0], expected) < EXACT
    assert outcomes[0].probe == outcomes[1].probe == expected.probe == (12, policy == "mixed_float16" and 1024.0)


def test_one_ranks_overflow_makes_all_ranks_skip_the_step(ranks):
    outcomes = ranks.alike(2, "half", policy="mixed_float16", outlier=True)
    expected = ranks.by_hand(2, "half", policy="mixed_float16", outlier=True)
    assert closeness(outcomes[0], expected) < EXACT
    assert outcomes[0].probe == outcomes[1].probe == expected.probe == (10, 256.0)


def doubles():
    import keras

    keras.config.set_dtype_policy("float64")
    case = every_optimizer("SGD")
    assert {weight.dtype for weight in case.model.weights} == {"float64"}
    keras.config.set_dtype_policy("float32")
    case.sync = {"nonFinite": "error"}
    return case


def test_doubles_are_averaged_as_doubles(ranks):
    equals_single(ranks, 2, "doubles", limit=1e-12)


def halves_looked_up():
    import keras

    keras.config.set_dtype_policy("bfloat16")
    case = embeddings(keras.optimizers.SGD(0.01))
    assert {weight.dtype for weight in case.model.weights} == {"bfloat16"}
    return case


def test_sparse_gradients_may_be_halves(ranks):
    # Weights that hold 8 bits of their numbers: a sum's order may decide which of two neighbours it is rounded to.
    equals_single(ranks, 2, "halves_looked_up", limit=3 * 2**-8)


# ---------------------------------------------------------------- layers


def normalised():
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), *smooth().layers])
    return Case(compiled(keras.optimizers.Adam(0.05), model), *rows())


@pytest.mark.parametrize("world", [2, 3])
def test_batch_normalisation_is_each_ranks_own_and_its_moving_statistics_are_averaged(ranks, world):
    outcomes = ranks.alike(world, "normalised")
    assert closeness(outcomes[0], ranks.by_hand(world, "normalised")) < EXACT
    assert closeness(outcomes[0], ranks.single("normalised")) > 10 * EXACT


def frozen():
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), *smooth().layers])
    model.layers[0].trainable = model.layers[1].trainable = False
    before = {weight.path: np.array(weight) for layer in model.layers[:2] for weight in layer.weights}
    return Case(compiled(keras.optimizers.Adam(0.05), model), *rows(), probe=lambda _: before)


def test_frozen_layers_stay_as_they_are(ranks):
    outcomes, _ = equals_single(ranks, 2, "frozen")
    assert len(outcomes[0].probe) == 6
    for path, value in outcomes[0].probe.items():
        assert outcomes[0].weights[path].tobytes() == value.tobytes()


def dropping(unseeded=False):
    import keras

    class Unseeded(keras.layers.Layer):
        def call(self, x, training=False):
            return keras.random.dropout(x, 0.5) if training else x

    first, second = smooth().layers
    drop = Unseeded() if unseeded else keras.layers.Dropout(0.5)
    model = keras.Sequential([keras.Input((4,)), first, drop, second])

    def mask(model):
        import random

        return np.array(drop(np.ones((4, 50), "float32"), training=True)), (random.random(), np.random.rand())

    return Case(compiled(keras.optimizers.Adam(0.05), model), *rows(), probe=mask)


@pytest.mark.parametrize("unseeded", [False, True])
def test_dropout_drops_something_else_on_every_rank_and_the_same_when_repeated(ranks, unseeded):
    world = 2 if unseeded else 3
    outcomes = ranks.alike(world, "dropping", unseeded=unseeded)
    masks = [outcome.probe[0] for outcome in outcomes]
    for one, other in itertools.combinations(range(world), 2):
        assert 0.3 < (masks[one] != masks[other]).mean() < 0.7  # of independent draws half would differ
    if not unseeded:  # rank 0 draws what a single process would
        assert np.array_equal(masks[0], ranks.single("dropping").probe[0])
    again = ranks.alike(world, "dropping", unseeded=unseeded)
    assert [outcome.digest for outcome in again] == [outcome.digest for outcome in outcomes]
    assert all(np.array_equal(outcome.probe[0], mask) for outcome, mask in zip(again, masks, strict=True))
    # Callbacks may decide by these.
    assert len({outcome.probe[1] for outcome in outcomes}) == 1


def tracking():
    """A layer that keeps statistics of several types."""
    import keras

    class Track(keras.layers.Layer):
        def build(self, shape):
            settings = {"shape": (), "initializer": "zeros", "trainable": False}
            self.half = self.add_weight(**settings, dtype="bfloat16", name="half")
            self.count = self.add_weight(**settings, dtype="int32", name="count")
            self.most = self.add_weight(**settings, dtype="int32", name="most")

        def call(self, x, training=False):
            if training:
                self.half.assign(keras.ops.cast(keras.ops.sign(keras.ops.sum(x) - 1000.0), "bfloat16"))
                self.count.assign_add(1)
                self.most.assign(keras.ops.cast(keras.ops.sum(x), "int32"))
            return x

    x, y = rows()
    x[-3:] += 1000.0  # the last batch, on rank 1
    model = keras.Sequential([keras.Input((4,)), Track(name="track"), *smooth().layers], name="all")
    model.layers[1].trainable = model.layers[2].trainable = False
    return Case(compiled("sgd", model), x, y)


def test_statistics_of_every_type_are_settled(ranks):
    weights = ranks.alike(2, "tracking")[0].weights
    half, count, most = (weights[f"all/track/{name}"] for name in ("half", "count", "most"))
    assert half.dtype.name == "bfloat16"
    assert float(half) == 0.0  # the mean of -1 and 1
    assert int(count) == 12
    assert 0 < int(most) < 1000  # rank 0's


# ---------------------------------------------------------------- models of one's own


def own_train_step(way):
    """Subclassed and built lazily, with a step and logs of its own."""
    import keras
    import tensorflow as tf

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = smooth().layers
            self.error = keras.metrics.MeanAbsoluteError(name="error")

        def call(self, x):
            return self.second(self.first(x))

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                predicted = self(x, training=True)
                loss = self.compute_loss(x, y, predicted)
            grads = tape.gradient(loss, self.trainable_variables)
            if way == "apply":
                self.optimizer.apply(grads, self.trainable_variables)
            elif way == "apply without variables":
                self.optimizer.apply(tuple(grads))
            else:
                self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            self.error.update_state(y, predicted)
            return {"error": self.error.result(), "mean": tf.reduce_mean(y), "both": tf.reduce_mean(x, axis=0)[:2]}

    x, y = rows()
    model = Own()
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return Case(model, x, y, probe=lambda _: float(y[-6:].mean()))


@pytest.mark.parametrize("way", ["apply_gradients", "apply", "apply without variables"])
def test_a_train_step_of_ones_own_is_averaged_and_its_logs_are_global(ranks, way):
    outcomes, expected = equals_single(ranks, 2, "own_train_step", way=way)
    # The metric is exact though it is not all that was logged; the last step's mean is that of its rows everywhere.
    same_history(outcomes, expected)
    assert outcomes[0].history["mean"] == pytest.approx([outcomes[0].probe] * 2, rel=1e-6)
    assert np.shape(outcomes[0].history["both"]) == (2, 2)


def traced_before():
    """A model that its function has trained a little: the step that was traced then knows of no other ranks."""
    case = every_optimizer("SGD")
    case.model.fit(case.x[:BATCH], case.y[:BATCH], batch_size=BATCH // 2, verbose=0)
    return case


def test_a_model_that_was_trained_before_is_averaged_all_the_same(ranks):
    equals_single(ranks, 2, "traced_before")


def adversaries():
    """Two networks with an optimizer each, and a third inside a network of its own, which train each other."""
    import keras
    import tensorflow as tf

    class Adversaries(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.third = smooth(), smooth(), smooth()

        def compile(self, **optimizers):
            super().compile(loss="mse")
            self.optimizers = [optimizers["one"]]
            self.by_name = {"other": optimizers["other"]}
            self.third.compile(keras.optimizers.RMSprop(0.02), "mse")

        def call(self, x):
            return self.one(x) + self.other(x) + self.third(x)

        def train_step(self, data):
            x, y = data
            parts = [
                (self.one, self.optimizers[0]),
                (self.other, self.by_name["other"]),
                (self.third, self.third.optimizer),
            ]
            for network, optimizer in parts:
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(y - self(x, training=True)))
                grads = tape.gradient(loss, network.trainable_variables)
                optimizer.apply_gradients(zip(grads, network.trainable_variables, strict=True))
            return {"last": loss}

    model = Adversaries()
    model.compile(one=keras.optimizers.Adam(0.02), other=keras.optimizers.SGD(0.01))
    # A model with a step of its own need not have metrics either.
    Adversaries.metrics = property(lambda self: [])
    return Case(model, *rows())


@pytest.mark.parametrize("world", [2, 3])
def test_several_optimizers_of_one_model_are_all_kept_in_step(ranks, world):
    outcomes, expected = equals_single(ranks, world, "adversaries")
    same_history(outcomes, expected, rel=1e-5)


def saved_amid_fit():
    """What a callback saves meanwhile must be what any program can load."""
    import keras

    @keras.saving.register_keras_serializable("tests")
    class Slow(keras.optimizers.SGD):
        pass

    configs = []
    save = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: configs.append(keras.saving.serialize_keras_object(model.optimizer))
    )
    model = compiled(Slow(0.01))
    expected = keras.saving.serialize_keras_object(model.optimizer)
    return Case(model, *rows(), callbacks=[save], probe=lambda model: (configs, expected, set(vars(model.optimizer))))


def test_optimizers_are_saved_as_what_they_are(ranks):
    configs, expected, attributes = ranks.alike(2, "saved_amid_fit")[0].probe
    assert configs == [expected] * 2
    assert expected["registered_name"] == "tests>Slow"
    assert not {"apply", "scale_loss", "train_step"} & attributes


# ---------------------------------------------------------------- what is fed and what is logged


def several_parts(spe=1, eager=False):
    import keras

    chance = np.random.default_rng(9)
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    joined = keras.layers.Concatenate()([smooth().layers[0](a), b])
    price = keras.layers.Dense(1, name="price")(joined)
    kind = keras.layers.Dense(3, "softmax", name="kind")(joined)
    model = keras.Model({"a": a, "b": b}, {"price": price, "kind": kind})
    x, y = rows()
    model.compile(
        keras.optimizers.Adam(0.05),
        {"price": "mse", "kind": "sparse_categorical_crossentropy"},
        loss_weights={"price": 0.3, "kind": 2.0},
        metrics={"price": ["mae"], "kind": ["accuracy"]},
        weighted_metrics={"price": ["mse"], "kind": []},
        steps_per_execution=spe,
        run_eagerly=eager,
    )
    weight = {name: chance.uniform(0.1, 3, ROWS).astype("float32") for name in ("price", "kind")}
    return Case(
        model,
        {"a": x, "b": chance.uniform(0.5, 1.5, (ROWS, 2)).astype("float32")},
        {"price": y, "kind": chance.integers(0, 3, ROWS)},
        weight,
    )


@pytest.mark.parametrize("spe", [1, 4, 16])
def test_several_inputs_and_outputs_with_weights_at_any_number_of_steps_per_execution(ranks, spe):
    outcomes = ranks.alike(2, "several_parts", spe=spe)
    expected = ranks.single("several_parts", spe=1)
    assert closeness(outcomes[0], expected) < EXACT
    same_history(outcomes, expected)
    assert len(expected.history) == 6


def test_a_step_that_runs_eagerly_is_averaged_too(ranks):
    outcomes = ranks.alike(2, "several_parts", eager=True)
    assert closeness(outcomes[0], ranks.single("several_parts", spe=1)) < EXACT


def classified(held=25):
    import keras

    x, y = rows()
    labels = (y > np.median(y)).astype("float32")
    first, _ = smooth().layers
    model = keras.Sequential([keras.Input((4,)), first, keras.layers.Dense(1, "sigmoid")])
    metrics = [
        "accuracy",
        keras.metrics.AUC(name="auc"),
        "mae",
        keras.metrics.F1Score(threshold=0.5, name="f1"),
        Mean(),
    ]
    case = Case(compiled(keras.optimizers.Adam(0.05), model, "binary_crossentropy", metrics=metrics), x, labels)
    # Another order than the training's, so that the ranks' shares differ in more than noise.
    case.validation = tuple(part[np.argsort(y[:, 0])][:: ROWS // held] for part in (x, labels))
    seen = {}

    def on_train_end(logs):
        seen.update(logs)

    case.callbacks = [keras.callbacks.LambdaCallback(on_train_end=on_train_end)]
    case.probe = lambda _: seen
    return case


def Mean():
    """A metric whose variable is the same on all ranks and no sum."""
    import keras

    class Constant(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="constant")
            self.value = self.add_variable((), "zeros", aggregation="mean", name="value")

        def update_state(self, y, predicted, sample_weight=None):
            self.value.assign(3.0)

        def result(self):
            return keras.ops.convert_to_tensor(self.value)

    return Constant()


@pytest.mark.parametrize("world", [2, 3])
def test_metrics_are_those_of_all_rows_in_training_and_in_validation(ranks, world):
    outcomes, expected = equals_single(ranks, world, "classified")
    same_history(outcomes, expected)
    assert set(expected.history) == {
        f"{prefix}{name}" for prefix in ("", "val_") for name in ("loss", "accuracy", "auc", "mae", "f1", "constant")
    }
    # What callbacks get when training ends is as global.
    for outcome in outcomes:
        assert outcome.probe == {name: values[-1] for name, values in outcome.history.items()}


def test_a_rank_without_validation_rows_agrees_with_the_others(ranks):
    outcomes = ranks.alike(3, "classified", held=2)
    same_history(outcomes, ranks.single("classified", held=2))


def stopping():
    import keras

    x, y = rows()
    case = Case(compiled(keras.optimizers.SGD(0.005), metrics=["mae"]), x, y, epochs=12)
    chance = np.random.default_rng(4)
    case.validation = (x[:24], (y[:24] * 0.6 + chance.normal(0, 1, (24, 1))).astype("float32"))
    case.callbacks = [
        keras.callbacks.ReduceLROnPlateau(monitor="val_mae", factor=0.5, patience=1, min_delta=0.05),
        keras.callbacks.EarlyStopping(monitor="val_mae", patience=3, restore_best_weights=True),
    ]
    case.probe = lambda model: float(model.evaluate(*case.validation, batch_size=24, verbose=0)[1])
    return case


@pytest.mark.parametrize("world", [2, 3])
def test_callbacks_decide_alike_on_every_rank_and_as_in_one_process(ranks, world):
    outcomes, expected = equals_single(ranks, world, "stopping")
    same_history(outcomes, expected, rel=EXACT)
    history = outcomes[0].history
    assert len(history["loss"]) < 12  # stopped
    assert len(set(history["learning_rate"])) > 1  # reduced
    best = min(history["val_mae"])
    assert history["val_mae"][-1] > best
    assert outcomes[0].probe == pytest.approx(best, rel=1e-5)  # restored


# ---------------------------------------------------------------- losses that are not finite


def going_wrong(step=4, rank=1, spe=1, mode="error", world=2, own=False, jit=False, made=0, epoch=2, value=np.nan):
    """The rows of one rank, or of all, hold a bad value from a step of an epoch on."""
    import keras

    class Own(keras.Sequential):
        def train_step(self, data):
            import tensorflow as tf

            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(grads, self.trainable_variables)
            return {"loss": loss}

    x, y = rows()
    batch = np.arange(ROWS)[(step - 1) * BATCH : step * BATCH]
    taken = batch if rank is None else np.split(batch, world)[rank]

    class Spoil(keras.layers.Layer):
        """Every epoch reads the same rows: what is bad in them is let through from one epoch on."""

        def build(self, shape):
            self.on = self.add_weight(shape=(), initializer="zeros", trainable=False, name="on")

        def call(self, x):
            marked = x[:, :1] > 100.0
            spoiled = keras.ops.logical_and(marked, self.on > 0)
            return keras.ops.where(spoiled, value, keras.ops.where(marked, 1.0, x))

    x[taken, 0] = 1000.0
    spoil = Spoil()
    layers = [keras.Input((4,)), spoil, *smooth().layers]
    model = Own(layers) if own else keras.Sequential(layers)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([8], [0.02, 0.01])
    compiled(keras.optimizers.SGD(schedule), model, steps_per_execution=spe, jit_compile=jit)
    turn_on = keras.callbacks.LambdaCallback(on_epoch_begin=lambda now, logs: spoil.on.assign(float(now + 1 >= epoch)))
    return Case(model, x, y, epochs=3, callbacks=[turn_on], sync={"nonFinite": mode}, first_step=made)


def last_line(outcome):
    return next(line for line in outcome.error.splitlines() if line.startswith("spark_nn.errors."))


@pytest.mark.parametrize(
    ("rank", "spe", "step"), [(0, 1, 2), (1, 1, 4), (None, 1, 4), (0, 16, 4), (1, 16, 2), (1, 16, 6), (None, 16, 2)]
)
def test_a_loss_that_is_not_finite_on_any_rank_stops_all_ranks_at_its_step(ranks, rank, spe, step):
    outcomes = ranks.gang(2, "going_wrong", rank=rank, spe=spe, step=step, value=np.inf if rank else np.nan)
    rate = 0.02 if step == 2 else 0.01
    for outcome in outcomes:
        assert last_line(outcome).startswith(
            f"spark_nn.errors.NonFiniteLoss: the loss is NaN or infinite in epoch 2 at step {step}, "
            f"with learning rate {rate:g}. Set a smaller learningRate"
        )


def test_it_is_ignored_unless_asked_for(ranks):
    for outcome in ranks.gang(2, "going_wrong", mode="ignore"):
        assert not outcome.error
        assert np.isnan(outcome.history["loss"]).tolist() == [False, True, True]


@pytest.mark.parametrize("spe", [1, 16])
def test_a_train_step_that_scales_no_loss_is_watched_by_what_it_logs(ranks, spe):
    (outcome,) = ranks.gang(1, "going_wrong", own=True, spe=spe, world=1, rank=None)
    assert "in epoch 2 at step 4, with learning rate 0.01." in last_line(outcome)


@pytest.mark.parametrize("jit", [False, True])
def test_one_process_is_watched_too_and_may_be_compiled_whole(ranks, jit):
    (outcome,) = ranks.gang(1, "going_wrong", jit=jit, spe=4, world=1, rank=None)
    assert "in epoch 2 at step 4, with learning rate 0.01." in last_line(outcome)


@pytest.mark.parametrize(("epoch", "reported"), [(1, "epoch 1 at step 14"), (2, "epoch 2 at step 4")])
def test_steps_are_counted_from_where_the_fit_goes_on_in_its_first_epoch(ranks, epoch, reported):
    (outcome,) = ranks.gang(1, "going_wrong", made=10, epoch=epoch, world=1, rank=None)
    assert f"in {reported}, with" in last_line(outcome)


def watched(jit=False):
    case = every_optimizer("Adam")
    case.model.jit_compile = jit
    case.sync = {"nonFinite": "error"}
    return case


@pytest.mark.parametrize("jit", [False, True])
def test_watching_changes_nothing_about_a_fit_that_goes_well(ranks, jit):
    (outcome,) = ranks.alike(1, "watched", jit=jit)
    assert closeness(outcome, ranks.single("every_optimizer", name="Adam")) < EXACT
