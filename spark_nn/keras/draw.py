"""Worker side: a Keras model as TensorBoard draws it."""

from __future__ import annotations

from typing import Any

from spark_nn.chance import random_numbers_kept
from spark_nn.tracking.events import Drawing


def draw(model: Any, example: Any) -> Drawing:
    """The graph of what a model does with a row, if TensorFlow does it, and the layers of one that can tell them.

    Keras's own callback would draw the training step, which Keras no longer makes one function of TensorFlow's.
    """
    import keras

    layers = model.to_json() if type(model).__name__ in ("Functional", "Sequential") else None
    if keras.backend.backend() != "tensorflow":
        return None, layers
    import tensorflow as tf

    with random_numbers_kept():
        traced = tf.function(lambda inputs: model(inputs, training=False)).get_concrete_function(example)
    return traced.graph.as_graph_def(add_shapes=True).SerializeToString(), layers
