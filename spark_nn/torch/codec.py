"""Networks <-> safetensors files: weights and a description of the inputs, and nothing that runs."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spark_nn.errors import ModelFileError, ParamError
from spark_nn.torch.blueprint import Blueprint, Specs, weights_of

SUFFIX = ".safetensors"
_INPUTS = "spark_nn.inputs"
_LOG = logging.getLogger(__name__)
# PyTorch's types by the names that safetensors files have for them.
_KINDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def save(
    module: Any, path: str | Path | None, inputs: Specs | None = None, whole: Callable[[Any], Any] = lambda each: each
) -> None:
    """Write the weights of a network, one after the other: no more memory is needed than for the largest.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    path : str or Path or None
        A local path; None on a rank that only takes part in bringing the weights together.
    inputs : dict, optional
        Shape and dtype of each input, which networks that shape themselves by their first input need.
    whole : callable
        Brings together a weight of which ranks hold parts.

    Raises
    ------
    ParamError
        It keeps state that is no tensor, or of a type that the file's format does not know.
    """
    import torch

    if extra := [name for name in module.state_dict() if name.endswith("_extra_state")]:
        raise ParamError(
            f"the model keeps state beside its tensors ({', '.join(extra)}), which a file of tensors cannot hold: keep "
            "it in buffers, or make it an argument of the model's function"
        )
    # The largest types first, so that each number lies where a processor reads it well.
    tensors = sorted(
        ((name, tensor) for name, tensor in weights_of(module).items() if not _is_lazy(tensor)),
        key=lambda each: (-each[1].element_size(), each[0]),
    )
    described = [[key, list(shape), dtype] for key, (shape, dtype) in (inputs or {}).items()]
    header = _header(tensors, {"format": "pt", _INPUTS: json.dumps(described)})
    with contextlib.nullcontext() if path is None else Path(path).open("wb") as file:
        if file is not None:
            file.write(header)
        for _, tensor in tensors:
            flat = whole(tensor.detach()).to("cpu").contiguous().reshape(-1)
            if file is not None:
                file.write(flat.view(torch.uint8).numpy().data)


def _header(tensors: list[tuple[str, Any]], metadata: dict[str, str]) -> bytes:
    """The beginning of a safetensors file: what lies where in the rest, by https://github.com/huggingface/safetensors."""
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors:
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _KINDS:
            raise ParamError(f"the model's {name} is of {kind}, which a safetensors file cannot hold: convert it")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        described[name] = {"dtype": _KINDS[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load(path: str | Path, blueprint: Blueprint, specs: Specs | None = None) -> Any:
    """The network of a blueprint with the weights of a file, in evaluation mode.

    Parameters
    ----------
    path : str or Path
        A local safetensors file.
    blueprint : Blueprint
        What makes the network.
    specs : dict, optional
        Its inputs, where the file does not tell.

    Raises
    ------
    ModelFileError
        The file is none, or is of another network.
    """
    tensors, inputs = read(path)
    module = blueprint.build()
    settle(module, specs or inputs)
    fill(module, tensors, str(path))
    return module.eval()


def read(path: str | Path) -> tuple[dict[str, Any], Specs]:
    """The tensors in a file, and the inputs of their network.

    Raises
    ------
    ModelFileError
        It is not a safetensors file of ours.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _inputs(file)  # noqa: SIM118  (it is no dict)


def inputs_of(path: str | Path) -> Specs:
    """The inputs of the network whose weights a file holds."""
    with _opened(path) as file:
        return _inputs(file)


def _inputs(file: Any) -> Specs:
    described = json.loads((file.metadata() or {}).get(_INPUTS, "[]"))
    return {key: (tuple(shape), str(np.dtype(dtype))) for key, shape, dtype in described}


@contextlib.contextmanager
def _opened(path: str | Path, framework: str = "pt") -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{path} cannot be read as a safetensors file ({error}): copy or save the model again"
        ) from error


def fill(module: Any, tensors: dict[str, Any], origin: str) -> None:
    """Give a network its weights.

    Raises
    ------
    ModelFileError
        They are another network's.
    """
    import torch

    own = weights_of(module)
    _check_alike(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, origin)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_fits(path: str | Path, blueprint: Blueprint, specs: Specs, origin: str) -> None:
    """Driver side: compare a network with a file of weights, of which only the header is read.

    Where PyTorch would have to be imported for it, or the network's function makes none without weights, it is left to
    who loads them.

    Raises
    ------
    ModelFileError
        They are another network's.
    """
    module = _outline(blueprint, specs)
    if module is None:
        return
    with _opened(path, "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _check_alike(weights_of(module), shapes, origin)


def _outline(blueprint: Blueprint, specs: Specs) -> Any | None:
    """A network without its weights."""
    torch = sys.modules.get("torch")
    if blueprint.function is None or torch is None:
        return blueprint.skeleton
    try:
        with torch.random.fork_rng([]):
            module = blueprint.build("meta")
            settle(module, specs, "meta")
    except Exception:  # noqa: BLE001  (it is the user's function, which may want to see numbers)
        _LOG.debug("the network was not compared with its weights", exc_info=True)
        return None
    return module


def _check_alike(own: dict[str, Any], shapes: dict[str, tuple[int, ...]], origin: str) -> None:
    if missing := sorted(own.keys() ^ shapes.keys()):
        raise ModelFileError(
            f"{origin} holds the weights of another network than the model gives: {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} in one of them only. Give the function, and the modelParams, that "
            "the model was trained with"
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ModelFileError(
                f"{origin} holds the weight {name} of the shape {shapes[name]}, and the model's has "
                f"{tuple(tensor.shape)}: give the function, and the modelParams, that it was trained with"
            )


def settle(module: Any, specs: Specs, device: str = "cpu") -> None:
    """Let a network that shapes itself by its first input do so, where it is."""
    if any(_is_lazy(tensor) for tensor in weights_of(module).values()):
        forward(module.eval(), example(specs, device=device))


def example(specs: Specs, rows: int = 1, device: Any = None) -> Any:
    """Rows of zeros, as the network takes them, where it is."""
    import torch

    arrays = {
        key: torch.from_numpy(np.zeros((rows, *shape), dtype)).to(device) for key, (shape, dtype) in specs.items()
    }
    return arrays.get(None, arrays)


def forward(module: Any, inputs: Any) -> Any:
    """What a network puts out for rows: a single input by place, several by their names, and without gradients."""
    import torch

    with torch.no_grad():
        return module(**inputs) if isinstance(inputs, dict) else module(inputs)


def by_name(put_out: Any) -> dict[str, Any]:
    """What a network put out, by its names; the only output by the empty name.

    Raises
    ------
    ParamError
        It is neither a tensor nor a dict of tensors.
    """
    import torch

    found = put_out if isinstance(put_out, dict) else {"": put_out}
    if not found or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise ParamError(
            f"the model puts out a {type(put_out).__name__}: it must be a tensor, or, for several outputs, a dict of "
            "tensors by their names. Wrap it in a module that returns one"
        )
    return found if len(found) > 1 else {"": next(iter(found.values()))}


def check_shaped(module: Any) -> None:
    """Driver side: refuse a network with weights that have no shape yet.

    Raises
    ------
    ParamError
        It has some.
    """
    if lazy := [name for name, tensor in weights_of(module).items() if _is_lazy(tensor)]:
        raise ParamError(
            f"the model's {_some(lazy)} will have a shape only when it has been called: call it once with rows, or "
            "give a function that returns it"
        )


def _is_lazy(tensor: Any) -> bool:
    import torch

    return bool(torch.nn.parameter.is_lazy(tensor))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
