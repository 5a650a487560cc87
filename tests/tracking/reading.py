"""What TensorBoard finds in a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np

# TensorBoard's switch: to read files it need not import TensorFlow.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


def found(folder):
    accumulator = EventAccumulator(str(folder).removeprefix("file://"))
    accumulator.Reload()
    return accumulator


def scalars(folder):
    """Steps and values by their tags."""
    accumulator = found(folder)
    return {
        tag: [(each.step, each.value) for each in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def check_told(folder, history):
    """Every epoch of the history once, in the right folder, and what goes with it; nothing else."""
    names = sorted(path.name for path in Path(folder.removeprefix("file://")).iterdir())
    assert names == ["train", "validation"][: 1 + any(name.startswith("val_") for name in history)]
    folders = {name: scalars(f"{folder}/{name}") for name in names}
    for name, values in history.items():
        where = "validation" if name.startswith("val_") else "train"
        told = folders[where].pop(f"epoch_{name.removeprefix('val_')}")
        assert [step for step, _ in told] == list(range(len(values)))
        np.testing.assert_allclose([value for _, value in told], values, rtol=1e-6)
    epochs = len(next(iter(history.values())))
    assert [step for step, _ in folders["train"]["rows_per_second"]] == list(range(epochs))
    assert all(value > 0 for _, value in folders["train"].pop("rows_per_second"))
    rates = dict(folders["train"].pop("epoch_learning_rate", []))
    assert not any(folders.values())
    return rates


def operations(folder):
    """The kinds of operations in the drawing of a fit's network, those of its functions among them."""
    graph = found(f"{folder}/train").Graph()
    functions = [node for function in graph.library.function for node in function.node_def]
    return {node.op for node in (*graph.node, *functions)}
