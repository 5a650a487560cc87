"""Executor side of an evaluation: a network that counts what its loss and metrics need.

The driver imports this module to name the loader; PyTorch is imported only on the executor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np

from spark_nn.columns import Arrays
from spark_nn.outputs import Output
from spark_nn.scoring.batches import slices
from spark_nn.share import Share
from spark_nn.torch import codec, losses, predict
from spark_nn.torch.blueprint import Blueprint


@dataclass(frozen=True)
class MeasureLoader:
    """Loads what measures a model; equal where its parts are, so that it loads once.

    Parameters
    ----------
    pickled : bytes
        The blueprint.
    outputs : str
        What the network puts out, as JSON.
    """

    pickled: bytes
    outputs: str

    def __call__(self, path: str, share: Share) -> TorchMeasure:
        """The measure of a safetensors file, for a task's share of the machine."""
        predict.start_torch(share)
        blueprint: Blueprint = cloudpickle.loads(self.pickled)
        outputs = {name: Output.fromDict(each) for name, each in json.loads(self.outputs).items()}
        module = codec.load(path, blueprint)
        return TorchMeasure(module, blueprint, outputs, predict.rows_at_once(module, codec.inputs_of(path)))


class TorchMeasure:
    """Counts rows by the loss and metrics that a network was trained with.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    blueprint : Blueprint
        Its loss and metrics.
    outputs : dict of str to Output
        What it puts out.
    rows : int
        Rows that go through it at once.
    """

    def __init__(self, module: Any, blueprint: Blueprint, outputs: dict[str, Output], rows: int) -> None:
        import torch

        from spark_nn.torch.metrics import Tally

        self._module = module
        self._rows = rows
        self._criterion = losses.Criterion(blueprint.loss)
        self._tally = Tally(blueprint.metrics, outputs, torch.device("cpu"))
        self._others: list[bytes] = []

    def reset(self) -> None:
        """Forget what was counted."""
        self._tally.reset()
        self._others = []

    def add(self, inputs: Arrays, labels: Arrays, weights: np.ndarray | None) -> None:
        """Count rows."""
        import torch

        total = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        with torch.no_grad():
            for rows in slices(total, self._rows):
                put_out = codec.forward(self._module, _tensors(inputs, rows))
                targets = _tensors(labels, rows)
                counted = None if weights is None else torch.from_numpy(weights[rows])
                self._tally.add_loss(self._criterion(put_out, targets, counted), min(rows.stop, total) - rows.start)
                self._tally.add(put_out, targets)

    def state(self) -> bytes:
        """What was counted."""
        return self._tally.state()

    def merge(self, state: bytes) -> None:
        """Count what another process has counted."""
        self._others.append(state)

    def results(self) -> dict[str, Any]:
        """The values of loss and metrics over all that was counted."""
        if self._others:
            self._tally.take(self._others)
        return self._tally.results()


def _tensors(arrays: Any, rows: slice) -> Any:
    import torch

    if isinstance(arrays, dict):
        return {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}
    return torch.from_numpy(arrays[rows])
