"""Worker side: the loss and metrics of a network, counted over rows wherever they are.

Metrics of torchmetrics keep sums, or the rows themselves, and say how those of several processes become one: what is
computed from them is what one process would have computed from all rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from spark_nn.errors import ClusterError, ModelFileError, ParamError
from spark_nn.outputs import Outputs
from spark_nn.torch.losses import fitted
from spark_nn.torch.names import SHORT, unknown_metric
from spark_nn.torch.trees import pack, unpack

try:
    import torchmetrics
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise ClusterError(
        "loss and metrics of PyTorch's networks are counted with the package torchmetrics, which this Python does not "
        "have: pip install 'spark-nn[torch]' where tasks run"
    ) from error


class Tally:
    """The loss of rows, added up, and what metrics have counted of them.

    Parameters
    ----------
    metrics : list or dict or None
        As the param `metrics` takes them.
    outputs : dict of str to Output
        What the network puts out.
    device : torch.device
        Where it computes.
    """

    def __init__(self, metrics: Any, outputs: Outputs, device: Any) -> None:
        self._outputs = outputs
        self._metrics = {
            name: _apart(each if isinstance(each, torchmetrics.Metric) else _Mean(each)).to(device)
            for name, each in made(metrics, outputs).items()
        }
        # What a network's own code lets count, by the names of its parts, and the names under which it is shown.
        self._followed: dict[str, Any] = {}
        self._follows = False
        self.shown: dict[str, str] = {}
        # The sum over rows of what is a number for each of them, and how many they are.
        self.logged: dict[str, list[Any]] = {}
        # A number of this process's where it can be read at once, and a tensor where reading waits for the device.
        self._near = device.type == "cpu"
        self._sum: Any = 0.0 if self._near else torch.zeros((), dtype=torch.float64, device=device)
        self._rows = 0
        self._zero = self._sum

    def add_loss(self, loss: Any, rows: int) -> float | None:
        """Count the mean loss of rows; return it where it can be read without waiting."""
        self._rows += rows
        if not self._near:
            self._sum = self._sum + loss.detach().double() * rows
            return None
        value: float = loss.item()
        self._sum += value * rows
        return value

    def add(self, put_out: Any, targets: Any) -> None:
        """Let the metrics count rows."""
        if not self._metrics:
            return
        with torch.no_grad():
            preds, labels = _readable(put_out, targets, self._outputs)
            for metric in self._metrics.values():
                metric.update(preds, labels)

    def follow(self, module: Any) -> None:
        """Keep an eye on the metrics that are parts of a network, and that its own code lets count."""
        self._follows = True
        for name, each in module.named_modules():
            inner = any(name.startswith(f"{outer}.") for outer in self._followed)
            if isinstance(each, torchmetrics.Metric) and not inner:
                self._followed[name] = _apart(each)

    def show(self, name: str, metric: Any) -> bool:
        """Tell the value of a metric that is followed under a name; whether it is one."""
        found = next((path for path, each in self._followed.items() if each is metric), None)
        if found is not None:
            self.shown[name] = found
        return found is not None

    def log(self, name: str, value: Any, rows: int) -> None:
        """Count a number that is the mean over rows."""
        if isinstance(value, torch.Tensor):
            value = value.item() if self._near else value.detach().double().reshape(())
        total, counted = self.logged.get(name, (0.0, 0))
        self.logged[name] = [total + value * rows, counted + rows]

    @property
    def rows(self) -> int:
        """How many rows a loss was counted of."""
        return self._rows

    @property
    def finite(self) -> bool:
        """Whether the loss of all rows so far is a finite number."""
        return bool(np.isfinite(float(self._sum)))

    @property
    def mean_loss(self) -> float:
        """The mean loss of all rows so far; to read it waits for a GPU."""
        return float(self._sum) / self._rows if self._rows else float("nan")

    def reset(self) -> None:
        """Forget what was counted."""
        self._sum, self._rows = self._zero, 0
        self.logged, self.shown = {}, {}
        for metric in self._all():
            metric.reset()

    def _all(self) -> list[Any]:
        return [*self._metrics.values(), *self._followed.values()]

    def state(self) -> bytes:
        """What was counted, to be sent."""
        parts = [
            [{"states": _states(part), "updates": part._update_count} for part in _parts(metric)]
            for metric in self._all()
        ]
        logged = {name: [float(total), rows] for name, (total, rows) in self.logged.items()}
        counted = {"loss": [float(self._sum), self._rows], "metrics": parts, "logged": logged, "shown": self.shown}
        described, tensors = pack(counted)
        header = [described, [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]]
        raw = b"".join(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
        return json.dumps(header).encode() + b"\n" + raw

    def take(self, states: Sequence[bytes]) -> None:
        """Count what several processes, or this one at another time, have counted, in place of what was.

        Raises
        ------
        ModelFileError
            They have counted other things.
        """
        found = [_unpacked(each) for each in states]
        if any(len(each["metrics"]) != len(self._all()) for each in found):
            raise ModelFileError("other metrics were counted elsewhere: every executor needs the same packages")
        total = np.sum([each["loss"] for each in found], axis=0)
        self._rows = int(total[1])
        self._sum = self._zero + float(total[0])
        self.logged, self.shown = {}, {}
        for each in found:
            self.shown.update(each["shown"])
            for name, (part, rows) in each["logged"].items():
                before, counted = self.logged.get(name, (0.0, 0))
                self.logged[name] = [before + part, counted + rows]
        for place, metric in enumerate(self._all()):
            for number, part in enumerate(_parts(metric)):
                _combine(part, [each["metrics"][place][number] for each in found])

    def results(self) -> dict[str, Any]:
        """The values of loss and metrics over all that was counted, by name."""
        values: dict[str, Any] = {} if self._follows and not self._rows else {"loss": self.mean_loss}
        values.update({name: float(total) / rows for name, (total, rows) in self.logged.items()})
        shown = {name: self._followed[path] for name, path in self.shown.items()}
        for name, metric in {**self._metrics, **shown}.items():
            found = metric.compute()
            for key, value in (found if isinstance(found, dict) else {"": found}).items():
                array = torch.as_tensor(value).double().cpu().numpy()
                values[f"{name}_{key}" if key else name] = float(array) if array.ndim == 0 else array.tolist()
        return values


class _Mean(torchmetrics.Metric):  # type: ignore[misc]
    """The mean over rows of a function that gives that of some rows.

    Parameters
    ----------
    function : callable
        Takes what was predicted and the labels.
    """

    full_state_update = False

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function
        for name in ("total", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")

    def update(self, preds: Any, labels: Any) -> None:
        rows = len(next(iter(preds.values())) if isinstance(preds, dict) else preds)
        self.total += torch.as_tensor(self.function(preds, labels)).double() * rows
        self.rows += rows

    def compute(self) -> Any:
        return self.total / self.rows


def made(given: Any, outputs: Outputs) -> dict[str, Any]:
    """The metrics that a param names: torchmetrics' own, or functions; by the names that the history gives them.

    Raises
    ------
    ParamError
        torchmetrics has none of that name, or it needs arguments; or two have the same name.
    """
    named = given if isinstance(given, dict) else {}
    pairs = [*named.items()] if named else [(_name(each), each) for each in given or []]
    result: dict[str, Any] = {}
    for name, each in pairs:
        if name in result or name == "loss":
            raise ParamError(f"metrics has two values of the name {name!r}: give a dict of names to metrics")
        result[name] = _by_name(each, outputs) if isinstance(each, str) else each
        if isinstance(each, torchmetrics.Metric):
            result[name] = each.clone()
            result[name].reset()
    return result


def _by_name(name: str, outputs: Outputs) -> Any:
    wanted = name.lower().replace("_", "")
    wanted = SHORT.get(wanted, wanted)
    known = {each.lower(): each for each in torchmetrics.__all__ if isinstance(getattr(torchmetrics, each), type)}
    kinds = {each.lower(): each for each in torchmetrics.classification.__all__}
    if wanted not in {**known, **kinds}:
        raise unknown_metric(name, [*known.values(), *kinds.values()])
    if len(outputs) > 1:
        raise ParamError(
            f"metrics={name!r}: the model has several outputs, which no metric takes together: give a function of the "
            "dicts of predictions and labels"
        )
    (output,) = outputs.values()
    arguments: dict[str, Any] = {}
    if wanted in known and hasattr(torchmetrics.classification, f"Binary{known[wanted]}"):
        if output.kind not in ("binary", "multiclass"):
            raise ParamError(
                f"metrics={name!r} is one of classes, and the model's output is {output.kind!r}: set outputKind, or "
                "give an instance of a metric"
            )
        cls = getattr(torchmetrics.classification, f"{output.kind.capitalize()}{known[wanted]}", None)
        cls = cls or getattr(torchmetrics, known[wanted])
    else:
        cls = (
            getattr(torchmetrics, known[wanted])
            if wanted in known
            else getattr(torchmetrics.classification, kinds[wanted])
        )
    if output.kind == "multiclass":
        arguments["num_classes"] = output.shape[0]
        if known.get(wanted) == "Accuracy":
            arguments["average"] = "micro"  # the share of rows, as everywhere else
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ParamError(f"metrics={name!r} needs arguments ({error}): give an instance of it") from error


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _readable(put_out: Any, targets: Any, outputs: Outputs) -> tuple[Any, Any]:
    """Predictions and labels as metrics take them: probabilities and classes, or numbers, one for each row."""
    if isinstance(put_out, dict) and len(outputs) > 1:
        return put_out, {name: fitted(each, put_out[name]) for name, each in targets.items()}
    (output,) = outputs.values()
    values = next(iter(put_out.values())) if isinstance(put_out, dict) else put_out
    labels = fitted(next(iter(targets.values())) if isinstance(targets, dict) else targets, values)
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if output.kind in ("binary", "regression"):
        values, labels = values.reshape(-1), labels.reshape(-1)
    if output.kind == "binary":
        return (values.sigmoid() if output.logits else values), labels.long()
    if output.kind == "multiclass":
        labels = labels.argmax(1) if labels.shape == values.shape else labels
        return (values.softmax(1) if output.logits else values), labels
    return values, labels


def _parts(metric: Any) -> list[Any]:
    """A metric, and those that it is made of."""
    return [each for each in metric.modules() if isinstance(each, torchmetrics.Metric)]


def _apart(metric: Any) -> Any:
    """A metric that leaves a process group alone: what all ranks have counted is brought together here, and once."""
    for part in _parts(metric):
        part.distributed_available_fn = lambda: False
    return metric


def _states(metric: Any) -> dict[str, Any]:
    """What a metric has counted; what it keeps of batch after batch as one."""
    return {
        name: [torch.cat([torch.atleast_1d(each) for each in value])] if isinstance(value, list) and value else value
        for name, value in ((name, getattr(metric, name)) for name in metric._defaults)
    }


def _combine(metric: Any, found: Sequence[dict[str, Any]]) -> None:
    """Give a metric what several have counted, as torchmetrics itself brings processes together."""
    # One that has seen no rows has nothing to say, and would spoil a mean.
    seen = [each for each in found if each["updates"]] or list(found[:1])
    for name, reduction in metric._reductions.items():
        values = [each["states"][name] for each in seen]
        if isinstance(metric._defaults[name], list):
            joined = [part for each in values for part in each]
            setattr(metric, name, [torch.cat(joined).to(metric.device)] if joined else [])
            continue
        # Where a metric says nothing, torchmetrics too stacks what processes have counted: its `compute` joins them.
        stacked = values[0] if len(values) == 1 else torch.stack(values)
        value = stacked if len(values) == 1 or reduction is None else reduction(stacked)
        setattr(metric, name, value.to(metric.device))
    metric._update_count = sum(each["updates"] for each in seen)
    metric._computed = None


def _unpacked(state: bytes) -> dict[str, Any]:
    line, _, raw = state.partition(b"\n")
    described, kinds = json.loads(line)
    tensors, start = [], 0
    for dtype, shape in kinds:
        empty = torch.empty(shape, dtype=getattr(torch, dtype))
        part = bytearray(raw[start : start + empty.nbytes])
        start += empty.nbytes
        tensors.append(torch.frombuffer(part, dtype=empty.dtype).reshape(shape) if part else empty)
    found: dict[str, Any] = unpack(described, tensors)
    return found
