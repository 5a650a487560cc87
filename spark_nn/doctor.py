"""Checks of a machine that is to run Spark: ``python -m spark_nn.doctor``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MIN_JAVA = 17


def javaProblem() -> str | None:
    """What is wrong with this machine's Java for Spark 4, in one sentence; None where nothing is."""
    cure = (
        f"install Java {MIN_JAVA} or newer (Debian and Ubuntu: apt-get install openjdk-17-jre-headless; "
        "macOS: brew install openjdk@17) or point JAVA_HOME to one"
    )
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if java is None or not Path(java).exists():
        return f"Spark needs Java, and there is none ({'JAVA_HOME=' + home if home else 'PATH'}): {cure}."
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"Spark needs Java, and {java} does not run ({error}): {cure}."
    found = re.search(r'version "(\d+)', answer.stderr + answer.stdout)
    if found is None or int(found[1]) < MIN_JAVA:
        version = found[1] if found else "unknown"
        return f"Spark 4 needs Java {MIN_JAVA} or newer, and {java} is version {version}: {cure}."
    return None


def requireJava() -> None:
    """Leave the program with one sentence where Spark could not start.

    Raises
    ------
    SystemExit
        Java is missing, does not run or is too old.
    """
    problem = javaProblem()
    if problem is not None:
        raise SystemExit(problem)


if __name__ == "__main__":
    requireJava()
    sys.stdout.write("this machine can run Spark 4\n")
