from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import types as T

from spark_nn import columns
from spark_nn.columns import Invalid, Problem, Tensor, decode
from spark_nn.errors import ColumnError

SCHEMA = T.StructType(
    [
        T.StructField("v", VectorUDT()),
        T.StructField("floats", T.ArrayType(T.DoubleType())),
        T.StructField("ints", T.ArrayType(T.IntegerType())),
        T.StructField("longs", T.ArrayType(T.LongType())),
        T.StructField("nested", T.ArrayType(T.ArrayType(T.DoubleType()))),
        T.StructField("d", T.DoubleType()),
        T.StructField("i", T.ShortType()),
        T.StructField("l", T.LongType()),
        T.StructField("b", T.BooleanType()),
        T.StructField("dec", T.DecimalType(10, 2)),
        T.StructField("s", T.StringType()),
        T.StructField("s2", T.StringType()),
        T.StructField("bytes", T.BinaryType()),
        T.StructField("words", T.ArrayType(T.StringType())),
        T.StructField("day", T.DateType()),
        T.StructField("when", T.TimestampType()),
    ]
)


@pytest.mark.parametrize(
    ("name", "form", "dtype", "shape"),
    [
        ("v", "vector", "float32", None),
        ("floats", "array", "float32", None),
        ("ints", "array", "int32", None),
        ("longs", "array", "int64", None),
        ("d", "scalars", "float32", (1,)),
        ("s", "scalars", "string", (1,)),
        ("bytes", "scalars", "binary", (1,)),
        ("words", "array", "string", None),
    ],
)
def test_features_from_one_column(name, form, dtype, shape):
    assert columns.features(SCHEMA, "featuresCol", [name]) == Tensor("features", (name,), form, dtype, 1, shape)


def test_nested_arrays_are_inputs_of_several_dimensions():
    assert columns.features(SCHEMA, "featuresCol", ["nested"], "features:image") == Tensor(
        "features:image", ("nested",), "array", "float32", 2, None
    )


def test_features_from_scalar_columns():
    tensor = columns.features(SCHEMA, "inputCols", ["d", "i", "b", "dec"])
    assert tensor == Tensor("features", ("d", "i", "b", "dec"), "scalars", "float32", 1, (4,))
    assert Tensor.fromDict(tensor.toDict()) == tensor


@pytest.mark.parametrize(
    ("name", "dtype"), [("d", "float32"), ("i", "int32"), ("l", "int64"), ("b", "float32"), ("dec", "float32")]
)
def test_labels_keep_whole_numbers_whole(name, dtype):
    assert columns.label(SCHEMA, name) == Tensor("label", (name,), "scalar", dtype, 0, ())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: columns.features(SCHEMA, "featuresCol", ["nope"]), r"featuresCol='nope'.*no such column.*v, floats"),
        (lambda: columns.features(SCHEMA, "inputCols", ["d", "s"]), r"inputCols='s' has type string.*StringIndexer"),
        (lambda: columns.features(SCHEMA, "inputCols", ["s", "bytes"]), r"inputCols='s' has type string"),
        (lambda: columns.features(SCHEMA, "inputCols", ["d", "v"]), r"inputCols='v' has type vector.*a number"),
        (lambda: columns.features(SCHEMA, "inputCols", ["day"]), r"type date.*unix_timestamp"),
        (lambda: columns.features(SCHEMA, "inputCols", ["d", "nested"]), r"array<array<double>>.*a number"),
        (lambda: columns.label(SCHEMA, "words"), r"labelCol='words' has type array<string>"),
        (lambda: columns.label(SCHEMA, "s"), r"labelCol='s' has type string.*StringIndexer"),
        (lambda: columns.label(SCHEMA, "when"), r"labelCol='when' has type timestamp"),
        (lambda: columns.weight(SCHEMA, "b"), r"weightCol='b' has type boolean, but must be a number"),
        (lambda: columns.validation(SCHEMA, "i"), r"validationIndicatorCol='i'.*must be a boolean"),
    ],
)
def test_refusals_name_param_column_type_and_cure(make, message):
    with pytest.raises(ColumnError, match=message):
        make()


