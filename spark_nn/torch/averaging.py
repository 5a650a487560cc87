"""Worker side: the mean over the ranks of a step's gradients.

Either the gang's ring averages them where they lie, after the backward pass, or PyTorch's own DistributedDataParallel
does, during it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from spark_nn.errors import CollectiveError
from spark_nn.gang.collective import Average, Collective, Engine, engine_for
from spark_nn.torch import codec, rendezvous


class Averager:
    """Averages gradients over the ranks through the gang's own collective.

    The gradients of all parameters go in one exchange, and are overwritten where they lie: no copy is made of those
    on the CPU. A parameter without a gradient on this rank counts as one of zeros; one that has none on any rank is
    left without, as in a single process.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    collective : Collective
        Exchange with the other ranks.
    """

    # Whether the ranks exchange parameters when they go forward, and each holds a part of them only.
    divided: ClassVar[bool] = False

    def __init__(self, module: Any, collective: Collective) -> None:
        self.forward = module  # what to call for the step's output
        self.collective = collective
        self._parameters = [each for each in module.parameters() if each.requires_grad]
        self._used = np.zeros(len(self._parameters), np.float32)
        self._averages: dict[Any, Average] = {}

    def average(self) -> None:
        """Give every parameter the gradient of the global batch."""
        groups: dict[Any, list[Any]] = {np.dtype(np.float32): [self._used]}
        copies: list[tuple[Any, Any]] = []
        sparse: list[Any] = []
        for number, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            self._used[number] = gradient is not None
            if gradient is None:
                gradient = parameter.grad = torch.zeros_like(parameter)
            elif gradient.layout is not torch.strided:
                sparse.append(parameter)
                continue
            flat = _flat(gradient)
            if flat is None:
                gradient = parameter.grad = gradient.contiguous()
                flat = gradient.view(-1)
            if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64):
                # Halves add up in single precision; doubles stay doubles.
                there = flat
                flat = flat.to("cpu", torch.float64 if flat.dtype is torch.float64 else torch.float32)
                copies.append((there, flat))
            array = flat.numpy()
            groups.setdefault(array.dtype, []).append(array)
        for dtype, arrays in groups.items():
            self._averaging(dtype, arrays)(arrays, arrays)
        for there, flat in copies:
            there.copy_(flat)
        for parameter in sparse:
            parameter.grad = self._gathered(parameter.grad)
        if not self._used.all():
            for place in np.flatnonzero(self._used == 0):
                self._parameters[int(place)].grad = None

    def whole(self, tensor: Any) -> Any:
        """A tensor of which ranks may hold parts; where they do, all call it."""
        return tensor

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Train in the block: what breaks the averaging is raised from it as an error of the gang's."""
        yield

    def _averaging(self, dtype: Any, arrays: Sequence[Any]) -> Average:
        sizes = tuple(each.size for each in arrays)
        if (dtype, sizes) not in self._averages:
            self._averages[dtype, sizes] = self.collective.averaging(dtype, sizes)
        return self._averages[dtype, sizes]

    def _gathered(self, gradient: Any) -> Any:
        """A sparse gradient of all ranks. Made dense, Adam would decay the moments of rows that no rank has seen."""
        gradient = gradient.coalesce()
        indices, values = gradient.indices(), gradient.values()
        every_index = self.collective.all_gather(indices.cpu().numpy().tobytes())
        every_value = self.collective.all_gather(values.cpu().contiguous().numpy().tobytes())
        parts = [np.frombuffer(part, np.int64).reshape(indices.shape[0], -1) for part in every_index]
        numbers = np.frombuffer(b"".join(every_value), values.cpu().numpy().dtype) / self.collective.world
        joined = torch.sparse_coo_tensor(
            torch.from_numpy(np.concatenate(parts, axis=1)),
            torch.from_numpy(numbers.astype(values.cpu().numpy().dtype)).reshape(-1, *values.shape[1:]),
            gradient.shape,
        )
        return joined.to(gradient.device).coalesce()


class Alone(Averager):
    """For the gang of one: there is nothing to average."""

    def average(self) -> None:
        """See :meth:`Averager.average`."""


class NativeAverager(Averager):
    """Averages gradients by PyTorch's DistributedDataParallel, which does so during the backward pass.

    Parameters
    ----------
    module : torch.nn.Module
        The network, on its device.
    collective : Collective
        Exchange with the other ranks; all of them are a process group (see :mod:`spark_nn.torch.rendezvous`).
    inputs : tensor or dict of tensors, or None
        Rows of its input, which show what parameters an output does without; None where a step may use others.
    """

    def __init__(self, module: Any, collective: Collective, inputs: Any) -> None:
        super().__init__(module, collective)
        with warnings.catch_warnings():
            # The newest release has another name for the setting, which the ones before do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # Buffers stay a rank's own until the epoch ends, as with the ring.
            self.forward = torch.nn.parallel.DistributedDataParallel(
                module,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=inputs is None or _unused(module, inputs),
            )

    def average(self) -> None:
        """See :meth:`Averager.average`: it is done."""

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """See :meth:`Averager.guarded`."""
        try:
            yield
        except (RuntimeError, torch.distributed.DistError) as error:
            # All that PyTorch runs raises these errors, the network as well.
            if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "timed out")):
                raise
            self.collective.barrier()  # raises what has become of the others; those that are well come here, too
            raise CollectiveError(f"torch.distributed failed on rank {self.collective.rank}: {error}") from error


@contextlib.contextmanager
def averager(
    engine: Engine, module: Any, collective: Collective, host: str, timeout: float, inputs: Any
) -> Iterator[Averager]:
    """What averages the gradients in the block; all ranks call it.

    Parameters
    ----------
    engine : {"auto", "ring", "native"}
        What was asked for. ``"auto"`` is native where every rank has a GPU: on CPUs the ring is faster than Gloo.
    module : torch.nn.Module
        The network, on its device.
    collective : Collective
        Exchange with the other ranks.
    host : str
        An address of this machine that the other ranks reach.
    timeout : float
        Seconds that a rank may keep silent.
    inputs : tensor or dict of tensors, or None
        Rows of the network's input (see :class:`NativeAverager`).
    """
    if collective.world == 1:
        yield Alone(module, collective)
        return
    here = any(each.device.type == "cuda" for each in module.parameters())
    everywhere = [int(each) for each in collective.all_gather(b"%d" % here)]
    if engine_for(engine, everywhere) == "ring":
        yield Averager(module, collective)
        return
    with rendezvous.joined(collective, host, timeout, "nccl" if all(everywhere) else "gloo"):
        yield NativeAverager(module, collective, inputs)


def _flat(gradient: Any) -> Any | None:
    """A gradient's memory as one dimension, None where it is not dense; it lies alike on all ranks."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    order = sorted(range(gradient.ndim), key=lambda axis: -gradient.stride(axis))
    ordered = gradient.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


def _unused(module: Any, inputs: Any) -> bool:
    """Whether the output does without some parameters."""
    training = module.training
    module.eval()  # which draws no random numbers and moves no statistics
    put_out = module(**inputs) if isinstance(inputs, dict) else module(inputs)
    total = sum(each.float().sum() for each in codec.by_name(put_out).values())
    total.backward()  # type: ignore[union-attr]
    unused = any(each.grad is None for each in module.parameters() if each.requires_grad)
    module.zero_grad(set_to_none=True)
    module.train(training)
    return unused
