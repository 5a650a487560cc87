"""The same for what workers, loaded models and model files raise."""

from __future__ import annotations

import importlib.util
import io
import threading
from types import SimpleNamespace
from unittest.mock import patch

import h5py
import jax
import numpy as np
import tensorflow as tf
from pyspark.sql import types as T

from spark_nn import KerasModel
from spark_nn.columns import Tensor
from spark_nn.dataset.materialize import check_count
from spark_nn.gang.ring import Ring
from spark_nn.gang.wire import Position
from spark_nn.keras import archive, native, parameters, sharded
from spark_nn.keras.backends import host
from spark_nn.keras.training import KerasTrainer
from spark_nn.model import Fitted
from spark_nn.outputs import Output
from spark_nn.torch import sharding
from spark_nn.torch.averaging import NativeAverager
from spark_nn.torch.blueprint import Blueprint
from spark_nn.torch.metrics import Tally

SCHEMA = T.StructType(
    [
        T.StructField("a", T.DoubleType()),
        T.StructField("word", T.StringType()),
        T.StructField("numbers", T.ArrayType(T.FloatType())),
    ]
)


def fitted(form="array", depth=1, **params):
    """A model that was trained on arrays of two numbers."""
    model = KerasModel()._set(**params)
    inputs = (Tensor("features", ("numbers",), form, "float32", depth, (2,)),)
    model._fitted = Fitted(None, inputs, {"": Output("regression", (1,))}, None)
    return model


def too_few_rows():
    check_count(SimpleNamespace(rows=lambda split: 1, skipped=0), SimpleNamespace(split=False), 2)


def without_a_loss():
    recipe = SimpleNamespace(optimizer=None, loss=None, metrics=None, lossWeights=[1.0])
    KerasTrainer._compile(SimpleNamespace(recipe=recipe), SimpleNamespace(compiled=False), 1)


def wrapped():
    host.check_range("column 'id'", np.array([0, 2**31]), np.dtype(np.int32))


def out_of_step():
    place = Position(*[0] * len(Position._fields))
    return Ring._out_of_step(SimpleNamespace(rank=0, _position=place), "rank 1", place)


def all_lost():
    hall = SimpleNamespace(lost=[1], serve=lambda gone: None)
    gang = SimpleNamespace(world=2, progress=SimpleNamespace(update=lambda **_: None))
    trainer = SimpleNamespace(schedule=SimpleNamespace(epochs=1))
    with patch.object(parameters, "ParameterServer"), patch.object(parameters, "Hall", lambda *_: hall):
        parameters.ParameterTrainer._serve(trainer, gang, SimpleNamespace(rows=lambda split: 1), None, {}, None)


def native_too_late():
    native.join(SimpleNamespace(all_gather=lambda state: [b"1"]), "127.0.0.1", 1.0)


def native_broken():
    with native._judged(SimpleNamespace(barrier=lambda: None, rank=0)):
        raise tf.errors.AbortedError(None, None, "Collective ops is aborted")


def gloo_broken():
    averager = SimpleNamespace(collective=SimpleNamespace(barrier=lambda: None, rank=0))
    with NativeAverager.guarded(averager):
        raise RuntimeError("[gloo] connection closed by peer")


def jax_broken():
    with sharded._judged(SimpleNamespace(collective=SimpleNamespace(barrier=lambda: None), rank=0)):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: connection closed by peer")


def other_layers():
    def reduce(bounds, op):
        bounds[0] += 1

    passed = [b'["", "a"]', b'["", "b"]']
    sharding._check_passed(SimpleNamespace(all_reduce=reduce, all_gather=lambda mine: passed), ["", "a"])


def first_values():
    with patch.object(sharded, "_digest", return_value=b"1"):
        sharded._check_alike(SimpleNamespace(collective=SimpleNamespace(all_gather=lambda mine: [mine, b"2"])), None)


def other_metrics():
    with patch("spark_nn.torch.metrics._unpacked", return_value={"metrics": [1]}):
        Tally.take(SimpleNamespace(_all=list), [b""])


def no_keras():
    archive._public.cache_clear()
    with patch.object(importlib.util, "find_spec", return_value=None):
        archive._public("keras.layers")


def cut_off():
    archive._data_offset(io.BytesIO(b"PK"), SimpleNamespace(header_offset=0, filename="config.json"), "model.keras")


def weights(make):
    file = io.BytesIO()
    with h5py.File(file, "w") as written:
        make(written)
    archive._check_weights(file, "model.weights.h5")


WORKERS = {
    "the DataFrame has … row… for numWorkers": too_few_rows,
    "the columns … make an input of shape": lambda: fitted(inputCols=["a", "a", "a"])._inputs(SCHEMA),
    "column … holds … values of … dimensions": lambda: fitted(featuresCol="word")._inputs(SCHEMA),
    "… names … columns, and the model was trained": lambda: fitted(inputCols=["a", "a", "a"])._arguments(),
    "the model was trained with the inputs": lambda: fitted(inputs={"x": "a"})._inputs(SCHEMA),
    "no loss: set": without_a_loss,
    "… holds the whole number": wrapped,
    "the model cannot be sent": lambda: Blueprint(None, {"lock": threading.Lock()}).pickled,
    "… is at …, and rank": out_of_step,
    "all … workers were lost": all_lost,
    "callbacks holds a … that takes": lambda: sharded._check_callbacks([tf.keras.callbacks.ModelCheckpoint("x.keras")]),
    "modelParallel needs the same": first_values,
    "TensorFlow is already at work": native_too_late,
    "TensorFlow's collective operations": native_broken,
    "torch.distributed failed": gloo_broken,
    "JAX's collective operations": jax_broken,
    "sharding='fsdp' needs all workers": other_layers,
    "other metrics were counted": other_metrics,
    "Keras is not installed": no_keras,
    "… is not a whole zip file": cut_off,
    "… an object whose": lambda: archive.examine({"class_name": ["x"], "config": {}}, "loss"),
    "… a function whose name is": lambda: archive.examine({"class_name": "function", "config": 3}, "loss"),
    "… has … at …, where Keras writes only": lambda: weights(lambda file: file.__setitem__("kind", np.dtype("f4"))),
    "… claims … bytes for": lambda: weights(lambda file: file.create_dataset("x", (1 << 30,), "f4", chunks=(1 << 20,))),
    "… at …: it may lead": lambda: weights(lambda file: file.__setitem__("x", h5py.SoftLink("/y"))),
}
