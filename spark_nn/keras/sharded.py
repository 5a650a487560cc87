"""Worker side of a Keras fit whose model is cut over the ranks: JAX computes one program on all of them.

Each rank holds its part of the variables, of the gradients and of the optimizer's state. What the ranks exchange, JAX
does; the gang's own collective only brings them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spark_nn.checkpoint import Checkpoints, Place
from spark_nn.columns import Tensor, arrange
from spark_nn.dataset.manifest import Manifest, Split
from spark_nn.dataset.stream import Stream
from spark_nn.errors import CollectiveError, ParamError
from spark_nn.gang.collective import Alone
from spark_nn.gang.context import GangContext
from spark_nn.keras import archive, backends, codec
from spark_nn.keras.customs import require
from spark_nn.keras.describe import describe_outputs
from spark_nn.keras.feed import Feed
from spark_nn.keras.sharding import DATA, Sharding
from spark_nn.keras.training import INITIAL_MODEL, KerasTrainer, Recipe, fetched, take_optimizer, take_weights
from spark_nn.outputs import Output
from spark_nn.report import Report
from spark_nn.store import RunDir
from spark_nn.trainer import Schedule, Trained, check_digests, misfit, publish

# How JAX reports that a value is not the same in all processes.
_UNLIKE = "not the same on each process"
# How JAX reports that processes cannot exchange.
_BROKEN = ("gloo", "nccl", "connection", "timed out", "deadline", "unavailable", "coordination")


class ShardedTrainer(KerasTrainer):
    """Trains a Keras model that no rank holds as a whole.

    Parameters
    ----------
    schedule : Schedule
        How to go through the rows.
    recipe : Recipe
        What to train.
    sharding : Sharding
        How the model lies over the ranks.
    """

    def __init__(self, schedule: Schedule, recipe: Recipe, sharding: Sharding) -> None:
        super().__init__(schedule, recipe)
        self.sharding = sharding

    def train(
        self,
        gang: GangContext,
        manifest: Manifest,
        data: Stream,
        validation: Stream | None,
        checkpoints: Checkpoints,
    ) -> Trained:
        """Train with the other ranks, and publish the model from rank 0."""
        clock = [time.monotonic()]
        gang.progress.update(phase="import")
        backends.room(self.recipe.backend)
        import keras

        from spark_nn.keras.callbacks import Reporting, Session, chosen

        clock.append(time.monotonic())
        gang.progress.update(phase="build")
        with _joined(gang):
            keras.utils.set_random_seed(self.schedule.seed % 2**32)
            distribution = _distribution(self.sharding)
            with distribution.scope():
                model, put_out = self._build(gang, None, manifest.role("features"))
                distribution.check(model)
                before = fetched(gang, INITIAL_MODEL, self.recipe.customs) if self.recipe.continued else None
                if before is not None:
                    take_weights(model, before)
                self._compile(model, 1)  # one program: each loss is that of the global batch
                if before is not None:
                    take_optimizer(model, before)
                    del before  # which is as large as the model
                _check_alike(gang, model)
                outputs = describe_outputs(model, put_out, manifest, self.schedule.classWeights)
                self.recipe.outputs.of({name: Output.fromDict(output) for name, output in outputs.items()})
                self._check_loadable(model)
                order = tuple(outputs) if isinstance(put_out, (list, tuple)) and len(outputs) > 1 else None
                own, watched = chosen(self.recipe.callbacks, gang, validation is not None)
                _check_callbacks(own)
                sync = _synchroniser(model, self.schedule.nonFiniteLoss)
                feed = Feed(data, self.schedule.classWeights, order)
                held = None if validation is None else Feed(validation, outputs=order)

                clock.append(time.monotonic())
                gang.progress.update(phase="trace")
                epochs = self.schedule.epochs
                rows = data.rows * self.sharding.replicas
                events = self.events(gang, 0)
                report = Report(gang.progress, epochs, data.steps, rows, Place(0, 0), events)
                session = Session(
                    [sync.callback(), feed.callback(), *own, Reporting(report)],
                    model,
                    kept=(),
                    epochs=epochs,
                    steps=data.steps,
                    watched=watched,
                    report=report,
                )
                with sync.averaged_gradients(), feed.errors(), (held or feed).errors():
                    model.fit(
                        feed.dataset(),
                        epochs=epochs,
                        verbose=0,
                        validation_data=None if held is None else held.dataset(),
                        callbacks=session,
                    )
                check_digests(gang, _digest(model))
                clock.append(time.monotonic())
                gang.progress.update(phase="publish")
                _gather(model, gang.rank)
            # Outside the distribution: Keras makes variables to compare with while it saves, and no other rank does so.
            file, sha256 = "", ""
            if gang.rank == 0:
                with _optimizer_left_out(model):
                    file, sha256 = publish(gang, functools.partial(codec.save, model), codec.SUFFIX)
        return report.trained(file, sha256, outputs, clock)

    def _stream(self, gang: GangContext, data: RunDir, manifest: Manifest, split: Split) -> Stream:
        # Ranks that differ along other axes than that of the data take the same rows.
        place = dataclasses.replace(gang, rank=self.sharding.place(gang.rank), world=self.sharding.replicas)
        return super()._stream(place, data, manifest, split)

    def _build(self, gang: GangContext, example: Any, inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        with _told_unlike():
            return super()._build(gang, example, inputs)

    def _put_out(self, model: Any, example: Any, inputs: Sequence[Tensor]) -> Any:
        """What the model puts out, found without computing: parts of it are on other machines."""
        import keras

        symbols = {
            tensor.name: keras.KerasTensor((1, *(tensor.shape or ())), dtype=str(tensor.numpy)) for tensor in inputs
        }
        try:
            with _told_unlike():
                return model(arrange(symbols, "features"))
        except ParamError:
            raise
        except Exception as error:
            raise misfit(inputs, "each of the model's inputs as the model does", error) from error

    def _check_loadable(self, model: Any) -> None:
        """Refuse a model that could not be loaded where it is to score, by its config: it cannot be saved yet."""
        named = archive.examine(codec.plain(model), "the model").network
        require(named, self.recipe.customs.find(named), "the model", named, ParamError)


@contextlib.contextmanager
def _joined(gang: GangContext) -> Iterator[None]:
    """JAX's processes are one cluster for the time of the block."""
    import jax

    from spark_nn.ranks.jax import join
    from spark_nn.ranks.task import introduced

    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        jax.config.update("jax_platforms", "cpu")
    host, cards, port = introduced(gang)
    with contextlib.closing(port), _judged(gang):
        # The gang's addresses are no business of a proxy's.
        hosts = {card["address"].rpartition(":")[0].strip("[]") for card in cards}
        os.environ.update(no_grpc_proxy=",".join(hosts))
        join(cards[0]["address"], host, gang.world, gang.rank, gang.timeout)
        yield
        # Who leaves without a word takes the others' processes along.
        gang.collective.barrier()
        jax.distributed.shutdown()


