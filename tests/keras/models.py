"""Models and references for the tests of Keras; imported by name only where Keras is wanted."""

from __future__ import annotations

import numpy as np


def mlp(units=8, activation="sigmoid", outputs=1, batch_norm=False, dropout=0.0):
    import keras

    layers = [keras.layers.Dense(units, "relu")]
    if batch_norm:
        layers.append(keras.layers.BatchNormalization())
    if dropout:
        layers.append(keras.layers.Dropout(dropout))
    return keras.Sequential([*layers, keras.layers.Dense(outputs, activation)])


def embedding(optimizer="adam"):
    import keras

    inputs = keras.Input((2,))
    vectors = keras.layers.Flatten()(keras.layers.Embedding(50, 4)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(vectors))
    model.compile(optimizer, "mse")
    return model


def several(vocabulary):
    """An image, a word, a sentence and two numbers in; a price and a class out."""
    import keras

    image = keras.Input((6, 5), name="image")
    word = keras.Input((1,), dtype="string", name="word")
    text = keras.Input((1,), dtype="string", name="text")
    numbers = keras.Input((2,), name="numbers")
    pixels = keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(keras.layers.Reshape((6, 5, 1))(image)))
    index = keras.layers.StringLookup(vocabulary=vocabulary)(word)
    looked_up = keras.layers.Flatten()(keras.layers.Embedding(len(vocabulary) + 1, 3)(index))
    tokens = keras.layers.TextVectorization(vocabulary=vocabulary, output_sequence_length=4)(text)
    read = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(len(vocabulary) + 2, 3)(tokens))
    joined = keras.layers.Concatenate()([pixels, looked_up, read, numbers])
    price = keras.layers.Dense(1, name="price")(joined)
    kind = keras.layers.Dense(3, "softmax", name="kind")(joined)
    return keras.Model([image, word, text, numbers], [price, kind])


def hashing():
    import keras

    inputs = keras.Input((1,), dtype="string")
    bins = keras.layers.Hashing(8, output_mode="one_hot")(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(bins))


def with_lambda():
    import keras

    return keras.Sequential([keras.layers.Lambda(lambda x: x * 2), keras.layers.Dense(1)])


def with_own_layer():
    import keras

    @keras.saving.register_keras_serializable("tests")
    class Twice(keras.layers.Layer):
        def call(self, x):
            return x * 2

    return keras.Sequential([Twice(), keras.layers.Dense(1)])


def two_outputs():
    import keras

    x = keras.Input((3,))
    return keras.Model(x, [keras.layers.Dense(1)(x), keras.layers.Dense(1)(x)])


def summed_loss():
    import keras

    return keras.losses.MeanSquaredError(reduction="sum")


def terminates_on_nan():
    import keras

    return [keras.callbacks.TerminateOnNaN()]


def stops_early():
    import keras

    return [keras.callbacks.EarlyStopping(monitor="val_loss")]


def raises():
    import sys

    sys.stdout.write("it is about to break\n")
    raise ValueError("no model today")


def not_a_model():
    return 3


