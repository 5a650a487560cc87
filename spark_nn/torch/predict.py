"""Executor side of scoring: a PyTorch network that predicts.

The driver imports this module to name the loader; PyTorch is imported only on the executor.
"""

from __future__ import annotations

import warnings
from typing import Any

from spark_nn.columns import Arrays
from spark_nn.scoring.batches import rows_for
from spark_nn.share import Share
from spark_nn.torch import codec
from spark_nn.torch.blueprint import Blueprint, Specs


def start_torch(share: Share) -> str:
    """Import PyTorch for a task's share of the machine; return PyTorch's name of its device.

    Spark hands a Python worker from task to task, and each of these has cores and a GPU of its own.
    """
    import torch

    torch.set_num_threads(share.cpus)
    # Arrow's memory must not be written to, and inference does not.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    cards = torch.cuda.device_count() if share.gpu is not None else 0
    return f"cuda:{share.card(cards)}" if cards else "cpu"


def rows_at_once(module: Any, specs: Specs) -> int:
    """Rows that go through a network at once with good speed and little memory, found by a row of zeros."""
    import torch

    widest = [1]

    def note(_: Any, __: Any, put_out: Any) -> None:
        each = put_out if isinstance(put_out, (list, tuple)) else [put_out]
        widest.extend(tensor.numel() for tensor in each if isinstance(tensor, torch.Tensor))

    hooks = [each.register_forward_hook(note) for each in module.modules()]
    try:
        codec.forward(module, codec.example(specs))
    finally:
        for hook in hooks:
            hook.remove()
    return rows_for(max(widest))


def load_predictor(path: str, share: Share, blueprint: Blueprint) -> TorchPredictor:
    """The predictor of a safetensors file.

    Parameters
    ----------
    path : str
        A local file.
    share : Share
        What it may use of the machine: PyTorch gets as many threads as the task has cores.
    blueprint : Blueprint
        What makes the network.
    """
    device = start_torch(share)
    module = codec.load(path, blueprint)
    rows = rows_at_once(module, codec.inputs_of(path))
    return TorchPredictor(module.to(device), rows, device)


class TorchPredictor:
    """Predicts blocks of rows.

    Parameters
    ----------
    module : torch.nn.Module
        The network, in evaluation mode.
    rows : int
        Rows that go through it at once with good speed and little memory.
    device : str
        PyTorch's name of the device that it is on.
    """

    def __init__(self, module: Any, rows: int, device: str) -> None:
        self.rows = rows
        self._module = module
        self._device = device

    def __call__(self, inputs: Arrays) -> Arrays:
        """Predict a block of rows."""
        import torch

        with torch.inference_mode():
            if isinstance(inputs, dict):
                part: Any = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            else:
                part = torch.from_numpy(inputs).to(self._device)
            found = codec.by_name(codec.forward(self._module, part))
            # NumPy has no bfloat16, and columns have no halves.
            outputs: dict[str, Any] = {name: tensor.float().cpu().numpy() for name, tensor in found.items()}
        predicted: Arrays = outputs.get("", outputs)
        return predicted
