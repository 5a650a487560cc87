"""Driver side of materialising: DataFrame -> Parquet in the run directory, written once by the executors.

The driver plans the conversion, starts one job and writes the manifest from the tasks' reports. It never
sees a row.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spark_nn.columns import Problem, Tensor, expression, report
from spark_nn.dataset.manifest import MANIFEST, Group, Manifest, Split
from spark_nn.dataset.writer import PartitionWriter, group_rows, stored
from spark_nn.errors import ColumnError, DatasetError, StoreError
from spark_nn.store import RunDir

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def materialize(
    dataset: DataFrame,
    tensors: list[Tensor],
    run: RunDir,
    *,
    validationFraction: float,
    seed: int,
    shuffle: bool,
    workers: int,
) -> Manifest:
    """Write the tensors of every row, split into training and validation rows.

    Parameters
    ----------
    dataset : pyspark.sql.DataFrame
        The rows.
    tensors : list of Tensor
        What to write of each; a tensor named ``"validation"`` decides the split.
    run : RunDir
        Where to write, in its folder ``data``.
    validationFraction : float
        Share of the rows to hold back where no tensor decides; 0 for none.
    seed : int
        Seed of the split and of the shuffling.
    shuffle : bool
        Whether to mix the rows that are written together.
    workers : int
        Ranks that will share the rows; each needs at least one.

    Returns
    -------
    Manifest
        What was written; it stands in the run directory too.

    Raises
    ------
    ColumnError
        Rows hold what cannot be used: null, NaN, arrays of differing length.
    DatasetError
        There are too few rows.
    StoreError
        The executors do not share the store with the driver.
    """
    run.mkdir("data")
    writer = PartitionWriter(run, tuple(tensors), validationFraction, seed, shuffle)
    rows = dataset.select(*(expression(tensor) for tensor in tensors)).mapInArrow(writer, "report string").collect()
    reports = [json.loads(row["report"]) for row in rows]
    for task in reports:
        if "unshared" in task:
            raise StoreError(
                f"an executor does not find the directory that the driver made in the store ({task['unshared']}): the "
                "store is not the same directory there. Set storeUrl to storage that all hosts share"
            )
    _check_rows(reports)
    known = _with_widths(stored(tensors), reports)
    manifest = Manifest(
        tensors=tuple(known),
        group_rows=group_rows(known),
        train=_groups(reports, "train"),
        validation=_groups(reports, "validation"),
    )
    held_back = validationFraction > 0 or any(tensor.name == "validation" for tensor in tensors)
    _check_count(manifest, workers, held_back)
    run.writeJson(MANIFEST, manifest.toDict())
    return manifest


def _check_rows(reports: list[dict[str, Any]]) -> None:
    problems: Counter[Problem] = Counter()
    for task in reports:
        for column, kind, rows in task["problems"]:
            problems[Problem(column, kind)] += rows
    if problems:
        raise report(problems)


def _with_widths(tensors: list[Tensor], reports: list[dict[str, Any]]) -> list[Tensor]:
    """The tensors with the widths that the tasks found, which must agree."""
    known = []
    for tensor in tensors:
        if tensor.form != "scalar":
            widths = sorted({task["widths"][tensor.name] for task in reports if task["files"]})
            if len(widths) > 1:
                raise ColumnError(
                    f"column {tensor.columns[0]!r} has rows of differing length, among them "
                    f"{', '.join(map(str, widths))}: every row must have as many elements, pad or cut them"
                )
            if widths == [0]:
                raise ColumnError(
                    f"column {tensor.columns[0]!r} holds empty arrays: every row needs at least one element"
                )
            tensor = replace(tensor, width=widths[0] if widths else None)
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


def _check_count(manifest: Manifest, workers: int, held_back: bool) -> None:
    for split, name in (("train", "training"), ("validation", "validation")):
        rows = manifest.rows(split)  # type: ignore[arg-type]
        if rows >= workers or (split == "validation" and not held_back):
            continue
        raise DatasetError(
            f"the DataFrame has {rows:,} {name} row{'s' if rows != 1 else ''} for numWorkers={workers}: "
            "each worker needs at least one. Give more rows, hold back "
            f"{'fewer' if split == 'train' else 'more'} of them for validation, or use fewer workers"
        )
