"""KerasModel: a Keras model that scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spark_nn.errors import ModelFileError
from spark_nn.export import check_format
from spark_nn.keras import archive, codec, export, measure, predict, pretrained
from spark_nn.keras.customs import Customs, registered, require
from spark_nn.keras.stages import HasBackend, HasCustomObjects, check_numbers
from spark_nn.model import NeuralModel
from spark_nn.persistence import ModelFile
from spark_nn.scoring.evaluation import MeasureLoader
from spark_nn.scoring.models import Loader


class KerasModel(HasCustomObjects, HasBackend, NeuralModel):
    """A Keras model that scores DataFrames; :class:`KerasEstimator` makes it, or :meth:`fromKeras`.

    The formats of :meth:`export` are ``"tf_saved_model"``, a folder for TensorFlow Serving and
    ``tf.saved_model.load``; ``"onnx"``, a file (with the extra ``onnx``; not for models that take strings); and
    ``"keras"``, the native file.

    Its file holds no code. Where it consists of classes and functions of your own, `customObjects` names them; they are
    not saved, but given again: ``KerasModel.load(path, customObjects={"MyLayer": MyLayer})``.

    It scores on the backend that it was trained on, and `backend` asks for another: its file does not depend on it. A
    process holds one backend only, so a Python worker of Spark's that has scored on another goes on with that.
    """

    __module__ = "spark_nn"

    @classmethod
    def fromKeras(cls, model: Any, **params: Any) -> KerasModel:
        """A model that scores with a network which no estimator fitted, such as a pretrained one.

        Parameters
        ----------
        model : keras.Model
            Built, with inputs whose rows have a fixed shape. Where it is compiled, its loss decides the output columns
            as after a fit, and :meth:`evaluate` measures by its loss and metrics.
        **params
            Params of this class: `featuresCol`, `inputCols` or `inputs`, `predictionCol` and the others. None stands
            for not given.

        Returns
        -------
        KerasModel
            Without a summary.

        Raises
        ------
        TypeError
            It is no keras.Model.
        ParamError
            The network is not built, has an input of open shape, or cannot be loaded where it is to score; or a param
            is unknown or does not fit it.

        Examples
        --------
        >>> KerasModel.fromKeras(native, featuresCol="image").transform(images)  # doctest: +SKIP
        """
        made = cls._withParams(params)
        made._fitted = pretrained.describe(model, made.inputColumns(), made._known)
        made._outputs()  # refuses params that do not suit them
        return made

    @property
    def model(self) -> Any:
        """The native ``keras.Model``, loaded anew at each access.

        It is compiled as it was trained, but where the loss or a metric is a function, which its file does not hold.

        Raises
        ------
        SparkNNError
            This model is empty.
        ModelFileError
            Custom objects that it consists of are missing.
        """
        return codec.load_compiled(str(self.fitted.file.path), self._known)

    def _loader(self) -> Loader:
        self._checkBackend()
        return codec.ModelLoader(predict.load_predictor, self.getBackend(), self._customs(compiled=False))

    def _measurer(self) -> MeasureLoader:
        measure.check_compiled(self.fitted.file.path)
        self._checkBackend()
        return codec.ModelLoader(measure.load_measure, self.getBackend(), self._customs(compiled=True))

    def _checkBackend(self) -> None:
        if self.getBackend() != "tensorflow":
            check_numbers(self.getBackend(), self.fitted.inputs)

    def _exporter(self, format: str) -> Callable[[Path], None]:
        check_format(format, export.FORMATS, export.PACKAGES, export.CURE)
        fitted = self.fitted
        return functools.partial(export.write, fitted.file.path, fitted.inputs, format, self._known)

    def _customs(self, *, compiled: bool) -> Customs:
        """The custom objects that executors need; of the loss and metrics those that are known."""
        file = self.fitted.file
        named = archive.inspect(file.path, file.origin)
        require(named.network, self._known(named.network), file.origin, named.network)
        return Customs.of(self.getCustomObjects(), registered(), named.all if compiled else named.network)

    def _savedMetadata(self) -> dict[str, Any]:
        file = self.fitted.file
        return {
            **super()._savedMetadata(),
            "customObjects": self._recorded(archive.inspect(file.path, file.origin)),
        }

    def _unsavedParams(self) -> set[str]:
        return {"customObjects"}  # whoever loads the model gives them again

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if any(not name.endswith(codec.SUFFIX) for name in files):
            raise ModelFileError(
                f"a KerasModel has a {codec.SUFFIX} file, and the metadata lists {', '.join(files)}: save it again"
            )
        super()._loadSaved(metadata, files)
        self._admit(self.fitted.file, metadata.get("customObjects"))
