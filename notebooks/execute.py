"""Run notebooks and keep what they show: `python notebooks/execute.py [notebook ...]`.

What a reader has no use for is left out: what processes say on their way up, times, and the names of folders on the
machine that ran them. A notebook that still names one, or whose outputs are large, is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LARGEST = 300_000  # bytes of a notebook's outputs
SECONDS = 600  # for a cell
FOLDER = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|usr|opt|var)/")


def executed(file: Path) -> nbformat.NotebookNode:
    """The notebook as it comes out of a kernel of its own, without noise."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(file.parent)}}).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def problem(notebook: nbformat.NotebookNode) -> str | None:
    """Why the outputs are not to be kept, or None."""
    outputs = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    if len(outputs) > LARGEST:
        return f"its outputs have {len(outputs):,} bytes, more than {LARGEST:,}"
    found = FOLDER.search(re.sub(r'"image/png": "[^"]*"', "", outputs))
    return found and f"its outputs name a folder of this machine: ...{outputs[found.start() : found.end() + 40]}"


def main() -> None:
    """Run the notebooks named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    for file in parser.parse_args().notebooks:
        began = time.monotonic()
        notebook = executed(file)
        refused = problem(notebook)
        if refused:
            sys.exit(f"{file.name}: {refused}")
        nbformat.write(notebook, file)
        print(f"{file.name}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
