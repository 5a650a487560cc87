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
from collections.abc import Callable, Iterator, Sequence
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

from spark_nn.columns import Arrays, Invalid, Tensor, arrange, decode, expression, quoted, report
from spark_nn.errors import ColumnError, ModelFileError
from spark_nn.outputs import Outputs, columns_of
from spark_nn.store import digest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Predict = Callable[[Arrays], Arrays]
Loader = Callable[[str, int], Predict]
# A function over batches: of each an array per column in, a struct per row out.
Scored = Callable[[Iterator[Sequence[pa.Array]]], Iterator[pa.StructArray]]

# Of each row, where rows may be skipped, whether it was scored: pandas cannot say that a whole struct is null.
_USED = "used"
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
    inputs : tuple of Tensor
        The model's inputs.
    outputs : dict of str to Output
        What it puts out, by the model's names.
    fields : tuple of str
        Which values to return, by their keys in :func:`~spark_nn.outputs.columns_of`.
    skip : bool
        Whether rows that cannot be used get a null, and are no error.
    """

    file: str
    sha256: str
    load: Loader
    inputs: tuple[Tensor, ...]
    outputs: Outputs
    fields: tuple[str, ...]
    skip: bool = False

    def __call__(self, batches: Iterator[Sequence[pa.Array]]) -> Iterator[pa.StructArray]:
        """Score Arrow batches, each an array per input, one struct per row."""
        predict: Predict | None = None
        for batch in batches:
            if predict is None:
                predict = fetched(self.load, self.file, self.sha256)
            yield self.score(batch, predict)

    def types(self) -> dict[str, str]:
        """The SQL type of each value that can be returned."""
        return {
            field: self.outputs[output].fields[param] for field, (param, output) in columns_of(self.outputs).items()
        }

    def score(self, batch: Sequence[pa.Array], predict: Predict) -> pa.StructArray:
        """Score one batch.

        Raises
        ------
        ColumnError
            Rows of the batch hold what the model cannot take.
        """
        rows = len(batch[0])
        invalid = Invalid(rows)
        blocks = [decode(array, tensor, invalid) for array, tensor in zip(batch, self.inputs, strict=True)]
        if invalid.problems:
            if not self.skip:
                raise report(invalid.problems, " (counted in one batch of rows that were being scored)")
            used = pa.array(~invalid.rows)
            scored = self.score([array.filter(used) for array in batch], predict)
            # Taking at null gives null.
            places = np.cumsum(~invalid.rows) - 1
            return scored.take(pa.array(places, mask=invalid.rows))
        inputs = arrange(
            {tensor.name: block for tensor, block in zip(self.inputs, blocks, strict=True) if block is not None},
            "features",
        )
        predicted: Any
        if rows:
            predicted = predict(inputs)  # type: ignore[arg-type]
        else:
            predicted = {name: np.zeros((0, *output.shape), np.float32) for name, output in self.outputs.items()}
            predicted = predicted.get("", predicted)
        values = {
            (param, name): array
            for name, output in self.outputs.items()
            for param, array in output.values(predicted[name] if name else predicted).items()
        }
        keys = columns_of(self.outputs)
        arrays = {field: _arrow(values[keys[field]]) for field in self.fields}
        if self.skip:
            arrays[_USED] = pa.array(np.ones(rows, bool))
        return pa.StructArray.from_arrays(list(arrays.values()), list(arrays))


def score(dataset: DataFrame, scorer: Scorer, columns: dict[str, str]) -> DataFrame:
    """Driver side: the DataFrame with the output columns added. Starts no job.

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
    declared = [f"{quoted(field)}:{types[field]}" for field in scorer.fields] + [f"{_USED}:boolean"] * scorer.skip
    sql = f"struct<{','.join(declared)}>"
    scores = _udf(scorer, sql)(*(expression(tensor) for tensor in scorer.inputs))
    held = f"spark_nn_{scorer.sha256[:16]}"
    results = {}
    for field, name in columns.items():
        param, output = keys[field]
        value = F.col(held)[field]
        results[name] = array_to_vector(value) if scorer.outputs[output].vector(param) else value
    scored = dataset.withColumn(held, scores)
    if scorer.skip:
        scored = scored.where(F.col(held)[_USED])
    return scored.withColumns(results).drop(held)


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
    udf = arrow_kind(scorer, len(scorer.inputs), sql) if takes_arrow() else pandas_kind(scorer, sql)
    # The filter that leaves rows out would otherwise be moved below the projection, and the model be run twice.
    return udf.asNondeterministic() if scorer.skip else udf


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
            pa.array(nested(series) if tensor.depth > 1 else series, type=kind, from_pandas=True)
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
    kind = pa.type_for_alias(tensor.dtype)
    for _ in range(tensor.depth):
        kind = pa.list_(kind)
    return kind


def nested(series: pd.Series) -> list[Any]:
    """Arrays of arrays as lists, which is what Arrow takes."""

    def plain(value: Any) -> Any:
        return [plain(each) for each in value] if isinstance(value, (np.ndarray, list)) else value

    return [plain(value) for value in series]


def fetched(load: Callable[[str, int], Any], file: str, sha256: str) -> Any:
    """Executor side: what a loader makes of a model file that was shipped, for a task of so many cores."""
    context = TaskContext.get()
    return _loaded(load, SparkFiles.get(file), sha256, context.cpus() if context else 1)


@functools.lru_cache(maxsize=_KEPT_MODELS)
def _loaded(load: Callable[[str, int], Any], path: str, sha256: str, cpus: int) -> Any:
    """What a loader makes of a model file, such as its predicting function; loaded once per Python worker."""
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
