"""Keras on PyTorch: steps are run one by one, and gradients lie in memory that NumPy sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

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
    "buffers",
    "dataset",
    "first",
    "methods",
    "prepare",
    "random_state",
    "ready",
    "set_random_state",
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
        _still(model)
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
        _still(model)
        self._model = model

    def __call__(self, data: tuple[Any, ...], known: bool) -> None:
        """Take in a batch."""
        with torch.no_grad():
            self._model.test_step(tensors(data))


def _still(model: Any) -> None:
    """Tell PyTorch's code that no training goes on, where it asks its module and not the argument.

    PyTorch sees attributes only, and not the layers that a model keeps in a list: Keras's own ``eval`` misses those.
    """
    for layer in model._flatten_layers():
        layer.eval()


class Averager(host.Averager):
    """Averages gradients over the ranks, in the memory that they lie in where that is the machine's own.

    A variable without a gradient on this rank counts as one of zeros: which of them take part may depend on a rank's
    rows. One that has none on any rank is left without, as in a single process.
    """

    def average(self, grads: Sequence[Any], variables: Sequence[Any], news: bool) -> tuple[list[Any], bool]:
        """The gradients of the global batch, in one exchange, and whether any rank has news."""
        given = [
            torch.zeros_like(variable.value) if grad is None else grad
            for grad, variable in zip(grads, variables, strict=True)
        ]
        # Halves add up in single precision; doubles stay doubles.
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in given) else torch.float32
        if any(grad.device.type != "cpu" for grad in given):
            flat = torch.cat([grad.reshape(-1).to(wide) for grad in given]).cpu()
            parts = list(flat.split([grad.numel() for grad in given]))
        else:
            parts = [grad.to(wide).contiguous() for grad in given]
        flags = torch.tensor([*(grad is not None for grad in grads), news], dtype=wide)
        arrays = [part.numpy().reshape(-1) for part in (*parts, flags)]
        self.mean(arrays, arrays)
        *used, told = (flags > 0).tolist()
        means = [
            part.reshape(grad.shape).to(grad.device, grad.dtype) if there else None
            for part, grad, there in zip(parts, given, used, strict=True)
        ]
        return means, told


def averager(engine: Engine, collective: Collective, address: str, timeout: float) -> Averager:
    """What averages the gradients; see the room of TensorFlow."""
    return Averager(collective)


def methods(
    optimizers: Sequence[Any], model: keras.Model, averager: Averager | None, watch: Watch | None
) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Objects, and the methods that they need for the time of a training: see the room of TensorFlow."""
    noted = None if watch is None else _Noted()
    for optimizer in optimizers:
        if averager is not None:
            yield optimizer, "apply", _averaged(optimizer, averager, noted)
        if noted is not None:
            yield optimizer, "scale_loss", _seen(optimizer, noted)
    if watch is not None and noted is not None:
        yield model, "train_step", _counted(model, watch, noted)


class _Noted:
    """What is known of the losses of the step that is being made.

    Attributes
    ----------
    own : bool
        Whether one of this rank's was not finite.
    told : bool
        Whether one of any rank's was not, which came with the gradients.
    scaled : bool
        Whether the step has passed a loss through an optimizer's ``scale_loss``.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self.own = self.told = self.scaled = False


def _averaged(optimizer: Any, averager: Averager, noted: _Noted | None) -> Callable[..., Any]:
    """The optimizer's ``apply``, on gradients of the global batch."""
    original = optimizer.apply

    def apply(grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        given = list(grads)
        variables = optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
        with torch.no_grad():
            # The news travels with the gradients, so that all ranks know it at the same step.
            given, told = averager.average(given, variables, noted is not None and noted.own)
        if noted is not None:
            noted.told |= told
        return original(given, None if trainable_variables is None else variables)

    return apply


def _seen(optimizer: Any, noted: _Noted) -> Callable[[Any], Any]:
    """The optimizer's ``scale_loss``, which a step passes its loss through before it is scaled."""
    original = optimizer.scale_loss

    def scale_loss(loss: Any) -> Any:
        noted.scaled = True
        noted.own |= not bool(torch.isfinite(loss).all())
        return original(loss)

    return scale_loss


def _counted(model: keras.Model, watch: Watch, noted: _Noted) -> Callable[..., Any]:
    """The model's ``train_step``, counted; where it does not scale the loss, the loss that it logs is watched."""
    original = model.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        rate = learning_rate(model.optimizer)
        noted.begin()
        logs = original(*args, **kwargs)
        loss = logs.get("loss") if isinstance(logs, dict) else None
        if loss is not None and not noted.scaled:
            # Known too late for this step's exchange: this rank alone ends the fit, and with it the others'.
            noted.own = not np.isfinite(keras.ops.convert_to_numpy(loss)).all()
        watch.note(noted.own or noted.told, rate)
        return logs

    return train_step


class Buffer:
    """What PyTorch's code keeps beside parameters, to be read and written as one of Keras's variables is.

    Parameters
    ----------
    path : str
        Its name.
    tensor : torch.Tensor
        Where it lies.
    """

    trainable: ClassVar[bool] = False

    def __init__(self, path: str, tensor: torch.Tensor) -> None:
        self.path = self.name = path
        self.value = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")

    def assign(self, value: np.ndarray) -> None:
        """Give it a value."""
        with torch.no_grad():
            self.value.copy_(keras.ops.convert_to_tensor(value, dtype=self.dtype))


def buffers(model: keras.Model) -> list[Buffer]:
    """What a model's PyTorch code keeps beside parameters, such as the running statistics of its normalisations.

    It is Keras's of no kind: neither a variable nor a weight.
    """
    found: dict[int, Buffer] = {}
    for layer in model._flatten_layers():
        for name, tensor in layer.named_buffers():
            found.setdefault(id(tensor), Buffer(f"{layer.name}/{name}", tensor))
    return list(found.values())


def random_state() -> dict[str, np.ndarray]:
    """The state of PyTorch's generators."""
    state = {"torch-state": torch.get_rng_state().numpy()}
    return {**state, "cuda-state": torch.cuda.get_rng_state().numpy()} if torch.cuda.is_available() else state


def set_random_state(arrays: Mapping[str, np.ndarray]) -> None:
    """Go on from the state that :func:`random_state` gave."""
    torch.set_rng_state(torch.from_numpy(arrays["torch-state"]))
    if "cuda-state" in arrays:
        torch.cuda.set_rng_state(torch.from_numpy(arrays["cuda-state"]))


def ready(model: keras.Model) -> None:
    """Settings of a compiled model that several ranks need: what compiles a step cannot see the other processes."""
    model.jit_compile = False
