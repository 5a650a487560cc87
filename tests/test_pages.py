"""Every ```python block of the site's pages runs: a page's in their order, as one script, all pages in one session.

What a page's reader need not see, such as a DataFrame or what is asserted of the result, stands in an HTML comment and
runs as well. A block after a comment that begins with "not run" is only compiled. The page on tracking runs in
tests/tracking/test_docs.py, which looks at what TensorBoard and MLflow then have.
"""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F

import spark_nn
from spark_nn.dataset.lease import shelf

pytestmark = pytest.mark.timeout(180)

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"(<!-- not run[^\n]*-->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Names that a page may use without importing them.
IMPORTED = {
    "F": F,
    "np": np,
    "pd": pd,
    "io": io,
    "spark_nn": spark_nn,
    **{name: getattr(spark_nn, name) for name in ("KerasEstimator", "KerasModel", "TorchEstimator", "TorchModel")},
    "Pipeline": Pipeline,
    "VectorAssembler": VectorAssembler,
    "BinaryClassificationEvaluator": BinaryClassificationEvaluator,
    "CrossValidator": CrossValidator,
    "ParamGridBuilder": ParamGridBuilder,
}
# And what it may take for made, unless it makes its own.
MADE = """
def build():
    import keras
    return keras.Sequential([keras.layers.Dense(1)])

df = spark.sql("SELECT id, rand(1) AS a, rand(2) AS b, rand(3) AS label FROM range(64)")
net = KerasEstimator(model=build, loss="mse", inputCols=["a", "b"], verbose=0)
"""


def blocks(page):
    """The line where each block of a page begins, its code, and whether it is only shown."""
    text = page.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == len(re.findall(r"^ *```python", text, re.MULTILINE)), "a block does not end"
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(2)) + 1, found[2], found[1] is not None


ELSEWHERE = {"tracking"}
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in ELSEWHERE and list(blocks(page))]


@pytest.fixture
def quiet(sessions, tmp_path, monkeypatch, page):
    spark = sessions.get("local[2]")
    monkeypatch.chdir(tmp_path)
    yield spark
    shelf().clear()
    spark.conf.unset("spark.nn.allowedModules")
    if page.stem == "backends":  # Spark's Python workers keep the backend that they have scored with
        sessions.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(quiet, page):
    found = list(blocks(page))
    if find_spec("torch") is None and any("Torch" in code or "torch" in code for _, code, _ in found):
        pytest.skip("torch is not installed")
    names = {"__name__": "__main__", "spark": quiet, **IMPORTED}  # whose functions travel by value, as a script's do
    exec(MADE, names)
    for line, code, shown in found:
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if not shown:
            exec(compiled, names)


def test_few_blocks_are_only_shown():
    assert sum(shown for page in PAGES for _, _, shown in blocks(page)) <= 4