@contextlib.contextmanager
def _judged(gang: GangContext) -> Iterator[None]:
    """Let the gang's collective say which rank is lost, where JAX's operations fail."""
    from jax.errors import JaxRuntimeError

    try:
        yield
    except JaxRuntimeError as error:
        # All that JAX runs raises these errors, the model's own functions as well.
        if not any(word in str(error).lower() for word in _BROKEN):
            raise
        gang.collective.barrier()  # raises what has become of the others; those that are well come here, too
        raise CollectiveError(f"JAX's collective operations failed on rank {gang.rank}: {error}") from error


def _distribution(sharding: Sharding) -> Any:
    """Keras's distribution, which refuses variables that cannot be laid out, and patterns that none matches."""
    import keras

    distributions = keras.distribution
    names = list(sharding.mesh)
    mesh = distributions.DeviceMesh(sharding.shape, names, distributions.list_devices())
    layout = distributions.LayoutMap(mesh)
    for pattern, axes in sharding.layout.items():
        layout[pattern] = tuple(axes)

    class Checked(distributions.ModelParallel):  # type: ignore[misc, name-defined]
        def get_variable_layout(self, variable: Any) -> Any:
            if getattr(variable, "_layout", None) is None:
                for pattern in sharding.layout:
                    if re.fullmatch(pattern, variable.path):
                        sharding.checkVariable(variable.path, variable.shape, pattern)
            return super().get_variable_layout(variable)

        def check(self, model: Any) -> None:
            """Refuse patterns that no variable matches: Keras would leave these variables whole, silently."""
            paths = [variable.path for variable in model.variables]
            for pattern in sharding.layout:
                if not any(re.fullmatch(pattern, path) for path in paths):
                    raise ParamError(
                        f"modelParallel lays out {pattern!r}, which matches none of the model's variables as a whole: "
                        f"these are {', '.join(paths)}"
                    )

    return Checked(layout_map=layout, batch_dim_name=DATA, auto_shard_dataset=False)


