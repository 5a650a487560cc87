"""Worker side: what the loop asks of a batch, and of an epoch, whoever says what the loss is."""

from __future__ import annotations

from typing import Any, Literal

from spark_nn.torch.losses import Criterion

Phase = Literal["training", "validation"]


class Objective:
    """The loss of what the network puts out.

    Parameters
    ----------
    criterion : Criterion
        The loss.
    """

    def __init__(self, criterion: Criterion | None) -> None:
        self.criterion = criterion

    def turn(self, module: Any, phase: Phase) -> None:
        """Have the network's layers compute as in training or as in evaluation."""
        if phase == "training":
            module.train()
        else:
            module.eval()

    def begin(self, phase: Phase, epoch: int) -> None:
        """Begin an epoch's training, or go on with it, or its validation."""

    def batch(self, forward: Any, inputs: Any, labels: Any, weights: Any, rows: int, number: int) -> tuple[Any, Any]:
        """The loss of a batch and what the network puts out for it; None where they are not known.

        Parameters
        ----------
        forward : callable
            The network, or what goes through it and averages gradients.
        inputs, labels, weights, rows : object
            The batch (see :data:`spark_nn.torch.feed.Batch`).
        number : int
            Its place in the epoch, from 0.
        """
        assert self.criterion is not None
        put_out = forward(**inputs) if isinstance(inputs, dict) else forward(inputs)
        return self.criterion(put_out, labels, weights), put_out

    def end(self, phase: Phase, rows: int) -> None:
        """End what :meth:`begin` began, when the tally has the rows of all ranks; of these `rows` were this one's."""

    def named(self, validated: dict[str, Any], logs: dict[str, Any]) -> dict[str, Any]:
        """What validation rows gave by the names that the history is to have, in which there is `logs` already."""
        return {f"val_{name}": value for name, value in validated.items()}

    def watched(self, logs: dict[str, Any]) -> float:
        """What a plateau's scheduler goes by."""
        value: float = logs.get("val_loss", logs["loss"])
        return value
