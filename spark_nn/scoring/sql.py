"""A model as a function of SQL.

``transform`` plans the conversion of its columns on the JVM; a function does not know what it will be called with. So
its arguments arrive as they are, and are turned into what that plan would have given, Vectors too, on the executor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from spark_nn.columns import Tensor, quoted
from spark_nn.errors import ColumnError, ParamError
from spark_nn.scoring.scorer import Scorer
from spark_nn.scoring.udf import arrow_kind, frames_kind, nested, takes_arrow

# The fields of a Vector, as Arrow has them.
_VECTOR = {"type": pa.int8(), "size": pa.int32(), "indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())}


@dataclass(frozen=True)
class SqlScorer:
    """Executor side: turns batches of arguments into batches of structs.

    Parameters
    ----------
    scorer : Scorer
        What scores the model's inputs; its tensors name the arguments, in order.
    names : dict of str to str
        What the fields are called, by the scorer's fields.
    """

    scorer: Scorer
    names: dict[str, str]

    def __call__(self, batches: Iterator[Sequence[pa.Array]]) -> Iterator[pa.StructArray]:
        """Score Arrow batches, each an array per argument, one struct per row; null where a row is skipped."""
        fields = [self.names[field] for field in self.scorer.fields]
        for scored in self.scorer(self._inputs(batch) for batch in batches):
            values = dict(zip([field.name for field in scored.type], scored.flatten(), strict=True))
            yield pa.StructArray.from_arrays(
                [values[field] for field in self.scorer.fields], fields, mask=scored.is_null()
            )

    def _inputs(self, batch: Sequence[pa.Array]) -> list[pa.Array]:
        """The arguments as the model's inputs."""
        batch = _separate(batch)
        taken = [column for tensor in self.scorer.inputs for column in tensor.columns]
        if len(batch) != len(taken):
            raise ColumnError(
                f"the function of a model was called with {len(batch)} arguments, and takes {len(taken)}: "
                f"{', '.join(taken)}, in this order"
            )
        arguments = iter(batch)
        return [_input([next(arguments) for _ in tensor.columns], tensor) for tensor in self.scorer.inputs]


def sql_function(scorer: Scorer, names: dict[str, str]) -> Any:
    """Driver side: the function, for ``spark.udf.register`` or to be called with columns.

    Parameters
    ----------
    scorer : Scorer
        What to score with.
    names : dict of str to str
        What the fields of the struct are called, by the scorer's fields.

    Raises
    ------
    ParamError
        There is no field, or two of the same name.
    """
    if not names:
        raise ParamError(
            "every output column has an empty name, so the function would return nothing: set predictionCol"
        )
    if len({name.lower() for name in names.values()}) < len(names):
        raise ParamError(f"the output columns {', '.join(map(repr, names.values()))} must have different names")
    types = scorer.types()
    sql = f"struct<{','.join(f'{quoted(name)}:{types[field]}' for field, name in names.items())}>"
    scored = SqlScorer(scorer, names)
    count = sum(len(tensor.columns) for tensor in scorer.inputs)
    return arrow_kind(scored, count, sql) if takes_arrow() else frames_kind(scored, _arrays, count, sql)


def _input(arguments: list[pa.Array], tensor: Tensor) -> pa.Array:
    """An input from its arguments: an array of its dtype per row, nested as deep as the input is."""
    if len(arguments) > 1 or (tensor.depth == 1 and _depth(arguments[0].type) == 0):
        scalars = [_cast(array, tensor, column, 0) for array, column in zip(arguments, tensor.columns, strict=True)]
        return _side_by_side(scalars, tensor)
    (array,), (column,) = arguments, tensor.columns
    if pa.types.is_struct(array.type) and {each.name for each in array.type} == set(_VECTOR):
        array = _of_vectors(array, tensor)
    return _cast(array, tensor, column, tensor.depth)


def _depth(kind: pa.DataType) -> int:
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind, depth = kind.value_type, depth + 1
    # A Vector is a row of numbers.
    return depth + 1 if pa.types.is_struct(kind) else depth


