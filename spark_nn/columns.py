"""DataFrame columns <-> model tensors: one contract for writing, training and scoring.

The driver describes each tensor once, from the schema (:func:`features`, :func:`label`, ...), and plans its
conversion on the JVM (:func:`expression`). The executors turn the Arrow arrays that arrive into NumPy blocks
(:func:`decode`). Nothing here handles one row at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DataType,
    DateType,
    FractionalType,
    IntegralType,
    LongType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from spark_nn.errors import ColumnError

Form = Literal["vector", "array", "scalars", "scalar"]

# What Spark calls the dtypes that tensors have.
_SQL_TYPES = {"float32": "float", "int32": "int", "int64": "bigint", "bool": "boolean"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model and the columns it is made of.

    Parameters
    ----------
    name : str
        Its role: ``"features"``, ``"label"``, ``"weight"``, ``"validation"``.
    columns : tuple of str
        The columns it is made of; more than one only in the form ``"scalars"``.
    form : {"vector", "array", "scalars", "scalar"}
        A Vector column, an array column, several scalar columns side by side, or one scalar column.
    dtype : {"float32", "int32", "int64", "bool"}
        Type of its elements.
    width : int or None
        Elements in a row; None for a single scalar, and until rows have been seen.
    """

    name: str
    columns: tuple[str, ...]
    form: Form
    dtype: str
    width: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row: ``()`` for a scalar, ``(width,)`` otherwise."""
        return () if self.width is None else (self.width,)

    def toDict(self) -> dict[str, Any]:
        """The tensor as JSON can hold it."""
        return asdict(self)

    @classmethod
    def fromDict(cls, value: dict[str, Any]) -> Tensor:
        """The tensor that :meth:`toDict` described."""
        return cls(**{**value, "columns": tuple(value["columns"])})


@dataclass(frozen=True)
class Problem:
    """A reason why rows of a column cannot be used; counted by :func:`decode`."""

    column: str
    kind: Literal["null", "nan", "infinite", "width", "negative"]

    def describe(self, rows: int) -> str:
        """What was found in how many rows, and the cure."""
        found, cure = {
            "null": ("null", "drop them (df.na.drop) or fill them (df.na.fill, Imputer)"),
            "nan": ("NaN", "drop them (df.na.drop) or fill them (Imputer)"),
            "infinite": ("infinite, or beyond the range of 32-bit floats,", "scale or drop them"),
            "width": (
                "not of the length expected (that of the first row, or of the rows trained on)",
                "every row must have as many elements: pad or cut them",
            ),
            "negative": ("negative", "weights must be 0 or more"),
        }[self.kind]
        return f"column {self.column!r} is {found} in {rows:,} row{'s' if rows != 1 else ''}: {cure}"


def features(schema: StructType, param: str, columns: Sequence[str]) -> Tensor:
    """The model's input, from one Vector or array column, or from several scalar columns.

    Raises
    ------
    ColumnError
        A column is missing or has a type that cannot become a tensor.
    """
    if param == "featuresCol":
        (name,) = columns
        kind = _type(schema, param, name)
        if isinstance(kind, VectorUDT):
            return Tensor("features", (name,), "vector", "float32")
        if isinstance(kind, ArrayType) and _dtype(kind.elementType) is not None:
            return Tensor("features", (name,), "array", _dtype(kind.elementType) or "float32")
        if _dtype(kind) is None:
            raise _refusal(param, name, kind, "a Vector or an array of numbers")
        # One numeric column is a model input of width one.
    for name in columns:
        kind = _type(schema, param, name)
        if _dtype(kind) is None:
            raise _refusal(param, name, kind, "a number or boolean")
    return Tensor("features", tuple(columns), "scalars", "float32", len(columns))


def label(schema: StructType, name: str) -> Tensor:
    """What the model learns to predict: a number, or a Vector or array of numbers per row."""
    kind = _type(schema, "labelCol", name)
    if isinstance(kind, VectorUDT):
        return Tensor("label", (name,), "vector", "float32")
    if isinstance(kind, ArrayType) and _dtype(kind.elementType) is not None:
        return Tensor("label", (name,), "array", _dtype(kind.elementType) or "float32")
    dtype = _dtype(kind)
    if dtype is None:
        raise _refusal("labelCol", name, kind, "a number, a boolean, a Vector or an array of numbers")
    return Tensor("label", (name,), "scalar", dtype)


def weight(schema: StructType, name: str) -> Tensor:
    """The weight of each row's loss."""
    kind = _type(schema, "weightCol", name)
    if not isinstance(kind, NumericType):
        raise _refusal("weightCol", name, kind, "a number")
    return Tensor("weight", (name,), "scalar", "float32")


def validation(schema: StructType, name: str) -> Tensor:
    """The boolean that sends a row to the validation set."""
    kind = _type(schema, "validationIndicatorCol", name)
    if not isinstance(kind, BooleanType):
        raise _refusal("validationIndicatorCol", name, kind, "a boolean")
    return Tensor("validation", (name,), "scalar", "bool")


