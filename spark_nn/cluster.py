"""Driver side of :func:`run`: the user's own training function on a gang of Spark tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import cloudpickle
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from spark_nn.columns import Tensor
from spark_nn.converters import boolean, choice, integer
from spark_nn.dataset.lease import Source
from spark_nn.dataset.materialize import Spec, check_count
from spark_nn.errors import ParamError
from spark_nn.gang.board import Board
from spark_nn.gang.launch import Gang
from spark_nn.params import TrainingParams
from spark_nn.ranks import jax, tensorflow, torch, values
from spark_nn.ranks.context import Framework, Reading
from spark_nn.ranks.roles import Cast
from spark_nn.ranks.task import RankTask
from spark_nn.store import RunDir, store_url

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_ROOMS = {"tensorflow": tensorflow, "torch": torch, "jax": jax}


def run(
    function: Callable[..., Any],
    *args: Any,
    numWorkers: int = 1,
    framework: Framework = "tensorflow",
    parameterServers: int = 0,
    evaluator: bool = False,
    dataset: DataFrame | None = None,
    featuresCol: str | None = None,
    inputCols: list[str] | None = None,
    inputs: dict[str, str | list[str]] | None = None,
    labelCol: str | None = "label",
    labels: dict[str, str] | None = None,
    weightCol: str | None = None,
    handleInvalid: str = "error",
    shuffle: bool = True,
    seed: int = 0,
    cache: str = "auto",
    storeUrl: str | None = None,
    useGpu: bool | None = None,
    timeout: float = 600.0,
    maxRetries: int = 3,
    verbose: int = 1,
    followLogs: bool = False,
    spark: SparkSession | None = None,
) -> Any:
    """Run a function of your own on a gang of Spark tasks, and return what it returns on the first of them.

    Each task has a process of its own, started, guarded and ended as those of a fit: when one of them fails, all end
    within seconds, and the error names rank and host and carries the traceback.

    Parameters
    ----------
    function : callable
        Called as ``function(ctx, *args)`` on every rank, with its :class:`~spark_nn.ranks.context.RankContext`; with
        parameter servers on the chief alone. What it returns on rank 0 must consist of None, booleans, numbers,
        strings, bytes, NumPy arrays, and lists, tuples (which become lists) and dicts with string keys of such.
    *args : object
        Its further arguments.
    numWorkers : int, default 1
        Ranks that train (>= 1). The first of them is the chief; with parameter servers the chief comes besides.
    framework : {"tensorflow", "torch", "jax"}, default ``"tensorflow"``
        Whose environment is set up before the function runs: ``TF_CONFIG``; ``MASTER_ADDR``, ``MASTER_PORT``,
        ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``; or the arguments of
        ``jax.distributed.initialize``. ``ctx.initialize()`` joins the process groups of the last two. Keras in the
        function runs on the same.
    parameterServers : int, default 0
        Ranks that run a ``tf.distribute.Server`` as ``"ps"`` until the chief ends (>= 0); the workers then run one,
        too, and the function drives them from the chief by a ``ClusterCoordinator``. TensorFlow only.
    evaluator : bool, default False
        Whether one more rank runs the function, as ``"evaluator"``, which is not among those that train. TensorFlow
        only.
    dataset : pyspark.sql.DataFrame, optional
        The rows that ``ctx.batches`` gives, written once to the store as for a fit.
    featuresCol, inputCols, inputs, labelCol, labels, weightCol
        The columns, as the params of the estimators name them; ``labelCol=None`` for rows without a label.
    handleInvalid, shuffle, seed, cache, storeUrl, useGpu, timeout, maxRetries, verbose, followLogs
        As the params of the estimators. A function that is begun again finds in ``ctx.checkpoints`` what it has kept
        there.
    spark : pyspark.sql.SparkSession, optional
        Default: that of the dataset, else the active one.

    Returns
    -------
    object
        What the function returned on rank 0.

    Raises
    ------
    ParamError, ColumnError, ClusterError
        Something cannot be; nothing has been started.
    DatasetError, StoreError
        The rows cannot be used, or not be written.
    TrainingError
        The function failed on a rank, or a rank was lost more often than `maxRetries`.

    Examples
    --------
    >>> def train(ctx, rate):
    ...     import torch
    ...     ctx.initialize()
    ...     model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    ...     for x, y in ctx.batches(64, epochs=5):
    ...         optimizer.zero_grad()
    ...         loss = ((model(torch.from_numpy(x))[:, 0] - torch.from_numpy(y)) ** 2).mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...     return {name: value.numpy() for name, value in model.module.state_dict().items()}
    >>> spark_nn.run(train, 0.1, numWorkers=2, framework="torch", dataset=df)  # doctest: +SKIP
    """
    given = {
        "featuresCol": featuresCol,
        "inputCols": inputCols,
        "inputs": inputs,
        "labelCol": None if labels is not None and labelCol == "label" else labelCol,
        "labels": labels,
        "weightCol": weightCol,
        "handleInvalid": handleInvalid,
        "shuffle": shuffle,
        "seed": seed,
        "cache": cache,
        "numWorkers": numWorkers,
        "storeUrl": storeUrl,
        "useGpu": useGpu,
        "timeout": timeout,
        "maxRetries": maxRetries,
        "verbose": verbose,
        "followLogs": followLogs,
    }
    params = _RunParams()
    params._set(**{name: value for name, value in given.items() if value is not None})
    room = _ROOMS[choice("framework", tuple(_ROOMS))(framework)]
    cast = _cast(params.getNumWorkers(), parameterServers, evaluator, framework)
    _check_function(function, args)
    spark = _session(spark, dataset)
    others = cast.world - cast.workers
    gang = Gang(spark, cast.world, params.getTimeout(), params.getMaxRetries(), useGpu, others)
    gang.check()
    store = store_url(spark, storeUrl)
    spec = None if dataset is None else params.spec(dataset.schema, labelled=labels is not None or labelCol is not None)
    with ExitStack() as stack:
        folder = stack.enter_context(RunDir.open(store))
        board = Board({folder.url: ""}, verbose=params.getVerbose(), followLogs=params.getFollowLogs())
        stack.enter_context(board)
        home = gang.home(room.VARIABLES, room.PRELOAD)
        gang.warm(home)
        reading = None
        if dataset is not None and spec is not None:
            board.phase("materializing rows")
            leased = stack.enter_context(Source(dataset)).lease(spec, store)
            check_count(leased.manifest, spec, cast.readers)
            reading = Reading(leased.run, spec.seed, spec.shuffle, params.getCache())  # type: ignore[arg-type]
        task = RankTask(function, args, cast, framework, reading)
        outcome = gang.run(task, folder, home=home, board=board)
        value = values.fetched(folder, outcome.value)
        board.done(folder.url)
        return value


class _RunParams(TrainingParams):
    """The params that :func:`run` shares with the estimators."""

    def spec(self, schema: StructType, *, labelled: bool) -> Spec:
        """What is written of every row."""
        labels: tuple[Tensor, ...] = self.labelTensors(schema) if labelled else ()
        return Spec(
            (*self.inputTensors(schema), *labels, *self.weightTensors(schema)),
            validationFraction=0.0,
            seed=self.getSeed() % 2**63,  # NumPy takes no negative seeds, Spark does
            shuffle=self.getShuffle(),
            skip=self.getHandleInvalid() != "error",
        )


def _cast(workers: int, parameterServers: int, evaluator: bool, framework: str) -> Cast:
    servers = integer("parameterServers", low=0)(parameterServers)
    aside = boolean("evaluator")(evaluator)
    if framework != "tensorflow" and (servers or aside):
        name, value = ("parameterServers", servers) if servers else ("evaluator", aside)
        raise ParamError(
            f"{name}={value!r} with framework={framework!r}: only TensorFlow has such a role; leave it out"
        )
    return Cast(workers, servers, aside)


def _check_function(function: Any, args: tuple[Any, ...]) -> None:
    """Refuse what cannot travel to the workers, before anything is started."""
    if not callable(function):
        raise ParamError(
            f"function={function!r}: must be a function that takes the context, and what else is given to run"
        )
    try:
        cloudpickle.dumps((function, args))
    except Exception as error:
        raise ParamError(
            f"the function {getattr(function, '__name__', function)!r}, or what it is given, cannot be sent to the "
            f"workers ({type(error).__name__}: {error}): make sessions, locks, open files and the like inside it"
        ) from error


def _session(spark: SparkSession | None, dataset: DataFrame | None) -> SparkSession:
    found = spark or (dataset.sparkSession if dataset is not None else SparkSession.getActiveSession())
    if found is None:
        raise ParamError("spark is not given and no session is active: give the session as spark=")
    return found