def _synchroniser(model: Any, nonFinite: Any) -> Any:
    from spark_nn.keras.sync import Measured, Synchroniser
    from spark_nn.keras.tally import results

    class Together(Synchroniser):
        """JAX keeps the ranks in step: metrics and statistics are of the global batch already."""

        def sum_metrics(self) -> Measured:
            found = results(self.model)
            return found, found

        def settle_statistics(self) -> None:
            pass

    return Together(model, Alone(), 0, nonFinite=nonFinite)


@contextlib.contextmanager
def _told_unlike() -> Iterator[None]:
    """Say what is to be done where JAX finds that a variable's first value is not the same on all ranks."""
    try:
        yield
    except AssertionError as error:
        if _UNLIKE not in str(error):
            raise
        raise _unlike() from error


def _check_alike(gang: GangContext, model: Any) -> None:
    """Refuse first values that differ: those of large variables JAX draws part by part, and does not compare."""
    if len(set(gang.collective.all_gather(_digest(model)))) > 1:
        raise _unlike()


def _unlike() -> ParamError:
    return ParamError(
        "modelParallel needs the same first values on every worker, and the model's function makes others on each: "
        "leave the seed to the param seed, and read no clock, process number or random numbers of your own"
    )


def _digest(model: Any) -> bytes:
    """SHA-256 over the variables that every rank holds whole."""
    found = hashlib.sha256()
    for variable in (*model.variables, *model.optimizer.variables):
        if variable.value.is_fully_replicated:
            found.update(np.asarray(variable.value).tobytes())
    return found.digest()


def _check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse Keras's own callbacks that need the whole model amid a training."""
    import keras.callbacks as kinds

    for callback in callbacks:
        if isinstance(callback, kinds.ModelCheckpoint) or getattr(callback, "restore_best_weights", False):
            raise ParamError(
                f"callbacks holds a {type(callback).__name__} that takes the model's weights amid the training, and "
                "with modelParallel no worker has all of them: leave it out, or restore_best_weights"
            )


def _gather(model: Any, rank: int) -> None:
    """Bring the variables together on rank 0, one after the other, each in the place of the part that was there."""
    from jax.experimental import multihost_utils

    for variable in model.variables:
        value = variable.value
        whole = np.asarray(value) if value.is_fully_replicated else multihost_utils.process_allgather(value, tiled=True)
        variable._value = whole if rank == 0 else None


@contextlib.contextmanager
def _optimizer_left_out(model: Any) -> Iterator[None]:
    """Save the model in the block without the state of its optimizer, which is not brought together."""
    with contextlib.ExitStack() as block:
        for optimizer in (model.optimizer, getattr(model.optimizer, "inner_optimizer", None)):
            if optimizer is not None:
                block.enter_context(backends.replaced(optimizer, "save_own_variables", lambda store: None))
        yield
