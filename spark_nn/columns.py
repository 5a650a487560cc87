"""DataFrame columns <-> model tensors: one contract for writing, training and scoring.

The driver describes each tensor once, from the schema (:func:`features`, :func:`label`, ...), and plans its
conversion on the JVM (:func:`expression`). The executors turn the Arrow arrays that arrive into NumPy blocks
(:func:`decode`). Nothing here handles one row at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
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

Form = Literal["vector", "array", "scalars", "scalar", "bytes"]
Role = Literal["features", "label", "weight", "validation"]
# One array, or arrays by the names that the model gives its inputs or outputs.
Arrays = np.ndarray | dict[str, np.ndarray]

# What Spark calls the dtypes that tensors have.
_SQL_TYPES = {
    "float32": "float",
    "int32": "int",
    "int64": "bigint",
    "bool": "boolean",
    "string": "string",
    "binary": "binary",
}
_NUMBERS = "a number or boolean"
_BOOLEAN = "a boolean"
# Params with a default, where somebody may not know that there are others.
_OTHERWISE = {
    "featuresCol": ". Name the model's input with featuresCol, or with inputCols (scalar columns) or inputs (by name)",
    "labelCol": ". Name the label with labelCol, or several with labels",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the model and the columns it is made of.

    Parameters
    ----------
    name : str
        Its role: ``"features"``, ``"label"``, ``"weight"``, ``"validation"``; of several inputs or outputs each
        has the model's own name for it after a colon, as in ``"features:image"``.
    columns : tuple of str
        The columns it is made of; more than one only in the form ``"scalars"``.
    form : {"vector", "array", "scalars", "scalar", "bytes"}
        A Vector column, an array column, several scalar columns side by side, one scalar column, or a binary column
        of as many bytes as a row has elements, each a number from 0 to 255.
    dtype : {"float32", "int32", "int64", "bool", "string", "binary"}
        Type of its elements.
    depth : int
        Number of dimensions of a row: 0 for a single scalar, more than 1 for nested arrays.
    shape : tuple of int or None
        Shape of a row; None until rows have been seen.
    """

    name: str
    columns: tuple[str, ...]
    form: Form
    dtype: str
    depth: int
    shape: tuple[int, ...] | None

    @property
    def role(self) -> str:
        """What it is to the model, without the name of an input or output."""
        return self.name.partition(":")[0]

    @property
    def key(self) -> str | None:
        """The model's name for it, None for the only one of its role."""
        return self.name.partition(":")[2] or None

    @property
    def packed(self) -> bool:
        """Whether rows are arrays of numbers, which are kept as one binary value each."""
        return self.depth > 0 and self.numeric

    @property
    def numeric(self) -> bool:
        """Whether elements are numbers of a fixed size."""
        return self.dtype not in ("string", "binary")

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy type of its elements; strings and bytes are Python objects."""
        return np.dtype(self.dtype if self.numeric else object)

    @property
    def size(self) -> int:
        """Elements in a row, once the shape is known."""
        return int(np.prod(self.shape or (), dtype=np.int64))

    def toDict(self) -> dict[str, Any]:
        """The tensor as JSON can hold it."""
        return asdict(self)

    @classmethod
    def fromDict(cls, value: dict[str, Any]) -> Tensor:
        """The tensor that :meth:`toDict` described."""
        shape = None if value["shape"] is None else tuple(value["shape"])
        return cls(**{**value, "columns": tuple(value["columns"]), "shape": shape})


@dataclass(frozen=True)
class Problem:
    """A reason why rows of a column cannot be used; counted by :func:`decode`."""

    column: str
    kind: Literal["null", "nan", "infinite", "width", "negative"]
    # Of a width the one expected, and one that was found.
    expected: int | None = field(default=None, compare=False)
    found: int | None = field(default=None, compare=False)

    def describe(self, rows: int) -> str:
        """What was found in how many rows, and the cure."""
        usual = "that of most rows, or of the rows trained on"
        lengths = f"{self.expected}, {usual}; one has {self.found}" if self.expected else usual
        found, cure = {
            "null": ("null", "drop them (df.na.drop) or fill them (df.na.fill, Imputer)"),
            "nan": ("NaN", "drop them (df.na.drop) or fill them (Imputer)"),
            "infinite": ("infinite, or beyond the range of 32-bit floats,", "scale or drop them"),
            "width": (
                f"empty, or not of the length expected ({lengths}),",
                "every row needs the same number of elements: pad or cut them",
            ),
            "negative": ("negative", "weights must be 0 or more"),
        }[self.kind]
        return f"column {self.column!r} is {found} in {rows:,} row{'s' if rows != 1 else ''}: {cure}"


class Invalid:
    """The rows of a batch that cannot be used, and why.

    Parameters
    ----------
    rows : int
        Rows of the batch.

    Attributes
    ----------
    rows : numpy.ndarray of bool
        True where a row cannot be used.
    problems : collections.Counter of Problem
        The number of rows with each problem.
    """

    def __init__(self, rows: int) -> None:
        self.rows = np.zeros(rows, bool)
        self.problems: Counter[Problem] = Counter()

    def add(self, problem: Problem, rows: np.ndarray) -> None:
        """Take note of the rows that have a problem."""
        if count := int(np.count_nonzero(rows)):
            self.problems[problem] += count
            self.rows |= rows


def features(schema: StructType, param: str, columns: Sequence[str], name: str = "features") -> Tensor:
    """An input of the model, from one column of any kind, or from several scalar columns.

    Parameters
    ----------
    schema : StructType
        The DataFrame's.
    param : str
        The Param that names the columns, for messages.
    columns : sequence of str
        The columns.
    name : str
        The tensor's name.

    Raises
    ------
    ColumnError
        A column is missing or has a type that cannot become a tensor.
    """
    if len(columns) == 1 and (tensor := _tensor(schema, param, columns[0], name)) is not None:
        if tensor.form != "scalar":
            return tensor
        # One scalar column is a model input of width one.
        return Tensor(name, tensor.columns, "scalars", _joined(tensor.dtype), 1, (1,))
    if len(columns) == 1:
        allowed = "a Vector, an array, a number, a boolean, a string or binary"
        raise _refusal(param, columns[0], _type(schema, param, columns[0]), allowed)
    found = {column: _dtype(_type(schema, param, column)) for column in columns}
    dtypes = {_joined(dtype) for dtype in found.values() if dtype is not None}
    if dtypes in ({"string"}, {"binary"}) and None not in found.values():
        return Tensor(name, tuple(columns), "scalars", dtypes.pop(), 1, (len(columns),))
    for column, dtype in found.items():
        if dtype is None or _joined(dtype) != "float32":
            raise _refusal(param, column, schema[column].dataType, _NUMBERS)
    return Tensor(name, tuple(columns), "scalars", "float32", 1, (len(columns),))


def label(schema: StructType, column: str, param: str = "labelCol", name: str = "label") -> Tensor:
    """What the model learns to predict: a number, or a Vector or array of numbers per row."""
    tensor = _tensor(schema, param, column, name)
    if tensor is None or not tensor.numeric:
        kind = _type(schema, param, column)
        raise _refusal(param, column, kind, "a number, a boolean, a Vector or an array of numbers")
    return tensor


def weight(schema: StructType, name: str) -> Tensor:
    """The weight of each row's loss."""
    kind = _type(schema, "weightCol", name)
    if not isinstance(kind, NumericType):
        raise _refusal("weightCol", name, kind, "a number")
    return Tensor("weight", (name,), "scalar", "float32", 0, ())


