"""Worker side of a Keras fit: build, compile, train in step, publish.

The driver imports this module to describe the training; Keras and TensorFlow are imported only on the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, ClassVar

from spark_nn.columns import Tensor
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.stream import Stream
from spark_nn.errors import ParamError
from spark_nn.gang.context import GangContext
from spark_nn.keras import codec
from spark_nn.keras.describe import describe_outputs
from spark_nn.keras.feed import Feed
from spark_nn.trainer import Schedule, Trained, Trainer, check_digests, publish

# Where the driver leaves a model instance for the ranks.
INITIAL_MODEL = "initial.keras"


@dataclass(frozen=True)
class Recipe:
    """What to train and how; None where the model's own compiled setting holds.

    Parameters
    ----------
    function : callable or None
        Returns the model; None where the driver left an instance in the run directory.
    arguments : dict
        Keyword arguments of the function.
    optimizer, loss, metrics : object or None
        As ``keras.Model.compile`` takes them, or as :func:`spark_nn.keras.codec.plain` made them.
    learningRate : float or None
        In place of the optimizer's own.
    callbacks : list or callable or None
        Keras callbacks, or a function that returns them.
    """

    function: Callable[..., Any] | None
    arguments: dict[str, Any]
    optimizer: Any
    loss: Any
    metrics: Any
    learningRate: float | None
    callbacks: Any


class KerasTrainer(Trainer):
    """Trains a Keras model on a gang.

    Parameters
    ----------
    schedule : Schedule
        How to go through the rows.
    recipe : Recipe
        What to train.
    """

    # Whatever the machine prefers: the gradients are averaged inside TensorFlow's graph.
    environment: ClassVar[dict[str, str]] = {"KERAS_BACKEND": "tensorflow"}

    def __init__(self, schedule: Schedule, recipe: Recipe) -> None:
        super().__init__(schedule)
        self.recipe = recipe

    def train(self, gang: GangContext, manifest: Manifest, data: Stream, validation: Stream | None) -> Trained:
        """Train in step with the other ranks and publish the model from rank 0."""
        began = time.monotonic()
        import keras

        from spark_nn.keras.sync import Synchroniser

        imported = time.monotonic()
        keras.utils.set_random_seed(self.schedule.seed % 2**32)
        example = Feed(data).example()
        model, put_out = self._build(gang, example, manifest.role("features"))
        self._compile(model, gang.world)
        outputs = describe_outputs(model, put_out, manifest.role("label"))
        order = tuple(outputs) if isinstance(put_out, (list, tuple)) and len(outputs) > 1 else None
        feed = Feed(data, self.schedule.classWeights, order)
        if gang.rank == 0:
            codec.check_loadable(model)
        callbacks = self._callbacks(gang, validation is not None)
        sync = Synchroniser(model, gang.collective, gang.rank)
        sync.start_alike()

        reporter = _reporter(gang, data, self.schedule.epochs)
        with sync.averaged_gradients():
            model.fit(
                feed.dataset(),
                epochs=self.schedule.epochs,
                verbose=0,
                validation_data=None if validation is None else Feed(validation, outputs=order).dataset(),
                callbacks=[sync.callback(), feed.callback(), *callbacks, reporter],
            )
        check_digests(gang, sync.digest())
        trained = time.monotonic()
        file, sha256 = publish(gang, model.save, codec.SUFFIX) if gang.rank == 0 else ("", "")
        return Trained(
            file=file,
            sha256=sha256,
            outputs=outputs,
            history=gang.progress.state.history,
            rowsPerSecond=gang.progress.state.rowsPerSecond,
            epochSeconds=gang.progress.state.seconds,
            seconds={
                "import": imported - began,
                "train": trained - imported,
                "publish": time.monotonic() - trained,
            },
        )

    def _build(self, gang: GangContext, example: Any, inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        """The model, built, and what it puts out for one row of its input."""
        recipe = self.recipe
        if recipe.function is not None:
            model = recipe.function(**recipe.arguments)
            if not codec.is_model(model):
                raise ParamError(f"the function given as model returned {model!r}, not a keras.Model")
        else:
            # Keras reads a model from a local path only.
            with NamedTemporaryFile(suffix=codec.SUFFIX) as local:
                gang.run.get(INITIAL_MODEL, Path(local.name))
                model = codec.load_model(local.name, compiled=True)
        try:
            return model, model(example, training=False)  # which builds what is not built yet
        except Exception as error:
            described = ", ".join(
                f"{each.key or 'the input'}: {each.dtype} {each.shape} from {', '.join(each.columns)}"
                for each in inputs
            )
            raise ParamError(
                f"the model does not take the input that the columns make ({described}; the shape is that of a row). "
                "The param inputs must name each of the model's inputs as the model does. "
                f"{type(error).__name__}: {error}"
            ) from error

    def _compile(self, model: Any, world: int) -> None:
        """Compile with the params that were given; the model's own settings hold for the others."""
        recipe = self.recipe
        own = dict(model._compile_config.config) if model.compiled else {}
        given = {
            name: codec.restore(value)
            for name, value in (
                ("optimizer", recipe.optimizer),
                ("loss", recipe.loss),
                ("metrics", recipe.metrics),
            )
            if value is not None
        }
        if given or not model.compiled:
            settings = {**own, **given}
            if settings.get("loss") is None:
                raise ParamError(
                    "no loss: set the param loss (such as 'mse' or 'binary_crossentropy'), or compile the "
                    "model with one"
                )
            if model.compiled and "optimizer" not in given:
                settings["optimizer"] = model.optimizer
            settings.setdefault("optimizer", "rmsprop")  # Keras's own default
            model.compile(**settings)
        if world > 1:
            model.jit_compile = False  # XLA cannot compile a step that talks to other processes
            _check_reduction(model.loss)
        if recipe.learningRate is not None:
            model.optimizer.learning_rate = recipe.learningRate
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)

    def _callbacks(self, gang: GangContext, validated: bool) -> list[Any]:
        """The user's callbacks; Keras's own that write files or send messages run on rank 0 alone."""
        import keras.callbacks as kinds

        given = self.recipe.callbacks or []
        callbacks = list(given() if callable(given) else given)
        for callback in callbacks:
            # Both act on what one rank alone sees, and the others would wait for it.
            if isinstance(callback, kinds.BackupAndRestore) or (
                gang.world > 1 and isinstance(callback, kinds.TerminateOnNaN)
            ):
                raise ParamError(
                    f"callbacks holds a {type(callback).__name__}, which would act on some workers and not on others: "
                    "leave it out"
                )
            monitor = getattr(callback, "monitor", None)
            if not validated and isinstance(monitor, str) and monitor.startswith("val_"):
                raise ParamError(
                    f"callbacks holds a {type(callback).__name__} that monitors {monitor!r}, but no rows are held back "
                    "for validation: set validationFraction or validationIndicatorCol, or monitor another metric"
                )
        outward = (kinds.ModelCheckpoint, kinds.CSVLogger, kinds.TensorBoard, kinds.RemoteMonitor)
        return [callback for callback in callbacks if gang.rank == 0 or not isinstance(callback, outward)]