def drifting():
    import os

    import keras

    class Drift(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.model.set_weights([w + os.getpid() for w in self.model.get_weights()])

    return [Drift()]


def global_batches(x, y, world, batch, weight=None):
    """The batches that the ranks train on together, without shuffling."""
    total, local = len(x), batch // world
    share = -(-total // world)
    starts = [rank * total // world for rank in range(world)]
    for first in range(0, share, local):
        taken = np.concatenate([np.arange(s + first, s + min(first + local, share)) for s in starts])
        yield (x[taken], y[taken]) if weight is None else (x[taken], y[taken], weight[taken])


def single_process(build, compile_args, x, y, world, batch, epochs, seed, weight=None, arguments=None):
    """Train in this process with plain Keras on the global batches; return the model."""
    import keras

    keras.utils.set_random_seed(seed)
    model = build(**(arguments or {}))
    if not model.built:
        model(np.zeros((1, *x.shape[1:]), x.dtype))
    if compile_args:
        model.compile(**compile_args)
    for _ in range(epochs):
        for given in global_batches(x, y, world, batch, weight):
            model.train_on_batch(*given)
    return model


def relative(found, expected):
    """The largest difference of two lists of weights, relative to the largest weight of each."""
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in zip(found, expected, strict=True))


def remembering():
    """A network and an optimizer with all that must be remembered between two steps."""
    import keras

    layers = [
        keras.layers.Dense(16, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.GaussianNoise(0.1),
    ]
    model = keras.Sequential([*layers, keras.layers.Dense(1, "sigmoid")])
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 20, 0.9)
    optimizer = keras.optimizers.AdamW(schedule, use_ema=True, ema_momentum=0.9, global_clipnorm=1.0)
    model.compile(optimizer, "binary_crossentropy", metrics=["auc", "accuracy"])
    return model


def another_each_time(folder):
    """A model whose size depends on what has happened before."""
    import os

    import keras

    units = 3 + len(os.listdir(folder))
    return keras.Sequential([keras.layers.Dense(units, "relu"), keras.layers.Dense(1, "sigmoid")])


def killed_once(mark, rank, step, *, early=True):
    """A function that returns callbacks, one of which kills its rank at a step, the first time round."""

    def make():
        import os
        import random
        import signal

        import keras

        class Kill(keras.callbacks.Callback):
            done = 0

            def on_train_batch_end(self, batch, logs=None):
                self.done += 1
                with open("/proc/self/comm") as file:
                    mine = file.read().strip() == f"spark_nn rank {rank}"
                if mine and self.done == step and not os.path.exists(mark):
                    with open(mark, "w"):
                        os.kill(os.getpid(), signal.SIGKILL)

        class Draw(keras.callbacks.Callback):
            """Changes the weights by random numbers of Python and NumPy, alike on all ranks."""

            def on_epoch_end(self, epoch, logs=None):
                shift = random.random() + np.random.random()
                self.model.set_weights([weight * (1 + shift / 100) for weight in self.model.get_weights()])

        stop = keras.callbacks.EarlyStopping("val_loss", patience=2, min_delta=0.001, restore_best_weights=True)

        class Warm(keras.callbacks.Callback):
            """Acts when training begins, at a batch by its number, and by the number of all steps."""

            def on_train_begin(self, logs=None):
                self.model.optimizer.learning_rate = 0.04

            def on_train_batch_end(self, batch, logs=None):
                if batch in (4, self.params["steps"] - 2):
                    self.model.optimizer.learning_rate = self.model.optimizer.learning_rate * 0.97

        decay = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9)
        plateau = keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=10.0)
        return [*([stop] if early else [stop, plateau, decay, Warm()]), Draw(), Kill()]

    return make


def telling(path):
    """A callback that prints, and waits until a file is there, which it takes to have been read."""
    import time
    from pathlib import Path

    import keras

    class Telling(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            print(f"the end of epoch {epoch}")  # noqa: T201
            limit = time.monotonic() + 60
            while not Path(path).exists():
                assert time.monotonic() < limit, "nobody has read it"
                time.sleep(0.05)

    return [Telling()]


def two_layers(optimizer="sgd", seed=None):
    """A network of two layers with names; with `seed="process"` no two processes draw the same weights."""
    import os

    import keras

    if seed == "process":
        keras.utils.set_random_seed(os.getpid())
    layers = [keras.layers.Dense(8, "relu", name="first"), keras.layers.Dense(1, "sigmoid", name="second")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer=optimizer, loss="binary_crossentropy")
    return model


class Looking:
    """A function that returns a callback, which writes down this rank's part of what the optimizer begins with.

    And once training is over it gives the rank a bias of its own.
    """

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        import os

        import jax
        import keras

        folder = self.folder

        class Look(keras.callbacks.Callback):
            def on_train_begin(self, logs=None):
                parts = [each.value.addressable_data(0) for each in self.model.optimizer.variables]
                np.savez(os.path.join(folder, f"rank-{jax.process_index()}.npz"), *map(np.asarray, parts))

            def on_train_end(self, logs=None):
                bias = self.model.layers[-1].bias
                own = np.full(bias.shape, jax.process_index(), np.float32)
                bias._value = jax.make_array_from_process_local_data(bias.value.sharding, own)

        return [Look()]


class Killed:
    """A function that returns a callback, which kills its rank at a step."""

    def __init__(self, mark, rank, step):
        self.settings = mark, rank, step

    def __call__(self):
        return killed_once(*self.settings)()[-1:]