def validation(schema: StructType, name: str) -> Tensor:
    """The boolean that sends a row to the validation set."""
    kind = _type(schema, "validationIndicatorCol", name)
    if not isinstance(kind, BooleanType):
        raise _refusal("validationIndicatorCol", name, kind, _BOOLEAN)
    return Tensor("validation", (name,), "scalar", "bool", 0, ())


def arrange(block: dict[str, np.ndarray], role: Role) -> Arrays | None:
    """The arrays of a role: the only one, or those of several by the model's names; None where there is none."""
    if role in block:
        return block[role]
    named = {name.partition(":")[2]: values for name, values in block.items() if name.startswith(f"{role}:")}
    return next(iter(named.values())) if len(named) == 1 else named or None


def expression(tensor: Tensor) -> Column:
    """The plan of a tensor on the JVM: one column of type ``dtype`` or ``array<dtype>``, named after it."""
    sql = _SQL_TYPES[tensor.dtype]
    columns = [F.col(quoted(name)) for name in tensor.columns]
    if tensor.form == "scalars":
        result = F.array(*(column.cast(sql) for column in columns))
    elif tensor.form == "bytes":
        result = columns[0]
    elif tensor.form == "vector":
        # vector_to_array itself fails on null with a message that names neither column nor row.
        result = F.when(columns[0].isNotNull(), vector_to_array(columns[0], "float32"))
    else:
        result = columns[0].cast("array<" * tensor.depth + sql + ">" * tensor.depth)
    return result.alias(tensor.name)


