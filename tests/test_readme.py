from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
# What the second example leaves to its reader.
REST = """
rows = spark.range(64).selectExpr("if(id % 2 = 0, 'red', 'blue') AS color", "double(id) AS age", "rand(1) AS height",
                                  "rand(2) AS price", "int(id % 2) AS sold")
print("COLUMNS", *net.setVerbose(0).fit(rows).transform(rows).columns[5:])
"""


@pytest.mark.timeout(240)
def test_the_examples_run_as_they_stand(tmp_path):
    lines, several = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(lines + several + REST)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=230)
    assert done.returncode == 0, done.stderr[-3000:]
    auc, columns = re.fullmatch(r"AUC (.*)\nCOLUMNS (.*)\n", done.stdout).groups()
    assert float(auc) > 0.95
    assert columns.split() == ["prediction_price", "rawPrediction_sold", "probability_sold", "prediction_sold"]
    assert re.search(r"^epoch 5/5 .*auc 0\.9", done.stderr, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir() if path.name != "spark-warehouse"] == ["example.py"]
