"""The manifest of a materialised dataset: what was written, and how to read it back.

It is the last file written. A directory without it holds no dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from spark_nn.columns import Tensor, row_bytes
from spark_nn.dataset.extent import Extent
from spark_nn.dataset.fingerprint import Fingerprint
from spark_nn.errors import StoreError
from spark_nn.store import RunDir

Split = Literal["train", "validation"]

MANIFEST = "manifest.json"
_VERSION = 1
# What Python adds to a string, and the reference to it.
_OBJECT_BYTES = 64


@dataclass(frozen=True)
class Group:
    """A Parquet row group.

    Parameters
    ----------
    file : str
        Name of its file, below the dataset's directory.
    index : int
        Its place in the file.
    rows : int
        Its rows.
    """

    file: str
    index: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds.

    Parameters
    ----------
    tensors : tuple of Tensor
        The tensors of each row, all of known shape.
    group_rows : int
        Rows of a full row group, of the largest where they differ.
    train, validation : tuple of Group
        The row groups of either split, in the order of the DataFrame's partitions.
    content : Fingerprint
        What the DataFrame held.
    string_bytes : float
        Bytes of the strings in an average row, as Arrow holds them.
    skipped : int
        Rows that were left out because they cannot be used.
    labels : mapping of str to Extent
        Between which numbers each label lies, by the tensors' names.
    """

    tensors: tuple[Tensor, ...]
    group_rows: int
    train: tuple[Group, ...]
    validation: tuple[Group, ...]
    content: Fingerprint
    string_bytes: float = 0.0
    skipped: int = 0
    labels: Mapping[str, Extent] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDir) -> Manifest:
        """Worker side: the manifest of the dataset in a directory.

        Raises
        ------
        StoreError
            There is none.
        """
        value = run.readJson(MANIFEST)
        if value is None:
            raise StoreError(
                f"there is no dataset in {run.url} for this worker: the store is not the same directory here as on the "
                "driver. Set storeUrl to storage that all hosts share"
            )
        return cls.fromDict(value)

    @property
    def row_bytes(self) -> float:
        """Bytes of an average row in memory."""
        strings = sum(tensor.size for tensor in self.tensors if not tensor.numeric)
        return row_bytes(self.tensors) + self.string_bytes + strings * _OBJECT_BYTES

    def groups(self, split: Split) -> tuple[Group, ...]:
        """The row groups of a split."""
        return self.train if split == "train" else self.validation

    def rows(self, split: Split) -> int:
        """Rows of a split."""
        return sum(group.rows for group in self.groups(split))

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of this name, None where the dataset has none."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def role(self, role: str) -> tuple[Tensor, ...]:
        """The tensors of a role, in order."""
        return tuple(tensor for tensor in self.tensors if tensor.role == role)

    def toDict(self) -> dict[str, Any]:
        """The manifest as JSON can hold it."""

        def plain(groups: Sequence[Group]) -> list[list[Any]]:
            return [[group.file, group.index, group.rows] for group in groups]

        return {
            "version": _VERSION,
            "tensors": [tensor.toDict() for tensor in self.tensors],
            "group_rows": self.group_rows,
            "train": plain(self.train),
            "validation": plain(self.validation),
            "content": asdict(self.content),
            "string_bytes": self.string_bytes,
            "skipped": self.skipped,
            "labels": {name: extent.toDict() for name, extent in self.labels.items()},
        }

    @classmethod
    def fromDict(cls, value: dict[str, Any]) -> Manifest:
        """The manifest that :meth:`toDict` described."""
        return cls(
            tensors=tuple(Tensor.fromDict(tensor) for tensor in value["tensors"]),
            group_rows=value["group_rows"],
            train=tuple(Group(*group) for group in value["train"]),
            validation=tuple(Group(*group) for group in value["validation"]),
            content=Fingerprint(**value["content"]),
            string_bytes=value["string_bytes"],
            skipped=value["skipped"],
            labels={name: Extent.fromDict(extent) for name, extent in value["labels"].items()},
        )
