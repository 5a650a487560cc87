"""Worker side: a Keras model as TensorBoard draws it."""

from __future__ import annotations

from typing import Any

from spark_nn.tracking.events import Drawing


def draw(model: Any) -> Drawing:
    """The graph of the training step, if there is one, and the layers of a model that can tell them.

    As ``keras.callbacks.TensorBoard`` does, without having to know of every batch.
    """
    layers = model.to_json() if type(model).__name__ in ("Functional", "Sequential") else None
    # Keras gives the graph of what it has traced no public name.
    traced = getattr(model.train_function, "_concrete_variable_creation_fn", None)
    graph = None if traced is None else traced.graph.as_graph_def(add_shapes=True).SerializeToString()
    return graph, layers


def learning_rate(optimizer: Any) -> float | None:
    """The optimizer's learning rate as it is now, whoever turns it."""
    import keras

    rate = getattr(optimizer, "learning_rate", None)
    return None if rate is None else float(keras.ops.convert_to_numpy(rate))
