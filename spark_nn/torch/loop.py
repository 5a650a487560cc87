"""Worker side: the steps and epochs of a PyTorch fit."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from spark_nn.checkpoint import Place
from spark_nn.gang.context import GangContext
from spark_nn.report import Report
from spark_nn.torch import codec
from spark_nn.torch.averaging import Averager
from spark_nn.torch.feed import Feed
from spark_nn.torch.metrics import Tally
from spark_nn.torch.objective import Objective, Phase
from spark_nn.torch.sync import Keeper, settle_buffers
from spark_nn.torch.training import Recipe
from spark_nn.trainer import Schedule, non_finite

# Seconds between two looks at a loss on a GPU: each look waits until it has done all its work.
_LOOK_EVERY = 1.0
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Loop:
    """One rank's training; all of its parts are in step with those of the other ranks.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    recipe : Recipe
        How to train.
    schedule : Schedule
        How to go through the rows.
    module : torch.nn.Module
        The network, on its device.
    objective : Objective
        What gives the loss.
    optimizer : torch.optim.Optimizer
        Of its parameters.
    scheduler : torch.optim.lr_scheduler.LRScheduler or None
        What turns the learning rate.
    scaler : torch.amp.GradScaler or None
        What scales the loss, for halves.
    averager : Averager
        What averages the gradients.
    tally : Tally
        What counts losses and metrics.
    keeper : Keeper
        What writes checkpoints.
    report : Report
        What tells the driver.
    """

    gang: GangContext
    recipe: Recipe
    schedule: Schedule
    module: Any
    objective: Objective
    optimizer: Any
    scheduler: Any
    scaler: Any
    averager: Averager
    tally: Tally
    keeper: Keeper
    report: Report

    def __post_init__(self) -> None:
        self._watch = self.schedule.nonFiniteLoss == "error"
        self._looked = 0.0
        # A plateau's scheduler asks for a metric.
        self._plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        self._by_step = self.scheduler is not None and self.recipe.lrSchedulerInterval == "step"
        kind = _TYPES.get(self.recipe.mixedPrecision)
        device = next(self.module.parameters()).device.type
        self._autocast = contextlib.nullcontext() if kind is None else torch.autocast(device, kind)
        self._clipped = [each for each in self.module.parameters() if each.requires_grad]

    def run(self, feed: Feed, validation: Feed | None, place: Place) -> None:
        """Train from a place on to the end."""
        with self.averager.guarded():
            for epoch in range(place.epoch, self.schedule.epochs):
                start = place.step if epoch == place.epoch else 0
                self._epoch(feed, validation, epoch, start)
                last = epoch + 1 == self.schedule.epochs
                if last or (self.recipe.stopWhen and self.recipe.stopWhen(self.gang.progress.state.history)):
                    return
                self.keeper.look(Place(epoch + 1, 0))

    def _epoch(self, feed: Feed, validation: Feed | None, epoch: int, start: int) -> None:
        self.gang.collective.mark(epoch, 0)  # ranks that meet in different epochs are told so
        self.report.begin_epoch(epoch)
        self.objective.turn(self.module, "training")
        self.objective.begin("training", epoch)
        for step, (inputs, labels, weights, rows) in enumerate(feed.batches(epoch, start), start + 1):
            self._step(inputs, labels, weights, rows, Place(epoch, step))
            self.report.end_step(step, self.tally.mean_loss if self.report.wanted(step) else None)
            if step < feed.stream.steps:
                self.keeper.look(Place(epoch, step))
        self._look(Place(epoch, feed.stream.steps))
        settle_buffers(self.gang, self.module)
        logs = self._measured("training")
        if validation is not None:
            self.report.begin_validation()
            logs.update(self.objective.named(self._validated(validation, epoch), logs))
        rate = self.optimizer.param_groups[0].get("lr")
        if self.scheduler is not None:
            logs["learning_rate"] = rate
            if not self._by_step:
                self.scheduler.step(*[self.objective.watched(logs)] if self._plateau else [])
        self.report.end_epoch(logs, None if rate is None else float(rate))

    def _step(self, inputs: Any, labels: Any, weights: Any, rows: int, place: Place) -> None:
        with self._autocast:
            loss, put_out = self.objective.batch(self.averager.forward, inputs, labels, weights, rows, place.step - 1)
        value = self.tally.add_loss(loss, rows)
        if value is None:
            if time.monotonic() >= self._looked + _LOOK_EVERY:
                self._look(place)
        elif self._watch and not math.isfinite(value):
            self._complain(place)
        self.tally.add(put_out, labels)
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
        self.averager.average()
        self._clip()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self._by_step:
            self.scheduler.step()

    def _clip(self) -> None:
        norm, limit = self.recipe.clipGradNorm, self.recipe.clipGradValue
        if norm is None and limit is None:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if limit is not None:
            torch.nn.utils.clip_grad_value_(self._clipped, limit)
        if norm is not None:
            torch.nn.utils.clip_grad_norm_(self._clipped, norm)

    def _look(self, place: Place) -> None:
        """Raise `NonFiniteLoss` if a step so far was bad."""
        self._looked = time.monotonic()
        if self._watch and not self.tally.finite:
            self._complain(place)

    def _complain(self, place: Place) -> None:
        rate = float(self.optimizer.param_groups[0].get("lr", math.nan))
        raise non_finite(place.epoch, place.step - 1, rate, "clipGradNorm or clipGradValue")

    def _measured(self, phase: Phase) -> dict[str, Any]:
        """Loss and metrics of the rows of all ranks."""
        rows = self.tally.rows
        if self.gang.world > 1:
            self.tally.take(self.gang.collective.all_gather(self.tally.state()))
        self.objective.end(phase, rows)
        values = self.tally.results()
        self.tally.reset()
        return values

    def _validated(self, validation: Feed, epoch: int) -> dict[str, Any]:
        self.objective.turn(self.module, "validation")
        self.objective.begin("validation", epoch)
        more = self._more(validation)  # asked before, since a rank that waits for the answer goes no way forward
        # What is made in inference mode may not take part in a backward pass later, and parameters are made anew.
        looking = torch.no_grad() if self.averager.divided else torch.inference_mode()
        with looking, self._autocast:
            for number, (inputs, labels, weights, rows) in enumerate(validation.batches(0)):
                loss, put_out = self.objective.batch(self.module, inputs, labels, weights, rows, number)
                if loss is not None:
                    self.tally.add_loss(loss, rows)
                self.tally.add(put_out, labels)
            for _ in range(more):
                codec.forward(self.module, codec.example(validation.specs, device=validation.device))
        return self._measured("validation")

    def _more(self, validation: Feed) -> int:
        """How many more batches another rank has, whose forward passes need this one's part of the network, too."""
        if not self.averager.divided:
            return 0
        steps = validation.stream.passSteps
        return max(int(each) for each in self.gang.collective.all_gather(b"%d" % steps)) - steps
