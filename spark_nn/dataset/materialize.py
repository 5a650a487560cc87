"""Driver side of materialising: DataFrame -> Parquet in the store, written once by the executors.

The driver plans the conversion, starts one job and writes the manifest from the tasks' reports. It never
sees a row.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F

from spark_nn.columns import Tensor, expression, one_shape, refuse_rows
from spark_nn.dataset.extent import Extent, together
from spark_nn.dataset.fingerprint import Fingerprint
from spark_nn.dataset.manifest import MANIFEST, Group, Manifest, Split
from spark_nn.dataset.writer import PartitionWriter, group_rows, stored
from spark_nn.errors import DatasetError, StoreError
from spark_nn.store import RunDir

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# A DataFrame that Spark takes to be smaller is written where it lies: moving it costs more than one task's time.
_SPREAD_BYTES = 64 << 20


@dataclass(frozen=True)
class Spec:
    """What to write of a DataFrame's rows; with the rows' content it decides what a dataset holds.

    Parameters
    ----------
    tensors : tuple of Tensor
        What to write of each row; a tensor named ``"validation"`` decides the split.
    validationFraction : float
        Share of the rows to hold back where no tensor decides; 0 for none.
    seed : int
        Seed of the split and of the shuffling.
    shuffle : bool
        Whether to mix the rows; False keeps their order.
    skip : bool
        Whether to leave out rows that cannot be used, and not refuse them all.
    """

    tensors: tuple[Tensor, ...]
    validationFraction: float
    seed: int
    shuffle: bool
    skip: bool

    @property
    def split(self) -> bool:
        """Whether rows are held back for validation."""
        return self.validationFraction > 0 or any(tensor.name == "validation" for tensor in self.tensors)


def materialize(dataset: DataFrame, spec: Spec, run: RunDir) -> Manifest:
    """Write the tensors of every row, split into training and validation rows.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        The rows.
    spec : Spec
        What to write of them.
    run : RunDir
        Where to write.

    Returns
    -------
    Manifest
        What was written; it stands in the directory too.

    Raises
    ------
    ColumnError
        Rows hold what cannot be used: null, NaN, arrays of differing length.
    StoreError
        The executors do not share the store with the driver.
    """
    run.mkdir("data")
    reports = _pass(dataset, spec, run)
    for task in reports:
        if "unshared" in task:
            raise StoreError(
                f"an executor does not find the directory that the driver made in the store ({task['unshared']}): the "
                "store is not the same directory there. Set storeUrl to storage that all hosts share"
            )
    refuse_rows(reports)
    known = _with_shapes(stored(list(spec.tensors)), reports)
    content, skipped = _content(reports), sum(task["skipped"] for task in reports)
    manifest = Manifest(
        tensors=tuple(known),
        group_rows=max((task["group"] for task in reports), default=0) or group_rows(known),
        train=_groups(reports, "train"),
        validation=_groups(reports, "validation"),
        content=content,
        string_bytes=sum(task["strings"] for task in reports) / max(1, content.rows - skipped),
        skipped=skipped,
        labels=_labels(reports),
    )
    run.writeJson(MANIFEST, manifest.toDict())
    return manifest


def look(dataset: DataFrame, spec: Spec) -> Fingerprint:
    """The fingerprint that :func:`materialize` would find, for the price of a pass that writes nothing."""
    return _content(_pass(dataset, spec, None))


def check_count(manifest: Manifest, spec: Spec, workers: int) -> None:
    """Check that every worker gets a row.

    Raises
    ------
    DatasetError
        There are too few rows.
    """
    for split, name in (("train", "training"), ("validation", "validation")):
        rows = manifest.rows(split)  # type: ignore[arg-type]
        if rows >= workers or (split == "validation" and not spec.split):
            continue
        raise DatasetError(
            f"the DataFrame has {rows:,} {name} row{'s' if rows != 1 else ''} for numWorkers={workers}: "
            "each worker needs at least one. Give more rows, hold back "
            f"{'fewer' if split == 'train' else 'more'} of them for validation, or use fewer workers"
            + (f" ({manifest.skipped:,} rows were skipped, see handleInvalid)" if manifest.skipped else "")
        )


def _pass(dataset: DataFrame, spec: Spec, run: RunDir | None) -> list[dict[str, Any]]:
    """The reports of a pass over the rows, which are written where there is a directory to write them to."""
    rows = dataset.select(*(expression(tensor) for tensor in spec.tensors))
    if run is not None and spec.shuffle and (parts := _spread(dataset)):
        # By a random number and not round-robin, which can leave partitions empty.
        rows = rows.repartition(parts, F.rand(spec.seed))
    writer = PartitionWriter(run, spec.tensors, spec.validationFraction, spec.seed, spec.shuffle, spec.skip)
    return [json.loads(row["report"]) for row in rows.mapInArrow(writer, "report string").collect()]


def _content(reports: list[dict[str, Any]]) -> Fingerprint:
    return sum((Fingerprint(**task["content"]) for task in reports), Fingerprint())


def _labels(reports: list[dict[str, Any]]) -> dict[str, Extent]:
    parts = ({name: Extent.fromDict(extent) for name, extent in task["labels"].items()} for task in reports)
    return functools.reduce(together, parts, {})


def _spread(dataset: DataFrame) -> int | None:
    """How many partitions to spread the rows over before writing, None to write them where they lie.

    Large data in fewer partitions than there are slots would be written by a few tasks while the others idle. Asked
    only of plans that no shuffle feeds, as a shuffle has spread its rows already, and asking would run it.
    """
    if not hasattr(dataset, "_jdf"):  # Spark Connect shows no plan
        return None
    query = dataset._jdf.queryExecution()
    if int(str(query.optimizedPlan().stats().sizeInBytes())) < _SPREAD_BYTES:
        return None
    if "Exchange" in query.executedPlan().toString():
        return None
    slots = int(dataset.sparkSession.sparkContext.defaultParallelism)
    return slots if query.toRdd().getNumPartitions() < slots else None


def _with_shapes(tensors: list[Tensor], reports: list[dict[str, Any]]) -> list[Tensor]:
    """The tensors with the shapes that the tasks found, which must agree."""
    known = []
    for tensor in tensors:
        if tensor.depth:
            shape = one_shape(tensor, (task["shapes"][tensor.name] for task in reports if task["files"]))
            tensor = replace(tensor, shape=shape or tensor.shape or (0,) * tensor.depth)
        known.append(tensor)
    return known


def _groups(reports: list[dict[str, Any]], split: Split) -> tuple[Group, ...]:
    """The row groups of a split, in the order of the DataFrame's partitions."""
    groups = []
    for task in sorted(reports, key=lambda task: int(task["partition"])):
        if split in task["files"]:
            file, rows = task["files"][split]
            groups += [Group(file, index, count) for index, count in enumerate(rows)]
    return tuple(groups)
