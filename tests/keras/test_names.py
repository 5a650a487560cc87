"""What is misspelt is told on the driver, which imports no framework for what is not."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys

import pytest

from spark_nn import KerasEstimator
from spark_nn.errors import ParamError
from spark_nn.keras import estimator, names
from spark_nn.keras.known import BY_SHAPE, NAMES, is_known

pytestmark = pytest.mark.timeout(240)

# In a process that has imported nothing, with rows that nobody may look at.
SCRIPT = """
import json, os, sys
from spark_nn import KerasEstimator

class Rows:
    def __getattr__(self, name):
        raise AssertionError(name)

def build():
    pass

def told(**settings):
    environment = dict(os.environ)
    try:
        KerasEstimator(model=build, **settings).fit(Rows())
    except Exception as error:
        found = [type(error).__name__, str(error)]
    return [*found, [name for name in ("keras", "tensorflow") if name in sys.modules], os.environ == environment]

right = {"optimizer": "AdamW", "loss": {"a": "kld", "b": ["MSE"]}, "metrics": ["Acc", "AUC", "f1_score"]}
print(json.dumps([told(**right), told(**{**right, "optimizer": "adm"})]))
"""


def halved(y, p):
    return (y - p) / 2


def build():
    """A model's function, which is not called."""


def taken(module, name):
    """Whether Keras makes something of a name; what only others are derived from measures nothing."""
    import keras

    try:
        return type(module.get(name)) not in (keras.losses.Loss, keras.metrics.Metric)
    except (KeyError, TypeError, ValueError):
        return False


@pytest.mark.parametrize("param", NAMES)
def test_the_table_has_the_names_that_keras_takes_and_no_others(param):
    import keras
    from keras.src import losses, metrics, optimizers

    public = {"optimizer": keras.optimizers, "loss": keras.losses, "metrics": keras.metrics}[param]
    own = {"optimizer": optimizers, "loss": losses, "metrics": metrics}[param]
    all_names = {*own.ALL_OBJECTS_DICT, *vars(public)}
    all_names |= {spelt(name) for name in all_names for spelt in (str.lower, str.upper, str.capitalize)}
    expected = {name for name in all_names if taken(public, name)}
    by_shape = {name for name in all_names if param == "metrics" and name.lower() in BY_SHAPE}
    assert {name for name in all_names if is_known(param, name)} == expected | by_shape
    assert all(taken(public, name) for name in NAMES[param])


def test_right_names_import_nothing_and_a_wrong_one_is_told_before_a_row_is_looked_at(tmp_path):
    # The backend is the driver's own, and of no interest.
    environment = {**os.environ, "KERAS_BACKEND": "nonsense", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200)
    right, wrong = json.loads(done.stdout)
    assert right == ["AssertionError", "schema", [], True]
    message = "optimizer='adm': Keras has no optimizer of this name; did you mean 'Adam'"
    assert (wrong[0], wrong[1][: len(message)], *wrong[2:]) == ("ParamError", message, [], True)
    assert not list(tmp_path.iterdir())


def test_nobody_asks_for_names_of_ones_own_nor_for_objects(monkeypatch):
    import keras

    monkeypatch.setattr(estimator, "check_names", lambda doubtful, backend: pytest.fail(f"asked for {doubtful}"))
    monkeypatch.setitem(keras.saving.get_custom_objects(), "mine>twice", halved)
    metrics = {"a": ["Acc", None, keras.metrics.AUC()], "b": ["mine>twice", halved]}
    KerasEstimator(
        model=build,
        loss=["own", "bce"],
        customObjects={"own": halved},
        metrics=metrics,
        optimizer=keras.optimizers.SGD(),
    )._check()


def test_what_keras_cannot_make_of_a_name_is_told():
    with pytest.raises(ParamError, match="metrics='MeanIoU': the metric of this name needs arguments; give an inst"):
        KerasEstimator(model=build, loss="mse", metrics=["MeanIoU"])._check()
    with pytest.raises(ParamError, match="optimizer='LossScaleOptimizer': the optimizer of this name needs arguments"):
        names.check_name("optimizer", "LossScaleOptimizer")
    with pytest.raises(ParamError, match="loss='bcee': Keras has no loss of this name; did you mean 'bce'"):
        names.check_name("loss", "bcee")
    for name in ("ce", "crossentropy"):  # which Keras knows as losses, and no longer as metrics
        with pytest.raises(ParamError, match="Keras has no metric of this name"):
            names.check_name("metrics", name)


def test_where_keras_cannot_be_asked_the_workers_are(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "spark_nn"):
        patch.setattr(sys, "executable", "/no/such/python")
        names.check_names([("loss", "of a driver without Python")], "tensorflow")
    assert "left to the workers to judge" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
        names.check_names([("loss", "of a driver without Keras")], "tensorflow")


@pytest.mark.parametrize("name", ["ce", "crossentropy", "CE"])
def test_a_loss_that_keras_would_choose_is_to_be_named(name):
    with pytest.raises(ParamError, match=f"loss='{name}': Keras chooses among its cross-entropies by the labels"):
        names.check_name("loss", name)
