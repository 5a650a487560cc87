"""Worker side: a LightningModule's own steps in the place of a loss, an optimizer and a scheduler."""

from __future__ import annotations

import inspect
import json
from numbers import Real
from typing import Any, Literal

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from spark_nn.errors import ParamError
from spark_nn.gang.context import GangContext
from spark_nn.torch.lightning import defines
from spark_nn.torch.metrics import Tally
from spark_nn.torch.objective import Objective, Phase

_HOOKS = {"training": "on_train_epoch", "validation": "on_validation_epoch"}
# What Lightning knows of a scheduler, but for what only its own trainer could do.
_SCHEDULER = {"scheduler", "interval", "frequency", "monitor", "strict", "name"}


class Standin:
    """What a LightningModule finds as `self.trainer`: where the training is, and nothing that would change it.

    Each rank counts as a machine of its own, with one device.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    epochs, steps : int
        How many there are, and how many steps each has.
    """

    def __init__(self, gang: GangContext, epochs: int, steps: int) -> None:
        self.max_epochs, self.num_training_batches, self.estimated_stepping_batches = epochs, steps, epochs * steps
        self.world_size, self.global_rank, self.local_rank = gang.world, gang.rank, 0
        self.is_global_zero = gang.rank == 0
        self.current_epoch = self.global_step = 0
        self.training, self.validating, self.sanity_checking = True, False, False
        self.logger = self.progress_bar_callback = None
        self.loggers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"self.trainer.{name}: there is no Trainer of Lightning's here, and what stands in for it has "
            f"{', '.join(sorted(vars(self)))} only"
        )


