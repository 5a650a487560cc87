"""Datasets written without Spark: the writer is called as a task would call it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from spark_nn.columns import Tensor
from spark_nn.dataset.fingerprint import Fingerprint
from spark_nn.dataset.manifest import Group, Manifest
from spark_nn.dataset.writer import PartitionWriter, group_rows
from spark_nn.store import RunDir

FEATURES = Tensor("features", ("x",), "array", "float32", 1, (3,))
LABEL = Tensor("label", ("y",), "scalar", "int64", 0, ())


def batch(first, rows):
    """Rows numbered from `first`: features (n, n + 0.25, n + 0.5), label n."""
    n = np.arange(first, first + rows)
    x = (n[:, None] + np.array([0, 0.25, 0.5])).astype(np.float32)
    offsets = pa.array(np.arange(0, 3 * rows + 1, 3, dtype=np.int32))
    lists = pa.ListArray.from_arrays(offsets, pa.array(x.reshape(-1)))
    return pa.RecordBatch.from_arrays([lists, pa.array(n)], ["features", "label"])


def batches(rows, size=1000, first=0):
    for start in range(0, rows, size):
        yield batch(first + start, min(size, rows - start))


def write(folder, partitions, *, fraction=0.0, seed=0, shuffle=False):
    """Write partitions of the given numbers of rows; return the run directory and the manifest."""
    run = RunDir(folder.as_uri())
    run.mkdir("data")
    writer = PartitionWriter(run, (FEATURES, LABEL), fraction, seed, shuffle)
    groups = {"train": [], "validation": []}
    first = 0
    for partition, rows in enumerate(partitions):
        report = writer.write(partition, batches(rows, first=first))
        first += rows
        assert report["problems"] == []
        for split, (file, counts) in report["files"].items():
            groups[split] += [Group(file, index, count) for index, count in enumerate(counts)]
    tensors = [FEATURES, LABEL]
    content = Fingerprint(first)
    manifest = Manifest(
        tuple(tensors), group_rows(tensors), tuple(groups["train"]), tuple(groups["validation"]), content
    )
    return run, Manifest.fromDict(manifest.toDict())