def quoted(name: str) -> str:
    """A column's name as Spark takes it whole, dots and all."""
    return "`" + name.replace("`", "``") + "`"


def decode(array: pa.Array, tensor: Tensor, invalid: Invalid) -> np.ndarray | None:
    """Turn an Arrow array that came from :func:`expression` into a NumPy block.

    Parameters
    ----------
    array : pyarrow.Array
        One batch of rows.
    tensor : Tensor
        Its description. Where the shape is open, the batch decides: its most common one.
    invalid : Invalid
        Gets the rows added that cannot be used.

    Returns
    -------
    numpy.ndarray or None
        Shape ``(rows,) + shape``, C-contiguous, of the tensor's dtype; it may share the array's memory.
        None where a row could not be used.
    """
    if tensor.form == "bytes":
        return _unpacked(array, tensor, invalid)
    values, shape = array, []
    for level in range(tensor.depth):
        lengths = values.value_lengths().to_numpy(zero_copy_only=False) if not values.null_count else np.array([-1, 0])
        shape.append(tensor.shape[level] if tensor.shape else int(lengths[0]) if len(lengths) else 0)
        if (lengths != shape[-1]).any() or (shape[-1] == 0 and len(lengths)):
            _refuse(array, tensor, invalid)
            return None
        values = values.flatten()
    if values.null_count:
        _refuse(array, tensor, invalid)
        return None
    block: np.ndarray = values.to_numpy(zero_copy_only=False)
    # Two passes that allocate nothing: the minimum is NaN where any element is.
    if tensor.dtype == "float32" and block.size and not (np.isfinite(block.min()) and np.isfinite(block.max())):
        _refuse(array, tensor, invalid)
        return None
    if tensor.role == "weight" and block.size and block.min() < 0:
        _refuse(array, tensor, invalid)
        return None
    return block.reshape((len(array), *shape))


def decode_batch(
    batch: pa.RecordBatch, tensors: Sequence[Tensor], invalid: Invalid
) -> tuple[dict[str, np.ndarray], list[Tensor]]:
    """Decode the columns of a batch, named as the tensors; the first rows seen decide the shapes that were open."""
    block: dict[str, np.ndarray] = {}
    known = []
    for tensor in tensors:
        values = decode(batch.column(tensor.name), tensor, invalid)
        if values is not None:
            block[tensor.name] = values
            if tensor.shape is None and len(values):
                tensor = replace(tensor, shape=values.shape[1:])
        known.append(tensor)
    return block, known


def decode_usable(
    batch: pa.RecordBatch, tensors: Sequence[Tensor], *, skip: bool
) -> tuple[pa.RecordBatch, dict[str, np.ndarray], list[Tensor], Invalid]:
    """Decode a batch, without the rows that cannot be used where these may be skipped.

    Returns
    -------
    tuple
        The rows that are left, their blocks, the tensors as :func:`decode_batch` gives them, and what was wrong with
        the rows that came.
    """
    invalid = Invalid(batch.num_rows)
    block, known = decode_batch(batch, tensors, invalid)
    if skip and invalid.problems:
        batch = batch.filter(pa.array(~invalid.rows))
        block, known = decode_batch(batch, tensors, Invalid(batch.num_rows))
    return batch, block, known, invalid


