"""Keras on JAX and PyTorch: fits in step against plain Keras of the same backend in one process, without Spark.

The cases are those of `tests.keras.test_sync`, which holds TensorFlow to many more of them, and some of each backend's
own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from tests.keras.ranks import BATCH, ROWS, Case, Ranks
from tests.keras.test_sync import (
    EXACT,
    closeness,
    compiled,
    equals_single,
    last_line,
    rows,
    same_history,
    smooth,
)

pytestmark = pytest.mark.timeout(120)

# A plain one, one with moments, one that scales the loss, and one made of others.
OPTIMIZERS = ["SGD", "Adam", "LossScaleOptimizer", "MultiOptimizer"]


@pytest.fixture(scope="module", params=["jax", "torch"])
def ranks(request):
    with Ranks(request.param, 2) as processes:
        processes.backend = request.param
        yield processes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_give_what_one_process_gives_on_the_global_batches(ranks, name):
    equals_single(ranks, 2, "every_optimizer", name=name)


@pytest.mark.parametrize("name", ["global_clipnorm", "ema", "accumulation", "schedule"])
def test_options_act_on_the_averaged_gradient(ranks, name):
    equals_single(ranks, 2, "with_options", name=name)


def test_metrics_are_those_of_all_rows_in_training_and_in_validation(ranks):
    outcomes, expected = equals_single(ranks, 2, "classified")
    same_history(outcomes, expected, rel=1e-5)
    for outcome in outcomes:
        assert outcome.probe == {name: values[-1] for name, values in outcome.history.items()}


def test_callbacks_decide_alike_and_as_in_one_process(ranks):
    outcomes, expected = equals_single(ranks, 2, "stopping")
    same_history(outcomes, expected, rel=EXACT)
    assert len(outcomes[0].history["loss"]) < 12


def test_several_inputs_and_outputs_with_weights(ranks):
    outcomes, expected = equals_single(ranks, 2, "several_parts")
    same_history(outcomes, expected, rel=1e-5)


def test_dropout_drops_something_else_on_every_rank_and_the_same_when_repeated(ranks):
    first, again = ranks.alike(2, "dropping"), ranks.alike(2, "dropping")
    assert first[0].digest == again[0].digest
    assert closeness(first[0], ranks.single("dropping")) > 1e-4


def normalised_alike():
    """Every rank gets the same rows, so that normalising each rank's batch is normalising the global one."""
    import keras

    x, y = rows()
    half = BATCH // 2
    for start in range(0, ROWS - half, BATCH):
        x[start + half : start + BATCH], y[start + half : start + BATCH] = (
            x[start : start + half],
            y[start : start + half],
        )
    x[-3:], y[-3:] = x[-6:-3], y[-6:-3]
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), *smooth().layers])
    return Case(compiled(keras.optimizers.Adam(0.05), model), x, y)


def test_batch_normalisation_of_the_same_rows_everywhere_is_that_of_one_process(ranks):
    _, expected = equals_single(ranks, 2, "normalised_alike")
    assert any("moving_variance" in path for path in expected.weights)


@pytest.mark.parametrize(("rank", "step"), [(0, 2), (1, 4)])
def test_a_loss_that_is_not_finite_on_any_rank_stops_all_ranks_at_its_step(ranks, rank, step):
    rate = 0.02 if step == 2 else 0.01
    for outcome in ranks.gang(2, "going_wrong", rank=rank, step=step, jit=ranks.backend == "jax"):
        assert f"in epoch 2 at step {step}, with learning rate {rate:g}." in last_line(outcome)


def test_one_process_is_watched_too(ranks):
    jax = ranks.backend == "jax"
    (outcome,) = ranks.gang(1, "going_wrong", world=1, rank=None, made=10, epoch=1, jit=jax, spe=4 if jax else 1)
    assert "in epoch 1 at step 14, with learning rate 0.02." in last_line(outcome)


def by_two(**settings):
    """A ``train_step`` for PyTorch that scales no loss, and applies the gradients by two optimizers."""
    import keras
    import torch

    from tests.keras.test_sync import going_wrong

    case = going_wrong(**settings)
    model = case.model
    model.other = keras.optimizers.SGD(0.01)

    def train_step(data):
        x, y = data
        model.zero_grad()
        loss = model.compute_loss(x, y, model(x, training=True))
        loss.backward()
        for optimizer, variables in (
            (model.optimizer, model.trainable_weights[:2]),
            (model.other, model.trainable_weights[2:]),
        ):
            with torch.no_grad():
                optimizer.apply([variable.value.grad for variable in variables], variables)
        return {"loss": loss}

    vars(model)["train_step"] = train_step
    return case


