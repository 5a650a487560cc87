"""Driver side: a network that was trained elsewhere as what a fit would have left of it.

PyTorch is there already, since the user holds one of its networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spark_nn.columns import Tensor
from spark_nn.errors import ParamError
from spark_nn.model import Fitted
from spark_nn.outputs import Output
from spark_nn.persistence import ModelFile
from spark_nn.torch import codec, losses


def _inputs(example: Any, columns: dict[str, tuple[str, list[str]]]) -> tuple[Tensor, ...]:
    """The inputs as the columns make them."""
    given = example if isinstance(example, dict) else {None: example}
    keys = {name: name.partition(":")[2] or None for name in columns}
    if set(keys.values()) != set(given):
        named = ", ".join(repr(key) for key in given if key) or "none"
        raise ParamError(f"the example has inputs of the names {named}, and the param inputs must name the same")
    return tuple(_tensor(name, np.asarray(given[keys[name]]), *columns[name]) for name in columns)


def describe(model: Any, example: Any, columns: dict[str, tuple[str, list[str]]], loss: Any) -> Fitted:
    """What a fit would have left.

    Parameters
    ----------
    model : torch.nn.Module
        With its weights.
    example : array or dict of arrays
        Rows of its input.
    columns : dict
        For each input, by its tensor's name, the param that names its columns, and the columns.
    loss : object or None
        As the param `loss` takes it.

    Raises
    ------
    ParamError
        The network does not take the example, or the columns do not fit it.
    """
    tensors = _inputs(example, columns)
    specs = {tensor.key: (tuple(tensor.shape or ()), tensor.dtype) for tensor in tensors}
    training = model.training
    try:
        device = next((each.device for each in model.parameters()), None)
        put_out = codec.by_name(codec.forward(model.eval(), codec.example(specs, device=device)))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ParamError(f"the model does not take its example: {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    file = ModelFile(codec.SUFFIX)
    codec.save(model, file.path, specs)
    outputs = {name: Output.fromDict(each) for name, each in losses.describe(put_out, loss).items()}
    return Fitted(file.sealed(), tensors, outputs, None)


def _tensor(name: str, rows: np.ndarray, param: str, columns: list[str]) -> Tensor:
    shape = rows.shape[1:]
    if not rows.ndim:
        raise ParamError("the example must be rows: its first dimension counts them")
    if len(columns) > 1 and shape != (len(columns),):
        raise ParamError(
            f"{param}={columns!r} makes an input of shape {(len(columns),)}, and the example's rows have {shape}: name "
            "as many columns, or one that holds an array"
        )
    kind = {"f": "float32", "b": "bool", "i": "int64" if rows.dtype.itemsize > 4 else "int32"}.get(rows.dtype.kind)
    if kind is None:
        raise ParamError(
            f"the example is of {rows.dtype}, which no column holds: use floats, whole numbers or booleans"
        )
    form = "scalars" if len(columns) > 1 else "array"
    # Columns that are joined, and those of single numbers, become floats, as for a fit.
    single = len(columns) > 1 or shape in ((), (1,))
    return Tensor(name, tuple(columns), form, "float32" if single else kind, len(shape), tuple(shape))  # type: ignore[arg-type]
