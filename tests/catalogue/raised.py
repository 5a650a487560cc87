"""What raises each error of docs/errors.md, by the beginning of its heading there, without a Spark job.

An error may be returned in place of being raised, where raising it is somebody else's part.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pyspark.sql import SparkSession
from pyspark.sql import types as T

from spark_nn import KerasEstimator, KerasModel, TorchEstimator, TorchModel, cluster, columns, outputs, summary_view
from spark_nn.columns import Problem, Tensor
from spark_nn.dataset import petastorm_compat
from spark_nn.dataset.manifest import Manifest
from spark_nn.dataset.reading import GroupReader
from spark_nn.dataset.stream import Stream
from spark_nn.disk import _Connect, _Hadoop
from spark_nn.export import Target
from spark_nn.gang import launch, worker
from spark_nn.gang.ring import Ring
from spark_nn.keras import backends, names, predict
from spark_nn.keras import pretrained as keras_pretrained
from spark_nn.keras.sharding import Sharding
from spark_nn.keras.stages import check_numbers
from spark_nn.network import check_network
from spark_nn.outputs import Choice, Output
from spark_nn.persistence import ModelFile, StageWriter, _fetch
from spark_nn.ranks.context import RankContext
from spark_nn.scoring import sql
from spark_nn.scoring.scorer import Scorer
from spark_nn.store import RunDir, store_url
from spark_nn.torch import codec, losses, metrics, pretrained, sharding, steps, training, trees
from spark_nn.torch import model as torch_model
from spark_nn.tracking import events

SCHEMA = T.StructType(
    [
        T.StructField("a", T.DoubleType()),
        T.StructField("day", T.DateType()),
        T.StructField("several", T.ArrayType(T.ArrayType(T.DoubleType()))),
    ]
)
ONE = {"": Output("regression", (1,))}
CUT = {"mesh": {"model": 2}, "layout": {".*kernel": [None, "model"]}}
TWO = {"x": Output("regression", (1,)), "y": Output("regression", (1,))}


def keras(**params):
    return KerasEstimator(**{"model": named, "loss": "mse", **params})


def pytorch(**params):
    return TorchEstimator(**{"model": torch.nn.Linear(1, 1), "loss": "mse_loss", **params})


def named():
    """A function with a name."""


def numbers(shape=(2,)):
    return Tensor("features", ("a",), "array", "float32", len(shape), shape)


class Keeping(torch.nn.Linear):
    def get_extra_state(self):
        return {}


class Stepping(torch.nn.Linear):
    """What a LightningModule needs, and no more."""

    def __init__(self, **attributes):
        super().__init__(1, 1)
        vars(self).update(attributes)

    def training_step(self, batch):
        """Returns nothing."""

    def configure_optimizers(self):
        """Returns nothing."""


def stepping():
    module, tally = Stepping(), metrics.Tally(None, {}, torch.device("cpu"))
    return steps.Steps(SimpleNamespace(world=1, rank=0), module, tally, 1, 1)


def frozen_late():
    found = stepping()
    found.module.requires_grad_(False)
    found.begin("training", 0)


def returned_nothing():
    found = stepping()
    found.batch(found.module, torch.ones(1, 1), torch.ones(1), None, 1, 0)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def spec_of_a_deep_label():
    stage = keras(classWeights={0: 1.0}, labelCol="several", featuresCol="a")
    stage._spec(SCHEMA, stage._schedule())


def cause(error, *, told):
    """What the driver makes of a gang that has left nothing."""
    gang = launch.Gang(SimpleNamespace(), 1)
    with folder() as path, patch.object(launch, "_PATIENCE", 0.0):
        return gang._cause(RunDir(f"file://{path}"), error, told=told)


def recovering():
    gang = SimpleNamespace(world=2, _slots=lambda patience: 1)
    with patch.object(launch, "_PAUSE", 0):
        launch.Gang._recover(gang, ValueError("a host is gone"))


def dynamic():
    launch.Gang(SimpleNamespace(conf=SimpleNamespace(get=lambda name, default=None: "true")), 1).check()


def gathering(answer, timeout=10.0):
    worker._gather(SimpleNamespace(allGather=answer), "", timeout)


def broken(_):
    raise ConnectionError("an executor is gone")


def in_the_store(act):
    with folder() as path, patch("spark_nn.store._PAUSES", ()):
        run = RunDir(f"file://{path}")
        act(run)


def no_dataset(run):
    Manifest.of(run)


def list_a_file(run):
    Path(run.path("file")).write_text("")
    with patch.object(run.fs, "ls", side_effect=OSError("the disk is slow")):
        run.names("file")


def rows_that_cannot_be_read():
    reader = SimpleNamespace(_read=broken, reading=SimpleNamespace(run=SimpleNamespace(url="file:///store")))
    GroupReader._table(reader, SimpleNamespace(file="part-0"))


def a_defect():
    stream = SimpleNamespace(rank=0, run=SimpleNamespace(url="file:///store"))
    return Stream._defect(stream, "delivered 3 rows of 4 planned")


def another_petastorm():
    with patch.object(importlib.metadata, "version", return_value="0.12.0"):
        petastorm_compat.install()


def petastorm_before():
    with (
        patch.object(sys, "meta_path", []),
        patch.dict(sys.modules, {"petastorm": SimpleNamespace()}),
        patch.object(importlib.metadata, "version", return_value=petastorm_compat._WANTED),
    ):
        petastorm_compat.install()


def over_there():
    with folder() as path:
        target = Target(str(path / "x"), overwrite=False)
        target.put(path / "nothing")


def overwriting():
    writer = StageWriter(keras())
    with patch.object(StageWriter, "sparkSession", SimpleNamespace()), patch("pyspark.ml.util._remove_dfs_dir", None):
        writer._handleOverwrite("s3a://bucket/stage")


def hadoop():
    from py4j.protocol import Py4JError

    with _Hadoop._told(SimpleNamespace(_root="hdfs://host/stage"), "read", "model.keras"):
        raise Py4JError("permission denied")


def copying():
    _Connect._run(SimpleNamespace(_root="/stage", _spark=None), named, "model.keras")


def another_backend():
    backend = SimpleNamespace(backend=lambda: "jax")
    with patch.dict(sys.modules, {"keras": SimpleNamespace(backend=backend)}), predict.own_backend("tensorflow"):
        raise ValueError("no such operation")


def written_anew():
    file = ModelFile(".keras")
    file.path.write_bytes(b"x")
    file.sealed("0" * 64)


def no_session():
    with patch.object(SparkSession, "getActiveSession", return_value=None):
        cluster._session(None, None)


def too_many_rows():
    scorer = SimpleNamespace(inputs=(numbers(),), outputs=ONE)
    Scorer._structs(scorer, [np.zeros((3, 2), np.float32)], lambda rows: np.zeros((1, 1)))


def recipe(**given):
    defaults = {"optimizer": "sgd", "optimizerParams": {}, "learningRate": None, "lrSchedulerInterval": "epoch"}
    return SimpleNamespace(**{**defaults, **given})


def lost_ring(error):
    ring = SimpleNamespace(_aborted="", _position=None, rank=0)
    Ring._lose(ring, "rank 1", error)


def ragged():
    return columns.report(Counter({Problem("a", "nan"): 2}))


def jaxlib_of_tomorrow():
    from spark_nn.ranks import jax

    with patch.object(jax, "_GLOO", "no_such_name"):
        jax.join("127.0.0.1:1", "127.0.0.1", 2, 0, 1.0)


def without_matplotlib():
    with patch.object(importlib.util, "find_spec", return_value=None):
        summary_view.plot(None, None, None)


def without_tensorboard():
    with patch.dict(sys.modules, {"tensorboard.summary.writer.record_writer": None}):
        events.Events("file:///nowhere", SimpleNamespace(host="a-host"), 0)


def without_jax():
    with patch.dict(sys.modules, {"jax": None}):
        sys.modules.pop("spark_nn.keras.backends.jax", None)
        backends.room("jax")


def without_torchmetrics():
    with patch.dict(sys.modules, {"torchmetrics": None, "spark_nn.torch.metrics": None}):
        del sys.modules["spark_nn.torch.metrics"]
        importlib.import_module("spark_nn.torch.metrics")


def cut(mesh=None, layout=None):
    return Sharding.of({"mesh": mesh or {"model": 2}, "layout": layout or {".*kernel": [None, "model"]}})


def divided(module, kinds=(b"cpu",)):
    gang = SimpleNamespace(collective=SimpleNamespace(all_gather=lambda kind: kinds))
    with sharding.sharded(gang, module, {}, torch.device("cpu"), seed=0, halves=False):
        pass


DRIVER = {
    # A param's value.
    "… takes a whole number": lambda: keras(epochs=2.5),
    "… takes a number, not": lambda: keras(learningRate="0.1"),
    "… takes True or False": lambda: keras(shuffle=1),
    "…=…: must be …": lambda: keras(epochs=0),
    "checkpointInterval=…": lambda: keras(checkpointInterval=0),
    "… takes a dict, not": lambda: keras(modelParams=[1]),
    "… is … (…): only numbers": lambda: keras(modelParams={"f": print}),
    "… takes a dict with at least": lambda: keras(inputs={}),
    "…[…] takes a column's name": lambda: keras(labels={"x": ["a"]}),
    "… has the key": lambda: keras(inputs={"a:b": "c"}),
    "classWeights takes": lambda: keras(classWeights="balanced"),
    "… takes …, or a dict of outputs' names": lambda: keras(outputKind={}),
    "model takes a … or a function": lambda: keras(model=3),
    "model takes a …, not": lambda: TorchModel.fromTorch(3, np.zeros((1, 1))),
    "… takes what keras.Model.compile takes": lambda: keras(optimizer=3),
    "metrics takes a list": lambda: keras(metrics="auc"),
    "callbacks takes a list": lambda: keras(callbacks=[3]),
    "… takes a name or something to call": lambda: pytorch(optimizer=3),
    "loss takes an instance": lambda: pytorch(loss=torch.nn.MSELoss),
    "… takes a function of": lambda: pytorch(stopWhen=3),
    "initialModel takes": lambda: keras(initialModel="path"),
    "customObjects takes": lambda: keras(customObjects=[int]),
    "customObjects[…] takes": lambda: keras(customObjects={"MyLayer": 3}),
    "a … has no param": lambda: KerasModel._withParams({"nonsense": 1}),
    "… has no param": lambda: keras(learning_rate=0.1),
    "model is not set": lambda: check_network(None, None, {}, "keras.Model"),
    # Params that do not go together.
    "… are both set, but name the same": lambda: keras(featuresCol="a", inputCols=["a"]).inputColumns(),
    "inputCols=[]": lambda: keras(inputCols=[]).inputColumns(),
    "labelCol=… and labels": lambda: keras(labelCol="a", labels={"x": "a"}).labelTensors(SCHEMA),
    "validationFraction=… and": lambda: keras(validationFraction=0.1, validationIndicatorCol="a").checkTrainingParams(),
    "batchSize=… is smaller": lambda: keras(batchSize=2, numWorkers=3).checkTrainingParams(),
    "batchSize=… is not a multiple": lambda: keras(batchSize=100, numWorkers=3).checkTrainingParams(),
    "classWeights=… with labels": lambda: keras(
        classWeights={0: 1.0}, labels={"x": "a", "y": "a"}
    ).checkTrainingParams(),
    "classWeights=…, but a label": spec_of_a_deep_label,
    "outputCols names": lambda: keras(outputCols={"x": "a"}).checkTrainingParams(),
    "…=… with parameterServers=1": lambda: keras(parameterServers=1, callbacks=named).checkParameterServers(),
    "parameterServers=… with backend": lambda: keras(parameterServers=1, backend="jax").checkBackend(),
    "collective='native' with backend": lambda: keras(collective="native", backend="torch").checkBackend(),
    "modelParams=… are arguments of a function, and": lambda: check_network(None, 1, {"a": 1}, "keras.Model"),
    "mixedPrecision='fp16'": lambda: training._check_precision("fp16", "cpu"),
    # Columns.
    "…=…: the DataFrame has no such column": lambda: keras(featuresCol="b").inputTensors(SCHEMA),
    "…=… has type": lambda: keras(featuresCol="day").inputTensors(SCHEMA),
    "column … holds … values, and with": lambda: check_numbers("jax", [dataclasses.replace(numbers(), dtype="string")]),
    "column … is … in": ragged,
    "the function of a model was called with a struct": lambda: sql._array(pd.DataFrame({"a": [1]})),
    "the function of a model was called with values": lambda: sql._cast(pa.array(["x"]), numbers(()), "a", 0),
    # Outputs.
    "…=…: the model has no output": lambda: Choice({"z": "raw"}, None, {}).of(TWO),
    "threshold=…": lambda: Choice("auto", 0.5, {}).of(ONE),
    "outputKind=… needs": lambda: Choice("binary", None, {}).of({"": Output("raw", (3,))}),
    "the model has … outputs": lambda: outputs.check_labels(TWO, [None]),
    "the model has one output": lambda: outputs.check_labels(ONE, ["x", "y"]),
    "of … rows the model has put out": too_many_rows,
    # The model.
    "loss is not set: give": lambda: TorchEstimator(model=torch.nn.Linear(1, 1))._check(),
    "…=… without a loss": lambda: TorchEstimator(model=Stepping, metrics=["auroc"])._check(),
    "… sets automatic_optimization": lambda: TorchEstimator(model=Stepping(automatic_optimization=False))._check(),
    "… defines …,": lambda: TorchEstimator(model=type("Hooked", (Stepping,), {"setup": named}))._check(),
    "… has no validation_step": lambda: TorchEstimator(model=Stepping, validationFraction=0.1)._check(),
    "….configure_optimizers returned": lambda: stepping().configured(),
    "….training_step returned": returned_nothing,
    "… changed requires_grad of": frozen_late,
    "the scheduler's monitor": lambda: stepping().watched({"loss": 1.0}),
    "self.log(…, reduce_fx": lambda: stepping().log("x", 1.0, reduce_fx="max"),
    "self.log(…, ...)": lambda: stepping().log("x", "y"),
    "loss=…: torch.nn.functional": lambda: losses.check_loss("no_such", weighted=False, workers=1),
    "…=…: the … of this name needs": lambda: names.check_name("metrics", "MeanIoU"),
    "loss … has reduction": lambda: losses.check_loss(torch.nn.MSELoss(reduction="sum"), weighted=False, workers=2),
    "weightCol and classWeights weight the loss of each row, and loss …": lambda: losses.check_loss(
        torch.nn.CrossEntropyLoss(weight=torch.ones(2)), weighted=True, workers=1
    ),
    "weightCol and classWeights weight the loss of each row, and loss=": lambda: losses.check_loss(
        named, weighted=True, workers=1
    ),
    "the loss of several outputs": lambda: losses.Criterion(named)({"x": 1, "y": 2}, {}, weights=1),
    "loss names the outputs": lambda: losses.describe(dict.fromkeys("xy", torch.ones(1)), {"x": "mse_loss"}),
    "optimizer=…: torch.optim": lambda: training._optimizer(recipe(optimizer="no_such"), torch.nn.Linear(1, 1)),
    "optimizer=… with optimizerParams": lambda: training._optimizer(
        recipe(optimizerParams={"no_such": 1, "lr": 0.1}), torch.nn.Linear(1, 1)
    ),
    "optimizer=… gives": lambda: training._optimizer(recipe(optimizer=lambda _: None), torch.nn.Linear(1, 1)),
    "lrScheduler=… returned": lambda: training._scheduler(recipe(lrScheduler=lambda _: None), None),
    "metrics=…: torchmetrics": lambda: metrics.made(["no_such"], ONE),
    "loss and metrics of PyTorch's": without_torchmetrics,
    "metrics=…: the model has several": lambda: metrics.made(["auroc"], TWO),
    "metrics has two values": lambda: metrics.made(["auroc", "auroc"], {"": Output("binary", (1,))}),
    "metrics=… is one of classes": lambda: metrics.made(["auroc"], ONE),
    "metrics=… needs arguments": lambda: metrics.made(["MultitaskWrapper"], ONE),
    "the model keeps state beside": lambda: codec.save(Keeping(1, 1), None),
    "… is a …, and only numbers": lambda: trees.pack({"a": object()}, "state"),
    "the model puts out a": lambda: codec.by_name((1, 2)),
    "the model's … will have a shape": lambda: codec.check_shaped(torch.nn.LazyLinear(1)),
    "the model's input … takes": lambda: keras_pretrained._dtype(
        SimpleNamespace(dtype="complex64", name="x"), (2,), ["a"]
    ),
    "the example has inputs": lambda: pretrained._inputs({"x": [1.0]}, {"features": ("featuresCol", ["a"])}),
    "the example must be rows": lambda: pretrained._tensor("features", np.asarray(1.0), "featuresCol", ["a"]),
    "the example is of": lambda: pretrained._tensor("features", np.zeros((1, 2), complex), "featuresCol", ["a"]),
    "…=… makes an input of shape": lambda: pretrained._tensor("features", np.zeros((1, 3)), "inputCols", ["a", "b"]),
    "the model does not take its example": lambda: TorchModel.fromTorch(torch.nn.Linear(2, 1), np.zeros((1, 3), "f4")),
    "this … is empty": lambda: KerasModel().fitted,
    "the model's … is of": lambda: codec.save(torch.nn.Linear(1, 1, dtype=torch.complex128), None),
    # A model that is cut or divided.
    "modelParallel with backend": lambda: keras(modelParallel=CUT, numWorkers=2).checkModelParallel(),
    "modelParallel=…": lambda: Sharding.of({"mesh": {"model": 2}}),
    "modelParallel has the mesh": lambda: cut({"model": 0}),
    "modelParallel has no layout": lambda: Sharding.of({**CUT, "layout": {}}),
    "modelParallel lays out …, which is no": lambda: cut(layout={"*kernel": [None, "model"]}),
    "modelParallel lays out … as …: must be a list": lambda: cut(layout={".*kernel": "model"}),
    "modelParallel lays out … along": lambda: cut(layout={".*kernel": [None, "modle"]}),
    "modelParallel has a mesh": lambda: cut().check(3, 32),
    "batchSize=… cannot be cut": lambda: cut({"data": 2}, {".*": [None]}).check(2, 9),
    "…=… with modelParallel": lambda: keras(
        modelParallel=CUT, numWorkers=2, backend="jax", checkpointInterval=5
    ).checkModelParallel(),
    "modelParallel lays out … as …, and": lambda: cut().checkVariable("conv/kernel", (3, 3, 8), ".*kernel"),
    "modelParallel cuts": lambda: cut().checkVariable("dense/kernel", (4, 9), ".*kernel"),
    "sharding='fsdp' with collective": lambda: pytorch(sharding="fsdp", numWorkers=2, collective="ring")._check(),
    "sharding='fsdp' with mixedPrecision": lambda: pytorch(
        sharding="fsdp", numWorkers=2, mixedPrecision="fp16"
    )._check(),
    "sharding='fsdp' needs a GPU": lambda: divided(torch.nn.Linear(1, 1), (b"cpu", b"cuda")),
    "sharding='fsdp' cannot divide sparse": lambda: divided(torch.nn.Sequential(torch.nn.Embedding(2, 2, sparse=True))),
    # Rows and the store.
    "there is no dataset in": lambda: in_the_store(no_dataset),
    "rank 0 has left no result": lambda: cause(None, told=True),
    "cannot … … in the store": lambda: in_the_store(list_a_file),
    "cannot read … in the store": rows_that_cannot_be_read,
    "…=…: …. Install": lambda: RunDir("no-such://x"),
    "…=…: write it as": lambda: store_url(None, "file:/tmp"),
    "spark_nn needs Petastorm": another_petastorm,
    "Petastorm was imported before": petastorm_before,
    "rank … …: this is a defect": a_defect,
    # The cluster and training.
    "spark.dynamicAllocation.enabled=true": dynamic,
    "training cannot go on": recovering,
    "not all tasks of the gang came": lambda: gathering(lambda _: time.sleep(1), 0.01),
    "another task of the gang was lost": lambda: gathering(broken),
    "the gang could not run": lambda: cause(RuntimeError("no resources"), told=False),
    "the Spark task that trained was lost": lambda: cause(None, told=False),
    "backend=… needs the package": without_jax,
    "… was lost: …": lambda: lost_ring(OSError("no route to host")),
    "… closed its connection": lambda: lost_ring(EOFError()),
    # Logs and the summary.
    "logDir=… cannot be written": lambda: events.run_folder("/dev/null/x", "run"),
    "logDir: …, where": lambda: events.Events("file:///nowhere", SimpleNamespace(host="a-host"), 0),
    "logDir is set, and": without_tensorboard,
    "plot needs matplotlib": without_matplotlib,
    "metrics names …": lambda: summary_view._panels({"loss": [1.0]}, ["recall"]),
    "ax has …": lambda: summary_view._axes([1, 2], 3),
    # `run`.
    "function=…": lambda: cluster._check_function(3, ()),
    "the function …, or what it is given": lambda: cluster._check_function(named, (sys._getframe(),)),
    "spark is not given": no_session,
    "…=… with framework": lambda: cluster._cast(1, 1, False, "torch"),
    "ctx.batches: run was given no dataset": lambda: RankContext.batches(SimpleNamespace(_reading=None), 1),
    "batchSize=… must be a positive multiple": lambda: RankContext.batches(
        SimpleNamespace(_reading=1, role="worker", _cast=SimpleNamespace(readers=2)), 3
    ),
    "framework=… has nothing": lambda: RankContext.initialize(SimpleNamespace(framework="tensorflow")),
    "jaxlib …": jaxlib_of_tomorrow,
    # Scoring, saving and loading.
    "the model wants backend=…": another_backend,
    "path=…: …. Install": lambda: Target("no-such://x", overwrite=False),
    "cannot write …: …": over_there,
    "… cannot be overwritten over Spark Connect": overwriting,
    "cannot … …/…: …; look at the path": hadoop,
    "…/… cannot be copied by a Spark task": copying,
    "the model file is not the one": written_anew,
    "…/metadata lists … as": lambda: _fetch(None, "/stage", "model.keras"),
    "a … has … file…: save it again": lambda: KerasModel()._loadSaved({}, {"model.h5": None}),
    "a … has one model file": lambda: KerasModel()._loadSaved({}, {"a.keras": None, "b.keras": None}),
    "the metadata …": lambda: torch_model._known(3, []),
}
