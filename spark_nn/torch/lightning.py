"""LightningModules: which networks are such, and which of them can be trained by their own steps.

What counts is what a class defines, and not what it inherits from: the package is not needed, and any of its names will
do. Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spark_nn.errors import ParamError
from spark_nn.torch.blueprint import is_module

_STEPS = ("training_step", "configure_optimizers")
# What Lightning's trainer calls in a fit, and the loop does not.
_NOT_CALLED = (
    *("prepare_data", "setup", "teardown", "configure_model", "configure_sharded_model", "configure_callbacks"),
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
    *("training_step_end", "training_epoch_end", "validation_step_end", "validation_epoch_end"),
    *("on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_batch_start", "on_train_batch_end"),
    *("on_epoch_start", "on_epoch_end", "on_pretrain_routine_start", "on_pretrain_routine_end"),
    *("on_validation_start", "on_validation_end", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    *("on_save_checkpoint", "on_load_checkpoint"),
)


def check_given(model: Any, params: Mapping[str, Any], *, validates: bool) -> None:
    """Driver side: refuse what cannot be trained without a loss.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The network, a class of such, or a function, of which only the workers see what it returns.
    params : mapping
        Params that go with a loss only, as far as they are set, and their values.
    validates : bool
        Whether there are validation rows.

    Raises
    ------
    ParamError
        It is no LightningModule, or one that asks for what is not done here; or such a param is set.
    """
    if is_module(model):
        check(model, validates=validates)
    elif isinstance(model, type):
        _check_class(model, validates)
    for name, value in params.items():
        raise ParamError(
            f"{name}={value!r} without a loss: what a LightningModule's own training_step and configure_optimizers say "
            "leaves no room for it. Leave it out (arguments of the module go to modelParams), or set loss, and the "
            "steps are not used"
        )


def check(module: Any, *, validates: bool = False) -> None:
    """Refuse a network that does not say how it is trained, or asks for what is not done here.

    Raises
    ------
    ParamError
        It is such a one.
    """
    _check_class(type(module), validates)
    if not getattr(module, "automatic_optimization", True):
        raise ParamError(
            f"{type(module).__name__} sets automatic_optimization=False, and gradients have to be averaged between its "
            "training_step and its optimizer's step: leave the step to the training, or train it by spark_nn.run"
        )


def _check_class(kind: type, validates: bool) -> None:
    if not all(defines(kind, name) for name in _STEPS):
        raise ParamError(
            "loss is not set: give one, such as 'mse_loss' or 'binary_cross_entropy_with_logits', or a LightningModule "
            "that defines training_step and configure_optimizers"
        )
    if hooks := [name for name in _NOT_CALLED if defines(kind, name)]:
        raise ParamError(
            f"{kind.__name__} defines {', '.join(hooks)}, which this training does not call: do it in __init__, "
            "training_step or on_train_epoch_start, or set loss, and the module's own steps are not used"
        )
    if validates and not defines(kind, "validation_step"):
        raise ParamError(
            f"{kind.__name__} has no validation_step, and there are validation rows: define it, or leave "
            "validationFraction and validationIndicatorCol out"
        )


def defines(kind: type, name: str) -> bool:
    """Whether a class, or one that it inherits from before Lightning's own, defines something."""
    for each in kind.__mro__:
        if each.__name__ == "LightningModule":
            return False
        if name in vars(each):
            return True
    return False
