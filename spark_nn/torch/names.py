"""Names that params may give in place of PyTorch's classes, known without importing PyTorch."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from spark_nn.errors import ParamError, meant

# Some metrics have shorthands for classes whose names say more.
SHORT = {"mse": "meansquarederror", "mae": "meanabsoluteerror", "f1": "f1score", "auc": "auroc"}


def exported(package: str, module: str = "") -> frozenset[str]:
    """Classes that a module of an installed package lists as public, in small letters; none where it cannot be told.

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
                return frozenset(each.lower() for each in names if isinstance(each, str) and each[:1].isupper())
    return frozenset()


def check_optimizer(name: str) -> None:
    """Driver side: refuse what PyTorch, as it is installed here, has no optimizer of this name for.

    Raises
    ------
    ParamError
        There is none.
    """
    known = exported("torch", "optim") - {"optimizer"}
    if known and name.lower() not in known:
        raise ParamError(
            f"optimizer={name!r}: torch.optim has no class of this name{meant(name, known)}; known are "
            f"{', '.join(sorted(known))}"
        )


def check_metric(name: str) -> None:
    """Driver side: refuse what torchmetrics, as it is installed here, has no metric of this name for.

    Raises
    ------
    ParamError
        There is none.
    """
    known = exported("torchmetrics") | exported("torchmetrics", "classification")
    wanted = name.lower().replace("_", "")
    if known and SHORT.get(wanted, wanted) not in known:
        raise unknown_metric(name, meant(name, [*known, *SHORT]))


def unknown_metric(name: str, advice: str = "") -> ParamError:
    """The error of a metric that torchmetrics does not have."""
    return ParamError(
        f"metrics={name!r}: torchmetrics has no metric of this name{advice}; give one of its classes' names, such as "
        "'accuracy', 'auroc' or 'mean_absolute_error', an instance, or a function of predictions and labels"
    )
