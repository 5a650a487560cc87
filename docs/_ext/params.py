"""The directive ``param-table``: the Params of a stage with type, default and meaning, from the class itself."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, NamedTuple

_TYPE = re.compile(r"Param\[(.*)\]")
# What annotations call things, and what a reader of Python calls them.
_ANY = "Any"


class Row(NamedTuple):
    """What the table says of a Param."""

    name: str
    type: str
    default: str
    meaning: str


def rows(stage: type) -> list[Row]:
    """The Params of a stage: what its annotations, its docstring, its defaults and its Params say of them.

    Parameters
    ----------
    stage : type
        A class that can be made without arguments.

    Returns
    -------
    list of Row
        By name. A default is ``not set`` where Spark ML has none.
    """
    instance = stage()
    return [
        Row(
            param.name,
            type_of(stage, param.name),
            repr(instance.getOrDefault(param)) if instance.hasDefault(param) else "not set",
            " ".join(param.doc.split()),
        )
        for param in instance.params
    ]


def type_of(stage: type, name: str) -> str:
    """The type of a Param's values: the annotation's, or, where that leaves it open, what a docstring says."""
    for base in stage.__mro__:
        if (annotation := inspect.get_annotations(base).get(name)) is not None:
            found = _TYPE.search(str(annotation))[1]  # type: ignore[index]
            return documented(stage, name) if _ANY in found else found
    raise LookupError(f"{stage.__name__}.{name} has no annotation Param[...]")


def documented(stage: type, name: str) -> str:
    """The type that the docstring of a stage, or else of its estimator, gives a parameter."""
    from numpydoc.docscrape import ClassDoc

    estimator = getattr(importlib.import_module("spark_nn"), stage.__name__.replace("Model", "Estimator"), stage)
    for each in (stage, estimator, importlib.import_module("spark_nn").KerasEstimator):
        for parameter in ClassDoc(each)["Parameters"]:
            kind = re.sub(r",? ?(optional|default .*)$", "", parameter.type).rstrip(", ").replace("``", "")
            if name in parameter.name.split(", ") and kind:
                return kind
    raise LookupError(f"no docstring tells the type of {stage.__name__}.{name}")


def setup(app: Any) -> dict[str, Any]:
    """Register the directive; Sphinx calls this."""
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class ParamTable(Directive):
        required_arguments = 1

        def run(self) -> list[nodes.Node]:
            name = self.arguments[0]
            stage = getattr(importlib.import_module("spark_nn"), name)
            widths = [18, 22, 14, 60]
            table = nodes.table(classes=["params"])
            group = nodes.tgroup(cols=len(widths))
            table += group
            group += [nodes.colspec(colwidth=width) for width in widths]
            head = nodes.thead()
            head += line([nodes.paragraph(text=title) for title in ("Param", "Type", "Default", "Meaning")])
            body = nodes.tbody()
            for row in rows(stage):
                code = [nodes.paragraph("", "", nodes.literal(text=text)) for text in (row.name, row.type)]
                default = nodes.paragraph(text=row.default) if row.default == "not set" else None
                entry = line([*code, default or nodes.paragraph("", "", nodes.literal(text=row.default))])
                entry += nodes.entry("", nodes.paragraph(text=row.meaning))
                body += entry
            group += [head, body]
            return [table]

    def line(cells: list[nodes.Node]) -> nodes.row:
        row = nodes.row()
        row += [nodes.entry("", cell) for cell in cells]
        return row

    app.add_directive("param-table", ParamTable)
    return {"parallel_read_safe": True}
