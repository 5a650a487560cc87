"""Keras on PyTorch: steps are run one by one, and gradients lie in memory that NumPy sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import torch

from spark_nn.gang.collective import Collective, Engine
from spark_nn.keras.backends import host
from spark_nn.keras.backends.host import TOGETHER, Watch, dataset, first
from spark_nn.keras.describe import by_name
from spark_nn.keras.rate import learning_rate
from spark_nn.share import Share

__all__ = [
    "TOGETHER",
    "Averager",
    "Forward",
    "Step",
    "Watch",
    "averager",
    "dataset",
    "first",
    "methods",
    "prepare",
    "ready",
    "start",
    "tensors",
]


def prepare() -> None:
    """Everything is imported with this room."""


def start(share: Share) -> str:
    """Ready a process that scores for a task's share of the machine; return Keras's name of its device."""
    torch.set_num_threads(share.cpus)
    cards = torch.cuda.device_count() if share.gpu is not None else 0
    return f"gpu:{share.card(cards)}" if cards else "cpu"


def tensors(arrays: Any) -> Any:
    """Arrays as tensors, of the same memory where they stay in the machine's own."""
    return keras.tree.map_structure(keras.ops.convert_to_tensor, arrays)


class Forward:
    """A model that predicts blocks of rows.

    Parameters
    ----------
    model : keras.Model
        The model.
    device : str
        Keras's name of the device to run it on.
    """

    def __init__(self, model: Any, device: str) -> None:
        self._model = model
        self._device = device

    def __call__(self, part: dict[str, np.ndarray], named: bool, fixed: int | None) -> dict[str, np.ndarray]:
        """The outputs of some rows by their names; the only input and the only output have the empty one."""
        with keras.device(self._device), torch.inference_mode():
            block = tensors(part)
            found = by_name(self._model, self._model(block if named else block[""], training=False))
            return {name: tensor.cpu().numpy() for name, tensor in found.items()}


class Step:
    """A compiled model that measures batches: its metrics take them in.

    Parameters
    ----------
    model : keras.Model
        Compiled.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, data: tuple[Any, ...], known: bool) -> None:
        """Take in a batch."""
        with torch.no_grad():
            self._model.test_step(tensors(data))


class Averager(host.Averager):
    """Averages gradients over the ranks, in the memory that they lie in where that is the machine's own."""

    def average(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients of the global batch, in one exchange."""
        given = [grad for grad in grads if grad is not None]
        if not given:
            return list(grads)
        # Halves add up in single precision; doubles stay doubles.
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in given) else torch.float32
        if any(grad.device.type != "cpu" for grad in given):
            flat = torch.cat([grad.reshape(-1).to(wide) for grad in given]).cpu()
            parts = list(flat.split([grad.numel() for grad in given]))
        else:
            parts = [grad.to(wide).contiguous() for grad in given]
        arrays = [part.numpy().reshape(-1) for part in parts]
        self.mean(arrays, arrays)
        means = iter(
            part.reshape(grad.shape).to(grad.device, grad.dtype) for part, grad in zip(parts, given, strict=True)
        )
        return [None if grad is None else next(means) for grad in grads]


def averager(engine: Engine, collective: Collective, address: str, timeout: float) -> Averager:
    """What averages the gradients; see the room of TensorFlow."""
    return Averager(collective)


def methods(
    optimizers: Sequence[Any], model: keras.Model, averager: Averager | None, watch: Watch | None
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Objects, and the methods that they need for the time of a training: see the room of TensorFlow."""
    for optimizer in optimizers:
        noted = _Noted()
        yield optimizer, "apply", _averaged(optimizer, averager, watch, noted)
        if watch is not None:
            yield optimizer, "scale_loss", _seen(optimizer, noted)


class _Noted:
    """The loss of the step that is being made, on this rank."""

    bad: bool = False


def _averaged(optimizer: Any, averager: Averager | None, watch: Watch | None, noted: _Noted) -> Callable[..., Any]:
    """The optimizer's ``apply``, on gradients of the global batch."""
    original = optimizer.apply

    def apply(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        given = list(grads)
        with torch.no_grad():
            if watch is not None:
                # The news travels with the gradients, so that all ranks know it at the same step.
                given.append(torch.tensor([float(noted.bad)]))
            if averager is not None:
                given = averager.average(given)
            if watch is not None:
                bad = bool(given.pop()[0] > 0)
                watch.note(bad, learning_rate(optimizer) if bad else np.nan)
        return original(given, trainable_variables)

    return apply


def _seen(optimizer: Any, noted: _Noted) -> Callable[[Any], Any]:
    """The optimizer's ``scale_loss``, which every step passes its loss through before it is scaled."""
    original = optimizer.scale_loss

    def scale_loss(loss: Any) -> Any:
        noted.bad = not bool(torch.isfinite(loss).all())
        return original(loss)

    return scale_loss


def ready(model: keras.Model) -> None:
    """Settings of a compiled model that several ranks need: what compiles a step cannot see the other processes."""
    model.jit_compile = False
