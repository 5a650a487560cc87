"""Measuring a model over a DataFrame: one Spark job in two steps.

Every task runs the model over its rows and hands on what its loss and metrics have counted; one more task adds that
up and computes the values. They are those over all rows at once, however the rows are partitioned, because what
metrics keep are sums. The driver sees the values only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from spark_nn.columns import (
    Arrays,
    Invalid,
    Problem,
    Tensor,
    arrange,
    decode_batch,
    decode_usable,
    expression,
    one_shape,
    refuse_rows,
    told,
)
from spark_nn.errors import DatasetError, ModelFileError
from spark_nn.scoring.models import fetched
from spark_nn.share import Share

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


class Measure(Protocol):
    """Executor side: a framework's model that counts. One serves task after task of its Python worker."""

    def reset(self) -> None:
        """Forget what was counted."""

    def add(self, inputs: Arrays, labels: Arrays, weights: np.ndarray | None) -> None:
        """Count rows."""

    def state(self) -> bytes:
        """What was counted, for :meth:`merge` of another process."""

    def merge(self, state: bytes) -> None:
        """Count what another process has counted; rows have been added here before, be they forgotten since."""

    def results(self) -> dict[str, Any]:
        """The values of loss and metrics over all that was counted, as JSON can hold them."""


MeasureLoader = Callable[[str, Share], Measure]


@dataclass(frozen=True)
class Evaluation:
    """Executor side: what the tasks of an evaluation do.

    Parameters
    ----------
    file : str
        Name of the model's file among the session's artifacts.
    sha256 : str
        Its digest.
    load : callable
        The framework's loader: takes the local path and the task's share, returns the :class:`Measure`. It must be
        importable; it raises `ModelFileError` where the file cannot be measured.
    tensors : tuple of Tensor
        The model's inputs, labels and weights.
    skip : bool
        Whether rows that cannot be used are left out, and are no error.
    """

    file: str
    sha256: str
    load: MeasureLoader
    tensors: tuple[Tensor, ...]
    skip: bool

    def measure(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Count the rows of a partition; yield a row with the report, what was counted, and one of the rows."""
        measure: Measure | None = None
        tensors: Sequence[Tensor] = self.tensors
        problems: Counter[Problem] = Counter()
        rows = skipped = 0
        example = refused = None
        for batch in batches:
            came = batch.num_rows
            batch, block, known, invalid = decode_usable(batch, tensors, skip=self.skip)
            skipped += came - batch.num_rows
            if not self.skip:
                problems += invalid.problems
            if problems or refused or not batch.num_rows:
                continue  # no value will be computed: only find out what is wrong with the rest
            tensors = known
            if measure is None:
                try:
                    measure = self._loaded()
                except ModelFileError as error:
                    refused = str(error)
                    continue
                example = _bytes(batch.slice(0, 1))
            rows += batch.num_rows
            _add(measure, block)
        found = {
            "rows": rows,
            "skipped": skipped,
            "problems": told(problems),
            "shapes": {tensor.name: tensor.shape for tensor in tensors} if rows else {},
            "refused": refused,
        }
        state = None if measure is None or problems else measure.state()
        yield pa.RecordBatch.from_arrays(
            [pa.array([json.dumps(found)]), pa.array([state], pa.binary()), pa.array([example], pa.binary())],
            ["report", "state", "example"],
        )

    def finish(self, tasks: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Add up what the tasks have counted; yield a row with their reports and the values."""
        reports: list[dict[str, Any]] = []
        measure: Measure | None = None
        for batch in tasks:
            for found, state, example in zip(*batch.columns, strict=True):
                reports.append(json.loads(found.as_py()))
                if not state.is_valid:
                    continue
                if measure is None:
                    measure = self._loaded()
                    block, _ = decode_batch(_batch(example.as_py()), self.tensors, Invalid(1))
                    _add(measure, block)  # some metrics know only from rows what they have to count
                    measure.reset()
                measure.merge(state.as_py())
        result = {"reports": reports, "results": {} if measure is None else measure.results()}
        yield pa.RecordBatch.from_pydict({"result": [json.dumps(result)]})

    def _loaded(self) -> Measure:
        measure: Measure = fetched(self.load, self.file, self.sha256)
        measure.reset()  # a task that failed may have left something
        return measure


def evaluate(dataset: DataFrame, evaluation: Evaluation) -> dict[str, Any]:
    """Driver side: the values of a model's loss and metrics over a DataFrame.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        The rows.
    evaluation : Evaluation
        What to measure, and of which columns.

    Raises
    ------
    ColumnError
        Rows hold what cannot be used: null, NaN, arrays of differing length.
    DatasetError
        There are no rows.
    ModelFileError
        The model's file does not say what to measure.
    """
    rows = dataset.select(*(expression(tensor) for tensor in evaluation.tensors))
    counted = rows.mapInArrow(evaluation.measure, "report string, state binary, example binary")
    # Repartitioned and not coalesced, which would have one task do it all.
    found = counted.repartition(1).mapInArrow(evaluation.finish, "result string").collect()
    result = json.loads(found[0]["result"]) if found else {"reports": [], "results": {}}
    reports: list[dict[str, Any]] = result["reports"]
    refuse_rows(reports)
    for task in reports:
        if task["refused"]:
            raise ModelFileError(task["refused"])
    for tensor in evaluation.tensors:  # within a partition all rows have one, or there is a problem
        one_shape(tensor, (task["shapes"][tensor.name] for task in reports if task["rows"]))
    if not any(task["rows"] for task in reports):
        skipped = sum(task["skipped"] for task in reports)
        raise DatasetError(
            "the DataFrame has no rows to evaluate the model on"
            + (f": all {skipped:,} were skipped, see handleInvalid" if skipped else "")
        )
    values: dict[str, Any] = result["results"]
    return values


def _add(measure: Measure, block: dict[str, np.ndarray]) -> None:
    inputs, labels = arrange(block, "features"), arrange(block, "label")
    assert inputs is not None
    assert labels is not None
    measure.add(inputs, labels, block.get("weight"))


def _bytes(batch: pa.RecordBatch) -> bytes:
    """Rows as Arrow's own stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _batch(data: bytes) -> pa.RecordBatch:
    with pa.ipc.open_stream(data) as stream:
        return stream.read_next_batch()
