"""A network that is divided over the ranks against one that each of them holds whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spark_nn.errors import ParamError
from spark_nn.gang.collective import Alone
from spark_nn.gang.context import GangContext
from spark_nn.gang.progress import Reporter
from spark_nn.store import RunDir
from spark_nn.torch import codec, sharding
from spark_nn.torch.blueprint import Blueprint
from spark_nn.torch.training import WEIGHTS
from tests.torch import models, ranks

pytestmark = pytest.mark.timeout(280)

SPECS = {None: ((3,), "float32")}

CASES = {
    "clipped": {
        "model": models.wide,
        "optimizer": "adamw",
        "optimizerParams": {"weight_decay": 0.1, "eps": 1e-3},  # smaller, it would make much of what is rounded
        "clipGradNorm": 0.1,
        "learningRate": 0.001,
        "lrScheduler": models.decay,
        "metrics": ["auroc", "accuracy"],
    },
    "transformer": {
        "model": models.transformer,
        "optimizerParams": {"momentum": 0.9},
        "clipGradValue": 0.01,
    },
    "tied": {"model": models.tied_by_attribute},
    "halves": {"model": models.wide, "mixedPrecision": "bf16"},
    "instance": {"model": models.wide(), "weights": "model"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Of whose rows that are held back one rank has a batch more."""
    return ranks.dataset(tmp_path_factory.mktemp("rows"), [170, 105])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """What all comes to, by name: trained one after the other, since ranks are long in starting."""
    folder = tmp_path_factory.mktemp("trained")
    remembering = {"mark": str(folder / "mark"), "rank": 1}
    settings = {"optimizer": "adamw", "lrScheduler": models.decay, "clipGradNorm": 0.5, "metrics": ["auroc"]}
    lost, undisturbed = (
        ranks.divided(ranks.trainer(models.remembering, {**remembering, "step": step}, interval=3, **settings))
        for step in (12, -1)
    )
    found = {"killed": ranks.train(data, [(folder / "lost", 0, lost)])[0]}
    found["written"] = sorted(each.name for each in (folder / "lost/attempt-0/checkpoints").iterdir())
    jobs = {"again": (folder / "lost", 1, lost), "undisturbed": (folder / "undisturbed", 0, undisturbed)}
    deep = ranks.trainer(models.deep, {"layers": 12, "units": 1200}, optimizer="adam", epochs=1, batch=64)
    for name, made in {**{name: ranks.trainer(**each) for name, each in CASES.items()}, "deep": deep}.items():
        for way in ("fsdp", "none"):
            jobs[f"{name} {way}"] = folder / f"{name}-{way}", 0, ranks.divided(made, way)
            if made.recipe.weights:
                jobs[f"{name} {way}"][0].mkdir()
                codec.save(CASES[name]["model"], jobs[f"{name} {way}"][0] / WEIGHTS)
    skipping = folder / "skipping", 0, ranks.divided(ranks.trainer(models.skipping))
    *outcomes, found["skipping"] = ranks.train(data, [*jobs.values(), skipping])
    for name, outcome in zip(jobs, outcomes, strict=False):
        assert not outcome.errors, "\n".join([name, *outcome.errors])
        found[name] = outcome
    assert not list(folder.glob("*/scratch-*/*"))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_divided_network_comes_to_what_a_whole_one_does(trained, name):
    whole, divided = trained[f"{name} none"], trained[f"{name} fsdp"]
    assert divided.weights.keys() == whole.weights.keys()
    for weight, values in whole.weights.items():
        # Relative to the largest of them, or to a step of the optimizer.
        scale = max(abs(values).max(), 0.01)
        np.testing.assert_allclose(divided.weights[weight], values, atol=1e-5 * scale, rtol=0, err_msg=weight)
    assert divided.history.keys() == whole.history.keys()
    for measure, values in whole.history.items():
        np.testing.assert_allclose(divided.history[measure], values, rtol=1e-5, err_msg=measure)


