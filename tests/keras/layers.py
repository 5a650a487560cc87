"""Parts of models that are not Keras's, in a module that can be imported; imports Keras."""

from __future__ import annotations

import os

import keras


class Gate(keras.layers.Layer):
    """Lets each number through as far as it has learnt to."""

    def __init__(self, start=0.5, **kwargs):
        super().__init__(**kwargs)
        self.start = start

    def build(self, shape):
        self.opening = self.add_weight(shape=(shape[-1],), initializer=keras.initializers.Constant(self.start))

    def call(self, x):
        return x * keras.ops.sigmoid(self.opening)

    def get_config(self):
        return {**super().get_config(), "start": self.start}


class Counted(keras.layers.Dense):
    """Notes each process in which it is loaded."""

    def __init__(self, units, mark="", **kwargs):
        super().__init__(units, **kwargs)
        self.mark = mark

    def get_config(self):
        return {**super().get_config(), "mark": self.mark}

    @classmethod
    def from_config(cls, config):
        with open(config["mark"], "a") as file:
            file.write(f"{os.getpid()}\n")
        return super().from_config(config)


def bent(x):
    return x + 0.1 * keras.ops.square(x)


class Cubic(keras.losses.Loss):
    def call(self, y, predicted):
        y = keras.ops.reshape(keras.ops.cast(y, predicted.dtype), keras.ops.shape(predicted))
        return keras.ops.mean(keras.ops.abs(y - predicted) ** 3, axis=-1)


class Near(keras.metrics.Mean):
    """The share of rows whose prediction is near."""

    def update_state(self, y, predicted, sample_weight=None):
        y = keras.ops.reshape(keras.ops.cast(y, predicted.dtype), keras.ops.shape(predicted))
        near = keras.ops.abs(y - predicted) < 0.5
        return super().update_state(keras.ops.cast(near, "float32"), sample_weight)


class Net(keras.Model):
    """A subclassed model."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = keras.layers.Dense(units, bent)
        self.gate = Gate(0.25)
        self.last = keras.layers.Dense(1)

    def call(self, x):
        return self.last(self.gate(self.hidden(x)))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


OBJECTS = {"Gate": Gate, "bent": bent}


def gated(units=6):
    return keras.Sequential([keras.layers.Dense(units, bent), Gate(), keras.layers.Dense(1)])


def counted(mark):
    return keras.Sequential([keras.layers.Dense(3), Counted(1, mark=mark)])
