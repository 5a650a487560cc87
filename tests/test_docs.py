"""Docstrings of everything public, by numpydoc's checks, and what the reference says of every Param."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from numpydoc.validate import validate

import spark_nn
from spark_nn import errors

DOCS = Path(__file__).parent.parent / "docs"
# The same as the site's (docs/conf.py tells why), and in addition every parameter.
UNCHECKED = {"ES01", "EX01", "SA01", "GL01", "GL08", "SS05", "SS06"}
STAGES = ["KerasEstimator", "KerasModel", "TorchEstimator", "TorchModel"]
HANDED_OUT = ["spark_nn.ranks.context.RankContext", "spark_nn.ranks.context.Batches", "spark_nn.ranks.saves.Saves"]
# What users get and do not make: their constructors' arguments are the house's own.
NOT_MADE = {*HANDED_OUT, "spark_nn.KerasModel", "spark_nn.TorchModel"}


def public():
    """Names of what users import or are handed, and of its methods and properties."""
    named = [f"spark_nn.{name}" for name in spark_nn.__all__ if name != "__version__"]
    raised = [f"spark_nn.errors.{name}" for name, each in vars(errors).items() if inspect.isclass(each)]
    for path in [*named, *raised, *HANDED_OUT]:
        yield path
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        if inspect.isclass(found):
            yield from (f"{path}.{member}" for member in ours(found))


def ours(kind):
    """Members whose docstrings are ours, without getters and setters, which point at their Param."""
    for name, member in inspect.getmembers(kind):
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__module__.startswith("spark_nn"):
            continue
        if not re.match(r"(Get|Set) :py:attr:", function.__doc__ or "") and name != "setParams":
            yield name


def test_docstrings_are_numpydocs():
    found = []
    for path in public():
        unchecked = UNCHECKED | ({"PR01"} if path in NOT_MADE or path.startswith("spark_nn.errors.") else set())
        for code, text in validate(path)["errors"]:
            if code not in unchecked:
                found.append(f"{path}: {code} {text}")
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def table():
    """The site's directive, without Sphinx."""
    spec = importlib.util.spec_from_file_location("params_table", DOCS / "_ext" / "params.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", STAGES)
def test_the_reference_has_type_default_and_meaning_of_every_param(table, name):
    stage = getattr(spark_nn, name)
    rows = {row.name: row for row in table.rows(stage)}
    assert rows.keys() == {param.name for param in stage().params}
    for row in rows.values():
        assert row.type and "Any" not in row.type, row
        assert len(row.meaning) > 10, row
        if row.default != "not set":
            assert ast.literal_eval(row.default) == stage().getOrDefault(row.name), row
    for name, kind, default in (("predictBatchSize", "int", "not set"), ("handleInvalid", "str", "'error'")):
        assert rows[name][1:3] == (kind, default)


def test_every_page_is_in_a_toctree_and_every_stage_in_a_table():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = [line for tree in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL) for line in tree.splitlines()]
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or any(Path(page.stem).match(line) for line in listed if line), page.name
    tables = re.findall(r"\{param-table\} (\w+)", (DOCS / "params.md").read_text(encoding="utf-8"))
    assert sorted(tables) == sorted(STAGES)
