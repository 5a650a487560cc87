"""Worker side: a network of PyTorch's as TensorBoard draws it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from spark_nn.tracking.events import Drawing


def draw(module: Any, rows: Any) -> Drawing:
    """The graph of the network on these rows, as ``SummaryWriter.add_graph`` traces it.

    Nothing that training depends upon changes: the network computes as in evaluation, and the generators stay.
    """
    # TensorBoard's own switch: in this process it need not import TensorFlow to write files.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    import torch
    from torch.utils.tensorboard._pytorch_graph import graph  # the writer that has it in public opens a file of its own

    class Named(torch.nn.Module):  # type: ignore[misc]
        """Tracing passes inputs by their places, and the network takes them by their names."""

        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, *values: Any) -> Any:
            return self.network(**dict(zip(rows, values, strict=True)))

    several = isinstance(rows, dict)
    given = tuple(rows.values()) if several else (rows,)
    devices = sorted({each.get_device() for each in given if each.is_cuda})
    training = {each: each.training for each in module.modules()}
    try:
        module.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            # Not strictly, as several outputs are a dict.
            traced, _ = graph(Named() if several else module, given, use_strict_trace=False)
    finally:
        for each, was in training.items():
            each.training = was
    return traced.SerializeToString(), None