def lists(rows, kind=None):
    kind = kind or pa.float32()
    return pa.array(rows, pa.list_(kind))


def test_decode_arrays():
    invalid = Invalid(3)
    tensor = Tensor("features", ("x",), "array", "float32", 1, None)
    block = decode(lists([[1, 2], [3, 4], [5, 6]]), tensor, invalid)
    np.testing.assert_array_equal(block, np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    assert block.dtype == np.float32
    sliced = decode(lists([[1, 2], [3, 4], [5, 6]])[1:], tensor, invalid)
    np.testing.assert_array_equal(sliced, [[3, 4], [5, 6]])
    assert not invalid.problems and not invalid.rows.any()


@pytest.mark.parametrize(
    ("array", "tensor", "expected"),
    [
        (lists([[1], None, None]), Tensor("features", ("x",), "array", "float32", 1, None), {("x", "null"): 2}),
        (lists([[1, 2], [1], [1, 2]]), Tensor("features", ("x",), "array", "float32", 1, None), {("x", "width"): 1}),
        # Neither the first row nor one that cannot be used decides what length the others should have.
        (lists([[1], [1, 2], [1, 2]]), Tensor("features", ("x",), "array", "float32", 1, None), {("x", "width"): 1}),
        (
            lists([[np.nan], [1, 2], [1, 2]]),
            Tensor("features", ("x",), "array", "float32", 1, None),
            {("x", "width"): 1},
        ),
        (lists([[], [], [1]]), Tensor("features", ("x",), "array", "float32", 1, None), {("x", "width"): 2}),
        (
            lists(
                [[[1, 2]], [[1, 2], [3, 4]], [[1], [2]], [[1, 2], None], [[1, 2], [3, np.nan]]], pa.list_(pa.float32())
            ),
            Tensor("features", ("x",), "array", "float32", 2, None),
            {("x", "width"): 2, ("x", "null"): 1, ("x", "nan"): 1},
        ),
        (lists([[1, 2], [3, 4]]), Tensor("features", ("x",), "array", "float32", 1, (3,)), {("x", "width"): 2}),
        (lists([[1, None], [None, None]]), Tensor("features", ("x",), "array", "float32", 1, None), {("x", "null"): 2}),
        (
            lists([[1, np.nan], [2, 3], [np.nan, np.nan]]),
            Tensor("features", ("x",), "array", "float32", 1, None),
            {("x", "nan"): 2},
        ),
        (
            lists([[1, None], [None, None], [1, 2]]),
            Tensor("features", ("a", "b"), "scalars", "float32", 1, (2,)),
            {("a", "null"): 1, ("b", "null"): 2},
        ),
        (
            lists([[1, np.nan], [1, 2]]),
            Tensor("features", ("a", "b"), "scalars", "float32", 1, (2,)),
            {("b", "nan"): 1},
        ),
        (pa.array([1, None], pa.int64()), Tensor("label", ("y",), "scalar", "int64", 0, ()), {("y", "null"): 1}),
        (pa.array([1, np.nan], pa.float32()), Tensor("label", ("y",), "scalar", "float32", 0, ()), {("y", "nan"): 1}),
        (
            lists([[1, np.inf], [-np.inf, 3], [1, 2]]),
            Tensor("features", ("x",), "array", "float32", 1, None),
            {("x", "infinite"): 2},
        ),
        (pa.array([1, -2], pa.float32()), Tensor("weight", ("w",), "scalar", "float32", 0, ()), {("w", "negative"): 1}),
    ],
)
def test_rows_that_cannot_be_used_are_counted_by_column(array, tensor, expected):
    invalid = Invalid(len(array))
    assert decode(array, tensor, invalid) is None
    assert {(problem.column, problem.kind): rows for problem, rows in invalid.problems.items()} == expected
    # Without the rows it names, the rest can be used.
    rest = Invalid(int((~invalid.rows).sum()))
    assert decode(array.filter(pa.array(~invalid.rows)), tensor, rest) is not None


def test_the_error_says_how_many_rows_and_what_to_do():
    error = columns.report(Counter({Problem("x", "null"): 1234, Problem("a", "nan"): 1}))
    assert "column 'x' is null in 1,234 rows: drop them (df.na.drop) or fill them" in str(error)
    assert "column 'a' is NaN in 1 row:" in str(error)


def test_what_spark_hands_over_decodes_to_the_same_numbers(spark):
    """The two halves of the contract: the JVM's expression and the executor's decoding."""
    rows = [
        (Vectors.dense([1.5, 2.0]), [1.0, 2.0], [1, 2], 7, True, 0.1, 2**40),
        (Vectors.sparse(2, [1], [3.0]), [3.0, 4.0], [3, 4], 8, False, 0.2, 2**40 + 1),
    ]
    df = spark.createDataFrame(
        rows,
        T.StructType(
            [
                T.StructField("v", VectorUDT()),
                T.StructField("a", T.ArrayType(T.DoubleType())),
                T.StructField("i", T.ArrayType(T.IntegerType())),
                T.StructField("n`.", T.IntegerType()),
                T.StructField("b", T.BooleanType()),
                T.StructField("d", T.DoubleType()),
                T.StructField("l", T.LongType()),
            ]
        ),
    )
    expected = [
        (columns.features(df.schema, "featuresCol", ["v"]), np.array([[1.5, 2.0], [0, 3]], np.float32)),
        (columns.features(df.schema, "featuresCol", ["a"]), np.array([[1, 2], [3, 4]], np.float32)),
        (columns.features(df.schema, "featuresCol", ["i"]), np.array([[1, 2], [3, 4]], np.int32)),
        (
            columns.features(df.schema, "inputCols", ["n`.", "b", "d"]),
            np.array([[7, 1, 0.1], [8, 0, 0.2]], np.float32),
        ),
        (columns.label(df.schema, "l"), np.array([2**40, 2**40 + 1])),
        (columns.label(df.schema, "b"), np.array([1, 0], np.float32)),
    ]
    tensors = [replace(tensor, name=f"t{i}") for i, (tensor, _) in enumerate(expected)]
    table = df.select(*(columns.expression(tensor) for tensor in tensors)).toArrow()
    for tensor, (_, values) in zip(tensors, expected, strict=True):
        invalid = Invalid(2)
        block = decode(table.column(tensor.name).combine_chunks(), tensor, invalid)
        assert not invalid.problems
        assert block.dtype == values.dtype
        np.testing.assert_array_equal(block, values)


@pytest.mark.parametrize(
    ("array", "tensor", "lengths"),
    [
        (lists([[1, 2], [1], [1, 2]]), Tensor("features", ("x",), "array", "float32", 1, None), (2, 1)),
        (lists([[1, 2], [3, 4]]), Tensor("features", ("x",), "array", "float32", 1, (3,)), (3, 2)),
        (
            lists([[[1, 2]], [[1, 2, 3]], [[1, 2]]], pa.list_(pa.float32())),
            Tensor("features", ("x",), "array", "float32", 2, None),
            (2, 3),
        ),
        (pa.array([b"1234", b"12"]), Tensor("features", ("x",), "bytes", "float32", 2, (2, 2)), (4, 2)),
    ],
)
def test_a_length_that_is_wrong_is_told_with_the_one_expected(array, tensor, lengths):
    invalid = Invalid(len(array))
    assert decode(array, tensor, invalid) is None
    expected, found = lengths
    with pytest.raises(ColumnError, match=rf"column 'x' is .*expected \({expected}, .*has {found}\).*: pad or cut"):
        columns.refuse_rows([{"problems": columns.told(invalid.problems)}, {"problems": []}])
