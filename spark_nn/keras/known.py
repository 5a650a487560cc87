"""The names that Keras 3.15 has for optimizers, losses and metrics, known without importing it.

A test holds them to the real Keras. A name that is missing here is no mistake yet: a newer Keras may know it.
"""

from __future__ import annotations

import re

# Shorthands that Keras resolves by the shapes that it meets, in any case.
BY_SHAPE = frozenset({"accuracy", "acc"})
_OPTIMIZERS = (
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "Ftrl", "Lion", "Muon", "Nadam", "RMSprop"),
    *("ScheduleFreeAdamW", "SGD"),
)
_LOSSES_AND_METRICS = (
    *("BinaryCrossentropy", "CategoricalCrossentropy", "CategoricalHinge", "CosineSimilarity", "Hinge"),
    *("KLDivergence", "MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredError"),
    *("MeanSquaredLogarithmicError", "Poisson", "SparseCategoricalCrossentropy", "SquaredHinge"),
)
_LOSSES = (
    *("BinaryFocalCrossentropy", "CTC", "CategoricalFocalCrossentropy", "Circle", "Dice", "Huber", "LogCosh"),
    "Tversky",
)
_METRICS = (
    *("AUC", "Accuracy", "BinaryAccuracy", "BinaryIoU", "CategoricalAccuracy", "ConcordanceCorrelation", "F1Score"),
    *("FBetaScore", "FalseNegatives", "FalsePositives", "LogCoshError", "Mean", "PearsonCorrelation", "Precision"),
    *("R2Score", "Recall", "RootMeanSquaredError", "SparseCategoricalAccuracy", "SparseTopKCategoricalAccuracy"),
    *("Sum", "TopKCategoricalAccuracy", "TrueNegatives", "TruePositives"),
)
# Of losses and metrics.
SHORT = ("bce", "mae", "mape", "mse", "msle")


def _snake(name: str) -> str:
    """A class's name as Keras writes it for a function."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def _spelt(classes: tuple[str, ...], short: tuple[str, ...]) -> frozenset[str]:
    """All spellings that Keras takes for classes and shorthands."""
    return frozenset({*classes, *map(_snake, classes), *short, *map(str.upper, short)})


# By param; optimizers in small letters, since their case does not matter.
NAMES = {
    "optimizer": frozenset(map(str.lower, _OPTIMIZERS)),
    "loss": _spelt((*_LOSSES_AND_METRICS, *_LOSSES), (*SHORT, "kld")),
    "metrics": _spelt((*_LOSSES_AND_METRICS, *_METRICS), SHORT),
}


def is_known(param: str, name: str) -> bool:
    """Whether a name is one of Keras's.

    Parameters
    ----------
    param : {"optimizer", "loss", "metrics"}
        The param that it is given for.
    name : str
        The name.
    """
    if param == "metrics" and name.lower() in BY_SHAPE:
        return True
    return (name.lower() if param == "optimizer" else name) in NAMES[param]
