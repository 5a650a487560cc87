"""What a model puts out, and the columns that it becomes.

A model of one output fills the columns that its params name. Of several outputs each fills columns of its own, the
same with the output's name after an underscore: ``prediction_price``.

Spark's evaluators are strict about types: ``prediction`` must be a double, ``rawPrediction`` and
``probability`` must be Vectors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["regression", "binary", "multiclass", "raw"]


@dataclass(frozen=True)
class Output:
    """What a model puts out.

    Parameters
    ----------
    kind : {"regression", "binary", "multiclass", "raw"}
        A number; the probability of class 1; a probability per class; anything else.
    shape : tuple of int
        Shape of one row of the model's output.
    logits : bool
        Whether probabilities come as logits.
    """

    kind: Kind
    shape: tuple[int, ...]
    logits: bool = False

    def toDict(self) -> dict[str, Any]:
        """The description as JSON can hold it."""
        return asdict(self)

    @classmethod
    def fromDict(cls, value: dict[str, Any]) -> Output:
        """The output that :meth:`toDict` described."""
        return cls(value["kind"], tuple(value["shape"]), value["logits"])

    @property
    def fields(self) -> dict[str, str]:
        """The SQL type of each value that a row gets, by the Param that names its column."""
        if self.kind == "regression":
            return {"predictionCol": "double"}
        if self.kind in ("binary", "multiclass"):
            return {
                "rawPredictionCol": "array<double>",
                "probabilityCol": "array<double>",
                "predictionCol": "double",
            }
        return {"predictionCol": "array<" * len(self.shape) + "float" + ">" * len(self.shape)}

    def vector(self, field: str) -> bool:
        """Whether a value's column is a Vector."""
        return self.kind in ("binary", "multiclass") and field != "predictionCol"

    def values(self, output: np.ndarray) -> dict[str, np.ndarray]:
        """What each row gets, from the model's output of shape ``(rows,) + shape``."""
        if self.kind == "raw":
            return {"predictionCol": output.astype(np.float32, copy=False)}
        output = output.reshape(len(output), int(np.prod(self.shape))).astype(np.float64)
        if self.kind == "regression":
            return {"predictionCol": output[:, 0]}
        if self.kind == "binary":
            # As in Spark's LogisticRegression the raw prediction is the margin, once for each class.
            raw = np.concatenate([-output, output] if self.logits else [1.0 - output, output], axis=1)
            one = np.exp(-np.logaddexp(0.0, -output)) if self.logits else output
            probability = np.concatenate([1.0 - one, one], axis=1)
        else:
            raw = output
            probability = _softmax(output) if self.logits else output
        return {
            "rawPredictionCol": raw,
            "probabilityCol": probability,
            "predictionCol": probability.argmax(axis=1).astype(np.float64),
        }


Outputs = dict[str, Output]  # by the model's names; the only one by the empty name


def columns_of(outputs: Outputs) -> dict[str, tuple[str, str]]:
    """For each value that a row gets its key among them: the Param that names its column, and its output's name."""
    return {
        f"{param}:{name}" if name else param: (param, name)
        for name, output in outputs.items()
        for param in output.fields
    }


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return result
