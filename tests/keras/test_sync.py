"""Fits in step against plain Keras in one process on the same global batches, in a gang without Spark.

The functions that return a `Case` run in the processes of `tests.keras.ranks`, where Keras is.

Where nothing else is said, the largest difference allowed is 1e-5 of a tensor's largest weight: single precision
leaves some 1e-7 a step to the order in which rows are summed, which is the one thing that differs.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.keras.models import relative
from tests.keras.ranks import ROWS, Case, Ranks

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
        np.testing.assert_allclose(found[name], values, rtol=rel, err_msg=name)


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
    class Own:
        average = staticmethod(list)

    case = every_optimizer("SGD")
    case.sync = {"averager": Own()}
    return case


def test_without_the_averaging_these_comparisons_would_fail(ranks):
    outcomes = ranks.gang(2, "unsynchronised")
    assert outcomes[0].digest != outcomes[1].digest
    assert closeness(outcomes[0], ranks.single("every_optimizer", name="SGD")) > 100 * EXACT