def test_a_rank_is_killed_and_the_next_attempt_comes_to_the_same_bits(trained):
    (other,) = (each for each in trained["killed"].errors if each != "died")
    assert "PeerLost" in other
    # The newest may have been under way.
    assert [each for each in trained["written"] if each.startswith("000000-000000006")] == [
        f"000000-000000006.{end}" for end in ("json", "npz", "rank-0.npz", "rank-1.npz")
    ]
    again, undisturbed = trained["again"], trained["undisturbed"]
    assert again.history == undisturbed.history
    for name, values in undisturbed.weights.items():
        assert again.weights[name].tobytes() == values.tobytes(), name


def test_ranks_that_go_through_different_layers_are_told_which(trained):
    """The layers are of one size, so that nothing else would tell."""
    for error in trained["skipping"].errors:
        assert error.splitlines()[-1].startswith(
            "spark_nn.errors.ParamError: sharding='fsdp' needs all workers to go through the same layers, and rank 0 "
            "came to inner.1 where rank 1 came to inner.0"
        )
    assert len(trained["skipping"].errors) == 2


def test_a_rank_holds_a_part_only(trained):
    """With Adam that is parameters, gradients and two moments: half of each, and a few layers whole."""
    whole, divided = trained["deep none"].peaks, trained["deep fsdp"].peaks
    assert min(whole) > 0.8 * 4 * 4 * 12 * 1200**2
    assert max(divided) < 0.75 * min(whole), (divided, whole)


def test_layers_are_brought_together_by_size_where_they_are_called():
    module = models.transformer()
    called = sharding.called_once(module, SPECS)
    assert module.training
    assert sharding.groups_of(module, called) == ["blocks.layers.1", "blocks.layers.0", "words", ""]
    # A bias that two layers use stays with what holds both.
    found = sharding.groups_of(module, called, 1)
    assert found[:2] == ["tracked", "norm"] and {"head", "again"}.isdisjoint(found)
    # What is used without a call stays with what holds that use; to be asked for a type is no use.
    assert sharding.called_once(models.tied_by_attribute(), SPECS) == {"inner", ""}
    twice = torch.nn.Linear(3, 3)
    assert sharding.called_once(torch.nn.Sequential(twice, twice), SPECS) == {""}
    assert all(each.is_meta for each in sharding.outline(Blueprint(models.transformer), SPECS).parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.tied, "the model refers to into.weight otherwise than as an attribute"),
        (models.sometimes, "cannot divide sparse gradients: leave out sparse=True of layer table"),
        (models.scaled, "cannot divide the model: .*scalar"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, model, message):
    run = RunDir(tmp_path.as_uri())
    gang = GangContext(0, 1, "127.0.0.1", 1, 1, 0, 20.0, tmp_path, run, Alone(), Reporter(run, 1))
    opened = sharding.sharded(gang, model(), SPECS, torch.device("cpu"), seed=1, halves=False)
    with pytest.raises(ParamError, match=message), opened:
        pass


@pytest.mark.parametrize("model", [models.scaled, models.asked])
def test_what_cannot_be_built_without_memory_is_built_with_it_and_emptied(model):
    assert all(each.is_meta for each in sharding.outline(Blueprint(model), SPECS).parameters())


def test_weights_of_all_types_are_written_one_after_the_other(tmp_path):
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    kept = {
        "mask": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "wide": torch.tensor([1.5], dtype=torch.float64),
        "count": torch.tensor(7),
    }
    for name, each in kept.items():
        module.register_buffer(name, each)
    codec.save(module, tmp_path / "weights.safetensors", SPECS)
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == module.state_dict().keys()
    for name, each in module.state_dict().items():
        assert found[name].dtype is each.dtype
        assert torch.equal(found[name], each), name
    assert codec.inputs_of(tmp_path / "weights.safetensors") == SPECS
    module.register_buffer("complex", torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(ParamError, match="the model's complex is of complex128, which a safetensors file cannot hold"):
        codec.save(module, tmp_path / "other.safetensors")