def told(problems: Mapping[Problem, int]) -> list[list[Any]]:
    """What a task reports, as JSON can hold it: of each problem the number of rows, and what it is."""
    return [[rows, each.column, each.kind, each.expected, each.found] for each, rows in problems.items()]


def refuse_rows(reports: Iterable[dict[str, Any]]) -> None:
    """Driver side: raise what tasks have found wrong with rows that may not be skipped.

    Parameters
    ----------
    reports : iterable of dict
        Of each task the ``problems``: a list of what :func:`told` gives.

    Raises
    ------
    ColumnError
        There is something.
    """
    problems: Counter[Problem] = Counter()
    for task in reports:
        for rows, *problem in task["problems"]:
            problems[Problem(*problem)] += rows
    if problems:
        raise report(problems, "; or leave such rows out with handleInvalid='skip'")


def one_shape(tensor: Tensor, shapes: Iterable[Sequence[int]]) -> tuple[int, ...] | None:
    """Driver side: the shape of a row that all tasks have found, None where none has found any.

    Raises
    ------
    ColumnError
        They have found several.
    """
    found = sorted({tuple(shape) for shape in shapes})
    if len(found) > 1:
        listed = ", ".join(" x ".join(map(str, shape)) for shape in found)
        raise ColumnError(
            f"column {tensor.columns[0]!r} has rows of differing length, among them {listed}: every row must have as "
            "many elements, pad or cut them"
        )
    return found[0] if found else None


def report(problems: Counter[Problem], advice: str = "") -> ColumnError:
    """The error that names every column with rows that cannot be used."""
    lines = [problem.describe(rows) for problem, rows in sorted(problems.items(), key=repr)]
    return ColumnError("; ".join(lines) + advice)


def _unpacked(array: pa.Array, tensor: Tensor, invalid: Invalid) -> np.ndarray | None:
    """Rows of bytes as a block of numbers."""
    sound = array.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    wrong = sound & (lengths != tensor.size)
    if not sound.all() or wrong.any():
        invalid.add(Problem(tensor.columns[0], "null"), ~sound)
        invalid.add(_width(tensor.columns[0], tensor.size, lengths, wrong), wrong)
        return None
    _, offsets, data = array.buffers()
    large = pa.types.is_large_binary(array.type)
    first = np.frombuffer(offsets, np.int64 if large else np.int32)[array.offset] if len(array) else 0
    numbers = np.frombuffer(data or b"", np.uint8)[first : first + len(array) * tensor.size]
    return numbers.reshape(len(array), *(tensor.shape or ())).astype(tensor.numpy)


def _refuse(array: pa.Array, tensor: Tensor, invalid: Invalid) -> None:
    """Find out which rows cannot be used, which :func:`decode` need not know as long as there are none."""
    for problem, rows in _faults(array, tensor, 0).items():
        invalid.add(problem, rows)


def _width(column: str, expected: int, lengths: np.ndarray, wrong: np.ndarray) -> Problem:
    """The problem of lengths, some of which are wrong, for messages with the first of these."""
    return Problem(column, "width", expected, int(lengths[wrong][0]) if wrong.any() else None)


