"""Worker side of a fit, framework-neutral: what every rank gets and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import numpy as np

from spark_nn.checkpoint import Checkpoints
from spark_nn.columns import Tensor
from spark_nn.dataset.manifest import Manifest, Split
from spark_nn.dataset.stream import Block, Cache, Stream, choose_cache
from spark_nn.errors import NonFiniteLoss, ParamError, SparkNNError
from spark_nn.gang.context import GangContext, attempt_name
from spark_nn.store import RunDir, digest
from spark_nn.tracking.events import Drawing, Events

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
    cache : {"auto", "memory", "disk", "none"}
        What each rank keeps of the rows that it has read.
    classWeights : dict of int to float
        How much the rows of each class count, 1 where it says nothing.
    checkpointInterval : int or None
        Steps between two checkpoints; None for about a minute; 0 for none.
    nonFiniteLoss : {"error", "ignore"}
        Whether a loss that is NaN or infinite ends the training.
    stepsPerEpoch : int or None
        Steps of an epoch; None for a pass over the rows.
    logUrl : str or None
        The folder that TensorBoard is to find the training in.
    """

    epochs: int
    batch: int
    seed: int
    shuffle: bool
    cache: Literal["auto", "memory", "disk", "none"] = "none"
    classWeights: dict[int, float] = field(default_factory=dict)
    checkpointInterval: int | None = None
    nonFiniteLoss: Literal["error", "ignore"] = "error"
    stepsPerEpoch: int | None = None
    logUrl: str | None = None


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Parameters
    ----------
    file : str
        Name of the model's file in the run directory.
    sha256 : str
        Its digest.
    outputs : dict
        What the model puts out: arguments of :class:`spark_nn.outputs.Output` by the outputs' names, those of the
        only one by the empty name.
    history : dict
        For each metric its value after each epoch.
    rowsPerSecond : float
        Training rows per second, all ranks together.
    epochSeconds : list of float
        Seconds of each epoch's training.
    seconds : dict
        Where the worker's time went, by phase.
    """

    file: str
    sha256: str
    outputs: dict[str, dict[str, Any]]
    history: dict[str, list[Any]]
    rowsPerSecond: float
    epochSeconds: list[float]
    seconds: dict[str, float] = field(default_factory=dict)


class Trainer(ABC):
    """Trains one model on a gang. A framework's trainer is pickled on the driver and called on each rank.

    Parameters
    ----------
    schedule : Schedule
        How to go through the rows.
    """

    # What may be done once per executor, before it is known what to train: imports, as ``module:function``.
    preload: ClassVar[tuple[str, ...]] = ()
    # Whether ranks have no collective, but call rank 0, and all but that one may be lost.
    apart: ClassVar[bool] = False

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._events: Events | None = None

    def __call__(self, gang: GangContext, data: RunDir) -> dict[str, Any]:
        """Train on the dataset in a directory; return :class:`Trained` as a dict."""
        manifest = Manifest.of(data)
        schedule = self.schedule
        identity = {"rows": asdict(manifest.content), "batch": schedule.batch, "seed": schedule.seed}
        checkpoints = Checkpoints(gang, schedule.checkpointInterval, identity)
        with ExitStack() as block:
            block.callback(self._close_events)
            train = block.enter_context(closing(self._stream(gang, data, manifest, "train")))
            validation = None
            if manifest.validation:
                validation = block.enter_context(closing(self._stream(gang, data, manifest, "validation")))
            return asdict(self.train(gang, manifest, train, validation, checkpoints))

    @abstractmethod
    def train(
        self,
        gang: GangContext,
        manifest: Manifest,
        data: Stream,
        validation: Stream | None,
        checkpoints: Checkpoints,
    ) -> Trained:
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
        checkpoints : Checkpoints
            Where to go on, after an earlier attempt, and what to leave for a later one.
        """

    def events(self, gang: GangContext, epoch: int, draw: Callable[[], Drawing] | None = None) -> Events | None:
        """What tells TensorBoard of a training that begins or goes on with an epoch; on rank 0, if it is wanted."""
        if gang.rank or self.schedule.logUrl is None:
            return None
        self._events = Events(self.schedule.logUrl, gang, epoch, draw)
        return self._events

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            events.close()

    def _stream(self, gang: GangContext, data: RunDir, manifest: Manifest, split: Split) -> Stream:
        return Stream(
            data,
            manifest,
            split,
            rank=gang.rank,
            world=gang.world,
            batch=self.schedule.batch // gang.world,
            seed=self.schedule.seed,
            shuffle=self.schedule.shuffle and split == "train",
            steps=self.schedule.stepsPerEpoch if split == "train" else None,
            cache=self._cache(gang, manifest),
            scratch=gang.scratch,
            timeout=gang.timeout,
        )

    def _cache(self, gang: GangContext, manifest: Manifest) -> Cache:
        rows = manifest.rows("train") + manifest.rows("validation")
        repeated = self.schedule.epochs > 1 or self.schedule.stepsPerEpoch is not None
        return choose_cache(self.schedule.cache, int(rows * manifest.row_bytes), gang.neighbours, repeated=repeated)


