"""Worker side: ranks begin alike, stay alike, and can go on from where they were."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from spark_nn.chance import STRIDE, random_state, set_random_state
from spark_nn.checkpoint import Arrays, Checkpoint, Checkpoints, Place
from spark_nn.gang.context import GangContext
from spark_nn.torch.metrics import Tally
from spark_nn.torch.trees import pack, unpack

_DIGEST = hashlib.sha256().digest_size
# In place of an axis, of a tensor that belongs to divided ones and is not.
_WHOLE = -1


def start_alike(gang: GangContext, module: Any, seed: int) -> None:
    """Give every rank rank 0's weights and buffers, but for what is divided, and random numbers of its own."""
    for tensor in _tensors(module):
        broadcast(gang, tensor)
    if gang.rank:
        # Dropout on every rank must drop something else; rank 0 draws what a single process would.
        torch.manual_seed((seed + gang.rank * STRIDE) % 2**63)


def settle_buffers(gang: GangContext, module: Any) -> None:
    """Average what layers track on their own rows, such as BatchNorm's running statistics."""
    buffers = list(module.buffers())
    if gang.world == 1 or not buffers:
        return
    found = gang.collective.all_gather(b"".join(digest([each]) for each in buffers))
    for number, buffer in enumerate(buffers):
        if len({each[number * _DIGEST : (number + 1) * _DIGEST] for each in found}) == 1:
            continue  # the mean of numbers that are alike need not be the number itself
        if buffer.is_floating_point():
            wide = buffer.detach().to("cpu", torch.float64 if buffer.dtype is torch.float64 else torch.float32)
            array = np.array(wide.numpy(), order="C")
            gang.collective.all_reduce(array.reshape(-1), "mean")
            with torch.no_grad():
                buffer.copy_(torch.from_numpy(array))
        else:
            broadcast(gang, buffer)