class Steps(Objective):
    """The steps of a LightningModule in the place of a loss.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    module : LightningModule
        The network, on its device.
    tally : Tally
        What counts losses, and what the module logs.
    epochs, steps : int
        How many there are, and how many steps each has.
    """

    def __init__(self, gang: GangContext, module: Any, tally: Tally, epochs: int, steps: int) -> None:
        super().__init__(None)
        self.gang, self.module, self.tally = gang, module, tally
        self.trainer = module.trainer = Standin(gang, epochs, steps)
        module.log = self.log
        tally.follow(module)
        self._rows, self._seen = 1, 0
        self._ended: dict[str, float] | None = None  # what is logged while an epoch ends
        self._monitor: str | None = None
        self._held: dict[str, bool] | None = None  # of the module's parts, while they compute as in evaluation
        self._trained: set[str] = set()  # what training rows have been logged by in any epoch
        self._bare: set[str] = set()  # and validation rows, without a prefix
        self._asking = _asking(module)

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on has to know: which parts are in training, and the names so far."""
        modes = _modes(self.module) if self._held is None else self._held
        return {"modes": modes, "trained": sorted(self._trained), "bare": sorted(self._bare)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        _set_modes(self.module, state["modes"])
        self._trained, self._bare = set(state["trained"]), set(state["bare"])

    def configured(self) -> tuple[Any, Any, Literal["epoch", "step"]]:
        """The module's optimizer, its scheduler or None, and when this makes its step.

        Raises
        ------
        ParamError
            It has none, several, or one that the loop cannot go by.
        """
        found, schedulers = self.module.configure_optimizers(), []
        if isinstance(found, (list, tuple)) and len(found) == 2 and isinstance(found[0], list):
            found, schedulers = found[0], found[1] if isinstance(found[1], list) else [found[1]]
        if isinstance(found, (list, tuple)) and len(found) == 1:
            (found,) = found
        config: dict[str, Any] = {"monitor": None, "interval": "epoch", "frequency": 1, "strict": True}
        if isinstance(found, dict):
            config["monitor"] = found.get("monitor")
            schedulers = [found["lr_scheduler"]] if "lr_scheduler" in found else []
            found = found.get("optimizer")
        for each in schedulers:
            config.update(each if isinstance(each, dict) else {"scheduler": each})
        scheduler = config.get("scheduler")
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        for wrong, what in (
            (isinstance(found, (list, tuple)), "several optimizers"),
            (not isinstance(found, Optimizer) or isinstance(found, LBFGS), f"a {type(found).__name__} as optimizer"),
            (len(schedulers) > 1, "several schedulers"),
            (schedulers and not isinstance(scheduler, LRScheduler), f"a {type(scheduler).__name__} as scheduler"),
            (config.keys() - _SCHEDULER, f"a scheduler with {', '.join(sorted(config.keys() - _SCHEDULER))}"),
            (config["interval"] not in ("epoch", "step"), f"a scheduler with interval={config['interval']!r}"),
            (config["frequency"] != 1, f"a scheduler with frequency={config['frequency']!r}"),
            (not config["strict"], "a scheduler with strict=False"),
            (plateau and config["interval"] == "step", "ReduceLROnPlateau with interval='step'"),
            (plateau and config["monitor"] is None, "ReduceLROnPlateau without a monitor"),
        ):
            if wrong:
                raise ParamError(
                    f"{type(self.module).__name__}.configure_optimizers returned {what}: it must be one optimizer that "
                    "makes its step from the gradients, not LBFGS, with at most one of torch.optim.lr_scheduler, by "
                    "'epoch' or 'step', and for ReduceLROnPlateau by 'epoch' and a monitor"
                )
        self._monitor = config["monitor"]
        return found, scheduler, config["interval"]

    def turn(self, module: Any, phase: Phase) -> None:
        """See :meth:`Objective.turn`; a part that the module's own code has put into evaluation stays there."""
        if phase == "validation":
            self._held = _modes(module)
            module.eval()
        elif self._held is not None:
            _set_modes(module, self._held)
            self._held = None

    def begin(self, phase: Phase, epoch: int) -> None:
        """See :meth:`Objective.begin`.

        Raises
        ------
        ParamError
            The module trains other parameters than those whose gradients are averaged.
        """
        self.trainer.current_epoch, self._rows, self._seen = epoch, 1, 0
        self.trainer.training, self.trainer.validating = phase == "training", phase == "validation"
        if defines(type(self.module), hook := f"{_HOOKS[phase]}_start"):
            getattr(self.module, hook)()
        asking = _asking(self.module)
        if phase == "training" and asking != self._asking:
            changed = sorted({name for name, _ in asking.items() ^ self._asking.items()})
            raise ParamError(
                f"{type(self.module).__name__} changed requires_grad of {', '.join(changed[:5])} after it was built, "
                "and gradients are averaged of the parameters that had it then: set it in __init__, or make two fits, "
                "the second with initialModel and a module that sets it otherwise"
            )

    def batch(self, forward: Any, inputs: Any, labels: Any, weights: Any, rows: int, number: int) -> tuple[Any, Any]:
        """See :meth:`Objective.batch`; what the network puts out is the module's affair."""
        several = isinstance(labels, dict)
        batch = (inputs, {name: _typed(each) for name, each in labels.items()} if several else _typed(labels))
        self._rows, self._seen = rows, self._seen + rows
        if self.trainer.validating:
            _called(self.module.validation_step, batch, number)
            return None, None
        self.trainer.global_step = self.trainer.current_epoch * self.trainer.num_training_batches + number
        returned = self._through(forward, batch, number)
        loss: Any = returned.get("loss") if isinstance(returned, dict) else returned
        if getattr(loss, "numel", lambda: 0)() != 1 or not loss.requires_grad:
            raise ParamError(
                f"{type(self.module).__name__}.training_step returned a {type(returned).__name__}: it must be the loss "
                "of the batch, a tensor of one element that gradients can be taken of, or a dict with it as 'loss'"
            )
        return loss.reshape(()), None

    def _through(self, forward: Any, batch: Any, number: int) -> Any:
        """What `training_step` returns, called by what averages the gradients, where that has to see the pass."""
        if forward is self.module:
            return _called(self.module.training_step, batch, number)
        own = self.module.forward

        def once(*_: Any) -> Any:
            self.module.forward = own
            return _called(self.module.training_step, batch, number)

        self.module.forward = once
        return forward(batch)

    def end(self, phase: Phase, rows: int) -> None:
        """See :meth:`Objective.end`; a rank that has had no rows leaves the module's hook out."""
        if phase == "training":
            self.trainer.global_step = (self.trainer.current_epoch + 1) * self.trainer.num_training_batches
        hook, rows = f"{_HOOKS[phase]}_end", rows or self._seen
        if not defines(type(self.module), hook):
            return
        self._ended = {}
        if rows:
            getattr(self.module, hook)()
        mine = json.dumps([rows, self._ended, self.tally.shown]).encode()
        self._ended = None
        told = self.gang.collective.all_gather(mine) if self.gang.world > 1 else [mine]
        parts = [json.loads(each) for each in told]
        for name in {name for _, values, _ in parts for name in values}:
            self.tally.logged.pop(name, None)
        for count, values, shown in parts:
            self.tally.shown.update(shown)
            for name, value in values.items():
                self.tally.log(name, value, count)

    def named(self, validated: dict[str, Any], logs: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`Objective.named`: the module's own names, but for those that training rows have, too.

        They need not have them in every epoch: where they come by one only now, what validation rows had by it in the
        history is given the other name.
        """
        self._trained |= logs.keys()
        if late := self._bare & self._trained:
            history = self.gang.progress.state.history
            names = {name: f"val_{name}" if name in late else name for name in history}
            self.gang.progress.update(history={names[name]: values for name, values in history.items()})
        self._bare = (self._bare | validated.keys()) - self._trained
        return {f"val_{name}" if name in self._trained else name: value for name, value in validated.items()}

    def watched(self, logs: dict[str, Any]) -> float:
        """See :meth:`Objective.watched`.

        Raises
        ------
        ParamError
            The module did not log it.
        """
        if self._monitor not in logs:
            raise ParamError(
                f"the scheduler's monitor {self._monitor!r} was not logged in this epoch, but {', '.join(logs)}: name "
                "one of them, or log it with self.log"
            )
        value: float = logs[self._monitor]
        return value

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """What the module finds as `self.log`: the history gets the mean over the epoch's rows of all ranks.

        There is one history, of epochs, so that what says where and when else to log makes no difference.

        Parameters
        ----------
        name : str
            Name in the history.
        value : float, tensor or torchmetrics.Metric
            The mean over the rows of the batch; or a metric that is an attribute of the module.
        reduce_fx : {"mean"} or torch.mean
            Lightning knows others.
        batch_size : int, optional
            Rows that the value counts for, in place of the batch's.
        rank_zero_only : bool
            Whether the numbers of the first worker alone count.

        Raises
        ------
        ParamError
            The value is no number, or is not to become a mean.
        """
        if reduce_fx not in ("mean", torch.mean):
            raise ParamError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): the history has means over rows only")
        if self.tally.show(name, value):
            return
        if not isinstance(value, (Real, torch.Tensor)) or torch.as_tensor(value).numel() != 1:
            raise ParamError(
                f"self.log({name!r}, ...) was given a {type(value).__name__}: it must be a number, a tensor of one "
                "element, or a torchmetrics.Metric that is an attribute of the module"
            )
        if rank_zero_only and self.gang.rank:
            return
        if self._ended is not None:
            self._ended[name] = float(value)
        else:
            self.tally.log(name, value, batch_size or self._rows)


def _asking(module: Any) -> dict[str, bool]:
    """Which parameters of a network require gradients, by their names."""
    return {name: each.requires_grad for name, each in module.named_parameters()}


def _modes(module: Any) -> dict[str, bool]:
    """Which parts of a network compute as in training, by their names."""
    return {name: each.training for name, each in module.named_modules()}


def _set_modes(module: Any, modes: dict[str, bool]) -> None:
    for name, each in module.named_modules():
        each.training = modes.get(name, each.training)


def _typed(label: Any) -> Any:
    """A label as a DataLoader would give it: whole numbers as int64, which losses of classes ask for."""
    return label.float() if label.is_floating_point() or label.dtype is torch.bool else label.long()


def _called(step: Any, batch: Any, number: int) -> Any:
    """A step that may do without the batch's number."""
    return step(batch, number) if len(inspect.signature(step).parameters) > 1 else step(batch)
