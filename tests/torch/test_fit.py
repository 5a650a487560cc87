"""A fit on a gang against a plain loop of PyTorch's in one process, on the batches that the ranks have together."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchmetrics
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.sql import functions as F
from torch.nn import functional

from spark_nn import TorchEstimator, TorchModel
from spark_nn.errors import ColumnError, ParamError, TrainingError
from spark_nn.gang import board
from spark_nn.outputs import Output
from spark_nn.torch.metrics import made
from spark_nn.torch.names import exported
from tests.keras.test_fit import arrays, data
from tests.torch import models

pytestmark = pytest.mark.timeout(240)


def estimator(store, **kwargs):
    settings = {
        "model": models.mlp,
        "loss": "binary_cross_entropy_with_logits",
        "inputCols": ["a", "b", "c"],
        "batchSize": 32,
        "epochs": 2,
        "seed": 11,
        "verbose": 0,
        "shuffle": False,
        "storeUrl": store,
        **kwargs,
    }
    return TorchEstimator(**settings)


def logits(output, target):
    return functional.binary_cross_entropy_with_logits(output, target.float()[:, None])


OPTIMIZERS = {
    "adam": (2, "adam", {}, torch.optim.Adam),
    "momentum": (2, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "three": (3, "AdamW", {"weight_decay": 0.1}, torch.optim.AdamW),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_workers_equal_one_process_on_the_global_batches(sessions, store, name):
    world, given, arguments, kind = OPTIMIZERS[name]
    spark = sessions.get(f"local[{max(2, world)}]")
    df = data(spark)
    x, y, _ = arrays(df)
    settings = {"optimizer": given, "optimizerParams": arguments, "learningRate": 0.02, "batchSize": 12 * world}
    model = estimator(store, numWorkers=world, **settings).fit(df)
    expected = models.single_process(
        models.mlp, x, y, world, 12 * world, 2, 11, loss=logits, optimizer=lambda p: kind(p, lr=0.02, **arguments)
    )
    assert models.relative(models.weights(model.model), models.weights(expected)) < 1e-5
    scored = model.transform(df)
    assert scored.columns == [*df.columns, "rawPrediction", "probability", "prediction"]
    by_id = {row.id: row.probability[1] for row in scored.collect()}
    with torch.inference_mode():
        found = expected(torch.from_numpy(x)).sigmoid().numpy()[:, 0]
    np.testing.assert_allclose([by_id[row.id] for row in df.collect()], found, atol=1e-6)
    assert BinaryClassificationEvaluator().evaluate(scored) > 0.6


def weighted(output, target, weight):
    each = functional.binary_cross_entropy_with_logits(output, target.float()[:, None], reduction="none")
    return (each[:, 0] * weight).mean()


def test_weights_clipping_and_a_scheduler_act_as_in_one_process(spark, store):
    df = data(spark)
    x, y, w = arrays(df)
    model = estimator(
        store,
        numWorkers=2,
        optimizer="sgd",
        learningRate=0.5,
        weightCol="w",
        classWeights={1: 3.0},
        lrScheduler=models.decay,
        lrSchedulerInterval="step",
        clipGradNorm=0.1,
        clipGradValue=0.05,
    ).fit(df)

    def clip(parameters):
        parameters = list(parameters)
        torch.nn.utils.clip_grad_value_(parameters, 0.05)
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)

    expected = models.single_process(
        models.mlp, x, y, 2, 32, 2, 11,
        loss=weighted, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), weight=w * np.where(y == 1, 3, 1).astype("f4"),
        scheduler=models.decay, by_step=True, clip=clip,
    )  # fmt: skip
    assert models.relative(models.weights(model.model), models.weights(expected)) < 1e-5
    np.testing.assert_allclose(model.getHistory()["learning_rate"], [0.5 * 0.9**13, 0.5 * 0.9**26])


def test_metrics_of_two_workers_are_those_of_all_rows(spark, store, monkeypatch):
    """With a rate of almost nothing, the network is what it was at every step."""
    df = data(spark, 400).withColumn("held", F.expr("id % 5 = 1"))
    metrics = {"auc": "auroc", "accuracy": "accuracy", "f1": torchmetrics.F1Score("binary"), "error": models.absolute}
    settings = {"optimizer": "sgd", "learningRate": 1e-30, "metrics": metrics, "validationIndicatorCol": "held"}
    states, take = [], board._Fit.take
    monkeypatch.setattr(board._Fit, "take", lambda fit, state: states.append(state) or take(fit, state))
    model = estimator(store, numWorkers=2, epochs=1, verbose=2, **settings).fit(df)
    # The loss of the epoch under way is that of rank 0's rows so far.
    assert states[-1].loss == pytest.approx(model.getHistory()["loss"][0], abs=0.2)
    native = model.model
    for prefix, part in (("", df.where("not held")), ("val_", df.where("held"))):
        x, y, _ = arrays(part)
        with torch.inference_mode():
            output = native(torch.from_numpy(x))[:, 0]
        chance, labels = output.sigmoid(), torch.from_numpy(y).long()
        expected = {
            "loss": functional.binary_cross_entropy_with_logits(output, labels.float()),
            "auc": torchmetrics.functional.auroc(chance, labels, "binary"),
            "accuracy": ((chance > 0.5) == labels).float().mean(),
            "f1": torchmetrics.functional.f1_score(chance, labels, "binary"),
            "error": (chance - labels).abs().mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(model.getHistory()[prefix + name], [float(value)], rtol=1e-6, err_msg=name)
        measured = model.evaluate(part.repartition(3))
        assert set(measured) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(measured[name], float(value), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("engine", ["ring", "native"])
def test_layers_that_are_not_always_used_and_sparse_gradients(spark, store, engine):
    df = data(spark)
    x, y, _ = arrays(df)
    settings = {"model": models.sometimes, "optimizer": models.sometimes_optimizer, "collective": engine}
    model = estimator(store, numWorkers=2, **settings).fit(df)
    expected = models.single_process(
        models.sometimes, x, y, 2, 32, 2, 11, loss=two_halves, optimizer=models.sometimes_optimizer
    )
    assert models.relative(models.weights(model.model), models.weights(expected)) < 1e-5


def two_halves(output, target):
    return logits(output, target)


def test_batch_norm_tracks_the_mean_of_the_workers_and_dropout_differs(spark, store):
    df = data(spark, 64)
    x, y, _ = arrays(df)
    arguments = {"batch_norm": True}
    settings = {"modelParams": arguments, "optimizer": "sgd", "learningRate": 0.1, "batchSize": 64, "epochs": 1}
    model = estimator(store, numWorkers=2, **settings).fit(df)
    torch.manual_seed(11)
    first = models.mlp(**arguments)
    halves = [first, copy.deepcopy(first)]
    for rank, net in enumerate(halves):
        part = slice(32 * rank, 32 * rank + 32)
        logits(net(torch.from_numpy(x[part])), torch.from_numpy(y[part])).backward()
    state = model.model.state_dict()
    for name, parameter in first.named_parameters():
        gradient = (parameter.grad + dict(halves[1].named_parameters())[name].grad) / 2
        np.testing.assert_allclose(state[name], (parameter - 0.1 * gradient).detach(), rtol=1e-5, atol=1e-7)
    for name in ("running_mean", "running_var"):
        mean = sum(getattr(net[2], name) for net in halves) / 2
        np.testing.assert_allclose(state[f"2.{name}"], mean, rtol=1e-6)
    # Where both drop the same, halves of the same rows would have the same gradient, and be one of them.
    doubled = data(spark, 32).union(data(spark, 32)).coalesce(1)
    settings.update(modelParams={"dropout": 0.5})
    two, one = (estimator(store, numWorkers=n, **{**settings, "batchSize": 32 * n}).fit(df) for n, df in
                ((2, doubled), (1, data(spark, 32).coalesce(1))))  # fmt: skip
    assert models.relative(models.weights(two.model), models.weights(one.model)) > 1e-3


def test_an_instance_that_uses_a_weight_twice_is_trained_and_scores(spark, store):
    df = data(spark)
    x, y, _ = arrays(df)
    made = models.tied()
    before = [each.clone() for each in made.parameters()]
    model = estimator(store, model=made, numWorkers=2, optimizer="sgd", learningRate=0.1).fit(df)
    assert all(torch.equal(*both) for both in zip(made.parameters(), before, strict=True))
    expected = models.single_process(
        models.tied, x, y, 2, 32, 2, 11, loss=logits, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    assert models.relative(models.weights(model.model), models.weights(expected)) < 1e-5
    native = model.model
    assert native.out.weight is native.into.weight is native.alias[0]
    probability = [row.probability[1] for row in model.transform(df).collect()]
    with torch.inference_mode():
        np.testing.assert_allclose(probability, expected(torch.from_numpy(x)).sigmoid()[:, 0], atol=1e-6)


def test_several_inputs_and_outputs(spark, store):
    df = data(spark).withColumn("color", F.expr("cast(id % 4 as int)")).withColumn("price", F.expr("a + b"))
    model = estimator(
        store,
        model=models.several,
        loss={"price": "mse_loss", "kind": "cross_entropy"},
        numWorkers=2,
        optimizer="adam",
        learningRate=0.05,
        epochs=12,
    )
    model.clear(model.inputCols)
    model.setInputs({"numbers": ["a", "b"], "color": "color"}).setLabels({"price": "price", "kind": "color"})
    fitted = model.fit(df)
    scored = fitted.transform(df)
    assert [each for each in scored.columns if each not in df.columns] == [
        "prediction_price", "rawPrediction_kind", "probability_kind", "prediction_kind",
    ]  # fmt: skip
    found = scored.collect()
    rows = {"numbers": np.float32([[row.a, row.b] for row in found]), "color": np.float32([row.color for row in found])}
    with torch.inference_mode():
        put_out = fitted.model(**{name: torch.from_numpy(each) for name, each in rows.items()})
    np.testing.assert_allclose([row.prediction_price for row in found], put_out["price"][:, 0], atol=1e-5)
    np.testing.assert_allclose([row.probability_kind.toArray() for row in found], put_out["kind"].softmax(1), atol=1e-5)
    expected = functional.mse_loss(put_out["price"][:, 0], torch.tensor([row.price for row in found]))
    expected += functional.cross_entropy(put_out["kind"], torch.tensor([row.color for row in found]))
    np.testing.assert_allclose(fitted.evaluate(df)["loss"], float(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [("cross_entropy", 3), (torch.nn.NLLLoss(), 3), ("binary_cross_entropy", 1), ("huber_loss", 1)],
    ids=["logits", "log-probabilities", "probability", "number"],
)
def test_the_loss_decides_the_columns(spark, store, loss, outputs):
    df = data(spark).withColumn("label", F.expr(f"cast(id % {max(2, outputs)} as double)"))
    layers = {3: torch.nn.LogSoftmax(1), 1: torch.nn.Sigmoid()}
    net = torch.nn.Sequential(torch.nn.Linear(3, outputs), layers[outputs])
    net = net[0] if loss == "cross_entropy" else net
    row = estimator(store, model=net, loss=loss, epochs=1, mixedPrecision="no").fit(df).transform(df).first()
    with torch.inference_mode():
        scored = estimator(store, model=net, loss=loss, epochs=1).fit(df)
        output = scored.model(torch.tensor([[row.a, row.b, row.c]], dtype=torch.float32))[0]
    if loss == "huber_loss":
        np.testing.assert_allclose(row.prediction, float(output[0]), rtol=1e-5)
        return
    expected = output.softmax(0) if outputs == 3 else torch.stack([1 - output[0], output[0]])
    np.testing.assert_allclose(row.probability.toArray(), expected, rtol=1e-5)
    assert row.prediction == float(expected.argmax())
    assert abs(row.probability.toArray().sum() - 1) < 1e-6


def test_bfloat16_trains_close_to_single_precision(spark, store):
    df = data(spark)
    single, mixed = (
        estimator(store, numWorkers=2, optimizer="sgd", learningRate=0.1, mixedPrecision=each).fit(df)
        for each in ("no", "bf16")
    )
    assert all(each.dtype is torch.float32 for each in mixed.model.parameters())
    assert 1e-5 < models.relative(models.weights(mixed.model), models.weights(single.model)) < 0.1


REFUSED = [
    ({"loss": "mse"}, r"loss='mse': torch.nn.functional has no loss of this name .* did you mean 'mse_loss'"),
    ({"loss": torch.nn.MSELoss(reduction="sum"), "numWorkers": 2}, "reduction='sum', which several workers cannot"),
    ({"loss": torch.nn.MSELoss(reduction="none")}, "reduction='none', which is no scalar: use 'mean'"),
    ({"loss": torch.nn.CrossEntropyLoss(torch.ones(2)), "weightCol": "w"}, "weights classes itself .* use one of them"),
    ({"loss": torch.nn.NLLLoss(ignore_index=0), "classWeights": {1: 2.0}}, "weights classes itself .* use one of them"),
    ({"loss": two_halves, "weightCol": "w"}, "weight the loss of each row, and loss=.* does not tell it"),
    ({"modelParams": {"width": 3}}, r"modelParams=\{'width': 3\} are not arguments of the function"),
    (
        {"model": torch.nn.Linear(3, 1), "modelParams": {"units": 3}},
        "are arguments of a function, but model is a Linear",
    ),
    ({"model": torch.nn.LazyLinear(1)}, "the model's weight, bias will have a shape only when it has been called"),
    ({"mixedPrecision": "fp16", "useGpu": False}, "halves need GPUs"),
    ({"optimizer": "adma"}, "torch.optim has no class of this name .did you mean 'adam'.*; known are adadelta"),
    ({"optimizer": "lr_scheduler"}, "torch.optim has no class of this name; known are adadelta"),
    ({"metrics": ["acuracy"]}, "metrics='acuracy': torchmetrics has no metric of this name .did you mean 'accuracy'"),
    (
        {"metrics": {"a": "acc"}},
        "metrics='acc': torchmetrics has no metric of this name .did you mean 'accuracy'.*; give",
    ),
    ({"metrics": ["mean_absolut_error"]}, "metrics='mean_absolut_error': .* .did you mean 'mean_absolute_error'"),
    ({"metrics": {"m": "nonsense"}}, "metrics='nonsense': torchmetrics has no metric of this name; give one of"),
    ({"sharding": "fsdp", "numWorkers": 2, "collective": "ring"}, "exchanges by torch.distributed, so 'auto'"),
    ({"sharding": "fsdp", "numWorkers": 2, "mixedPrecision": "fp16"}, "use 'bf16', whose loss needs no scaling"),
    ({"inputCols": ["name"]}, "column 'name' holds string values, and PyTorch has no tensors of them"),
]


def test_the_names_of_optimizers_are_pytorchs():
    classes = {each for each in vars(torch.optim).values() if isinstance(each, type)}
    expected = {each.__name__ for each in classes if issubclass(each, torch.optim.Optimizer)}
    assert exported("torch", "optim") == expected
    assert len(expected) > 10


def test_metrics_of_other_names_are_refused_wherever_they_are_given():
    network, example = torch.nn.Linear(1, 1), np.zeros((1, 1), "float32")
    message = "metrics='acc': torchmetrics has no metric of this name .did you mean 'accuracy'"
    with pytest.raises(ParamError, match=message):
        TorchModel.fromTorch(network, example, loss="mse_loss", metrics=["auroc", "acc"])
    with pytest.raises(ParamError, match=message):
        TorchModel.load("nowhere", model=network, metrics={"a": "acc"})
    with pytest.raises(ParamError, match=message):  # where the driver has no torchmetrics
        made(["acc"], {"": Output("binary", (1,))})


def test_what_cannot_be_is_refused_before_anything_starts(spark, store):
    df = data(spark).withColumn("name", F.lit("x"))
    for settings, message in REFUSED:
        with pytest.raises((ParamError, ColumnError), match=message):
            estimator(store, **settings).fit(df)
    with pytest.raises(ParamError, match="loss is not set"):
        TorchEstimator(model=torch.nn.Linear, modelParams={"in_features": 3, "out_features": 1}).fit(df)
    for settings in ({"loss": torch.nn.MSELoss}, {"optimizer": 3}, {"metrics": "auroc"}, {"lrScheduler": "cosine"}):
        with pytest.raises(TypeError, match=next(iter(settings))):
            TorchEstimator(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": models.not_a_module}, "the function given as model returned 3, not a torch.nn.Module"),
        ({"modelParams": {"inputs": 4}}, r"does not take the input that the columns make \(the input: float32 \(3,\)"),
        ({"optimizer": "lbfgs"}, "gives a LBFGS: it must be a torch.optim.Optimizer that makes its step from"),
        ({"mixedPrecision": "fp16"}, "needs a GPU on every worker, and this one has none"),
        ({"lrScheduler": models.plateau, "lrSchedulerInterval": "step"}, "ReduceLROnPlateau makes its step by epoch"),
    ],
)
def test_what_only_the_worker_can_see_is_refused_there(spark, store, settings, message):
    with pytest.raises(TrainingError, match=message):
        estimator(store, **settings).fit(data(spark))
