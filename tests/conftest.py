from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import cloudpickle
import pytest

from spark_nn.dataset.lease import shelf
from spark_nn.doctor import javaProblem
from tests import toy
from tests.keras import models

# Executors of a cluster do not have the tests: their code travels with the functions.
cloudpickle.register_pickle_by_value(toy)
cloudpickle.register_pickle_by_value(models)


def pytest_configure(config):
    # One sentence for a machine without Java, in place of an error per test.
    problem = javaProblem()
    if problem is not None:
        pytest.exit(problem, returncode=1)


class Sessions:
    """One Spark session at a time, started anew where a test asks for another master."""

    def __init__(self, folder):
        self.folder = folder
        self.master = None
        self.session = None

    def get(self, master):
        if self.master != master:
            self.stop()
            self.session = self._start(master)
            self.master = master
        return self.session

    def stop(self):
        if self.session is not None:
            self.session.stop()
            self.session = self.master = None

    def _start(self, master):
        from pyspark.sql import SparkSession

        os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
        os.environ["SPARK_WORKER_DIR"] = str(self.folder / "work")
        conf = {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.sql.shuffle.partitions": "4",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.sql.warehouse.dir": str(self.folder / "warehouse"),
            "spark.local.dir": str(self.folder / "local"),
            "spark.nn.storeUrl": str(self.folder / "store"),
            "spark.log.level": "ERROR",
        }
        builder = SparkSession.builder.master(master).appName("tests")
        for name, value in conf.items():
            builder = builder.config(name, value)
        return builder.getOrCreate()


@pytest.fixture(scope="session")
def sessions(tmp_path_factory):
    sessions = Sessions(tmp_path_factory.mktemp("spark"))
    yield sessions
    sessions.stop()


@pytest.fixture
def spark(sessions):
    return sessions.get("local[2]")


@pytest.fixture
def cluster(sessions):
    """Two executor processes of one core each."""
    return sessions.get("local-cluster[2,1,2048]")


@pytest.fixture
def store(tmp_path):
    """A store of the test's own; a fit must leave it, and the temporary directory, as they were."""
    folder = tmp_path / "store"
    folder.mkdir()
    before = _temporary()
    yield str(folder)
    shelf().clear()  # what the next fit might have used again
    left = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert not left, f"left behind in the store: {left}"
    assert not _temporary() - before, "left behind in the temporary directory"


def _temporary():
    return {path.name for path in Path(tempfile.gettempdir()).glob("spark_nn-*") if "model" not in path.name}
