"""Worker side: a network whose parameters, gradients and optimizer's state are divided over the ranks.

PyTorch's ``fully_shard`` (FSDP2) does it: a group of layers has its parameters brought together when it computes, and
let go of right after; and each rank gets its part of the gradients' mean. The ranks make these exchanges in each
forward and backward pass, so all must go through the same layers equally often.

The first rank builds the network as a single process would, for its weights are drawn one after the other, and hands
them out group by group. The others never hold more than a few groups whole, if the network can be built without memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import json
import platform
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from spark_nn.errors import ParamError
from spark_nn.gang.collective import Collective
from spark_nn.gang.context import GangContext
from spark_nn.torch import codec, rendezvous, sync
from spark_nn.torch.averaging import NativeAverager
from spark_nn.torch.blueprint import Blueprint, Specs

# Elements of a group: below, an exchange costs more than what it saves.
LEAST = 1 << 20
# What computes in halves with weights in halves, as under autocast, which would keep a copy of them for the backward
# pass where this lets go of them.
_HALVES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_MMAP_THRESHOLD = -3  # of malloc.h
_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


class _Uses(TorchFunctionMode):  # type: ignore[misc]
    """Finds the layers of which a parameter is used, within the mode, while they are not called.

    Parameters
    ----------
    holders : dict of int to set of str
        For each parameter, by its identity, the layers that it is a part of.
    """

    def __init__(self, holders: Mapping[int, set[str]]) -> None:
        super().__init__()
        self.holders = holders
        self.called: list[str] = []  # the layers under way, the innermost last
        self.outside: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``torch.overrides.TorchFunctionMode``."""
        put_out = func(*args, **(kwargs or {}))
        # To ask for a type, a shape or a device is no use: what is divided answers that as well.
        if any(isinstance(leaf, (torch.Tensor, type(None))) for leaf in tree_leaves(put_out)):
            for leaf in tree_leaves((args, kwargs)):
                self.outside |= self.holders.get(id(leaf), set()).difference(self.called)
        return put_out


def called_once(module: Any, specs: Specs) -> set[str]:
    """The layers that a network calls exactly once for a row, and whose parameters it uses only within that call.

    Only those that return tensors, in lists and dicts at most.
    """
    names = {each: name for name, each in module.named_modules()}
    holders: dict[int, set[str]] = {}
    for name, each in module.named_modules():
        for parameter in each.parameters():
            holders.setdefault(id(parameter), set()).add(name)
    uses = _Uses(holders)
    counted: Counter[str] = Counter()

    def enter(each: Any, _: Any) -> None:
        uses.called.append(names[each])

    def leave(each: Any, _: Any, put_out: Any) -> None:
        uses.called.pop()
        counted[names[each]] += 1 if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(put_out)) else 2

    hooks = [each.register_forward_pre_hook(enter, prepend=True) for each in names]
    hooks += [each.register_forward_hook(leave) for each in names]
    training = module.training
    try:
        with uses:
            codec.forward(module.eval(), codec.example(specs))
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return {name for name, times in counted.items() if times == 1} - uses.outside


