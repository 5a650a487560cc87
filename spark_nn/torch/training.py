"""Worker side of a PyTorch fit: build, train in step, publish.

The driver imports this module to describe the training; PyTorch is imported only on the worker.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, ClassVar, Literal

import numpy as np

from spark_nn.checkpoint import Checkpoints
from spark_nn.columns import Tensor
from spark_nn.dataset import petastorm_compat
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.stream import Stream
from spark_nn.errors import ParamError
from spark_nn.gang.context import GangContext
from spark_nn.labels import check_values
from spark_nn.outputs import Choice, Output, check_labels
from spark_nn.report import Report
from spark_nn.torch import codec, lightning, losses
from spark_nn.torch.blueprint import Blueprint, Specs
from spark_nn.torch.draw import draw
from spark_nn.torch.names import unknown_optimizer
from spark_nn.torch.objective import Objective
from spark_nn.trainer import Schedule, Trained, Trainer, check_digests, misfit, publish

# Where the driver leaves the weights to begin with.
WEIGHTS = "given.safetensors"
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Recipe:
    """What to train and how.

    Parameters
    ----------
    blueprint : Blueprint
        What makes the network, with the loss and the metrics.
    weights : {"model", "initialModel"} or None
        The param whose weights the driver left in the run directory, if any.
    optimizer : str or callable
        Name or class of an optimizer of PyTorch's, or a function of the parameters; not looked at where the blueprint
        has no loss, and neither are the next four.
    optimizerParams : dict
        Its arguments.
    learningRate : float or None
        In place of the optimizer's own.
    lrScheduler : callable or None
        Takes the optimizer, returns what turns its learning rate.
    lrSchedulerInterval : {"epoch", "step"}
        When that happens.
    clipGradNorm, clipGradValue : float or None
        Limits of the gradient of the global batch.
    mixedPrecision : {"no", "bf16", "fp16"}
        What the network computes in.
    stopWhen : callable or None
        Takes the history; whether training is to end.
    collective : {"auto", "ring", "native"}
        How gradients are averaged.
    sharding : {"none", "fsdp"}
        Whether each rank holds a part of the network only.
    validates : bool
        Whether there are validation rows.
    outputs : Choice
        What the user says of the outputs.
    """

    blueprint: Blueprint
    weights: Literal["model", "initialModel"] | None
    optimizer: Any
    optimizerParams: dict[str, Any]
    learningRate: float | None
    lrScheduler: Callable[[Any], Any] | None
    lrSchedulerInterval: Literal["epoch", "step"]
    clipGradNorm: float | None
    clipGradValue: float | None
    mixedPrecision: Precision
    stopWhen: Callable[[dict[str, list[Any]]], Any] | None
    collective: Literal["auto", "ring", "native"] = "auto"
    sharding: Literal["none", "fsdp"] = "none"
    validates: bool = False
    outputs: Choice = field(default_factory=Choice)


class TorchTrainer(Trainer):
    """Trains a network of PyTorch's on a gang.

    Parameters
    ----------
    schedule : Schedule
        How to go through the rows.
    recipe : Recipe
        What to train.
    """

    preload: ClassVar[tuple[str, ...]] = ("spark_nn.torch.training:prepare",)

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
        import torch

        from spark_nn.torch import sync
        from spark_nn.torch.feed import Feed
        from spark_nn.torch.loop import Loop
        from spark_nn.torch.metrics import Tally
        from spark_nn.torch.steps import Steps

        clock.append(time.monotonic())
        gang.progress.update(phase="build")
        recipe, seed = self.recipe, self.schedule.seed
        torch.set_num_threads(gang.cpus)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _check_precision(recipe.mixedPrecision, device.type)
        feed = Feed(data, device, self.schedule.classWeights)
        module, put_out, opened = self._opened(gang, feed.specs, manifest.role("features"), device)
        stepped = recipe.blueprint.loss is None
        if not stepped:
            check_labels(put_out, [tensor.key for tensor in manifest.role("label")])
        outputs = losses.describe(put_out, recipe.blueprint.loss)
        check_values(losses.takes(put_out, recipe.blueprint.loss), manifest, self.schedule.classWeights)
        described = recipe.outputs.of({name: Output.fromDict(output) for name, output in outputs.items()})
        tally = Tally(recipe.blueprint.metrics, described, device)
        with opened as averager:
            if stepped:
                own = Steps(gang, module, tally, self.schedule.epochs, data.steps)
                optimizer, scheduler, interval = own.configured()
                objective: Objective = own
                recipe = replace(recipe, lrSchedulerInterval=interval)
            else:
                criterion = losses.Criterion(recipe.blueprint.loss)
                criterion.to(device)
                objective = Objective(criterion)
                optimizer = _optimizer(recipe, module)
                scheduler = _scheduler(recipe, optimizer)
            scaler = torch.amp.GradScaler(device.type) if recipe.mixedPrecision == "fp16" else None
            steps = objective if stepped else None
            parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "steps": steps}
            states = {name: each for name, each in parts.items() if each is not None}
            keeper = sync.Keeper(gang, checkpoints, module, states, tally, data.steps)
            place = keeper.restore()
            rows = codec.example(feed.specs, device=device)
            # A divided network is drawn by nobody: all ranks would have to go through it with the one that draws.
            drawing = None if averager.divided else functools.partial(draw, module, rows)
            events = self.events(gang, place.epoch, drawing)
            report = Report(gang.progress, self.schedule.epochs, data.steps, data.rows * gang.world, place, events)
            clock.append(time.monotonic())
            gang.progress.update(phase="trace")
            loop = Loop(
                gang=gang,
                recipe=recipe,
                schedule=self.schedule,
                module=module,
                objective=objective,
                optimizer=optimizer,
                scheduler=scheduler,
                scaler=scaler,
                averager=averager,
                tally=tally,
                keeper=keeper,
                report=report,
            )
            held = None if validation is None else Feed(validation, device, {})
            loop.run(feed, held, place)
            check_digests(gang, sync.weights_digest(module))
            clock.append(time.monotonic())
            gang.progress.update(phase="publish")
            write = functools.partial(codec.save, module, inputs=feed.specs, whole=averager.whole)
            file, sha256 = publish(gang, write, codec.SUFFIX) if gang.rank == 0 else ("", "")
            if averager.divided and gang.rank:
                write(None)  # what rank 0 writes, all bring together
        return report.trained(file, sha256, outputs, clock)

    def _opened(self, gang: GangContext, specs: Specs, inputs: tuple[Tensor, ...], device: Any) -> tuple[Any, Any, Any]:
        """The network, what it puts out for one row, and the block in which the ranks are kept alike."""
        recipe, seed = self.recipe, self.schedule.seed
        if recipe.sharding == "fsdp" and gang.world > 1:
            from spark_nn.torch import sharding

            module, put_out = (
                (sharding.outline(recipe.blueprint, specs), {}) if gang.rank else self._build(gang, specs, inputs)
            )
            put_out = sharding.told(gang, put_out)
            halves = recipe.mixedPrecision == "bf16"
            return module, put_out, sharding.sharded(gang, module, specs, device, seed=seed, halves=halves)
        from spark_nn.torch import averaging, sync

        module, put_out = self._build(gang, specs, inputs)
        module.to(device)
        sync.start_alike(gang, module, seed)
        rows = None if recipe.blueprint.loss is None else codec.example(specs, device=device)
        averager = averaging.averager(recipe.collective, module, gang.collective, gang.host, gang.timeout, rows)
        return module, put_out, averager

    def _build(self, gang: GangContext, specs: Specs, inputs: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """The network with its first weights, and what it puts out for one row of its input."""
        module = self.recipe.blueprint.build()
        if self.recipe.blueprint.loss is None:
            lightning.check(module, validates=self.recipe.validates)
        modes = [(each, each.training) for each in module.modules()]
        try:
            codec.settle(module, specs)
            if self.recipe.weights is not None:
                # safetensors reads a local path only.
                with NamedTemporaryFile(suffix=codec.SUFFIX) as local:
                    gang.run.get(WEIGHTS, Path(local.name))
                    tensors, _ = codec.read(local.name)
                codec.fill(module, tensors, self.recipe.weights)
            put_out = codec.by_name(codec.forward(module.eval(), codec.example(specs)))
            for each, training in modes:
                each.training = training
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise misfit(inputs, "each argument of the model's forward as that does", error) from error
        return module, put_out


def prepare() -> None:
    """Import what every training needs, without starting any of it."""
    import torch._dynamo  # noqa: F401  (an optimizer imports it when it is made)

    import spark_nn.torch.loop  # noqa: F401

    petastorm_compat.load()


def _optimizer(recipe: Recipe, module: Any) -> Any:
    """The optimizer of a network's parameters."""
    import torch

    given, arguments = recipe.optimizer, dict(recipe.optimizerParams)
    if isinstance(given, str):
        known = {
            name.lower(): each
            for name, each in vars(torch.optim).items()
            if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
        }
        if given.lower() not in known:
            raise unknown_optimizer(given, known)
        given = known[given.lower()]
    if isinstance(given, type) and recipe.learningRate is not None:
        arguments["lr"] = recipe.learningRate
    try:
        optimizer = given((each for each in module.parameters() if each.requires_grad), **arguments)
    except (TypeError, ValueError) as error:
        raise ParamError(f"optimizer={recipe.optimizer!r} with optimizerParams={arguments!r}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise ParamError(
            f"optimizer={recipe.optimizer!r} gives a {type(optimizer).__name__}: it must be a torch.optim.Optimizer "
            "that makes its step from the gradients, without evaluating the model again as LBFGS does"
        )
    if not isinstance(given, type) and recipe.learningRate is not None:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learningRate
    return optimizer


def _scheduler(recipe: Recipe, optimizer: Any) -> Any:
    """What turns the optimizer's learning rate, if anything does."""
    import torch

    if recipe.lrScheduler is None:
        return None
    scheduler = recipe.lrScheduler(optimizer)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise ParamError(
            f"lrScheduler={recipe.lrScheduler!r} returned {scheduler!r}: it must be one of torch.optim.lr_scheduler"
        )
    by_metric = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if by_metric and recipe.lrSchedulerInterval == "step":
        raise ParamError(
            "lrSchedulerInterval='step', and ReduceLROnPlateau makes its step by epoch, by the loss: set 'epoch'"
        )
    return scheduler


def _check_precision(precision: Precision, device: str) -> None:
    if precision == "fp16" and device != "cuda":
        raise ParamError(
            "mixedPrecision='fp16' needs a GPU on every worker, and this one has none: use 'bf16', which CPUs compute "
            "with too, or let Spark assign GPUs (spark.task.resource.gpu.amount)"
        )
