"""TorchModel: a PyTorch network that scores."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from spark_nn.allowed import MODULES_CONF, allowed_modules, from_allowed, within
from spark_nn.errors import ModelFileError
from spark_nn.export import check_format
from spark_nn.model import NeuralModel
from spark_nn.persistence import ModelFile, StageReader
from spark_nn.scoring.evaluation import MeasureLoader
from spark_nn.scoring.models import Loader
from spark_nn.torch import codec, export, measure, predict, pretrained
from spark_nn.torch.blueprint import Blueprint, BlueprintLoader, Specs, is_module, skeleton_of
from spark_nn.torch.losses import NAMES, check_loss, check_measurable
from spark_nn.torch.names import check_metrics
from spark_nn.torch.stages import TorchColumns

M = TypeVar("M", bound="TorchModel")
_CURE = (
    "give what returns the network, TorchModel.load(path, model=build), or, where load is called for you, as by "
    f"PipelineModel.load, name the function's module in the Spark conf {MODULES_CONF}, if you trust it"
)

_LOG = logging.getLogger(__name__)


class TorchModel(TorchColumns, NeuralModel):
    """A PyTorch network that scores DataFrames; :class:`TorchEstimator` makes it, or :meth:`fromTorch`.

    It is saved as its weights, a safetensors file, and the import path of the function that returned the network,
    with its arguments. Neither is code: a saved model is loaded with ``TorchModel.load(path, model=build)``, or with
    the function's module named in the Spark conf ``spark.nn.allowedModules``.

    The formats of :meth:`export` are ``"safetensors"``, the weights, and ``"onnx"``, a file (with the packages onnx
    and onnxscript).
    """

    __module__ = "spark_nn"
    _blueprint: Blueprint | None = None

    @classmethod
    def fromTorch(cls, model: Any, example: Any, loss: Any = None, metrics: Any = None, **params: Any) -> TorchModel:
        """A model that scores with a network which no estimator fitted, such as a pretrained one.

        Parameters
        ----------
        model : torch.nn.Module
            With its weights.
        example : array or tensor, or dict of them
            Rows of its input, of which shape and type count; of several inputs by the names of forward's arguments.
        loss, metrics : object, optional
            As :class:`TorchEstimator` takes them. The loss decides the output columns, and :meth:`evaluate` measures
            by both; without a loss the output is ``"raw"``.
        **params
            Params of this class: `featuresCol`, `inputCols` or `inputs`, `predictionCol` and the others. None stands
            for not given.

        Returns
        -------
        TorchModel
            Without a summary.

        Raises
        ------
        TypeError
            It is no torch.nn.Module.
        ParamError
            The network does not take the example, or cannot be sent to executors; or a param is unknown or does not
            fit it.

        Examples
        --------
        >>> TorchModel.fromTorch(net, np.zeros((1, 4), "float32"), inputCols=list("abcd"))  # doctest: +SKIP
        """
        made = cls._withParams(params)
        if not is_module(model):
            raise TypeError(f"model takes a torch.nn.Module, not {model!r} ({type(model).__name__})")
        codec.check_shaped(model)
        if loss is not None:
            check_loss(loss, weighted=False, workers=1)
        check_metrics(metrics)
        made._fitted = pretrained.describe(model, example, made.inputColumns(), loss)
        made._blueprint = Blueprint(None, skeleton=skeleton_of(model), loss=loss, metrics=metrics)
        made._blueprint.pickled  # noqa: B018  (refuses what cannot be sent)
        made._outputs()  # refuses params that do not suit them
        return made

    @classmethod
    def load(cls: type[M], path: str, model: Any = None, loss: Any = None, metrics: Any = None) -> M:
        """Load a model.

        Parameters
        ----------
        path : str
            Where it was saved.
        model : callable or torch.nn.Module, optional
            What returns the network when it is called with the arguments that were saved, or a network of the same
            layers.
        loss, metrics : object, optional
            In place of those that were saved, of which functions and modules are not.

        Returns
        -------
        TorchModel
            The model.

        Raises
        ------
        ModelFileError
            It is not as it was saved; or nothing is given that makes the network, and the session's conf
            ``spark.nn.allowedModules`` does not name the module of what made it.
        ParamError
            A metric's name is that of nothing.
        """
        check_metrics(metrics)

        def make() -> M:
            stage = cls()
            instance = is_module(model)
            if instance:
                codec.check_shaped(model)
            stage._blueprint = Blueprint(
                None if instance else model,
                skeleton=skeleton_of(model) if instance else None,
                loss=loss,
                metrics=metrics,
            )
            return stage

        return StageReader(cls, make=make).load(path)

    @property
    def model(self) -> Any:
        """The native ``torch.nn.Module`` in evaluation mode, loaded anew at each access.

        Raises
        ------
        SparkNNError
            This model is empty.
        """
        return codec.load(self.fitted.file.path, self._made(), self._specs())

    def _made(self) -> Blueprint:
        self.fitted  # noqa: B018  (refuses an empty one)
        assert self._blueprint is not None
        return self._blueprint

    def _specs(self) -> Specs:
        return {tensor.key: (tuple(tensor.shape or ()), tensor.dtype) for tensor in self.fitted.inputs}

    def _loader(self) -> Loader:
        return BlueprintLoader(predict.load_predictor, self._made().pickled)

    def _measurer(self) -> MeasureLoader:
        if self._made().loss is None:
            raise ModelFileError(
                "the model's loss is not known: steps of a LightningModule name none, and functions and modules are "
                "not saved. Give it, as TorchModel.load(path, model=..., loss=...) or "
                "TorchModel.fromTorch(..., loss=...)"
            )
        check_measurable(self._made().loss)
        return measure.MeasureLoader(self._made().pickled, json.dumps(self._described()))

    def _described(self) -> dict[str, Any]:
        return {name: output.toDict() for name, output in self._outputs().items()}

    def _exporter(self, format: str) -> Callable[[Path], None]:
        check_format(format, export.FORMATS, export.PACKAGES, export.CURE)
        return functools.partial(export.write, self.fitted.file.path, self._made(), self._specs(), format)

    def _savedMetadata(self) -> dict[str, Any]:
        network = self._made().toDict()
        if str(network["function"]).startswith("__main__:"):
            _LOG.warning(
                "%s makes the saved network, and is not there in another process: load it by TorchModel.load(path, "
                "model=...) with a function of the same network, or put the function into a module before the fit",
                network["function"],
            )
        return {**super()._savedMetadata(), "network": network}

    def _loadSaved(self, metadata: dict[str, Any], files: dict[str, ModelFile]) -> None:
        if any(not name.endswith(codec.SUFFIX) for name in files):
            raise ModelFileError(
                f"a TorchModel has a {codec.SUFFIX} file, and the metadata lists {', '.join(files)}: save it again"
            )
        super()._loadSaved(metadata, files)
        recorded = metadata.get("network")
        if not isinstance(recorded, dict) or not isinstance(recorded.get("arguments"), dict):
            raise ModelFileError("the metadata does not describe the model's network: save it again")
        self._blueprint = _resolved(self._blueprint or Blueprint(None), recorded, allowed_modules())
        file = self.fitted.file
        codec.check_fits(file.path, self._blueprint, self._specs(), file.origin)


def _resolved(given: Blueprint, recorded: dict[str, Any], allowed: list[str]) -> Blueprint:
    """What makes a network that was saved: what is given, or what the session lets in."""
    function = given.function
    if function is None and given.skeleton is None:
        path = recorded.get("function")
        if not isinstance(path, str):
            raise ModelFileError(
                f"the model was made of an instance of {recorded.get('class')}, which was not saved: {_CURE}"
            )
        if not within(path, allowed):
            raise ModelFileError(f"the model names {path}, which makes its network: module not allowed; {_CURE}")
        function = from_allowed(path, allowed)
    return Blueprint(
        function,
        recorded["arguments"] if given.skeleton is None else {},
        given.skeleton,
        given.loss if given.loss is not None else _known(_checked(recorded.get("loss")), allowed),
        given.metrics if given.metrics is not None else _known(recorded.get("metrics"), allowed),
    )


def _checked(loss: Any) -> Any:
    """A loss that was saved; the names in it are those of losses."""
    for each in loss.values() if isinstance(loss, dict) and set(loss) != {"import"} else [loss]:
        if isinstance(each, str) and each not in NAMES:
            raise ModelFileError(f"the metadata names the loss {each!r}, and there is none of this name: save it again")
    return loss


def _known(value: Any, allowed: list[str]) -> Any:
    """A loss or metrics that were saved, None where a part of them is not let in."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, list):
        found: Any = [_known(each, allowed) for each in value]
        return None if None in found else found
    if not isinstance(value, dict):
        raise ModelFileError(f"the metadata holds {value!r} as a loss or metric: save the model again")
    if set(value) == {"import"}:
        return from_allowed(value["import"], allowed) if within(value["import"], allowed) else None
    found = {name: _known(each, allowed) for name, each in value.items()}
    return None if None in found.values() else found