def _cast(array: pa.Array, tensor: Tensor, column: str, depth: int) -> pa.Array:
    """An argument with the input's dtype: numbers may become floats, but floats not whole numbers."""
    kind = array.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    real = pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)
    whole = pa.types.is_integer(kind)
    string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    alike = {"float32": real or whole, "string": string, "binary": binary}.get(tensor.dtype, whole)
    if not (alike or pa.types.is_null(kind)) or _depth(array.type) != depth:
        raise ColumnError(
            f"the function of a model was called with values of type {array.type} for {column!r}, which takes "
            f"{tensor.dtype} values of {depth} dimensions: give it the kind of column that the model was trained with"
        )
    target = pa.type_for_alias(tensor.dtype)
    for _ in range(depth):
        target = pa.list_(target)
    # What is beyond the range of 32-bit floats becomes infinite, and is found later.
    return array.cast(target, safe=tensor.dtype != "float32")


def _side_by_side(scalars: list[pa.Array], tensor: Tensor) -> pa.Array:
    """Single values as one array per row."""
    rows, width = len(scalars[0]), len(scalars)
    missing = np.stack([array.is_null().to_numpy(zero_copy_only=False) for array in scalars], axis=1).reshape(-1)
    if tensor.numeric:
        table = np.stack([array.fill_null(0).to_numpy(zero_copy_only=False) for array in scalars], axis=1)
    else:
        table = np.stack([array.to_numpy(zero_copy_only=False) for array in scalars], axis=1)
    offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
    values = pa.array(table.reshape(-1), pa.type_for_alias(tensor.dtype), mask=missing)
    return pa.ListArray.from_arrays(offsets, values)


def _of_vectors(vectors: pa.StructArray, tensor: Tensor) -> pa.ListArray:
    """Spark's Vectors, dense and sparse, as arrays of floats; one of another size than the input's becomes empty."""
    missing = vectors.is_null().to_numpy(zero_copy_only=False)
    width = tensor.size
    dense = vectors.field("type").fill_null(1).to_numpy(zero_copy_only=False) == 1
    sizes = vectors.field("size").fill_null(0).to_numpy(zero_copy_only=False)
    given = vectors.field("values").value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    fits = ~missing & (np.where(dense, given, sizes) == width)
    numbers = vectors.field("values").flatten().to_numpy(zero_copy_only=False)
    # Of each number its row and its place there, which sparse Vectors tell and dense ones need not.
    rows = np.repeat(np.arange(len(vectors)), given)
    places = np.arange(len(numbers)) - np.repeat(np.cumsum(given) - given, given)
    places[~dense[rows]] = vectors.field("indices").flatten().to_numpy(zero_copy_only=False)
    taken = fits[rows]
    table = np.zeros((len(vectors), width), np.float32)
    with np.errstate(over="ignore"):
        table[rows[taken], places[taken]] = numbers[taken]
    offsets = np.concatenate([[0], np.cumsum(np.where(fits, width, 0))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(table[fits].reshape(-1)), mask=pa.array(missing))


def _separate(batch: Any) -> Sequence[Any]:
    """The arguments one by one, also where there are more or fewer than Spark was told to expect."""
    if isinstance(batch, (pa.Array, pd.Series, pd.DataFrame)):
        return [batch]
    given: Sequence[Any] = batch[0] if len(batch) == 1 and isinstance(batch[0], tuple) else batch
    return given


def _arrays(batch: Sequence[Any]) -> list[pa.Array]:
    """Arguments as Arrow arrays, where they arrive as pandas has them: Vectors as frames of their fields."""
    return [_array(argument) for argument in _separate(batch)]


def _array(argument: pd.Series | pd.DataFrame) -> pa.Array:
    if isinstance(argument, pd.Series):
        return pa.array(nested(argument) if argument.dtype == object else argument, from_pandas=True)
    if (names := set(map(str, argument.columns))) != set(_VECTOR):
        raise ColumnError(
            f"the function of a model was called with a struct of {', '.join(sorted(names))}, and takes Vectors, "
            "arrays and single values"
        )
    fields = [pa.array(argument[name], kind, from_pandas=True) for name, kind in _VECTOR.items()]
    return pa.StructArray.from_arrays(fields, list(_VECTOR), mask=fields[0].is_null())
