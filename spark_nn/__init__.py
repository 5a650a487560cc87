"""spark_nn: neural networks as first-class citizens of Spark ML.

Importing the package imports neither Spark nor a framework; a public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark_nn.cluster import run
    from spark_nn.keras.estimator import KerasEstimator
    from spark_nn.keras.model import KerasModel
    from spark_nn.summary import TrainingSummary
    from spark_nn.torch.estimator import TorchEstimator
    from spark_nn.torch.model import TorchModel

__version__ = "0.1.0"
__all__ = ["KerasEstimator", "KerasModel", "TorchEstimator", "TorchModel", "TrainingSummary", "__version__", "run"]

_HOMES = {
    "KerasEstimator": "spark_nn.keras.estimator",
    "KerasModel": "spark_nn.keras.model",
    "TorchEstimator": "spark_nn.torch.estimator",
    "TorchModel": "spark_nn.torch.model",
    "TrainingSummary": "spark_nn.summary",
    "run": "spark_nn.cluster",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
