"""Scoring: one column UDF that runs the model and returns a struct, projected into the output columns.

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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyspark
from pyspark import SparkFiles, TaskContext
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from spark_nn.columns import Problem, Tensor, decode, expression, report
from spark_nn.errors import ColumnError, ModelFileError
from spark_nn.outputs import Output
from spark_nn.store import digest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Predict = Callable[[np.ndarray], np.ndarray]
Loader = Callable[[str, int], Predict]

# Models kept by a Python worker: a pipeline of two nets, and two more.
_KEPT_MODELS = 4


@dataclass(frozen=True)
class Scorer:
    """Executor side: turns batches of inputs into batches of outputs.

    Parameters
    ----------
    file : str
        Name of the model's file among the session's artifacts.
    sha256 : str
        Its digest.
    load : callable
        The framework's loader: takes the local path and the task's cores, returns the predicting function.
        It must be importable, so that a worker finds a model again that it has loaded before.
    input : Tensor
        The model's input.
    output : Output
        What it puts out.
    fields : tuple of str
        Which values to return, by the Params that name their columns.
    """

    file: str
    sha256: str
    load: Loader
    input: Tensor
    output: Output
    fields: tuple[str, ...]

    def __call__(self, batches: Iterator[pa.Array]) -> Iterator[pa.StructArray]:
        """Score Arrow batches, one struct per row."""
        predict: Predict | None = None
        for batch in batches:
            if predict is None:
                context = TaskContext.get()
                cpus = context.cpus() if context else 1
                predict = _loaded(self.load, SparkFiles.get(self.file), self.sha256, cpus)
            yield self.score(batch, predict)

    def score(self, batch: pa.Array, predict: Predict) -> pa.StructArray:
        """Score one batch.

        Raises
        ------
        ColumnError
            Rows of the batch hold what the model cannot take.
        """
        problems: Counter[Problem] = Counter()
        block = decode(batch, self.input, problems)
        if block is None:
            raise report(problems, " (counted in one batch of rows that were being scored)")
        if len(block):
            values = self.output.values(predict(block))
        else:
            values = self.output.values(np.zeros((0, *self.output.shape), np.float32))
        return pa.StructArray.from_arrays([_arrow(values[name]) for name in self.fields], list(self.fields))


def score(dataset: DataFrame, scorer: Scorer, columns: dict[str, str]) -> DataFrame:
    """Driver side: the DataFrame with the output columns added. Starts no job.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        What to score.
    scorer : Scorer
        What to score with.
    columns : dict
        The output columns' names, by the Params that name them.

    Raises
    ------
    ColumnError
        An output column is there already.
    """
    taken = {name.lower() for name in dataset.columns}  # as Spark resolves names
    for param, name in columns.items():
        if name.lower() in taken:
            raise ColumnError(f"{param}={name!r}: there already is such a column; rename or drop it, or set {param}")
        taken.add(name.lower())
    types = scorer.output.fields
    sql = f"struct<{','.join(f'{name}:{types[name]}' for name in scorer.fields)}>"
    scores = _udf(scorer, sql)(expression(scorer.input))
    held = f"spark_nn_{scorer.sha256[:16]}"
    results = {}
    for param, name in columns.items():
        value = F.col(held)[param]
        results[name] = array_to_vector(value) if scorer.output.vector(param) else value
    return dataset.withColumn(held, scores).withColumns(results).drop(held)


def ship(spark: SparkSession, file: Path) -> str:
    """Driver side: give a file to the session's executors; return the name they find it under.

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
    spark.addArtifacts(str(kept), file=True)
    return file.name


@functools.cache
def _shipping_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="spark_nn-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _udf(scorer: Scorer, sql: str) -> Any:
    """The scorer as a column UDF of the best kind that this Spark has."""
    functions: Any = F  # pyspark re-exports these without telling type checkers
    if tuple(int(part) for part in pyspark.__version__.split(".")[:2]) >= (4, 1):

        def arrow(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
            yield from scorer(batches)

        return functions.arrow_udf(arrow, sql)
    return pandas_kind(scorer, sql)


def pandas_kind(scorer: Scorer, sql: str) -> Any:
    """The scorer as a pandas UDF, for Spark 4.0."""
    functions: Any = F
    element = {"float32": pa.float32(), "int32": pa.int32(), "int64": pa.int64()}[scorer.input.dtype]

    def frames(batches: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        arrays = (pa.array(batch, type=pa.list_(element)) for batch in batches)
        for scored in scorer(arrays):
            yield pd.DataFrame(
                {
                    name: array.to_numpy(zero_copy_only=False)
                    for name, array in zip(scorer.fields, scored.flatten(), strict=True)
                }
            )

    return functions.pandas_udf(frames, sql)


@functools.lru_cache(maxsize=_KEPT_MODELS)
def _loaded(load: Loader, path: str, sha256: str, cpus: int) -> Predict:
    """The predicting function of a model file, loaded once per Python worker."""
    found = digest(Path(path))
    if found != sha256:
        raise ModelFileError(f"the model file {Path(path).name} arrived changed: its SHA-256 is {found}, not {sha256}")
    return load(path, cpus)


def _arrow(values: np.ndarray) -> pa.Array:
    """Values of shape ``(rows,) + shape`` as an Arrow array, nested as deep as the shape."""
    if values.ndim == 1:
        return pa.array(values)
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        offsets = pa.array(np.arange(0, len(array) + 1, size, dtype=np.int32))
        array = pa.ListArray.from_arrays(offsets, array)
    return array
