"""A function over batches as a column UDF, of the best kind that this Spark has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyspark
from pyspark.sql import functions as F

from spark_nn.columns import Tensor
from spark_nn.scoring.scorer import Scorer

# A function over batches: of each an array per column in, a struct per row out.
Scored = Callable[[Iterator[Sequence[pa.Array]]], Iterator[pa.StructArray]]


def scorer_udf(scorer: Scorer, sql: str) -> Any:
    """The scorer as a column UDF that returns a struct of this type."""
    udf = arrow_kind(scorer, len(scorer.inputs), sql) if takes_arrow() else pandas_kind(scorer, sql)
    # The filter that leaves rows out would otherwise be moved below the projection, and the model be run twice.
    return udf.asNondeterministic() if scorer.invalid == "skip" else udf


def takes_arrow() -> bool:
    """Whether this Spark has UDFs of Arrow arrays."""
    return tuple(int(part) for part in pyspark.__version__.split(".")[:2]) >= (4, 1)


def arrow_kind(scored: Scored, columns: int, sql: str) -> Any:
    """A function over batches as an Arrow UDF of so many columns."""
    functions: Any = F  # pyspark re-exports these without telling type checkers

    # Spark looks at the hints to tell what kind of function it is.
    def arrow(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        yield from scored((batch,) for batch in batches)

    def arrow_several(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        yield from scored(batches)

    return functions.arrow_udf(arrow if columns == 1 else arrow_several, sql)


def pandas_kind(scorer: Scorer, sql: str) -> Any:
    """The scorer as a pandas UDF, for Spark 4.0."""
    kinds = [_arrow_type(tensor) for tensor in scorer.inputs]

    def arrays(batch: Sequence[pd.Series]) -> tuple[pa.Array, ...]:
        return tuple(
            pa.array(
                nested(series) if tensor.depth > 1 and tensor.form != "bytes" else series, type=kind, from_pandas=True
            )
            for series, kind, tensor in zip(batch, kinds, scorer.inputs, strict=True)
        )

    return frames_kind(scorer, arrays, len(scorer.inputs), sql)


def frames_kind(
    scored: Scored, arrays: Callable[[Sequence[pd.Series]], Sequence[pa.Array]], columns: int, sql: str
) -> Any:
    """A function over batches as a pandas UDF of so many columns, given what turns their series into Arrow arrays."""
    functions: Any = F

    def frame(structs: pa.StructArray) -> pd.DataFrame:
        names = [field.name for field in structs.type]
        values = zip(names, structs.flatten(), strict=True)
        return pd.DataFrame({name: array.to_numpy(zero_copy_only=False) for name, array in values})

    def frames(batches: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        for structs in scored(arrays((batch,)) for batch in batches):
            yield frame(structs)

    def frames_of_several(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.DataFrame]:
        for structs in scored(map(arrays, batches)):
            yield frame(structs)

    return functions.pandas_udf(frames if columns == 1 else frames_of_several, sql)


def _arrow_type(tensor: Tensor) -> pa.DataType:
    """The type of the column that :func:`~spark_nn.columns.expression` plans."""
    if tensor.form == "bytes":
        return pa.binary()
    kind = pa.type_for_alias(tensor.dtype)
    for _ in range(tensor.depth):
        kind = pa.list_(kind)
    return kind


def nested(series: pd.Series) -> list[Any]:
    """Arrays of arrays as lists, which is what Arrow takes."""

    def plain(value: Any) -> Any:
        return [plain(each) for each in value] if isinstance(value, (np.ndarray, list)) else value

    return [plain(value) for value in series]