def groups_of(module: Any, called: set[str], least: int = LEAST) -> list[str]:
    """The layers whose parameters are brought together at once, by their names, inner ones first; the last is all.

    From the innermost on, each layer whose parameters that are in no group yet have that many elements becomes one, if
    it was called once, and none of these parameters is used outside of it.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    called : set of str
        Which layers are called once, by their names.
    least : int
        How many elements.
    """
    places = [(name, parameter) for name, parameter in module.named_parameters(remove_duplicate=False)]
    everywhere = Counter(id(parameter) for _, parameter in places)
    taken: set[int] = set()
    groups = []
    for name, each in reversed(list(module.named_modules())):
        if name not in called or not name or isinstance(each, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            continue
        inside = [parameter for place, parameter in places if place.startswith(f"{name}.")]
        sizes = {id(parameter): parameter.numel() for parameter in inside if id(parameter) not in taken}
        here = Counter(id(parameter) for parameter in inside if id(parameter) in sizes)
        if sum(sizes.values()) >= least and all(here[key] == everywhere[key] for key in here):
            groups.append(name)
            taken.update(here)
    return [*groups, ""]


def outline(blueprint: Blueprint, specs: Specs) -> Any:
    """A network without its weights, for ranks that get them from another; they take no memory.

    Where the network cannot be built without memory, it is built with it.
    """
    try:
        module = blueprint.build("meta")
        codec.settle(module, specs, "meta")
        whole = any(_is_meta(each) for each in _others(module))
    except (RuntimeError, TypeError, ValueError):
        # As where it asks for the values of its weights. If that is not what is wrong, it will be told below.
        whole = True
    if whole:
        module = blueprint.build()
        codec.settle(module, specs)
    _exchange(module, {id(each): _like(each, "meta") for each in module.parameters() if not each.is_meta})
    return module


class Sharded(NativeAverager):
    """Averages the gradients of a network that is divided, which PyTorch does during the backward pass.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang; the ranks are a process group.
    module : torch.nn.Module
        The network: rank 0's with its weights, those of the others without. It is changed.
    groups : list of str
        As :func:`groups_of` gives them.
    device : torch.device
        Where the network is to be.
    halves : bool
        Whether it computes in bfloat16.
    """

    divided = True

    def __init__(self, gang: GangContext, module: Any, groups: list[str], device: Any, *, halves: bool) -> None:
        self.forward = module
        self.collective = gang.collective
        mesh = init_device_mesh(device.type, (gang.world,))
        for name in groups:
            part = module.get_submodule(name)
            _exchange(module, {id(each): _like(each, "cpu") for each in _undivided(part).values() if each.is_meta})
            refs = {place: weakref.ref(each) for place, each in _undivided(part).items()}
            for ref in refs.values():
                sync.broadcast(gang, ref())
            policy = MixedPrecisionPolicy()
            if halves and type(part) in _HALVES:
                policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            try:
                # All let go of their parameters after the forward pass, the outermost too: with rows that are only
                # looked at no backward pass would do it.
                fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
            except (ValueError, NotImplementedError, AssertionError) as error:
                raise ParamError(f"sharding='fsdp' cannot divide {name or 'the model'}: {error}") from error
            _check_gone(refs)
        buffers = {id(each): torch.empty_like(each, device=device) for each in module.buffers() if each.is_meta}
        _exchange(module, buffers)
        self._keep_in_step(module, groups)

    def whole(self, tensor: Any) -> Any:
        """See :meth:`Averager.whole`."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _keep_in_step(self, module: Any, groups: list[str]) -> None:
        """Have each forward pass end with a look at whether all ranks have gone through the same groups.

        An exchange has no name: where ranks skip different layers of one size, each would compute with parts of
        several, and no one would notice.
        """
        passed: list[str] = []

        def note(name: str, *_: Any) -> None:
            passed.append(name)

        def begin(*_: Any) -> None:
            passed.clear()

        def compare(*_: Any) -> None:
            _check_passed(self.collective, passed)

        for name in groups:
            module.get_submodule(name).register_forward_pre_hook(functools.partial(note, name), prepend=True)
        module.register_forward_pre_hook(begin, prepend=True)
        module.register_forward_hook(compare)


@contextlib.contextmanager
def sharded(gang: GangContext, module: Any, specs: Specs, device: Any, *, seed: int, halves: bool) -> Iterator[Sharded]:
    """Have a network divided over the ranks in the block; all ranks call it.

    Parameters
    ----------
    gang : GangContext
        This rank's view of its gang.
    module : torch.nn.Module
        The network: rank 0's with its weights, those of the others without. It is changed.
    specs : dict
        Its inputs.
    device : torch.device
        Where it is to be.
    seed : int
        Of the random numbers.
    halves : bool
        Whether it computes in bfloat16.

    Raises
    ------
    ParamError
        It cannot be divided.
    """
    for name, each in module.named_modules():
        if getattr(each, "sparse", False):
            raise ParamError(f"sharding='fsdp' cannot divide sparse gradients: leave out sparse=True of layer {name}")
    kinds = {each.decode() for each in gang.collective.all_gather(device.type.encode())}
    if len(kinds) > 1:
        raise ParamError(
            "sharding='fsdp' needs a GPU on every worker or on none: set useGpu, or have Spark assign them"
        )
    _return_memory()
    planned = groups_of(module, called_once(module, specs)) if gang.rank == 0 else []
    groups = json.loads(gang.collective.all_gather(json.dumps(planned).encode())[0])
    backend = "nccl" if device.type == "cuda" else "gloo"
    with rendezvous.joined(gang.collective, gang.host, gang.timeout, backend):  # type: ignore[arg-type]
        averager = Sharded(gang, module, groups, device, halves=halves)
        sync.start_alike(gang, module, seed)
        with averager.guarded():
            yield averager


def told(gang: GangContext, put_out: Mapping[str, Any]) -> dict[str, Any]:
    """What the network of rank 0 put out: on all ranks tensors of these shapes, without values."""
    here = json.dumps({name: list(each.shape) for name, each in put_out.items()})
    shapes = json.loads(gang.collective.all_gather(here.encode())[0])
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _return_memory() -> None:
    """Have glibc give back what is freed of a megabyte and more; it would keep it, in pieces that fit nothing else."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def _undivided(module: Any) -> dict[str, Any]:
    return {name: each for name, each in module.named_parameters() if not isinstance(each, DTensor)}


def _check_passed(collective: Collective, passed: list[str]) -> None:
    """Refuse ranks that have gone through different groups, by their names, or in another order."""
    digest = hashlib.sha256(json.dumps(passed).encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True) // 2  # so that its negative is a number, too
    bounds = np.array([number, -number], np.int64)
    collective.all_reduce(bounds, "max")
    if bounds[0] == -bounds[1]:
        return
    found = [json.loads(each) for each in collective.all_gather(json.dumps(passed).encode())]
    other = next(rank for rank, each in enumerate(found) if each != found[0])
    names, others = next(pair for pair in zip_longest(found[0], found[other]) if pair[0] != pair[1])
    raise ParamError(
        f"sharding='fsdp' needs all workers to go through the same layers, and rank 0 came to {names or 'its end'} "
        f"where rank {other} came to {others or 'its end'}: skip no layers at random (LayerDrop, stochastic depth) or "
        "by the rows, or set sharding='none'"
    )


def _check_gone(refs: Mapping[str, weakref.ref[Any]]) -> None:
    """Refuse a network that holds its parameters by other ways than PyTorch's: it would go on with what they were."""
    if not any(ref() is not None for ref in refs.values()):
        return
    gc.collect()
    if left := [name for name, ref in refs.items() if ref() is not None]:
        raise ParamError(
            f"sharding='fsdp' replaces parameters, and the model refers to {', '.join(left[:5])} otherwise than as an "
            "attribute of a module, as from a list: look it up where it is used"
        )


def _exchange(module: Any, others: Mapping[int, Any]) -> None:
    """Put other tensors in the place of parameters and buffers, wherever these are used."""
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            tensors.update({name: others[id(old)] for name, old in tensors.items() if id(old) in others})


def _like(parameter: Any, device: str) -> Any:
    return torch.nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)


def _others(module: Any) -> list[Any]:
    """What modules refer to besides parameters, buffers and each other."""
    return [
        leaf
        for each in module.modules()
        for name, value in vars(each).items()
        if name not in ("_parameters", "_buffers", "_modules")
        for leaf in tree_leaves(value)
    ]


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
