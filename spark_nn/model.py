"""A fitted network, framework-neutral: the story of a transform, and what else a model does.

A framework plugs in by three hooks: what loads the model's file for prediction (:meth:`NeuralModel._loader`), what
measures it (:meth:`NeuralModel._measurer`), and what writes it in other formats (:meth:`NeuralModel._exporter`).
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyspark.ml.base import Model
from pyspark.ml.param import Param
from pyspark.sql import SparkSession

from spark_nn.columns import Tensor
from spark_nn.errors import ColumnError, ModelFileError, ParamError, SparkNNError, meant
from spark_nn.export import Target
from spark_nn.outputs import Output, Outputs, check_labels, columns_of
from spark_nn.params import ModelParams
from spark_nn.persistence import ModelFile
from spark_nn.scoring.evaluation import Evaluation, MeasureLoader, evaluate
from spark_nn.scoring.models import Loader
from spark_nn.scoring.plan import score, ship
from spark_nn.scoring.scorer import Scorer
from spark_nn.scoring.sql import sql_function
from spark_nn.stage import Stage
from spark_nn.summary import TrainingSummary

if TYPE_CHECKING:
    from pyspark.sql import DataFrame
    from pyspark.sql.types import StructType


M = TypeVar("M", bound="NeuralModel")


@dataclass(frozen=True)
class Fitted:
    """What a model has beside its params.

    Parameters
    ----------
    file : ModelFile
        The framework's native model file.
    inputs : tuple of Tensor
        The model's inputs, as they were trained.
    outputs : dict of str to Output
        What it puts out, by the model's names; the only one by the empty name.
    summary : TrainingSummary or None
        What the fit was like; None where there was none.
    """

    file: ModelFile
    inputs: tuple[Tensor, ...]
    outputs: Outputs
    summary: TrainingSummary | None


class NeuralModel(Model, ModelParams, Stage):
    """A fitted neural network that scores DataFrames."""

    _fitted: Fitted | None = None

    def hasParam(self, paramName: str) -> bool:
        """Whether the model has a param of this name.

        Parameters
        ----------
        paramName : str
            The name.

        Returns
        -------
        bool
            True where it has.
        """
        # The inherited one would evaluate the property `model`, and with it load the network.
        return isinstance(getattr(type(self), paramName, None), Param)

    @abstractmethod
    def _loader(self) -> Loader:
        """The importable function that loads the model's file for prediction on an executor."""

    @abstractmethod
    def _measurer(self) -> MeasureLoader:
        """The importable function that loads the model's file on an executor to measure it; refuses what cannot be."""

    @abstractmethod
    def _exporter(self, format: str) -> Callable[[Path], None]:
        """The function that writes the model in a format to a local path; refuses formats that it cannot write."""

    @classmethod
    def _withParams(cls: type[M], params: dict[str, Any]) -> M:
        """An empty model with these params; None stands for not given.

        Raises
        ------
        ParamError
            There is no such param.
        """
        made = cls()
        if unknown := [name for name in params if not made.hasParam(name)]:
            known = ", ".join(param.name for param in made.params)
            advice = meant(unknown[0], [param.name for param in made.params])
            raise ParamError(f"a {cls.__name__} has no param {unknown[0]!r}{advice}: it has {known}")
        made._set(**{name: value for name, value in params.items() if value is not None})
        return made

    @property
    def fitted(self) -> Fitted:
        """What the model has beside its params.

        Raises
        ------
        SparkNNError
            The model was made empty.
        """
        if self._fitted is None:
            name = type(self).__name__
            raise SparkNNError(f"this {name} is empty: get one from an estimator's fit or from {name}.load")
        return self._fitted

    @property
    def hasSummary(self) -> bool:
        """Whether there is a summary: always, in a model that was fitted."""
        return self._fitted is not None and self._fitted.summary is not None

    @property
    def summary(self) -> TrainingSummary:
        """What the fit was like: history, rows per second, timings.

        Raises
        ------
        SparkNNError
            The model was not fitted by an estimator, so that there is none (:attr:`hasSummary` tells).
        """
        summary = self.fitted.summary
        if summary is None:
            raise SparkNNError(
                f"this {type(self).__name__} has no summary, because no estimator fitted it: ask hasSummary first"
            )
        return summary

    def getHistory(self) -> dict[str, list[Any]]:
        """For each metric its value after each epoch of the fit.

        Returns
        -------
        dict of str to list
            ``summary.history``.

        Raises
        ------
        SparkNNError
            There is no summary (:attr:`hasSummary` tells).
        """
        return self.summary.history

    def evaluate(self, dataset: DataFrame) -> dict[str, Any]:
        """The model's loss and metrics over a DataFrame, computed where the rows are, in one Spark job.

        They are what the framework gives on all rows at once in one process, however they are partitioned. Labels come
        from `labelCol` or `labels`, the rows' weights from `weightCol` where it is set; class weights are a matter of
        training. Rows that cannot be used are an error or left out, as `handleInvalid` says.

        Parameters
        ----------
        dataset : pyspark.sql.DataFrame
            Rows with the columns of inputs, labels and weights.

        Returns
        -------
        dict of str to float
            The values by the metrics' names, ``loss`` among them; a list where a metric has one per class.

        Raises
        ------
        ColumnError
            A column is missing or cannot be used.
        DatasetError
            There are no rows.
        ModelFileError
            The model's file does not say what to measure.
        """
        fitted = self.fitted
        measurer = self._measurer()
        schema = dataset.schema
        tensors = (*self._inputs(schema), *self._labels(schema), *self.weightTensors(schema))
        evaluation = Evaluation(
            file=ship(dataset.sparkSession, fitted.file.path),
            sha256=fitted.file.sha256,
            load=measurer,
            tensors=tensors,
            skip=self.getHandleInvalid() != "error",
        )
        return evaluate(dataset, evaluation)

    def udf(self) -> Any:
        """The model as a function of SQL, for the active session.

        Its arguments are the model's input columns, in the order of its params: that of `featuresCol`, or those of
        `inputCols`, or those of `inputs`. A Vector may come in place of an array, and the other way round. It returns
        a struct whose fields are named as the columns that ``transform`` would add, and hold the same, Vectors as
        ``array<double>``. With `handleInvalid` ``"skip"`` or ``"keep"`` the struct of a row that cannot be used is null
        (on Spark 4.0, all of its fields are). The params count as they are now.

        Returns
        -------
        function
            For ``spark.udf.register``, or to be called with columns.

        Raises
        ------
        ColumnError
            The params name other inputs than the model has.
        ParamError
            All output columns have empty names.

        Examples
        --------
        >>> spark.udf.register("score", model.udf())  # doctest: +SKIP
        >>> spark.sql("SELECT id, score(features).prediction FROM rows")  # doctest: +SKIP
        """
        return sql_function(self._scorer(SparkSession.active(), self._arguments()), self._outputColumns())

    def export(self, path: str, format: str = "tf_saved_model", *, overwrite: bool = False) -> None:
        """Write the model for other programs, in a format of its framework.

        Parameters
        ----------
        path : str
            A local path or an fsspec URL (``s3://...``); what is written appears there whole or not at all.
        format : str, default ``"tf_saved_model"``
            Which format; the class of the model says which there are.
        overwrite : bool, default False
            Whether what is there is replaced.

        Raises
        ------
        ParamError
            The format is unknown, or the model cannot be written in it.
        StoreError
            The path exists, or cannot be written.
        """
        write = self._exporter(format)
        target = Target(path, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix="spark_nn-") as folder:
            local = Path(folder) / f"export{self.fitted.file.path.suffix}"
            write(local)
            target.put(local)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        names = self._outputColumns()
        inputs = self._inputs(dataset.schema)
        if not names:
            return dataset
        return score(dataset, self._scorer(dataset.sparkSession, inputs), names)

    def _scorer(self, spark: SparkSession, inputs: tuple[Tensor, ...]) -> Scorer:
        """What scores these inputs on the executors of a session."""
        fitted = self.fitted
        return Scorer(
            file=ship(spark, fitted.file.path),
            sha256=fitted.file.sha256,
            load=self._loader(),
            inputs=inputs,
            outputs=self._outputs(),
            fields=tuple(self._outputColumns()),
            invalid=self.getHandleInvalid(),  # type: ignore[arg-type]
            rows=self.getPredictBatchSize() if self.isDefined("predictBatchSize") else None,
        )

    def _outputs(self) -> Outputs:
        """What the model puts out, with what the params say of it."""
        return self.outputChoice().of(self.fitted.outputs)

    def _labels(self, schema: StructType) -> tuple[Tensor, ...]:
        """What the model's outputs are measured by."""
        labels = self.labelTensors(schema)
        check_labels(self.fitted.outputs, [tensor.key for tensor in labels])
        return labels

    def _arguments(self) -> tuple[Tensor, ...]:
        """The params' columns as the inputs that the model was trained on; their types are not known yet."""
        given = self.inputColumns()
        trained = self._trained(given)
        for name, (param, names) in given.items():
            if len(names) > 1 and trained[name].shape != (len(names),):
                raise ColumnError(
                    f"{param} names {len(names)} columns, and the model was trained with an input of shape "
                    f"{trained[name].shape} from {', '.join(map(repr, trained[name].columns))}: name as many"
                )
        return tuple(
            replace(trained[name], columns=tuple(names), form="scalars" if len(names) > 1 else "array")
            for name, (_, names) in given.items()
        )

    def _trained(self, given: dict[str, Any]) -> dict[str, Tensor]:
        """The inputs that the model was trained on, by name; those given must be the same."""
        trained = {tensor.name: tensor for tensor in self.fitted.inputs}
        if given.keys() != trained.keys():
            raise ColumnError(
                f"the model was trained with the inputs {', '.join(map(repr, trained))}, and its params now name "
                f"{', '.join(map(repr, given))}: name columns for the same ones"
            )
        return trained

    def _outputColumns(self) -> dict[str, str]:
        """Name of the column for each value that a row gets, by its key; none for what is left out."""
        chosen = self.outputChoice().columns
        names = {}
        for field, (param, output) in columns_of(self._outputs()).items():
            column = self.getOrDefault(self.getParam(param))
            own = chosen.get(output) if param == "predictionCol" else None
            if chosen.get(output) != "" and (own or column):
                names[field] = own or (f"{column}_{output}" if output else column)
        return names

    def _inputs(self, schema: StructType) -> tuple[Tensor, ...]:
        """The DataFrame's columns as the inputs that the model was trained on."""
        found = {tensor.name: tensor for tensor in self.inputTensors(schema)}
        trained = self._trained(found)
        for name, tensor in found.items():
            known = trained[name]
            if tensor.dtype == "binary" and known.numeric and len(tensor.columns) == 1:
                found[name] = replace(known, columns=tensor.columns, form="bytes")
                continue
            # Numbers may become floats, but floats not whole numbers, and strings neither.
            alike = tensor.dtype == known.dtype or (
                tensor.numeric and known.numeric and (known.dtype == "float32" or tensor.dtype != "float32")
            )
            if tensor.depth != known.depth or not alike:
                raise ColumnError(
                    f"column {tensor.columns[0]!r} holds {tensor.dtype} values of {tensor.depth} dimensions, and the "
                    f"model was trained with {known.dtype} values of {known.depth}: give it the same kind of column"
                )
            if tensor.shape is not None and tensor.shape != known.shape:
                raise ColumnError(
                    f"the columns {', '.join(map(repr, tensor.columns))} make an input of shape {tensor.shape}, and "
                    f"the model was trained with {known.shape} from {', '.join(map(repr, known.columns))}: name as many"
                )
        return tuple(replace(found[name], dtype=known.dtype, shape=known.shape) for name, known in trained.items())

    def _savedFiles(self) -> dict[str, ModelFile]:
        file = self.fitted.file
        return {f"model{file.path.suffix}": file}

    def _savedMetadata(self) -> dict[str, Any]:
        fitted = self.fitted
        return {
            "inputs": [tensor.toDict() for tensor in fitted.inputs],
            "outputs": {name: output.toDict() for name, output in fitted.outputs.items()},
            "summary": None if fitted.summary is None else fitted.summary.toDict(),
        }

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if len(files) != 1:
            raise ModelFileError(f"a {type(self).__name__} has one model file, and {len(files)} were saved")
        (file,) = files.values()
        self._fitted = Fitted(
            file,
            tuple(Tensor.fromDict(tensor) for tensor in metadata["inputs"]),
            {name: Output.fromDict(output) for name, output in metadata["outputs"].items()},
            None if metadata["summary"] is None else TrainingSummary.fromDict(metadata["summary"]),
        )