@pytest.mark.parametrize("world", [1, 2])
def test_a_train_step_that_scales_no_loss_is_watched_by_what_it_logs(ranks, world):
    if ranks.backend != "torch":
        pytest.skip("JAX's log their loss, too, and have one optimizer")
    outcomes = ranks.gang(world, "by_two", world=world, rank=world - 1)
    assert "in epoch 2 at step 4, with learning rate 0.01." in last_line(outcomes[-1])
    assert all(outcome.error for outcome in outcomes)


def routed():
    """Layers that take some rows only: a rank's rows go to one of two, and to the third come none."""
    import keras

    class Routed(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.experts = [keras.layers.Dense(6, "softplus", kernel_initializer="ones") for _ in range(3)]

        def build(self, shape):
            for expert in self.experts:
                expert.build(shape)

        def call(self, x):
            put_out = keras.ops.zeros((len(x), 6))
            for number, expert in enumerate(self.experts):
                mine = x[:, 0] == number
                if mine.any():
                    put_out = put_out + mine[:, None] * expert(x)
            return put_out

    x, y = rows()
    half = np.arange(ROWS) % BATCH // (BATCH // 2)
    half[-(ROWS % BATCH) :] = np.arange(ROWS % BATCH) // (ROWS % BATCH // 2)
    x[:, 0] = half
    model = keras.Sequential([keras.Input((4,)), Routed(), keras.layers.Dense(1, kernel_initializer="ones")])
    return Case(compiled(keras.optimizers.AdamW(0.05, weight_decay=0.1), model), x, y)


def test_gradients_that_a_rank_lacks_count_as_zeros_and_none_at_all_as_none(ranks):
    if ranks.backend != "torch":
        pytest.skip("what a compiled step consists of does not depend on its rows")
    outcomes, _ = equals_single(ranks, 2, "routed")
    first, other, unused = [outcomes[0].weights[path] for path in outcomes[0].weights if "kernel" in path][:3]
    assert not np.allclose(first, other)
    assert (unused == 1).all()  # it does not even decay


def wrapped():
    """What PyTorch keeps and draws by itself: running statistics, and dropout."""
    import keras
    import torch

    from spark_nn.checkpoint import Place
    from spark_nn.gang.collective import Alone
    from spark_nn.keras import backends
    from spark_nn.keras.resume import Keeper, _set_random
    from spark_nn.keras.tally import array_of

    class Wrapped(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            norm = torch.nn.BatchNorm1d(4)
            norm.register_buffer("process", torch.tensor(float(os.getpid()), dtype=torch.float64))
            self.norm = norm

        def call(self, x, training=None):
            return torch.nn.functional.dropout(self.norm(x, training=training), 0.2, self.training)

    def probe(model):
        room = backends.current()
        found = {each.path.rpartition(".")[2]: array_of(each) for each in room.buffers(model)}
        drawn = kept(model)
        block = {"": case.x}
        scored = [room.Forward(model, "cpu")(block, False, None)[""] for _ in range(2)]
        model.reset_metrics()
        room.Step(model)((case.x, case.y), True)
        return {
            **found,
            "drawn": drawn,
            "scored": scored,
            "pid": os.getpid(),
            "measured": model.get_metrics_result()["loss"].item(),
        }

    def kept(model):
        """What is drawn after a checkpoint; brought back, it is drawn again, and all buffers are as before."""
        saved = {}
        progress = SimpleNamespace(state=SimpleNamespace(history={}, seconds=0.0))
        gang = SimpleNamespace(rank=0, collective=Alone(), progress=progress)
        checkpoints = SimpleNamespace(save=lambda place, state, alike, own: saved.update(alike, **own))
        keeper = Keeper(model, gang, checkpoints, [], 1, 1)
        keeper._save(Place(0, 1))
        drawn = torch.rand(3).tolist()
        before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
        for each in backends.current().buffers(model):
            each.assign(0 * array_of(each))
        keeper._assign(saved)
        _set_random(saved)
        assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
        assert torch.rand(3).tolist() == drawn
        return drawn

    case = Case(compiled("sgd", keras.Sequential([keras.Input((4,)), Wrapped(), *smooth().layers])), *rows())
    case.probe = probe
    # What Keras builds a model with has moved them already.
    norm = case.model.layers[0].norm.module
    case.callbacks = [keras.callbacks.LambdaCallback(on_train_begin=lambda logs: norm.reset_running_stats())]
    return case


def test_what_pytorch_keeps_by_itself_is_kept_in_step_and_does_not_train_when_it_scores(ranks):
    if ranks.backend != "torch":
        pytest.skip("PyTorch's own")
    one, other = (outcome.probe for outcome in ranks.alike(2, "wrapped"))
    x, y = rows()
    assert one["process"] == other["process"] == one["pid"] != other["pid"]
    assert one["num_batches_tracked"] == other["num_batches_tracked"] == 12
    np.testing.assert_array_equal(one["running_mean"], other["running_mean"])
    # Each rank moves them by the halves of the batches that it gets; for both together that is by whole batches.
    mean = np.zeros(4)
    for batch in [x[start : start + BATCH] for start in range(0, ROWS, BATCH)] * 2:
        mean = 0.9 * mean + 0.1 * batch.mean(axis=0)
    np.testing.assert_allclose(one["running_mean"], mean, rtol=1e-5)
    assert one["drawn"] != other["drawn"]
    first, again = one["scored"]
    np.testing.assert_array_equal(first, again)
    assert one["measured"] == pytest.approx(float(np.mean((first - y) ** 2)), rel=1e-5)


def large_numbers():
    """What JAX's room says of whole numbers beyond 32 bits, wherever they come from; and of models of five rows."""
    import keras

    from spark_nn.columns import Tensor
    from spark_nn.errors import ColumnError
    from spark_nn.keras import backends
    from spark_nn.keras.predict import KerasPredictor

    room = backends.current()
    large = np.array([3, 2**31])

    def refused(function, *arguments):
        try:
            function(*arguments)
        except ColumnError as error:
            return str(error)
        return ""

    def probe(model):
        ids = keras.Sequential([keras.Input((), dtype="int64"), keras.layers.Rescaling(1.0)])
        forward = room.Forward(ids, "cpu:0")
        tensor = Tensor("features", ("id",), "scalar", "int64", 0, ())
        five = keras.Sequential([keras.Input((4,), batch_size=5), Five()])
        return {
            "training": refused(room.check_block, [tensor], {"features": large}),
            "scoring": refused(forward, {"": -large - 1}, False, None),
            "measuring": refused(room.Step(model), (case.x[:2], large), True),
            "fits": forward({"": large - 1}, False, None)[""].tolist(),
            "five": KerasPredictor(five, "cpu:0", "jax")(case.x[:12]),
        }

    class Five(keras.layers.Layer):
        def call(self, x):
            return keras.ops.reshape(keras.ops.reshape(x, (5, 2, 2)) * 2.0, (5, 4))

    case = Case(compiled("sgd"), *rows(), epochs=1, probe=probe)
    return case


def test_jax_refuses_whole_numbers_that_it_would_wrap_and_keeps_to_a_fixed_number_of_rows(ranks):
    if ranks.backend != "jax":
        pytest.skip("PyTorch has 64 bits, and takes any number of rows")
    (outcome,) = ranks.alike(1, "large_numbers")
    found = outcome.probe
    number = "holds the whole number {}, and JAX takes those from -2147483648 to 2147483647"
    assert found["training"].startswith("column 'id' " + number.format(2**31))
    assert found["scoring"].startswith("the model's only input " + number.format(-(2**31) - 1))
    assert found["measuring"].startswith("the model's only label " + number.format(2**31))
    assert found["fits"] == [2, 2**31]  # as floats, which have no odd numbers there
    np.testing.assert_array_equal(found["five"], 2 * rows()[0][:12])


def own_step(way):
    """A ``train_step`` of the user's own, as JAX has them: good, or doing more than what can be cut in two."""
    import jax
    import keras

    class Own(keras.Sequential):
        def train_step(self, state, data):
            trained, others, optimizer, metrics = state
            x, y = data

            def loss_of(trained):
                predicted, fresh = self.stateless_call(trained, others, x, training=True)
                return 3 * keras.ops.mean(keras.ops.square(predicted - y)), fresh

            (loss, others), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
            trained, optimizer = self.optimizer.stateless_apply(optimizer, grads, trained)
            if way == "bad":
                trained = [value * 0.9 for value in trained]
            return {"loss": loss}, (trained, others, optimizer, metrics)

    return Case(compiled(keras.optimizers.SGD(0.003), Own(smooth().layers)), *rows())


def test_a_train_step_of_ones_own_is_cut_in_two_where_that_can_be(ranks):
    if ranks.backend != "jax":
        pytest.skip("only JAX's have to be cut")
    equals_single(ranks, 2, "own_step", way="good")
    for outcome in ranks.gang(2, "own_step", way="bad"):
        assert "it must call self.optimizer.stateless_apply once" in last_line(outcome)


def unaveraged():
    case = Case(compiled("sgd"), *rows())
    from spark_nn.gang.collective import Alone
    from spark_nn.keras import backends

    case.sync = {"averager": backends.current().Averager(Alone())}
    return case


def test_without_the_averaging_these_comparisons_would_fail(ranks):
    outcomes = ranks.gang(2, "unaveraged")
    assert outcomes[0].digest != outcomes[1].digest
