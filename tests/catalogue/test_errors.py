"""docs/errors.md is true and whole: each error there is raised with that text, and none that users meet is missing."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.catalogue.elsewhere import ELSEWHERE, INTERNAL
from tests.catalogue.raised import DRIVER
from tests.catalogue.workers import WORKERS

RAISED = {**DRIVER, **WORKERS}
ROOT = Path(__file__).parent.parent.parent
PUBLIC = {
    *("SparkNNError", "ParamError", "ColumnError", "StoreError", "DatasetError", "ClusterError", "CollectiveError"),
    *("PeerLost", "OutOfStep", "ModelFileError", "CheckpointError", "NonFiniteLoss", "TrainingError"),
    *("TypeError", "ImportError"),
}
# So many characters of a text must be in the test that raises it.
PART = 10
# What PySpark puts before a TypeError of a param's converter.
OF_PYSPARK = r'(Invalid param value given for param "\w+"\. )?'


def pages_entries():
    """Heading, cause and cure of every error in the catalogue."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    found = re.findall(r"^`(.+)`\n: Cause: (.+)\n: Cure: (.+)$", text, re.MULTILINE)
    assert len(found) == len(re.findall(r"^: Cure: ", text, re.MULTILINE)) == text.count("\n: Cause: ")
    return found


HEADINGS = [heading for heading, _, _ in pages_entries()]


def as_regex(heading):
    return re.compile(OF_PYSPARK + ".*".join(map(re.escape, heading.split("…"))), re.DOTALL)


def template(node):
    """A string of the source, with … for what it fills in; None where it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "…") + (template(node.right) or "…")
    return None


@functools.cache
def sources():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "spark_nn").rglob("*.py")}


@functools.cache
def texts():
    """Every string of the package."""
    return {text for tree in sources().values() for node in ast.walk(tree) if (text := template(node))}


def raised_texts():
    """Where an error of a public class is made, and its text."""
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PUBLIC and node.args:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", template(node.args[0]) or "…"


def case_of(heading):
    """The longest beginning of a heading that has a case."""
    return max((key for key in {*RAISED, *ELSEWHERE} if heading.startswith(key)), key=len, default=None)


def test_every_heading_has_one_case_and_every_case_a_heading():
    assert len(HEADINGS) == len(set(HEADINGS)) > 200
    assert not RAISED.keys() & ELSEWHERE.keys()
    found = [case_of(heading) for heading in HEADINGS]
    assert [heading for heading, case in zip(HEADINGS, found, strict=True) if case is None] == []
    assert {*RAISED, *ELSEWHERE} == set(found)
    assert sorted(found) == sorted(set(found)), "several headings share a case: write more of their beginnings"


def test_every_error_that_the_package_makes_is_in_the_catalogue():
    patterns = [(heading.split("…"), as_regex(heading)) for heading in HEADINGS]
    missing = [
        f"{place} {text}"
        for place, text in raised_texts()
        if text not in INTERNAL
        and not any(all(part in text for part in parts) and pattern.fullmatch(text) for parts, pattern in patterns)
    ]
    assert not missing, "add to docs/errors.md:\n" + "\n".join(missing)
    assert {text for _, text in raised_texts()} >= INTERNAL, "no longer in the package"


@pytest.mark.parametrize("key", RAISED)
def test_the_text_is_the_catalogues(key):
    (heading,) = [heading for heading in HEADINGS if case_of(heading) == key]
    try:
        error = RAISED[key]()
    except Exception as raised:  # noqa: BLE001  (its class is of no interest, but its text)
        error = raised
    assert isinstance(error, Exception), "nothing was raised"
    assert as_regex(heading).fullmatch(str(error)), f"{heading}\n{type(error).__name__}: {error}"


@functools.cache
def looked_for(path):
    """The strings of each test of a file, and of the tables that it uses."""
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    tables = {
        target.id: node
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = {}
    for test in tree.body:
        if isinstance(test, ast.FunctionDef):
            nodes = list(ast.walk(test))
            used = {node.id for node in nodes if isinstance(node, ast.Name)} & tables.keys()
            nodes += [node for name in used for node in ast.walk(tables[name])]
            found[test.name] = [text for node in nodes if (text := template(node))]
    return found


@pytest.mark.parametrize("key", ELSEWHERE)
def test_another_test_raises_it(key):
    (heading,) = [heading for heading in HEADINGS if case_of(heading) == key]
    fixed = max(heading.split("…"), key=len)
    assert any(as_regex(heading).fullmatch(text) for text in texts() if fixed in text), (
        f"the package has no such text: {heading}"
    )
    path, _, name = ELSEWHERE[key].partition("::")
    assert name.startswith("test_")
    assert name in looked_for(path), f"there is no such test: {ELSEWHERE[key]}"
    # What the test looks for is a part of the text.
    wanted = "\n".join(re.sub(r"\\(.)", r"\1", text) for text in looked_for(path)[name])
    parts = [piece[at : at + PART] for piece in heading.split("…") for at in range(max(1, len(piece) - PART + 1))]
    assert any(part in wanted for part in parts if len(part) == PART), f"{ELSEWHERE[key]} does not look for {heading}"
