"""Worker side of a Keras fit: build, compile, train in step, publish.

The driver imports this module to describe the training; Keras and its backend are imported only on the worker.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, ClassVar

from spark_nn.chance import random_numbers_kept
from spark_nn.checkpoint import Checkpoints, Place
from spark_nn.columns import Tensor
from spark_nn.dataset import petastorm_compat
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.stream import Stream
from spark_nn.errors import ParamError
from spark_nn.gang.collective import Engine
from spark_nn.gang.context import GangContext
from spark_nn.keras import backends, codec
from spark_nn.keras.backends import Backend
from spark_nn.keras.backends.imports import lean
from spark_nn.keras.customs import Customs
from spark_nn.keras.describe import describe_outputs, other_reduction
from spark_nn.keras.draw import draw
from spark_nn.keras.feed import Feed
from spark_nn.keras.names import check_name
from spark_nn.keras.pace import steps_per_execution
from spark_nn.outputs import Choice, Output
from spark_nn.report import Report
from spark_nn.trainer import Schedule, Trained, Trainer, check_digests, misfit, publish

# Where the driver leaves a model instance for the ranks, and the fitted model to go on from.
MODEL = "given.keras"
INITIAL_MODEL = "initial.keras"


@dataclass(frozen=True)
class Recipe:
    """What to train and how; None where the model's own compiled setting holds.

    Parameters
    ----------
    function : callable or None
        Returns the model.
    instance : bool
        Whether the driver left the model in the run directory, and there is no function.
    continued : bool
        Whether it left a fitted one there, whose weights are the first ones.
    arguments : dict
        Keyword arguments of the function.
    optimizer, loss, lossWeights, metrics : object or None
        As ``keras.Model.compile`` takes them, or as :func:`spark_nn.keras.codec.plain` made them.
    learningRate : float or None
        In place of the optimizer's own.
    callbacks : list or callable or None
        Keras callbacks, or a function that returns them.
    collective : {"auto", "ring", "native"}
        How gradients are averaged.
    outputs : Choice
        What the user says of the outputs.
    customs : Customs
        What the model consists of besides Keras's own parts.
    backend : {"tensorflow", "jax", "torch"}
        What Keras runs on.
    """

    function: Callable[..., Any] | None
    instance: bool
    continued: bool
    arguments: dict[str, Any]
    optimizer: Any
    loss: Any
    lossWeights: Any
    metrics: Any
    learningRate: float | None
    callbacks: Any
    collective: Engine = "auto"
    outputs: Choice = field(default_factory=Choice)
    customs: Customs = field(default_factory=Customs)
    backend: Backend = "tensorflow"


class KerasTrainer(Trainer):
    """Trains a Keras model on a gang.

    Parameters
    ----------
    schedule : Schedule
        How to go through the rows.
    recipe : Recipe
        What to train.
    """

    preload: ClassVar[tuple[str, ...]] = ("spark_nn.keras.training:prepare",)

    def __init__(self, schedule: Schedule, recipe: Recipe) -> None:
        super().__init__(schedule)
        self.recipe = recipe

    def train(
        self,
        gang: GangContext,
        manifest: Manifest,
        data: Stream,
        validation: Stream | None,
        checkpoints: Checkpoints,
    ) -> Trained:
        """Train in step with the other ranks and publish the model from rank 0."""
        clock = [time.monotonic()]
        gang.progress.update(phase="import")
        with lean(self.recipe.backend):
            room = backends.room(self.recipe.backend)
        import keras

        from spark_nn.keras.callbacks import Reporting, Session, chosen
        from spark_nn.keras.resume import Keeper
        from spark_nn.keras.sync import Synchroniser

        clock.append(time.monotonic())
        gang.progress.update(phase="build")
        averager = room.averager(self.recipe.collective, gang.collective, gang.host, gang.timeout)
        keras.utils.set_random_seed(self.schedule.seed % 2**32)
        example = Feed(data).example()
        model, put_out = self._build(gang, example, manifest.role("features"))
        with random_numbers_kept():
            before = fetched(gang, INITIAL_MODEL, self.recipe.customs) if self.recipe.continued else None
        if before is not None:
            take_weights(model, before)
        self._compile(model, gang.world)
        if before is not None:
            take_optimizer(model, before)
        outputs = describe_outputs(model, put_out, manifest, self.schedule.classWeights)
        self.recipe.outputs.of({name: Output.fromDict(output) for name, output in outputs.items()})
        order = tuple(outputs) if isinstance(put_out, (list, tuple)) and len(outputs) > 1 else None
        feed = Feed(data, self.schedule.classWeights, order)
        with random_numbers_kept():
            if gang.rank == 0:
                codec.check_loadable(model, self.recipe.customs)
        own, watched = chosen(self.recipe.callbacks, gang, validation is not None)
        if not watched and room.TOGETHER:
            self._pace(model, data.steps, gang.world)
        sync = Synchroniser(model, gang.collective, gang.rank, averager, nonFinite=self.schedule.nonFiniteLoss)
        keeper = Keeper(model, gang, checkpoints, own, self.schedule.epochs, data.steps)
        place = keeper.find()
        sync.start_alike()
        keeper.settle(feed)
        sync.first_step = place.step

        clock.append(time.monotonic())
        gang.progress.update(phase="trace")
        events = self.events(gang, place.epoch, functools.partial(draw, model, example))
        report = Report(gang.progress, self.schedule.epochs, data.steps, data.rows * gang.world, place, events)
        session = Session(
            [sync.callback(), feed.callback(), *own, Reporting(report), keeper],
            model,
            kept=own,
            epochs=self.schedule.epochs,
            steps=data.steps,
            watched=watched,
            report=report,
        )
        held = None if validation is None else Feed(validation, outputs=order)
        with sync.averaged_gradients(), feed.errors(), (held or feed).errors():
            for first, last, start in _parts(place, self.schedule.epochs):
                with session.part(start=start, final=last == self.schedule.epochs):
                    model.fit(
                        feed.dataset(start),
                        initial_epoch=first,
                        epochs=last,
                        verbose=0,
                        validation_data=None if held is None else held.dataset(),
                        callbacks=session,
                    )
                if model.stop_training:
                    break
        check_digests(gang, sync.digest())
        clock.append(time.monotonic())
        gang.progress.update(phase="publish")
        file, sha256 = publish(gang, functools.partial(codec.save, model), codec.SUFFIX) if gang.rank == 0 else ("", "")
        return report.trained(file, sha256, outputs, clock)

    def _build(self, gang: GangContext, example: Any, inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        """The model, built, and what it puts out for one row of its input."""
        recipe = self.recipe
        if recipe.function is not None:
            model = recipe.function(**recipe.arguments)
            if not codec.is_model(model):
                raise ParamError(f"the function given as model returned {model!r}, not a keras.Model")
        else:
            model = fetched(gang, MODEL if recipe.instance else INITIAL_MODEL, recipe.customs)
        return model, self._put_out(model, example, inputs)

    def _put_out(self, model: Any, example: Any, inputs: Sequence[Tensor]) -> Any:
        """What the model puts out for an example; to call it builds what is not built yet."""
        try:
            return model(example, training=False)
        except Exception as error:
            raise misfit(inputs, "each of the model's inputs as the model does", error) from error

    def _compile(self, model: Any, world: int) -> None:
        """Compile with the params that were given; the model's own settings hold for the others."""
        recipe = self.recipe
        own = dict(model._compile_config.config) if model.compiled else {}
        params = {"optimizer": recipe.optimizer, "loss": recipe.loss, "metrics": recipe.metrics}
        given = {name: codec.restore(value, recipe.customs.find) for name, value in params.items() if value is not None}
        for name, value in given.items():
            check_name(name, value)
        if recipe.lossWeights is not None:
            given["loss_weights"] = recipe.lossWeights
        if given or not model.compiled:
            settings = {**own, **given}
            if settings.get("loss") is None:
                raise ParamError(
                    "no loss: set the param loss (such as 'mse' or 'binary_crossentropy'), or compile the "
                    "model with one"
                )
            if model.compiled and "optimizer" not in given:
                settings["optimizer"] = model.optimizer
            settings.setdefault("optimizer", "rmsprop")  # Keras's own default
            model.compile(**settings)
        if world > 1:
            backends.current().ready(model)
            _check_reduction(model.loss)
        if recipe.learningRate is not None:
            model.optimizer.learning_rate = recipe.learningRate
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)

    def _pace(self, model: Any, steps: int, world: int) -> None:
        """Choose how many steps Keras runs in one call, where nobody has."""
        if model.steps_per_execution == 1 and not model.run_eagerly:
            together = steps_per_execution(model.count_params(), self.schedule.batch // world, steps)
            # A checkpoint is written between two calls.
            model.steps_per_execution = min(together, self.schedule.checkpointInterval or together)


def prepare() -> None:
    """Import what every training on this process's backend needs, without starting any of it."""
    backend = os.environ["KERAS_BACKEND"]
    with lean(backend):
        backends.room(backend).prepare()

    import spark_nn.keras.callbacks
    import spark_nn.keras.resume
    import spark_nn.keras.sync  # noqa: F401

    petastorm_compat.load()


def fetched(gang: GangContext, name: str, customs: Customs) -> Any:
    """A model that the driver left, compiled as far as its file says how."""
    # Keras reads a model from a local path only.
    with NamedTemporaryFile(suffix=codec.SUFFIX) as local:
        gang.run.get(name, Path(local.name))
        return codec.load_compiled(local.name, customs.find)


def take_weights(model: Any, before: Any) -> None:
    """Give a model the weights of a fitted one.

    Raises
    ------
    ParamError
        It has others.
    """
    taking, giving = ([*each.weights, *backends.current().buffers(each)] for each in (model, before))
    ours, theirs = ([(tuple(weight.shape), weight.path) for weight in each] for each in (taking, giving))
    if len(ours) != len(theirs):
        raise ParamError(
            f"initialModel has {len(theirs)} weights, and the network of the param model {len(ours)}: both must have "
            "the same layers; or leave model out"
        )
    for (shape, path), (given, _) in zip(ours, theirs, strict=True):
        if shape != given:
            raise ParamError(
                f"the weight {path} of the network of the param model has shape {shape}, and initialModel's {given}: "
                "both must have the same layers; or leave model out"
            )
    for variable, taken in zip(taking, giving, strict=True):
        variable.assign(taken.value)


def take_optimizer(model: Any, before: Any) -> None:
    """Give a model's optimizer the state of a fitted model's, where it is of the same kind; its settings stay."""
    ours, theirs = model.optimizer, getattr(before, "optimizer", None)
    if theirs is None or type(ours) is not type(theirs):
        return
    if [each.shape for each in ours.variables] != [each.shape for each in theirs.variables]:
        return
    for variable, value in zip(ours.variables, theirs.variables, strict=True):
        if variable.name != "learning_rate":
            variable.assign(value)


def _parts(place: Place, epochs: int) -> list[tuple[int, int, int]]:
    """The calls of ``fit`` that a training from a place on takes: first epoch, end of the last, steps left out.

    An epoch that another attempt began has fewer steps, and Keras wants all epochs of a call to have as many.
    """
    if not place.step:
        return [(place.epoch, epochs, 0)]
    rest = [(place.epoch + 1, epochs, 0)] if place.epoch + 1 < epochs else []
    return [(place.epoch, place.epoch + 1, place.step), *rest]


def _check_reduction(loss: Any) -> None:
    """Refuse losses that do not average over rows: the mean over ranks would not be that of the global batch."""
    if (found := other_reduction(loss)) is not None:
        raise ParamError(
            f"loss {found}, which several workers cannot share: use 'sum_over_batch_size' (Keras's default), or "
            "numWorkers=1"
        )
