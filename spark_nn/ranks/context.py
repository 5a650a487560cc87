"""Worker side: what a function of the user's sees of its gang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Literal

from spark_nn.columns import arrange
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.stream import Block, Stream, choose_cache
from spark_nn.errors import ParamError
from spark_nn.gang.context import GangContext
from spark_nn.gang.progress import Reporter
from spark_nn.ranks.roles import Cast, Role
from spark_nn.ranks.saves import Saves
from spark_nn.store import RunDir

Framework = Literal["tensorflow", "torch", "jax"]


@dataclass(frozen=True)
class Reading:
    """How ranks read the rows.

    Parameters
    ----------
    data : RunDir
        Where the dataset lies.
    seed : int
        Seed of their order.
    shuffle : bool
        Whether the order changes with the epoch.
    cache : {"auto", "memory", "disk", "none"}
        What each rank keeps of the rows that it has read.
    """

    data: RunDir
    seed: int
    shuffle: bool
    cache: Literal["auto", "memory", "disk", "none"]


class RankContext:
    """One rank's view of its gang; the first argument of the function given to :func:`spark_nn.run`.

    Attributes
    ----------
    rank : int
        This process, from 0.
    world : int
        How many there are, servers and evaluator included.
    role : {"chief", "worker", "evaluator"}
        What this rank is for (``"ps"`` ranks run no function).
    index : int
        Its place among those of the same role, from 0.
    localRank, localWorld : int
        Its place among the ranks of the same host, from 0, and how many these are.
    host : str
        The address it is reached at: loopback where all ranks are on one machine.
    clusterSpec : dict of str to list of str
        The addresses, as ``host:port``, of the ranks of each role.
    attempt : int
        How often the run was begun before.
    cpus : int
        Cores that Spark gives the rank (``spark.task.cpus``).
    timeout : float
        The timeout given to :func:`spark_nn.run`, in seconds.
    scratch : Path
        A folder on the local disk that goes with the rank.
    checkpoints : Saves
        Keeps bytes and folders for another attempt, should this one fail.
    atEnd : list of callable
        What to do when the function has ended well on all ranks, such as to leave the framework's process group.
    """

    def __init__(
        self,
        gang: GangContext,
        cast: Cast,
        framework: Framework,
        seat: Seat,
        reading: Reading | None,
        stack: ExitStack,
    ) -> None:
        self.rank = gang.rank
        self.world = gang.world
        self.role: Role
        self.role, self.index = cast.parts[gang.rank]
        self.localRank, self.localWorld = seat.localRank, seat.localWorld
        self.host = seat.host
        self.clusterSpec = cast.spec(seat.addresses)
        self.attempt = gang.attempt
        self.cpus = gang.cpus
        self.timeout = gang.timeout
        self.scratch = gang.scratch
        self.checkpoints = Saves(gang)
        self.framework = framework
        self._gang = gang
        self._cast = cast
        self._reading = reading
        self._streams = stack.enter_context(ExitStack())
        self._reported = time.monotonic()
        self.atEnd: list[Callable[[], object]] = []

    @property
    def coordinator(self) -> str:
        """Address of rank 0, as ``host:port``."""
        return self.clusterSpec["chief"][0]

    @property
    def hosts(self) -> str:
        """The addresses of all ranks' machines, with commas between."""
        found = {each.rpartition(":")[0].strip("[]") for some in self.clusterSpec.values() for each in some}
        return ",".join(sorted(found))

    def initialize(self, **options: Any) -> None:
        """Join the framework's own process group; all ranks call it, before the framework computes anything.

        For ``"torch"`` it calls ``torch.distributed.init_process_group``, by NCCL where the rank has a GPU and else by
        Gloo; for ``"jax"`` it calls ``jax.distributed.initialize``, with Gloo between CPUs. TensorFlow needs no such
        call: its strategies find the cluster in ``TF_CONFIG``.

        Parameters
        ----------
        **options : object
            Further arguments of that function.

        Raises
        ------
        ParamError
            The framework is TensorFlow.
        """
        if self.framework == "torch":
            from spark_nn.ranks import torch

            torch.initialize(self, options)
        elif self.framework == "jax":
            from spark_nn.ranks import jax

            jax.initialize(self, options)
        else:
            raise ParamError(
                f"framework={self.framework!r} has nothing to initialize: a strategy such as "
                "tf.distribute.MultiWorkerMirroredStrategy() finds the cluster in TF_CONFIG"
            )

    def batches(self, batchSize: int, epochs: int = 1, initialEpoch: int = 0) -> Batches:
        """The share of the rows that this rank gets, as NumPy batches.

        Every row comes once per epoch on one of the ranks that train, and all of them get equally many batches of equal
        sizes; where the rows do not divide equally, at most one row per rank comes twice. With parameter servers the
        chief gets all rows, and hands batches to the workers. The evaluator gets all rows, in the same order each
        time.

        The order of an epoch goes by its number, so a second call that begins at the same one gives the same order;
        and it ends the batches of the first.

        Parameters
        ----------
        batchSize : int
            Rows of a step over all ranks that train together, as in the estimators: each gets its part.
        epochs : int, default 1
            How many passes over the rows.
        initialEpoch : int, default 0
            The first of them, for a function that goes on from a checkpoint.

        Returns
        -------
        Batches
            Iterate over it, or over single epochs of it.

        Raises
        ------
        ParamError
            No dataset was given to :func:`spark_nn.run`, or the ranks cannot share the batch equally.
        """
        if self._reading is None:
            raise ParamError("ctx.batches: run was given no dataset; give it the DataFrame as dataset=")
        aside = self.role == "evaluator"
        readers = 1 if aside else self._cast.readers
        if batchSize < readers or batchSize % readers:
            raise ParamError(
                f"batchSize={batchSize} must be a positive multiple of numWorkers={readers}: the workers share each "
                "batch equally"
            )
        manifest = Manifest.of(self._reading.data)
        needed = int(manifest.rows("train") * manifest.row_bytes)
        repeated = epochs - initialEpoch > 1
        stream = Stream(
            self._reading.data,
            manifest,
            "train",
            rank=0 if aside else self.rank,
            world=readers,
            batch=batchSize // readers,
            seed=self._reading.seed,
            shuffle=self._reading.shuffle and not aside,
            cache=choose_cache(self._reading.cache, needed, self._gang.neighbours, repeated=repeated),
            scratch=self.scratch,
            timeout=self.timeout,
        )
        self._streams.close()  # of one at a time: each holds rows in memory
        self._streams.enter_context(closing(stream))
        return Batches(stream, self._gang.progress, epochs, initialEpoch)

    def report(self, **metrics: float) -> None:
        """Tell the driver how it goes: rank 0's metrics become a line there, at each call.

        Parameters
        ----------
        **metrics : float
            Values by name.
        """
        progress, now = self._gang.progress, time.monotonic()
        history = {name: list(values) for name, values in progress.state.history.items()}
        lines = len(progress.state.seconds)
        for name, value in metrics.items():
            values = history.setdefault(name, [])
            values += [None] * (lines - len(values)) + [float(value)]
        seconds = [*progress.state.seconds, now - self._reported]
        self._reported = now
        progress.update(history=history, seconds=seconds)


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: the address of its machine, its place there, and the addresses of all ranks."""

    host: str
    localRank: int
    localWorld: int
    addresses: list[str]


class Batches:
    """Batches of one rank: tuples ``(features, labels, weights)`` of NumPy arrays, without what there is none of.

    Several inputs or labels come as dicts of arrays by the names given. The arrays are the receiver's own.

    Attributes
    ----------
    steps : int
        Batches of an epoch, the same on all ranks that train.
    """

    def __init__(self, stream: Stream, progress: Reporter, epochs: int, initialEpoch: int) -> None:
        self.steps = stream.steps
        self._stream = stream
        self._progress = progress
        self._epochs = range(initialEpoch, epochs)

    def __len__(self) -> int:
        return self.steps * len(self._epochs)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for number in self._epochs:
            yield from self.epoch(number)

    def epoch(self, number: int) -> Iterator[tuple[Any, ...]]:
        """The batches of one epoch; to begin one ends the one before.

        Parameters
        ----------
        number : int
            The epoch, from 0: it decides the order of the rows.

        Yields
        ------
        tuple of numpy.ndarray
            Features, labels and weights of a batch, without what there is none of.
        """
        self._progress.update(epochs=self._epochs.stop, epoch=number + 1, steps=self.steps, phase="training")
        for step, block in enumerate(self._stream.epoch(number), 1):
            self._progress.update(step=step)
            yield _parts(block)


def _parts(block: Block) -> tuple[Any, ...]:
    parts = (arrange(block, "features"), arrange(block, "label"), block.get("weight"))
    return tuple(part for part in parts if part is not None)
