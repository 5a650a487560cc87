from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.timeout(180)
def test_the_twenty_lines_run_as_they_stand(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("AUC")[1]) > 0.95
    assert re.search(r"^epoch 5/5 .*auc 0\.9", done.stderr, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir() if path.name != "spark-warehouse"] == ["example.py"]
