"""A PyTorch network in the formats of other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

from spark_nn.torch import codec
from spark_nn.torch.blueprint import Blueprint, Specs

FORMATS = ("safetensors", "onnx")
# What PyTorch's exporter imports.
PACKAGES = {"onnx": ("onnx", "onnxscript")}
CURE = "pip install onnx onnxscript"


def write(file: Path, blueprint: Blueprint, specs: Specs, format: str, target: Path) -> None:
    """Write a model in a format.

    Parameters
    ----------
    file : Path
        The safetensors file.
    blueprint : Blueprint
        What makes the network.
    specs : dict
        Its inputs.
    format : {"safetensors", "onnx"}
        What to write.
    target : Path
        A local path that does not exist.
    """
    if format == "safetensors":
        shutil.copyfile(file, target)
        return
    import torch

    module = codec.load(file, blueprint, specs)
    rows = codec.example(specs, rows=2)
    batch = {0: torch.export.Dim("rows")}
    if isinstance(rows, dict):
        shapes = {"kwargs": rows, "dynamic_shapes": dict.fromkeys(rows, batch)}
        torch.onnx.export(module, (), target, dynamo=True, external_data=False, verbose=False, **shapes)
    else:
        torch.onnx.export(
            module, (rows,), target, dynamo=True, external_data=False, verbose=False, dynamic_shapes=(batch,)
        )
