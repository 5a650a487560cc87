"""How the site is built: `tox -e docs`, without a network, and with every warning an error."""

import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import spark_nn  # noqa: E402

project = "spark_nn"
author = "the authors of spark_nn"
copyright = "the authors of spark_nn. Apache License 2.0"
version = release = spark_nn.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc", "params"]
exclude_patterns = ["_build", "_ext", "examples"]

# -- Pages: MyST Markdown, that GitHub shows too; notebooks with the outputs that were committed with them.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"

# Notebooks live beside docs/, where Sphinx does not look: it gets copies.
NOTEBOOKS = HERE / "_notebooks"
shutil.rmtree(NOTEBOOKS, ignore_errors=True)
NOTEBOOKS.mkdir()
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copy(notebook, NOTEBOOKS)

# -- The reference: from docstrings.
autodoc_typehints = "none"  # numpydoc's sections tell the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # api.md names them; params.md has the params
numpydoc_xref_param_type = False
# All checks but: ES01, EX01, SA01 (not everything has more to say, an example or a relative); GL01 (the house's
# docstrings begin on their first line, ruff's D212); GL08 (what has no docstring is ruff's matter); SS05 and SS06 (a
# summary may be a noun phrase, as in pyspark, and take the lines that it needs); PR01 and RT01, to which
# tests/test_docs.py holds what is ours and what users call: they never make a context, a fitted model or an error.
numpydoc_validation_checks = {"all", "ES01", "EX01", "SA01", "GL01", "GL08", "SS05", "SS06", "PR01", "RT01"}
# pyspark's own; and getters and setters, which point at their Params.
numpydoc_validation_exclude = {r"\.(fit|transform|copy|extractParamMap)$", r"\.[gs]et[A-Z]\w*$", r"\.hasParam$"}

# A name in a text that leads nowhere is an error, but for other projects' names: they are not looked up offline.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!spark_nn\b).*")]
if os.environ.get("SPARK_NN_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "pyspark": ("https://spark.apache.org/docs/latest/api/python", None),
    }

# -- Looks.
html_theme = "pydata_sphinx_theme"
html_title = "spark_nn"
html_static_path = ["_static"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
}


def without_empty_patterns(app, docname, source):
    """Leave patterns out of the front page's contents where no page has such a name: Sphinx would warn of them."""
    if docname == "index":
        lines = source[0].splitlines(keepends=True)
        source[0] = "".join(
            line
            for line in lines
            if "*" not in line or any(HERE.glob(f"{line.strip()}.md")) or any(HERE.glob(line.strip()))
        )


def setup(app):
    app.connect("source-read", without_empty_patterns)