def row_weights(block: Block, weights: dict[int, float]) -> np.ndarray | None:
    """The weight of each row's loss: what its column says times what its class counts; None where all count alike."""
    own = block.get("weight")
    if not weights:
        return own
    labels = next(values for name, values in block.items() if name.partition(":")[0] == "label")
    if labels.ndim > 1:
        labels = labels.argmax(axis=-1) if labels.shape[-1] > 1 else labels[..., 0]
    counted = np.ones(len(labels), np.float32) if own is None else own.copy()
    for each, weight in weights.items():
        counted[labels == each] *= weight
    return counted


def non_finite(epoch: int, good: int, rate: float, clipping: str) -> NonFiniteLoss:
    """The error of a loss that is NaN or infinite.

    Parameters
    ----------
    epoch, good : int
        The epoch, from 0, and its steps before.
    rate : float
        The step's learning rate; NaN where it has none of its own.
    clipping : str
        What clips gradients, for the message.
    """
    known = "" if np.isnan(rate) else f", with learning rate {rate:g}"
    return NonFiniteLoss(
        f"the loss is NaN or infinite in epoch {epoch + 1} at step {good + 1}{known}. Set a smaller learningRate, clip "
        f"the gradients ({clipping}), and look for extreme values in the inputs and labels; nonFiniteLoss='ignore' "
        "would let training go on"
    )


def misfit(inputs: Sequence[Tensor], named: str, error: Exception) -> ParamError:
    """The error of a model that does not take its input.

    Parameters
    ----------
    inputs : sequence of Tensor
        What the columns make.
    named : str
        What the param `inputs` must name, for the message.
    error : Exception
        The framework's own.
    """
    described = ", ".join(
        f"{each.key or 'the input'}: {each.dtype} {each.shape} from {', '.join(each.columns)}" for each in inputs
    )
    advice = f"The param inputs must name {named}"
    if any(each.dtype == "string" for each in inputs):
        advice += "; numbers that were read as text are cast before, as by F.col('x').cast('double')"
    return ParamError(
        f"the model does not take the input that the columns make ({described}; the shape is that of a row). {advice}. "
        f"{type(error).__name__}: {error}"
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
    # The others wait meanwhile, and must not take a large model's way to the store for silence.
    with gang.collective.waited_for(), TemporaryDirectory(prefix="spark_nn-") as folder:
        path = Path(folder) / f"model{suffix}"
        write(path)
        sha256 = digest(path)
        # Of this attempt: a straggler of an earlier one must not overwrite it.
        model_folder = f"{attempt_name(gang.attempt)}/{MODEL_FOLDER}"
        gang.run.mkdir(model_folder)
        name = f"{model_folder}/model{suffix}"
        gang.run.put(path, name)
    return name, sha256
