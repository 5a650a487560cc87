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

    given = tuple(rows.values()) if isinstance(rows, dict) else rows
    devices = [rows.device] if getattr(rows, "is_cuda", False) else []
    training = {each: each.training for each in module.modules()}
    try:
        module.eval()
        with torch.random.fork_rng(devices), torch.no_grad():
            traced, _ = graph(module, given)
    finally:
        for each, was in training.items():
            each.training = was
    return traced.SerializeToString(), None
