"""What the estimator and the model share: the columns that their networks take."""

from __future__ import annotations

from pyspark.sql.types import StructType

from spark_nn.columns import Tensor
from spark_nn.errors import ColumnError
from spark_nn.params import ModelParams
from spark_nn.stage import LIBRARIES


class TorchColumns(ModelParams):
    """A stage whose network takes what PyTorch has tensors of."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """Distributions whose versions are noted in what is saved."""
        return (*LIBRARIES, "torch", "safetensors")

    def inputTensors(self, schema: StructType) -> tuple[Tensor, ...]:
        """The model's inputs, as the DataFrame's columns make them.

        Parameters
        ----------
        schema : pyspark.sql.types.StructType
            The DataFrame's.

        Returns
        -------
        tuple of Tensor
            One for each input of the model.

        Raises
        ------
        ColumnError
            A column is missing, or of a type that cannot become a tensor, strings among them.
        """
        tensors = super().inputTensors(schema)
        for tensor in tensors:
            if not tensor.numeric:
                raise ColumnError(
                    f"column {tensor.columns[0]!r} holds {tensor.dtype} values, and PyTorch has no tensors of them: "
                    "make numbers of them before, as StringIndexer does"
                )
        return tensors
