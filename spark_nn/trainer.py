"""Worker side of a fit, framework-neutral: what every rank gets and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from spark_nn.dataset.manifest import MANIFEST, Manifest, Split
from spark_nn.dataset.stream import Stream
from spark_nn.errors import SparkNNError
from spark_nn.gang.context import GangContext
from spark_nn.store import digest

MODEL_FOLDER = "model"


@dataclass(frozen=True)
class Schedule:
    """How training goes through the rows.

    Parameters
    ----------
    epochs : int
        Passes over the rows.
    batch : int
        Rows of a step over all ranks together; a multiple of the number of ranks.
    seed : int
        Seed of everything random, 0 or more.
    shuffle : bool
        Whether the order changes with the epoch.
    """

    epochs: int
    batch: int
    seed: int
    shuffle: bool


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Parameters
    ----------
    file : str
        Name of the model's file in the run directory.
    sha256 : str
        Its digest.
    output : dict
        What the model puts out: arguments of :class:`spark_nn.outputs.Output`.
    history : dict
        For each metric its value after each epoch.
    rowsPerSecond : float
        Training rows per second, all ranks together.
    seconds : dict
        Where the worker's time went, by phase.
    """

    file: str
    sha256: str
    output: dict[str, Any]
    history: dict[str, list[Any]]
    rowsPerSecond: float
    seconds: dict[str, float] = field(default_factory=dict)


class Trainer(ABC):
    """Trains one model on a gang. A framework's trainer is pickled on the driver and called on each rank.

    Parameters
    ----------
    schedule : Schedule
        How to go through the rows.
    """

    # What must be set in the rank's process before the framework is imported there.
    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, gang: GangContext) -> dict[str, Any]:
        """Train on the dataset in the run directory; return :class:`Trained` as a dict."""
        value = gang.run.readJson(MANIFEST)
        if value is None:
            raise SparkNNError(
                f"rank {gang.rank} on {gang.host} finds no dataset in {gang.run.url}: the store is not the "
                "same directory there as on the driver. Set storeUrl to storage that all hosts share"
            )
        manifest = Manifest.fromDict(value)
        validation = self._stream(gang, manifest, "validation") if manifest.validation else None
        return asdict(self.train(gang, manifest, self._stream(gang, manifest, "train"), validation))

    @abstractmethod
    def train(self, gang: GangContext, manifest: Manifest, data: Stream, validation: Stream | None) -> Trained:
        """Train in step with the other ranks and publish the model from rank 0.

        Parameters
        ----------
        gang : GangContext
            This rank's view of its gang.
        manifest : Manifest
            The tensors and their shapes.
        data : Stream
            This rank's training batches: the same number of them, of the same sizes, on every rank.
        validation : Stream or None
            This rank's share of the validation rows, of any size.
        """

    def _stream(self, gang: GangContext, manifest: Manifest, split: Split) -> Stream:
        return Stream(
            gang.run,
            manifest,
            split,
            rank=gang.rank,
            world=gang.world,
            batch=self.schedule.batch // gang.world,
            seed=self.schedule.seed,
            shuffle=self.schedule.shuffle and split == "train",
        )


def check_digests(gang: GangContext, digest: bytes) -> None:
    """Fail the fit where the ranks' weights are not equal to the last bit.

    Raises
    ------
    SparkNNError
        They differ.
    """
    digests = gang.collective.all_gather(digest)
    if len(set(digests)) > 1:
        named = ", ".join(f"rank {rank}: {value.hex()[:12]}" for rank, value in enumerate(digests))
        raise SparkNNError(
            f"after training the ranks hold different weights ({named}): something in the model changes its "
            "weights outside the optimizer and differently on each rank"
        )


def publish(gang: GangContext, write: Any, suffix: str) -> tuple[str, str]:
    """Put a model file into the run directory.

    Parameters
    ----------
    gang : GangContext
        Only rank 0 should call this.
    write : callable
        Takes a local path and writes the model there.
    suffix : str
        The file's suffix, which tells its format.

    Returns
    -------
    tuple of str
        The file's name in the run directory and its SHA-256.
    """
    with TemporaryDirectory(prefix="spark_nn-") as folder:
        path = Path(folder) / f"model{suffix}"
        write(path)
        sha256 = digest(path)
        gang.run.mkdir(MODEL_FOLDER)
        name = f"{MODEL_FOLDER}/model{suffix}"
        gang.run.put(path, name)
    return name, sha256
