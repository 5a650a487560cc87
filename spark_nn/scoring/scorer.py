"""Executor side: turns batches of inputs into batches of predictions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from spark_nn.columns import Arrays, Invalid, Tensor, arrange, decode, report
from spark_nn.errors import ColumnError, ModelFileError
from spark_nn.outputs import Outputs, columns_of
from spark_nn.scoring.batches import Block, ahead, recut
from spark_nn.scoring.models import Loader, Predictor, fetched

# Of each row, where rows may be skipped, whether it was scored: pandas cannot say that a whole struct is null.
USED = "used"


@dataclass(frozen=True)
class Scorer:
    """Turns batches of inputs into batches of outputs.

    Parameters
    ----------
    file : str
        Name of the model's file among the session's artifacts.
    sha256 : str
        Its digest.
    load : callable
        The framework's loader. It must be importable, or equal to any other that loads the same, so that a worker
        finds a model again that it has loaded before.
    inputs : tuple of Tensor
        The model's inputs, of known shape.
    outputs : dict of str to Output
        What it puts out, by the model's names.
    fields : tuple of str
        Which values to return, by their keys in :func:`~spark_nn.outputs.columns_of`.
    invalid : {"error", "skip", "keep"}
        What becomes of rows that cannot be used: an error, or a null; where they are to be skipped, a field says so.
    rows : int or None
        Rows that go through the model at once; None leaves that to the model.
    """

    file: str
    sha256: str
    load: Loader
    inputs: tuple[Tensor, ...]
    outputs: Outputs
    fields: tuple[str, ...]
    invalid: Literal["error", "skip", "keep"] = "error"
    rows: int | None = None

    def __call__(self, batches: Iterator[Sequence[pa.Array]]) -> Iterator[pa.StructArray]:
        """Score Arrow batches, each an array per input: a struct per row, in batches of the model's size."""
        # Only read ahead: what is decoded goes through the model while the caches still hold it.
        blocks = self._blocks(ahead(batches))
        first = next(blocks, None)
        if first is None:
            return  # without rows no model is needed
        predictor: Predictor = fetched(self.load, self.file, self.sha256)
        for *inputs, used in recut(itertools.chain([first], blocks), self.rows or predictor.rows):
            yield self._scored(inputs, used, predictor)

    def types(self) -> dict[str, str]:
        """The SQL type of each value that can be returned."""
        return {
            field: self.outputs[output].fields[param] for field, (param, output) in columns_of(self.outputs).items()
        }

    def _blocks(self, batches: Iterator[Sequence[pa.Array]]) -> Iterator[Block]:
        """Of each batch its inputs, and which rows of them can be used; the others hold zeros.

        Raises
        ------
        ColumnError
            Rows of a batch hold what the model cannot take, and that is to be an error.
        """
        for batch in batches:
            invalid = Invalid(len(batch[0]))
            blocks = [decode(array, tensor, invalid) for array, tensor in zip(batch, self.inputs, strict=True)]
            used = ~invalid.rows
            if invalid.problems:
                if self.invalid == "error":
                    raise self._refusal(invalid)
                # They stay in their places, so that every row keeps its prediction; the model does not see them.
                blocks = [_filled(array, tensor, used) for array, tensor in zip(batch, self.inputs, strict=True)]
            yield [*(block for block in blocks if block is not None), used]

    def _refusal(self, invalid: Invalid) -> ColumnError:
        return report(
            invalid.problems,
            " (counted in one batch of rows that were being scored): leave such rows out with handleInvalid='skip', or "
            "give them a null with 'keep'",
        )

    def _scored(self, inputs: list[np.ndarray], used: np.ndarray, predictor: Predictor) -> pa.StructArray:
        if used.all():
            return self._structs(inputs, predictor)
        # Taking at null gives null.
        structs = self._structs([block[used] for block in inputs], predictor)
        return structs.take(pa.array(np.cumsum(used) - 1, mask=~used))

    def _structs(self, inputs: list[np.ndarray], predictor: Predictor) -> pa.StructArray:
        """Of each row that can be used a struct of the values to return."""
        rows = len(inputs[0])
        named = {tensor.name: block for tensor, block in zip(self.inputs, inputs, strict=True)}
        arrays = arrange(named, "features")
        assert arrays is not None
        predicted: Arrays = predictor(arrays) if rows else _nothing(self.outputs)
        values: dict[tuple[str, str], np.ndarray] = {}
        for name, output in self.outputs.items():
            array = predicted[name] if isinstance(predicted, dict) else predicted
            if array.shape != (rows, *output.shape):
                raise ModelFileError(
                    f"of {rows} rows the model has put out an array of shape {array.shape}, and not "
                    f"{(rows, *output.shape)}: its outputs must have a row for each row of its inputs"
                )
            values |= {(param, name): value for param, value in output.values(array).items()}
        keys = columns_of(self.outputs)
        fields = {field: _arrow(values[keys[field]]) for field in self.fields}
        if self.invalid == "skip":
            fields[USED] = pa.array(np.ones(rows, bool))
        return pa.StructArray.from_arrays(list(fields.values()), list(fields))


def _filled(array: pa.Array, tensor: Tensor, used: np.ndarray) -> np.ndarray:
    """A block of all rows, of which those that can be used are decoded."""
    decoded = decode(array.filter(pa.array(used)), tensor, Invalid(int(used.sum())))
    assert decoded is not None
    empty = {"string": "", "binary": b""}.get(tensor.dtype, 0)
    block = np.full((len(array), *decoded.shape[1:]), empty, decoded.dtype)
    block[used] = decoded
    return block


def _nothing(outputs: Outputs) -> Arrays:
    """What a model puts out for no rows."""
    found = {name: np.zeros((0, *output.shape), np.float32) for name, output in outputs.items()}
    return found.get("", found)


def _arrow(values: np.ndarray) -> pa.Array:
    """Values of shape ``(rows,) + shape`` as an Arrow array, nested as deep as the shape."""
    if values.ndim == 1:
        return pa.array(values)
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        offsets = pa.array(np.arange(0, len(array) + 1, size, dtype=np.int32))
        array = pa.ListArray.from_arrays(offsets, array)
    return array