def _reporter(gang: GangContext, data: Stream, epochs: int) -> Any:
    """The callback that tells the driver how far training is; it comes last and sees global logs."""
    import keras

    progress = gang.progress
    rows = data.rows * gang.world
    progress.update(epochs=epochs, steps=data.steps, rows=rows)

    class Report(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.began = time.monotonic()
            self.spent: float | None = None
            progress.update(epoch=epoch + 1, step=0)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            progress.update(step=batch + 1)

        def on_test_begin(self, logs: Any = None) -> None:
            self.spent = time.monotonic() - self.began

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            spent = time.monotonic() - self.began if self.spent is None else self.spent
            history = {name: list(values) for name, values in progress.state.history.items()}
            for name, value in (logs or {}).items():
                history.setdefault(name, []).append(value)
            progress.update(history=history, seconds=[*progress.state.seconds, spent])

    return Report()


def _check_reduction(loss: Any) -> None:
    """Refuse losses that do not average over rows: the mean over ranks would not be that of the global batch."""
    losses = loss.values() if isinstance(loss, dict) else loss if isinstance(loss, (list, tuple)) else [loss]
    for each in losses:
        reduction = getattr(each, "reduction", "sum_over_batch_size")
        if reduction not in ("sum_over_batch_size", "mean", "auto"):
            raise ParamError(
                f"loss {type(each).__name__} has reduction={reduction!r}, which several workers cannot share: use "
                "'sum_over_batch_size' (Keras's default), or numWorkers=1"
            )
