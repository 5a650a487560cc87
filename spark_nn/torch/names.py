"""Names that params may give in place of PyTorch's classes, known without importing PyTorch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spark_nn.errors import ParamError, meant

# Some metrics have shorthands for classes whose names say more.
SHORT = {"mse": "meansquarederror", "mae": "meanabsoluteerror", "f1": "f1score", "auc": "auroc"}
# So many letters of a name tell which is meant.
_LETTERS = 3


def exported(package: str, module: str = "") -> frozenset[str]:
    """Classes that a module of an installed package lists as public; none where it cannot be told.

    Parameters
    ----------
    package : str
        The package, which is read and not imported.
    module : str
        A package inside it.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(folder, module, "__init__.py")
        if not source.is_file():
            continue
        for statement in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and [ast.unparse(each) for each in statement.targets] == ["__all__"]:
                names = [each.value for each in ast.walk(statement.value) if isinstance(each, ast.Constant)]
                return frozenset(each for each in names if isinstance(each, str) and each[:1].isupper())
    return frozenset()


def check_optimizer(name: str) -> None:
    """Driver side: refuse what PyTorch, as it is installed here, has no optimizer of this name for.

    Raises
    ------
    ParamError
        There is none.
    """
    known = {each.lower() for each in exported("torch", "optim")} - {"optimizer"}
    if known and name.lower() not in known:
        raise unknown_optimizer(name, known)


def unknown_optimizer(name: str, known: Iterable[str]) -> ParamError:
    """The error of an optimizer that PyTorch does not have, but those that are known."""
    return ParamError(
        f"optimizer={name!r}: torch.optim has no class of this name{meant(name, known)}; known are "
        f"{', '.join(sorted(known))}"
    )


def check_metrics(metrics: Any) -> None:
    """Driver side: refuse names that torchmetrics, as it is installed here, has no metric for.

    Parameters
    ----------
    metrics : list or dict or None
        As the param `metrics` takes them; what is no name is passed over.

    Raises
    ------
    ParamError
        There is none.
    """
    given = metrics.values() if isinstance(metrics, dict) else metrics or ()
    names = [each for each in given if isinstance(each, str)]
    known = exported("torchmetrics") | exported("torchmetrics", "classification") if names else frozenset()
    lowered = {each.lower() for each in known}
    for name in names if known else ():
        wanted = name.lower().replace("_", "")
        if SHORT.get(wanted, wanted) not in lowered:
            raise unknown_metric(name, known)


def unknown_metric(name: str, known: Iterable[str]) -> ParamError:
    """The error of a metric that torchmetrics does not have.

    Parameters
    ----------
    name : str
        What was given.
    known : iterable of str
        The classes that there are.
    """
    spelt = [re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", each).lower() for each in sorted(known)]
    advice = meant(name, [*spelt, *SHORT])
    # What is cut short, such as 'acc', is like nothing whole.
    longer = [each for each in spelt if len(name) >= _LETTERS and each.startswith(name.lower())]
    if longer and not advice:
        advice = f" (did you mean {min(longer, key=len)!r}?)"
    return ParamError(
        f"metrics={name!r}: torchmetrics has no metric of this name{advice}; give one of its classes' names, such as "
        "'accuracy', 'auroc' or 'mean_absolute_error', an instance, or a function of predictions and labels"
    )