def expression(tensor: Tensor) -> Column:
    """The plan of a tensor on the JVM: one column of type ``dtype`` or ``array<dtype>``, named after it."""
    sql = _SQL_TYPES[tensor.dtype]
    columns = [F.col("`" + name.replace("`", "``") + "`") for name in tensor.columns]
    if tensor.form == "scalars":
        result = F.array(*(column.cast(sql) for column in columns))
    elif tensor.form == "vector":
        # vector_to_array itself fails on null with a message that names neither column nor row.
        result = F.when(columns[0].isNotNull(), vector_to_array(columns[0], "float32"))
    else:
        result = columns[0].cast(sql if tensor.form == "scalar" else f"array<{sql}>")
    return result.alias(tensor.name)


def decode(array: pa.Array, tensor: Tensor, problems: Counter[Problem]) -> np.ndarray | None:
    """Turn an Arrow array that came from :func:`expression` into a NumPy block.

    Parameters
    ----------
    array : pyarrow.Array
        One batch of rows.
    tensor : Tensor
        Its description. Where the width is open, the first row decides.
    problems : collections.Counter of Problem
        Gets the number of rows that cannot be used added, by column and reason.

    Returns
    -------
    numpy.ndarray or None
        Shape ``(rows,) + shape``, C-contiguous, of the tensor's dtype; it may share the array's memory.
        None where a row could not be used.
    """
    rows = len(array)
    before = problems.total()
    if array.null_count:
        problems[Problem(tensor.columns[0], "null")] += array.null_count
        array = array.drop_null()
    if tensor.form == "scalar":
        values = array
        width = 1
    else:
        lengths = array.value_lengths().to_numpy(zero_copy_only=False)
        width = tensor.width if tensor.width is not None else int(lengths[0]) if len(lengths) else 0
        odd = int(np.count_nonzero(lengths != width))
        if odd:
            problems[Problem(tensor.columns[0], "width")] += odd
            return None
        values = array.flatten()
    if values.null_count:
        _count_rows(~values.is_valid().to_numpy(zero_copy_only=False), width, tensor, "null", problems)
    if problems.total() > before:
        return None
    block: np.ndarray = values.to_numpy(zero_copy_only=False)
    # Two passes that allocate nothing: the minimum is NaN where any element is.
    if tensor.dtype == "float32" and block.size and not (np.isfinite(block.min()) and np.isfinite(block.max())):
        _count_rows(np.isnan(block), width, tensor, "nan", problems)
        _count_rows(np.isinf(block), width, tensor, "infinite", problems)
        return None
    if tensor.name == "weight" and block.size and block.min() < 0:
        _count_rows(block < 0, width, tensor, "negative", problems)
        return None
    return block.reshape((rows,) if tensor.form == "scalar" else (rows, width))


def report(problems: Counter[Problem], advice: str = "") -> ColumnError:
    """The error that names every column with rows that cannot be used."""
    lines = [problem.describe(rows) for problem, rows in sorted(problems.items(), key=repr)]
    return ColumnError("; ".join(lines) + advice)


def _count_rows(bad: np.ndarray, width: int, tensor: Tensor, kind: Any, problems: Counter[Problem]) -> None:
    """Count the rows with bad elements, by column where each element has a column of its own."""
    table = bad.reshape(-1, max(width, 1))
    if tensor.form == "scalars":
        for name, rows in zip(tensor.columns, table.sum(axis=0), strict=True):
            if rows:
                problems[Problem(name, kind)] += int(rows)
    elif rows := int(table.any(axis=1).sum()):
        problems[Problem(tensor.columns[0], kind)] += rows


def _type(schema: StructType, param: str, name: str) -> DataType:
    if name not in schema.names:
        raise ColumnError(
            f"{param}={name!r}: the DataFrame has no such column. It has {', '.join(schema.names) or 'none'}"
        )
    return schema[name].dataType


def _dtype(kind: DataType) -> str | None:
    """The tensor dtype for elements of a Spark type, None where there is none."""
    if isinstance(kind, LongType):
        return "int64"
    if isinstance(kind, IntegralType):
        return "int32"
    if isinstance(kind, (FractionalType, BooleanType)):
        return "float32"
    return None


def _refusal(param: str, name: str, kind: DataType, allowed: str) -> ColumnError:
    if isinstance(kind, StringType):
        advice = "StringIndexer (and OneHotEncoder) turns strings into numbers"
    elif isinstance(kind, (DateType, TimestampType, TimestampNTZType)):
        advice = "derive numbers from it, such as unix_timestamp, hour or dayofweek"
    elif isinstance(kind, ArrayType):
        advice = "cast it, or flatten what is nested"
    else:
        advice = "cast or assemble it first (VectorAssembler)"
    return ColumnError(f"{param}={name!r} has type {kind.simpleString()}, but must be {allowed}: {advice}")