def _faults(values: pa.Array, tensor: Tensor, level: int) -> dict[Problem, np.ndarray]:
    """Masks of the values with each problem: rows at level 0, elements of rows deeper down."""
    column = tensor.columns[0]
    sound = values.is_valid().to_numpy(zero_copy_only=False)
    faults = {Problem(column, "null"): ~sound}

    def spread(found: np.ndarray, among: np.ndarray) -> np.ndarray:
        mask = np.zeros(len(values), bool)
        mask[among] = found
        return mask

    if level == tensor.depth:
        numbers = values.filter(pa.array(sound)).to_numpy(zero_copy_only=False)
        if tensor.dtype == "float32":
            faults[Problem(column, "nan")] = spread(np.isnan(numbers), sound)
            faults[Problem(column, "infinite")] = spread(np.isinf(numbers), sound)
        if tensor.role == "weight":
            faults[Problem(column, "negative")] = spread(numbers < 0, sound)
        return faults
    lengths = values.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    # Not the first one's: that row may be the odd one.
    expected = tensor.shape[level] if tensor.shape else int(np.bincount(lengths[lengths > 0], minlength=2).argmax())
    whole = sound & (lengths == expected) & (lengths > 0)
    if (wrong := sound & ~whole).any():  # the lengths to tell are those of the outermost level that has such
        faults[_width(column, expected, lengths, wrong)] = wrong
    for problem, mask in _faults(values.filter(pa.array(whole)).flatten(), tensor, level + 1).items():
        table = mask.reshape(int(whole.sum()), expected)
        if tensor.form == "scalars":  # each element has a column of its own
            columns = enumerate(tensor.columns)
            faults |= {replace(problem, column=name): spread(table[:, i], whole) for i, name in columns}
        else:
            found = spread(np.asarray(table.any(axis=1)), whole)
            faults[problem] = faults[problem] | found if problem in faults else found
    return faults


def _type(schema: StructType, param: str, name: str) -> DataType:
    if name not in schema.names:
        raise ColumnError(
            f"{param}={name!r}: the DataFrame has no such column. It has {', '.join(schema.names) or 'none'}"
            f"{_OTHERWISE.get(param, '')}"
        )
    return schema[name].dataType


def _tensor(schema: StructType, param: str, column: str, name: str) -> Tensor | None:
    """The tensor that a column can be, None where it can be none."""
    kind = _type(schema, param, column)
    if isinstance(kind, VectorUDT):
        return Tensor(name, (column,), "vector", "float32", 1, None)
    depth = 0
    while isinstance(kind, ArrayType):
        kind, depth = kind.elementType, depth + 1
    dtype = _dtype(kind)
    if dtype is None:
        return None
    return Tensor(name, (column,), "array" if depth else "scalar", dtype, depth, None if depth else ())


def _dtype(kind: DataType) -> str | None:
    """The tensor dtype for elements of a Spark type, None where there is none."""
    if isinstance(kind, LongType):
        return "int64"
    if isinstance(kind, IntegralType):
        return "int32"
    if isinstance(kind, (FractionalType, BooleanType)):
        return "float32"
    if isinstance(kind, StringType):
        return "string"
    return "binary" if isinstance(kind, BinaryType) else None


def _joined(dtype: str) -> str:
    """The dtype of columns that are joined into one tensor: numbers of any kind become floats."""
    return dtype if dtype in ("string", "binary") else "float32"


def _refusal(param: str, name: str, kind: DataType, allowed: str) -> ColumnError:
    if allowed == _BOOLEAN:
        advice = f"cast it, F.col({name!r}).cast('boolean')"
    elif isinstance(kind, (StringType, BinaryType)):
        advice = (
            f"numbers that were read as text are cast, F.col({name!r}).cast('double'); StringIndexer (and "
            "OneHotEncoder) turns categories into numbers"
        )
        if allowed == _NUMBERS:
            advice += "; a model that takes strings itself has an input for them alone (the param inputs)"
    elif isinstance(kind, (DateType, TimestampType, TimestampNTZType)):
        advice = "derive numbers from it, such as unix_timestamp, hour or dayofweek"
    elif isinstance(kind, ArrayType):
        advice = "cast its elements to numbers"
    else:
        advice = "cast or assemble it first (VectorAssembler)"
    return ColumnError(f"{param}={name!r} has type {kind.simpleString()}, but must be {allowed}: {advice}")


def row_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the fixed-size tensors of a row, as NumPy holds them."""
    return sum(tensor.numpy.itemsize * tensor.size for tensor in tensors if tensor.numeric)
