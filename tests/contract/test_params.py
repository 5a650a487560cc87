"""What Spark ML expects of a stage's params, checked for every public stage, and for the toy's."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
from pyspark.ml.param import Param

from spark_nn.estimator import NeuralEstimator
from tests.contract.stages import ESTIMATORS, STAGES, TOYS, name_of, upper, values

every_stage = pytest.mark.parametrize("stage", STAGES, ids=name_of)
every_estimator = pytest.mark.parametrize("stage", ESTIMATORS, ids=name_of)


@every_stage
def test_every_param_is_documented_gettable_and_settable(stage):
    instance = stage()  # loading a stage makes it without arguments first
    assert instance.uid.startswith(f"{stage.__name__}_")
    explained = instance.explainParams()
    for name, value in values(stage).items():
        assert f"{name}: {instance.getParam(name).doc}" in explained
        assert instance.hasParam(name)
        if instance.hasDefault(name):
            assert value != instance.getOrDefault(name), f"{name} needs a value that is not its default"
        instance._set(**{name: value})
        assert instance.getOrDefault(name) == value
        if name in TOYS:
            continue
        assert getattr(instance, f"get{upper(name)}")() == value
        if hasattr(instance, f"set{upper(name)}") or issubclass(stage, NeuralEstimator):
            instance.clear(instance.getParam(name))
            assert getattr(instance, f"set{upper(name)}")(value) is instance
            assert instance.getOrDefault(name) == value
    assert not instance.hasParam("nonsense")


@every_stage
def test_the_doc_of_a_param_says_what_it_may_be(stage):
    for param in stage().params:
        if param.name in TOYS:
            continue
        assert len(param.doc) > 10
        rules = inspect.getclosurevars(param.typeConverter).nonlocals
        for allowed in rules.get("allowed", ()):
            assert (repr(allowed) if isinstance(allowed, str) else f"{allowed} ") in param.doc, param.name
        said = {"low": (">= {}", "{} <="), "above": ("> {}", "{} <"), "below": ("< {}",)}
        for rule, ways in said.items():
            if rules.get(rule) is not None:
                assert any(way.format(f"{rules[rule]:g}") in param.doc for way in ways), f"{param.name}: {rule}"


@every_stage
def test_defaults_fit_in_json(stage):
    defaults = {param.name: value for param, value in stage()._defaultParamMap.items()}
    assert json.loads(json.dumps(defaults)) == defaults


def numpied(value):
    """A value as a loop over NumPy's arrays would give it."""
    if isinstance(value, (list, tuple)):
        return [numpied(each) for each in value]
    if isinstance(value, dict):
        return {numpied(key): numpied(each) for key, each in value.items()}
    kinds = {bool: np.bool_, int: np.int64, float: np.float32, str: np.str_}
    return kinds[type(value)](value) if type(value) in kinds else value


@every_stage
def test_numpy_scalars_are_taken_and_kept_as_plain_values(stage):
    instance = stage()
    for name, value in values(stage).items():
        instance._set(**{name: numpied(value)})
        kept = instance.getOrDefault(name)
        assert kept == value, name
        if name not in {*stage.functionParams, "customObjects"}:
            assert json.dumps(kept) == json.dumps(value), name
        if isinstance(value, (bool, int, float)):
            assert type(kept) is type(value), name
    for name in ("epochs", "numWorkers"):
        if instance.hasParam(name):
            for kind in (np.int8, np.uint16, np.int32, np.float64):
                instance._set(**{name: kind(4)})
                assert type(instance.getOrDefault(name)) is int


@every_stage
def test_copies_are_independent_and_share_the_uid(stage):
    original = stage()
    extra = {original.predictionCol: "other", Param(stage(), "foreign", "of another stage"): 1}
    copy = original.copy(extra)
    assert copy.uid == original.uid
    assert copy.getPredictionCol() == "other"
    assert original.getPredictionCol() == "prediction"
    before = original.extractParamMap()
    for name, value in values(stage).items():
        copy._set(**{name: value})
    copy._setDefault(featuresCol="elsewhere")
    assert original.extractParamMap() == before
    second = copy.copy()
    original._set(labelCol="mine")
    assert {name: second.getOrDefault(name) for name in values(stage)} == values(stage)


@every_estimator
def test_the_constructor_takes_every_param_by_keyword(stage):
    instance = stage(**values(stage))
    assert {name: instance.getOrDefault(name) for name in values(stage)} == values(stage)
    with pytest.raises(TypeError, match="forces keyword arguments|positional"):
        stage(3)
    if stage.__name__ in {"KerasEstimator", "TorchEstimator"}:
        for call in (stage, stage().setParams):
            with pytest.raises(TypeError, match=r"has no param 'learning_rate' .did you mean 'learningRate'"):
                call(learning_rate=0.1)
        with pytest.raises(TypeError, match="Estimator has no param 'xyz'; explainParams"):
            stage(xyz=1)
