"""Driver side: a network that was trained elsewhere as what a fit would have left of it.

Keras is there already, since the user holds one of its models.
"""

from __future__ import annotations

from typing import Any

from spark_nn.columns import Tensor
from spark_nn.errors import ParamError
from spark_nn.keras import codec
from spark_nn.keras.customs import Find
from spark_nn.keras.describe import by_name, describe_model
from spark_nn.model import Fitted
from spark_nn.outputs import Output
from spark_nn.persistence import ModelFile


def describe(model: Any, columns: dict[str, tuple[str, list[str]]], find: Find) -> Fitted:
    """What a fit would have left.

    Parameters
    ----------
    model : keras.Model
        Built.
    columns : dict
        For each input, by its tensor's name, the param that names its columns, and the columns.
    find : callable
        Finds custom objects by their names.

    Raises
    ------
    ParamError
        The model is not built, has an input or output of open shape, or cannot be loaded where it is to score; or the
        columns do not fit its inputs.
    """
    if not codec.is_model(model):
        raise TypeError(f"model takes a keras.Model, not {model!r} ({type(model).__name__})")
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ParamError(
            "the model does not know its inputs: begin it with keras.Input, or call a Sequential model once with an "
            "array; wrap a model of a class of your own, keras.Model(inputs, yours(inputs))"
        )
    tensors = _inputs(inputs, columns)
    put_out = model.compute_output_spec(inputs[0] if len(inputs) == 1 else {tensor.name: tensor for tensor in inputs})
    for name, output in by_name(model, put_out).items():
        _fixed(f"output {name!r}" if name else "output", output)
    file = ModelFile(codec.SUFFIX)
    codec.save(model, file.path)
    codec.check_saved(file.path, "the model", find, compiled=False)
    outputs = {name: Output.fromDict(output) for name, output in describe_model(model, put_out).items()}
    return Fitted(file.sealed(), tensors, outputs, None)


def _inputs(inputs: list[Any], columns: dict[str, tuple[str, list[str]]]) -> tuple[Tensor, ...]:
    """The inputs as the columns make them."""
    names = [each.name for each in inputs]
    keys = [name.partition(":")[2] for name in columns]
    if len(names) != len(keys) or (len(names) > 1 and set(names) != set(keys)):
        given = ", ".join(map(repr, keys)) if any(keys) else "none"
        raise ParamError(
            f"the model has the input{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}, and inputs names "
            f"{given}: set inputs to a dict of each input's name and its column"
            + ("" if len(names) > 1 else ", or featuresCol in its place")
        )
    found = {each.name: each for each in inputs} if len(names) > 1 else dict.fromkeys(keys, inputs[0])
    return tuple(_tensor(found[key], name, *given) for key, (name, given) in zip(keys, columns.items(), strict=True))


def _tensor(tensor: Any, name: str, param: str, columns: list[str]) -> Tensor:
    shape = _fixed(f"input {tensor.name!r}", tensor)
    if not shape:
        raise ParamError(
            f"the model's input {tensor.name!r} has no dimension but the batch's: a column of numbers makes an input "
            "of shape (1,), so build the model with that"
        )
    if len(columns) > 1 and shape != (len(columns),):
        raise ParamError(
            f"{param}={columns!r} makes an input of shape {(len(columns),)}, and the model's input {tensor.name!r} has "
            f"{shape}: name as many columns, or one that holds an array"
        )
    return Tensor(
        name,
        tuple(columns),
        "scalars" if len(columns) > 1 else "array",
        _dtype(tensor, shape, columns),
        len(shape),
        shape,
    )


def _fixed(what: str, tensor: Any) -> tuple[int, ...]:
    """The shape of a row, which must not be open."""
    shape = tuple(tensor.shape[1:])
    if None in shape:
        raise ParamError(
            f"the model's {what} has the shape {shape} per row, and None leaves it open: build the model with fixed "
            "sizes, such as keras.Input((224, 224, 3)), and pad or cut the rows to them"
        )
    return shape


def _dtype(tensor: Any, shape: tuple[int, ...], columns: list[str]) -> str:
    """The dtype of the column values that an input takes; Keras casts them to its own.

    Single numbers, which make inputs of width one or are joined, are floats as for a fit.
    """
    dtype = str(tensor.dtype)
    if dtype == "string":
        return "string"
    if "float" in dtype or dtype == "bool" or ("int" in dtype and (len(columns) > 1 or shape == (1,))):
        return "float32"
    if "int" in dtype:
        return "int64" if dtype in ("int64", "uint64", "uint32") else "int32"
    raise ParamError(f"the model's input {tensor.name!r} takes {dtype}, which no column holds: use a float input")
