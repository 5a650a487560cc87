from __future__ import annotations

import os
import sys

import pytest

from spark_nn.doctor import javaProblem


def pytest_configure(config):
    # One sentence for a machine without Java, in place of an error per test.
    problem = javaProblem()
    if problem is not None:
        pytest.exit(problem, returncode=1)


def session(master, tmp_path_factory, **conf):
    from pyspark.sql import SparkSession

    # Workers must run this very Python, and find the modules of the tests.
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    folder = tmp_path_factory.mktemp("spark")
    os.environ["SPARK_WORKER_DIR"] = str(folder / "work")
    builder = (
        SparkSession.builder.master(master)
        .appName("tests")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.warehouse.dir", str(folder / "warehouse"))
        .config("spark.nn.storeUrl", str(folder / "store"))
        .config("spark.log.level", "ERROR")
    )
    for name, value in conf.items():
        builder = builder.config(name.replace("_", "."), value)
    return builder.getOrCreate()


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    spark = session("local[2]", tmp_path_factory)
    yield spark
    spark.stop()


@pytest.fixture
def store(tmp_path):
    """A store of the test's own; a fit must leave it empty."""
    folder = tmp_path / "store"
    folder.mkdir()
    yield str(folder)
    left = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert not left, f"left behind: {left}"