def digest(tensors: Sequence[Any]) -> bytes:
    """SHA-256 over tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_bytes(tensor).tobytes())
    return found.digest()


def weights_digest(module: Any) -> bytes:
    """SHA-256 over the weights and buffers of a network, but for what is divided among the ranks."""
    return digest(_tensors(module))


class Keeper:
    """Writes checkpoints of a training and brings it back to one.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    checkpoints : Checkpoints
        Where they go.
    module : torch.nn.Module
        The network.
    states : dict
        What else is alike on all ranks, and has a ``state_dict``: optimizer, scheduler, scaler, a module's own steps.
    tally : Tally
        What has been counted in an epoch.
    steps : int
        Steps of an epoch.
    """

    def __init__(
        self,
        gang: GangContext,
        checkpoints: Checkpoints,
        module: Any,
        states: dict[str, Any],
        tally: Tally,
        steps: int,
    ) -> None:
        self.gang = gang
        self.checkpoints = checkpoints
        self.module = module
        self.states = states
        self.tally = tally
        self.steps = steps

    def restore(self) -> Place:
        """Go on from the last checkpoint, if there is one; return where."""
        described = [[name, list(each.shape), str(each.dtype)] for name, each in self.module.state_dict().items()]
        pack({name: each.state_dict() for name, each in self.states.items()}, "the state")  # refused now, or never
        identity = hashlib.sha256(repr(described).encode()).hexdigest()
        found = self.checkpoints.restore(model=identity)
        if found is None:
            self.checkpoints.begin(0)
            return Place(0, 0)
        for number, tensor in enumerate(_parameters(self.module)):
            self._take(tensor, f"weight-{number}", found)
        tensors = []
        for number, (dtype, shape, axis) in enumerate(found.state["tensors"]):
            kind = getattr(torch, dtype)
            mesh = next((each.device_mesh for each in _parameters(self.module) if isinstance(each, DTensor)), None)
            divided = axis is not None and axis >= 0
            made = (
                empty(*shape, dtype=kind, device_mesh=mesh, placements=[Shard(axis)])
                if divided
                else torch.empty(shape, dtype=kind)
            )
            self._take(made, f"state-{number}", found)
            tensors.append(DTensor.from_local(made, mesh, [Replicate()]) if axis == _WHOLE else made)
        states = unpack(found.state["states"], tensors)
        for name, each in self.states.items():
            each.load_state_dict(states[name])
        for number, buffer in enumerate(self.module.buffers()):
            _assign(buffer, found.own[f"buffer-{number}"])
        self.tally.take([found.own["tally"].tobytes()])
        set_random_state(found.own)
        torch.set_rng_state(torch.from_numpy(found.own["torch-state"]))
        if "cuda-state" in found.own:
            torch.cuda.set_rng_state(torch.from_numpy(found.own["cuda-state"]))
        self.gang.progress.update(history=found.state["history"], seconds=found.state["seconds"])
        self.checkpoints.begin(found.place.epoch * self.steps + found.place.step)
        return found.place

    def look(self, place: Place) -> None:
        """Save a checkpoint if one is due; all ranks call it after the same steps."""
        if self.checkpoints.due(place.epoch * self.steps + place.step):
            self._save(place)

    def _save(self, place: Place) -> None:
        states, held = pack({name: each.state_dict() for name, each in self.states.items()})
        tensors = [each.full_tensor() if _axis(each) == _WHOLE else each for each in held]
        progress = self.gang.progress.state
        state = {
            "history": progress.history,
            "seconds": progress.seconds,
            "states": states,
            "tensors": [[str(each.dtype).removeprefix("torch."), list(each.shape), _axis(each)] for each in held],
        }
        named = {f"weight-{number}": each for number, each in enumerate(_parameters(self.module))}
        named.update({f"state-{number}": each for number, each in enumerate(tensors)})
        # Each rank writes its parts of what is divided, as they are.
        part = {name: _view(each) for name, each in named.items() if _axis(each) is not None}
        alike: Arrays = {}
        if self.gang.rank == 0:
            alike = {name: _bytes(each) for name, each in named.items() if name not in part}
        own = {f"buffer-{number}": _bytes(each) for number, each in enumerate(self.module.buffers())}
        own["tally"] = np.frombuffer(self.tally.state(), np.uint8)
        own["torch-state"] = torch.get_rng_state().numpy()
        if torch.cuda.is_available():
            own["cuda-state"] = torch.cuda.get_rng_state().numpy()
        self.checkpoints.save(place, state, alike, {**own, **random_state()}, part)

    def _take(self, tensor: Any, name: str, found: Checkpoint) -> None:
        """Fill a tensor with what this rank has read, where it is divided, or else with what rank 0 has."""
        if _axis(tensor) is not None:
            _assign(tensor.detach().to_local(), found.part.pop(name))
            return
        if name in found.arrays:
            _assign(tensor, found.arrays[name])
        broadcast(self.gang, tensor)


def _parameters(module: Any) -> list[Any]:
    return list(module.parameters())


def _tensors(module: Any) -> list[Any]:
    return [each for each in (*module.parameters(), *module.buffers()) if _axis(each) is None]


def _axis(tensor: Any) -> int | None:
    """The axis along which a tensor is divided over the ranks, `_WHOLE` where each has all of it, else None."""
    if not isinstance(tensor, DTensor):
        return None
    return tensor.placements[0].dim if isinstance(tensor.placements[0], Shard) else _WHOLE


def _view(tensor: Any) -> np.ndarray:
    """The part of a tensor that this rank holds, where it lies if NumPy can see it there."""
    flat = tensor.detach().to_local().contiguous().reshape(-1).cpu()
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array


def _bytes(tensor: Any) -> np.ndarray:
    """A tensor's content, whatever its type: NumPy does not know all of PyTorch's."""
    flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
    array: np.ndarray = flat.view(torch.uint8).numpy()
    return array


def _assign(tensor: Any, raw: np.ndarray) -> None:
    if not tensor.numel():
        return
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.array(raw)).view(tensor.dtype).reshape(tensor.shape))


def broadcast(gang: GangContext, tensor: Any) -> None:
    """Overwrite a tensor with rank 0's."""
    if gang.world > 1 and tensor.numel():
        raw = _bytes(tensor)
        gang.collective.broadcast(raw)
        _assign(tensor, raw)
