"""What a model puts out, and the columns that it becomes.

A model of one output fills the columns that its params name. Of several outputs each fills columns of its own, the
same with the output's name after an underscore: ``prediction_price``.

Spark's evaluators are strict about types: ``prediction`` must be a double, ``rawPrediction`` and
``probability`` must be Vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from spark_nn.errors import ParamError

Kind = Literal["regression", "binary", "multiclass", "raw"]
KINDS: tuple[str, ...] = get_args(Kind)


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
    threshold : float
        Of a binary output: the probability of class 1 above which the prediction is 1. No property of the model, so
        it is not part of the description.
    """

    kind: Kind
    shape: tuple[int, ...]
    logits: bool = False
    threshold: float = 0.5

    def toDict(self) -> dict[str, Any]:
        """The description as JSON can hold it."""
        return {"kind": self.kind, "shape": list(self.shape), "logits": self.logits}

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
            predicted = one[:, 0] > self.threshold
        else:
            raw = output
            probability = _softmax(output) if self.logits else output
            predicted = probability.argmax(axis=1)
        return {
            "rawPredictionCol": raw,
            "probabilityCol": probability,
            "predictionCol": predicted.astype(np.float64),
        }


Outputs = dict[str, Output]  # by the model's names; the only one by the empty name


def columns_of(outputs: Outputs) -> dict[str, tuple[str, str]]:
    """For each value that a row gets its key among them: the Param that names its column, and its output's name."""
    return {
        f"{param}:{name}" if name else param: (param, name)
        for name, output in outputs.items()
        for param in output.fields
    }


@dataclass(frozen=True)
class Choice:
    """What the user says of a model's outputs, in place of what its loss says.

    Parameters
    ----------
    kinds : str or dict
        The kind of all outputs, or of some by their names; ``"auto"`` leaves a kind as it is.
    threshold : float or None
        Of the binary ones.
    columns : dict
        Where the predictions of some go, by their names; an empty name leaves an output out.
    """

    kinds: str | Mapping[str, str] = "auto"
    threshold: float | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def of(self, outputs: Outputs) -> Outputs:
        """The outputs as they were described, with what the user says of them.

        Raises
        ------
        ParamError
            There is no such output, its shape does not suit the kind, or there is no binary one for the threshold.
        """
        for param, given in (("outputKind", self.kinds), ("outputCols", self.columns)):
            unknown = [name for name in given if name not in outputs] if isinstance(given, Mapping) else []
            if unknown:
                single = list(outputs) == [""]
                cure = "it has one, without a name" if single else f"it has {', '.join(map(repr, outputs))}"
                raise ParamError(f"{param}={given!r}: the model has no output {', '.join(map(repr, unknown))}; {cure}")
        kinds = self.kinds if isinstance(self.kinds, Mapping) else dict.fromkeys(outputs, self.kinds)
        result = {name: _as_kind(name, output, kinds.get(name, "auto")) for name, output in outputs.items()}
        if self.threshold is None:
            return result
        if all(output.kind != "binary" for output in result.values()):
            found = ", ".join(f"{output.kind!r}" for output in result.values())
            raise ParamError(
                f"threshold={self.threshold}: only outputs of kind 'binary' have one, and the model's is {found}; "
                "clear it, or set outputKind='binary' if the model puts out the probability of class 1"
            )
        return {name: replace(output, threshold=self.threshold) for name, output in result.items()}


def check_labels(outputs: Collection[str], given: Sequence[str | None]) -> None:
    """Check that there is a label for each output, and no other.

    Parameters
    ----------
    outputs : collection of str
        The outputs' names; the only one's is empty.
    given : sequence of str or None
        The outputs that labels are for; None where labelCol names the only one.

    Raises
    ------
    ParamError
        There is no label for an output, or no output for a label.
    """
    named = ", ".join(map(repr, given))
    if len(outputs) > 1 and set(given) != set(outputs):
        found = "labelCol is for models of one" if list(given) == [None] else f"labels names {named}"
        raise ParamError(
            f"the model has {len(outputs)} outputs, {', '.join(map(repr, outputs))}, and {found}: name a column for "
            "each output, and for nothing else, with the param labels={output: column}"
        )
    if len(outputs) == 1 and len(given) > 1:
        raise ParamError(f"the model has one output, and labels names {named}: name one column, with labelCol")


def _as_kind(name: str, output: Output, kind: str) -> Output:
    if kind in ("auto", output.kind):
        return output
    one = int(np.prod(output.shape)) == 1
    fits = {"regression": one, "binary": one, "multiclass": len(output.shape) == 1 and not one, "raw": True}
    if not fits[kind]:
        whose = f"output {name!r} of the model" if name else "model's output"
        allowed = [each for each in KINDS if fits[each]]
        needed = "one element per class" if kind == "multiclass" else "a single element"
        raise ParamError(
            f"outputKind={kind!r} needs {needed}, and the {whose} has the shape {output.shape} for a row: set "
            f"outputKind to {' or '.join(map(repr, allowed))}, or change the model's last layer"
        )
    return replace(output, kind=kind)  # type: ignore[arg-type]


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return result
