from __future__ import annotations

import subprocess
import sys

import pytest

import spark_nn


def imported_by(statement):
    script = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_imports_neither_spark_nor_a_framework():
    assert not imported_by("import spark_nn") & {"pyspark", "tensorflow", "keras", "torch", "numpy", "petastorm"}


def test_using_the_estimator_imports_no_framework():
    statement = "import spark_nn; spark_nn.KerasEstimator(model=print, loss='mse', optimizer='adam')"
    assert not imported_by(statement) & {"tensorflow", "keras", "torch", "petastorm"}


def test_public_names_are_there_and_name_the_public_package():
    for name in spark_nn.__all__:
        assert getattr(spark_nn, name) is not None
    assert spark_nn.KerasEstimator.__module__ == "spark_nn"
    assert spark_nn.KerasModel.__module__ == "spark_nn"
    assert set(dir(spark_nn)) == set(spark_nn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        spark_nn.Nonsense  # noqa: B018
