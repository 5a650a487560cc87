from __future__ import annotations

import subprocess
import sys

import pytest

from spark_nn import doctor


def fake_java(folder, text, status=0):
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit {status}\n")
    java.chmod(0o755)
    return str(folder)


def test_this_machine_is_fine():
    assert doctor.javaProblem() is None


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ('openjdk version "11.0.2" 2019', 0, "needs Java 17 or newer, and .*java is version 11: install Java 17"),
        ('java version "1.8.0_202"', 0, "is version 1:"),
        ("nothing of the kind", 0, "is version unknown"),
        ("broken", 3, "does not run"),
    ],
)
def test_a_java_that_will_not_do(tmp_path, monkeypatch, text, status, message):
    monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path, text, status))
    with pytest.raises(SystemExit, match=message):
        doctor.requireJava()


def test_a_newer_java_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", fake_java(tmp_path, 'openjdk version "25" 2025-09-16'))
    assert doctor.javaProblem() is None


def test_a_machine_without_java_gets_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "spark_nn.doctor"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "Spark needs Java, and there is none (PATH): install Java 17 or newer (Debian and Ubuntu: apt-get"
    )
