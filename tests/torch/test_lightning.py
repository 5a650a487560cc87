"""LightningModules trained by their own steps, against plain loops and against the same networks with a loss."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from pyspark.sql import functions as F
from torch.nn import functional

from spark_nn import TorchModel
from spark_nn.errors import ModelFileError, ParamError, TrainingError
from tests.keras.test_fit import arrays, data
from tests.torch import models

pytest.importorskip("pytorch_lightning")

from pytorch_lightning.core import hooks

from spark_nn.report import extended
from spark_nn.torch.lightning import check
from spark_nn.torch.metrics import Tally
from spark_nn.torch.objective import Objective
from spark_nn.torch.steps import Steps
from tests.torch import lit, test_fit

pytestmark = pytest.mark.timeout(240)


def estimator(store, model=lit.Net, **kwargs):
    """That of other networks, without a loss."""
    settings = {"loss": None, "validationIndicatorCol": "held", "outputKind": "regression", "numWorkers": 2, **kwargs}
    return test_fit.estimator(store, model=model, **settings)


def rows(spark):
    return data(spark).withColumn("held", F.expr("id % 5 = 1"))


def net_of(model):
    return {name: each.numpy() for name, each in model.model.net.state_dict().items()}


def logits(output, target):
    return functional.binary_cross_entropy_with_logits(output[:, 0], target.float())


@pytest.fixture(scope="module")
def fitted(sessions, tmp_path_factory):
    """On two workers, of which one was killed in the second epoch."""
    folder = tmp_path_factory.mktemp("fitted")
    arguments = {"mark": str(folder / "mark"), "rank": 1, "step": 16}
    stage = estimator(str(folder), modelParams=arguments, checkpointInterval=4, timeout=60.0)
    return stage.fit(rows(sessions.get("local[2]")))


def test_workers_equal_a_loop_in_one_process_and_the_history_has_what_is_logged(spark, fitted):
    """Although one was lost amid an epoch."""
    assert len(fitted.summary.restarts) == 1
    x, y, _ = arrays(rows(spark).where("not held"))
    torch.manual_seed(11)
    net = lit.Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    scheduler = models.decay(optimizer)
    history = {name: [] for name in ("loss", "train_accuracy", "size", "positive", "last", "half")}
    for _ in range(2):
        counted = []
        for inputs, target in models.global_batches(x, y, 2, 32):
            output, target = net(torch.from_numpy(inputs)), torch.from_numpy(target)
            loss = logits(output, target)
            right = ((output[:, 0] > 0) == target).float().mean().item()
            counted.append([len(target), loss.item(), right, target.sum()])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        number, losses, right, positive = np.transpose(counted)
        history["loss"].append(np.average(losses, weights=number))
        history["train_accuracy"].append(np.average(right, weights=number))
        history["size"].append(np.average(number / 2, weights=number))
        history["positive"].append(positive.sum())
        history["last"].append((len(history["last"]) == 1) / len(counted))
        history["half"].append(0.5 * len(history["loss"]))
    expected = {name: each.detach().numpy() for name, each in net.net.state_dict().items()}
    for name, found in net_of(fitted).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    told = fitted.getHistory()
    for name, values in history.items():
        np.testing.assert_allclose(told[name], values, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(told["train_loss"], told["loss"], rtol=1e-12)
    x, y, _ = arrays(rows(spark).where("held"))
    with torch.inference_mode():
        output, target = fitted.model(torch.from_numpy(x)), torch.from_numpy(y)
    np.testing.assert_allclose(told["val_loss"][-1], logits(output, target).item(), rtol=1e-6)
    accuracy = ((output[:, 0] > 0) == target).float().mean().item()
    for name in ("val_accuracy", "val_accuracy_too"):
        np.testing.assert_allclose(told[name][-1], accuracy, rtol=1e-6)
    # What training logs in the second epoch for the first time, and validation in both.
    np.testing.assert_array_equal([told["late"], told["val_late"]], [[np.nan, 1.0], [3.0, 3.0]])
    assert fitted.summary.toPandas()["late"].isna().tolist() == [True, False]
    assert {*told} == {
        *(*history, "train_loss", "positive_of_a_rank", "learning_rate", "late", "val_late"),
        *("val_loss", "val_accuracy", "val_accuracy_too", "val_size"),
    }


def test_the_same_network_with_a_loss_trains_alike(spark, store, fitted):
    settings = {"optimizer": "adam", "learningRate": 0.02, "lrScheduler": models.decay, "lrSchedulerInterval": "step"}
    loss = "binary_cross_entropy_with_logits"
    plain = estimator(store, models.mlp, loss=loss, outputKind=None, **settings).fit(rows(spark))
    for name, found in net_of(fitted).items():
        assert np.array_equal(found, plain.model.state_dict()[name].numpy()), name
    for name in ("loss", "val_loss", "learning_rate"):
        np.testing.assert_allclose(fitted.getHistory()[name], plain.getHistory()[name], rtol=1e-7, err_msg=name)


def test_an_instance_under_distributed_data_parallel(spark, store, fitted, tmp_path):
    torch.manual_seed(11)
    settings = {"collective": "native", "logDir": str(tmp_path / "logs")}
    native = estimator(store, lit.Net(mark=str(tmp_path / "mark")), **settings).fit(rows(spark))
    for name, found in net_of(native).items():
        np.testing.assert_allclose(found, net_of(fitted)[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, values in native.getHistory().items():
        if name != "positive_of_a_rank":  # which an attempt counts for itself
            np.testing.assert_allclose(values, fitted.getHistory()[name], rtol=1e-6, err_msg=name)
    # The mean over two ranks that have as many rows.
    np.testing.assert_allclose(native.getHistory()["positive_of_a_rank"], np.divide(fitted.getHistory()["positive"], 2))


def test_it_scores_and_is_loaded(spark, fitted, tmp_path):
    df = rows(spark)
    scored = fitted.transform(df)
    x, _, _ = arrays(df)
    with torch.inference_mode():
        expected = fitted.model(torch.from_numpy(x))[:, 0]
    np.testing.assert_allclose([row.prediction for row in scored.collect()], expected, atol=1e-6)
    with pytest.raises(ModelFileError, match="the model's loss is not known"):
        fitted.evaluate(df)
    fitted.save(str(tmp_path / "model"))
    loss = "binary_cross_entropy_with_logits"
    loaded = TorchModel.load(str(tmp_path / "model"), model=lit.Net, loss=loss)
    assert loaded.transform(df).collect() == scored.collect()
    found = loaded.evaluate(df.where("held"))["loss"]
    np.testing.assert_allclose(found, fitted.getHistory()["val_loss"][-1], rtol=1e-5)


REFUSED = [
    ({"model": torch.nn.Identity}, "loss is not set: give one.* or a LightningModule that defines training_step"),
    ({"model": lit.Unfinished}, "loss is not set"),
    ({"model": lit.Hooked}, "Hooked defines on_after_backward, which this training does not call"),
    ({"model": lit.Hooked()}, "Hooked defines on_after_backward"),
    ({"model": lit.Manual()}, "Manual sets automatic_optimization=False, and gradients have to be averaged"),
    ({"model": lit.Bare, "validationIndicatorCol": "held"}, "Bare has no validation_step, and there are validation"),
    ({"model": lit.Bare, "validationFraction": 0.1}, "Bare has no validation_step"),
    ({"optimizer": "sgd"}, "optimizer='sgd' without a loss: what a LightningModule's own training_step"),
    ({"learningRate": 0.1}, "learningRate=0.1 without a loss"),
    ({"lrScheduler": models.decay}, "lrScheduler=.* without a loss"),
    ({"metrics": ["auroc"]}, "metrics=.* without a loss"),
    ({"weightCol": "w"}, "weightCol='w' without a loss"),
    ({"classWeights": {1: 2.0}}, "classWeights=.* without a loss"),
    ({"sharding": "fsdp"}, "sharding='fsdp' without a loss"),
]


def test_what_cannot_be_is_refused_before_anything_starts(spark, store):
    for settings, message in REFUSED:
        settings = {"model": lit.Bare, "validationIndicatorCol": None, **settings}
        with pytest.raises(ParamError, match=message):
            estimator(store, **settings).fit(rows(spark))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: lit.Manual(), "Manual sets automatic_optimization=False"),
        (models.mlp, "loss is not set: give one"),
        (lit.Silent, "Silent.training_step returned a NoneType: it must be the loss of the batch"),
        (lit.Asking, r"self.trainer.accumulate_grad_batches: there is no Trainer of Lightning's here, .* max_epochs"),
    ],
    ids=["manual", "no-loss", "silent", "asking"],
)
def test_what_only_the_worker_can_see_is_refused_there(spark, store, model, message):
    with pytest.raises(TrainingError, match=message) as caught:
        estimator(store, model, validationIndicatorCol=None, numWorkers=1).fit(rows(spark))
    assert not caught.value.restarts


def steps(module, world=1):
    gang = SimpleNamespace(world=world, rank=0)
    tally = Tally(None, {}, torch.device("cpu"))
    return Steps(gang, module, tally, 3, 5), tally


def configured(returned):
    module = lit.Bare()
    module.configure_optimizers = lambda: returned(torch.optim.SGD(module.parameters(), lr=0.1))
    found, _ = steps(module)
    return found.configured()


def test_every_form_of_optimizers_is_taken_or_refused():
    for returned, interval in (
        (lambda each: each, None),
        (lambda each: [each], None),
        (lambda each: ([each], []), None),
        (lambda each: {"optimizer": each}, None),
        (lambda each: ([each], [models.decay(each)]), "epoch"),
        (lambda each: [{"optimizer": each, "lr_scheduler": models.decay(each)}], "epoch"),
        (lambda each: ([each], [{"scheduler": models.decay(each), "interval": "step", "name": "rate"}]), "step"),
        (lambda each: ([each], {"scheduler": models.plateau(each), "monitor": "loss"}), "epoch"),
    ):
        optimizer, scheduler, found = configured(returned)
        assert isinstance(optimizer, torch.optim.SGD)
        assert (scheduler is None) == (interval is None)
        assert found == (interval or "epoch")
    for returned, message in (
        (lambda each: None, "a NoneType as optimizer"),
        (lambda each: [each, each], "several optimizers"),
        (lambda each: ([each, each], []), "several optimizers"),
        (lambda each: torch.optim.LBFGS(each.param_groups[0]["params"]), "a LBFGS as optimizer"),
        (lambda each: ([each], [models.decay(each)] * 2), "several schedulers"),
        (lambda each: ([each], [3]), "a int as scheduler"),
        (lambda each: ([each], [{"scheduler": models.decay(each), "frequency": 2}]), "a scheduler with frequency=2"),
        (lambda each: ([each], [{"scheduler": models.decay(each), "often": 2}]), "a scheduler with often"),
        (lambda each: ([each], [models.plateau(each)]), "ReduceLROnPlateau without a monitor"),
    ):
        with pytest.raises(ParamError, match=rf"Bare.configure_optimizers returned {message}: it must be one"):
            configured(returned)


def test_parts_in_evaluation_stay_there_and_what_is_trained_stays_the_same():
    found, _ = steps(module := lit.Thawing())

    def evaluated(module):
        return [name for name, each in module.named_modules() if not each.training]

    for epoch in range(2):
        found.turn(module, "training")
        found.begin("training", epoch)
        assert evaluated(module) == ["net.0", "net.2"]
        found.turn(module, "validation")
        assert len(evaluated(module)) == len([*module.modules()])
        again, _ = steps(other := lit.Thawing())
        again.load_state_dict(json.loads(json.dumps(found.state_dict())))
        assert evaluated(other) == ["net.0", "net.2"]
    with pytest.raises(ParamError, match="Thawing changed requires_grad of net.0.bias, net.0.weight after"):
        found.begin("training", 2)


def test_a_name_of_validation_is_one_in_all_epochs():
    found, _ = steps(lit.Net())
    history, told = {}, []
    found.gang.progress = SimpleNamespace(state=SimpleNamespace(), update=lambda history: told.append(history))
    for epoch, trained in enumerate([{"a": 1}, {}, {"b": 1}, {}]):
        found.gang.progress.state.history = history
        logs = {"loss": 0, **trained}
        logs.update(found.named({"a": 2, "b": 3, "c": 4}, logs))
        history = extended(told.pop() if told else history, logs, epoch)
        again, _ = steps(lit.Net())
        again.load_state_dict(json.loads(json.dumps(found.state_dict())))
        again.gang, found = found.gang, again
    nan = np.nan
    expected = {"a": [1, nan, nan, nan], "b": [nan, nan, 1, nan], "val_a": [2] * 4, "val_b": [3] * 4, "c": [4] * 4}
    assert {*history} == {"loss", *expected}
    for name, values in expected.items():
        np.testing.assert_array_equal(history[name], values, err_msg=name)


def test_every_hook_of_a_fit_is_called_or_refused():
    called = ("on_train_epoch_start", "on_train_epoch_end", "on_validation_epoch_start", "on_validation_epoch_end")
    known = {name for kind in (hooks.ModelHooks, hooks.DataHooks, hooks.CheckpointHooks) for name in vars(kind)}
    apart = [name for name in known if name[0] == "_" or "test" in name or "predict" in name or "dataloader" in name]
    refused = known.difference(called, apart) | {"on_epoch_start", "on_epoch_end"}
    assert len(refused) > 25
    for name in refused:
        with pytest.raises(ParamError, match=f"Hooked defines {name}, which"):
            check(type("Hooked", (lit.Bare,), {name: lambda self: None})())


def test_what_is_logged_counts_by_rows_and_ranks():
    """And survives a checkpoint."""
    states = []
    for value in (1.0, 4.0):
        found, tally = steps(lit.Net())
        found._rows = int(value)
        found.module.log("mean", torch.tensor([value]), sync_dist=True)
        found.module.log("mean", 7, batch_size=1)
        found.module.held.update(torch.tensor([0.9, 0.2]), torch.tensor([1, int(value > 1)]))
        states.append(tally.state())
    found.module.log("right", found.module.held)
    tally.take([tally.state(), states[0]])
    assert tally.results() == {"mean": (1 + 7 + 16 + 7) / 7, "right": 0.75}
    assert json.loads(states[0].partition(b"\n")[0])
    twice = torchmetrics.SumMetric(distributed_available_fn=lambda: True, dist_sync_fn=lambda value, group: [value] * 2)
    apart = Tally({"sum": twice}, {}, torch.device("cpu"))
    apart._metrics["sum"].update(3.0)
    assert apart.results()["sum"] == 3.0
    for arguments, message in (
        ({"value": 1.0, "reduce_fx": "max"}, r"self.log\('x', reduce_fx='max'\): the history has means over rows only"),
        ({"value": torch.ones(2)}, r"self.log\('x', ...\) was given a Tensor: it must be a number"),
        ({"value": {"y": 1}}, r"self.log\('x', ...\) was given a dict"),
    ):
        with pytest.raises(ParamError, match=message):
            found.log("x", **arguments)
    with pytest.raises(TypeError, match="batchsize"):
        found.log("x", 1.0, batchsize=3)
    for rank in (0, 1):
        found.gang.rank = rank
        found.log("of_rank_0", float(rank), rank_zero_only=True, metric_attribute=None)
    assert tally.logged["of_rank_0"] == [0.0, found._rows]
    found._monitor = "val_x"
    assert found.watched({"loss": 1.0, "val_x": 3.0}) == 3.0
    with pytest.raises(ParamError, match="monitor 'val_x' was not logged in this epoch, but loss: name one of them"):
        found.watched({"loss": 1.0})
    assert not hasattr(found.trainer, "callback_metrics")
    assert [Objective(None).watched(logs) for logs in ({"loss": 1.0, "val_loss": 3.0}, {"loss": 1.0})] == [3.0, 1.0]
