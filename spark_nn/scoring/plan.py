"""Driver side of scoring: one column UDF that runs the model and returns a struct, projected into the output columns.

Because it is a column UDF and not a map over the rows, Spark prunes it where nothing reads a prediction, and
every row stays with its own prediction whatever its source.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, MapType, StructType, UserDefinedType

from spark_nn.columns import expression, quoted
from spark_nn.errors import ColumnError
from spark_nn.outputs import columns_of
from spark_nn.scoring.scorer import USED, Scorer
from spark_nn.scoring.udf import scorer_udf

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def score(dataset: DataFrame, scorer: Scorer, columns: dict[str, str]) -> DataFrame:
    """The DataFrame with the output columns added. Starts no job.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        What to score.
    scorer : Scorer
        What to score with.
    columns : dict
        The output columns' names, by the keys of the values they get.

    Raises
    ------
    ColumnError
        An output column is there already.
    """
    keys = columns_of(scorer.outputs)
    taken = {name.lower() for name in dataset.columns}  # as Spark resolves names
    for field, name in columns.items():
        param = keys[field][0]
        if name.lower() in taken:
            raise ColumnError(f"{param}={name!r}: there already is such a column; rename or drop it, or set {param}")
        taken.add(name.lower())
    types = scorer.types()
    skip = scorer.invalid == "skip"
    declared = [f"{quoted(field)}:{types[field]}" for field in scorer.fields] + [f"{USED}:boolean"] * skip
    scores = scorer_udf(scorer, f"struct<{','.join(declared)}>")(*(expression(tensor) for tensor in scorer.inputs))
    held = f"spark_nn_{scorer.sha256[:16]}"
    results = {}
    for field, name in columns.items():
        param, output = keys[field]
        value = F.col(held)[field]
        vector = scorer.outputs[output].vector(param)
        # Spark's conversion of a null to a Vector fails.
        results[name] = F.when(value.isNotNull(), array_to_vector(value)) if vector else value
    scored = _by_rows(dataset).withColumn(held, scores)
    if skip:
        scored = scored.where(F.col(held)[USED])
    return scored.withColumns(results).drop(held)


def _by_rows(dataset: DataFrame) -> DataFrame:
    """The DataFrame, so planned that Spark hands its rows to Python one by one where there are Vectors among them.

    Spark 4.3 hands over what a Parquet file holds column by column, and fails where one of these is a Vector, be it
    only carried along ("Unsupported data type UDT"). A condition keeps it from that. This one is always true, which
    Spark does not see; other conditions may still go before it.
    """
    vectors = [field.name for field in dataset.schema.fields if _has_udt(field.dataType)]
    if not vectors:
        return dataset
    return dataset.where(f"(hash(isnull({quoted(vectors[0])})) & 0) = 0")


def _has_udt(kind: DataType) -> bool:
    if isinstance(kind, StructType):
        return any(_has_udt(field.dataType) for field in kind.fields)
    if isinstance(kind, ArrayType):
        return _has_udt(kind.elementType)
    if isinstance(kind, MapType):
        return _has_udt(kind.keyType) or _has_udt(kind.valueType)
    return isinstance(kind, UserDefinedType)


def ship(spark: SparkSession, file: Path) -> str:
    """Give a file to the session's executors; return the name they find it under.

    Spark takes a name only once, offers the file to every executor that joins later, and forgets none. So the
    file is kept until this process ends, once for each content, which its name tells.
    """
    kept = _shipping_folder() / file.name
    if not kept.exists():
        draft = kept.with_name(f"{uuid.uuid4().hex}.draft")
        try:
            os.link(file, draft)  # costs no disk, and outlives the original
        except OSError:
            shutil.copyfile(file, draft)
        draft.replace(kept)  # two threads may get here at once, with the same content
    # Spark warns of a file that it has already; over Connect the client sees to that.
    if getattr(spark, "_jsparkSession", None) is None or file.name not in _shipped(spark):
        spark.addArtifacts(str(kept), file=True)
    return file.name


def _shipped(spark: SparkSession) -> set[str]:
    """Names of the files that a classic session's executors have been given."""
    return {str(url).rpartition("/")[2] for url in spark.sparkContext.listFiles}


@functools.cache
def _shipping_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="spark_nn-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
