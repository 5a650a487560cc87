from __future__ import annotations

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import cloudpickle
import pytest

from spark_nn.dataset.lease import shelf
from spark_nn.doctor import javaProblem
from tests import toy
from tests.extended import EXTENDED
from tests.keras import models
from tests.torch import models as torch_models

ROOT = str(Path(__file__).parent.parent)
# Executors of a cluster do not have the tests: their code travels with the functions.
cloudpickle.register_pickle_by_value(toy)
cloudpickle.register_pickle_by_value(models)
cloudpickle.register_pickle_by_value(torch_models)


def pytest_configure(config):
    # One sentence for a machine without Java, in place of an error per test.
    problem = javaProblem()
    if problem is not None:
        pytest.exit(problem, returncode=1)
    if hasattr(config, "workerinput"):
        _own_temporary(config)


def _own_temporary(config):
    """Give this process of several that test side by side a temporary directory, which no other leaves anything in."""
    folder = tempfile.mkdtemp(prefix=f"{config.workerinput['workerid']}-")
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # what was found before
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config, items):
    """Mark the tests that are left to `tox -e extended`, and put those last that ask for a session of their own."""
    _mark_extended(config, items)
    # To stop a session and to start another takes seconds.
    order = {path: place for place, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (order[item.path], {"spark", "sessions"} & set(item.fixturenames) == {"sessions"}))


def _mark_extended(config, items):
    names = {f"{item.path.relative_to(Path(__file__).parent).as_posix()}::{item.name}": item for item in items}
    files = {name.partition("::")[0] for name in names}
    unknown = [each for each in EXTENDED if each not in names and each.partition("::")[0] in files]
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/extended.py names what there is not: {', '.join(unknown)}")
    for name in names.keys() & set(EXTENDED):
        names[name].add_marker(pytest.mark.extended)


class Sessions:
    """One Spark session at a time, started anew where a test asks for another master or kind.

    PySpark knows what kind of session there is by the environment; what starting one leaves there goes with it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.current = None
        self.session = None
        self.address = None  # of the Connect server, for clients in other processes
        self._environment = {}

    def get(self, master, kind="classic"):
        if self.current != (master, kind):
            self.stop()
            os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
            os.environ["SPARK_WORKER_DIR"] = str(self.folder / "work")
            # A Connect server's workers do not run in this folder, and another package may bring "tests" of its own.
            os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
            self._environment = dict(os.environ)
            self.session = self._classic(master) if kind == "classic" else self._connect(master)
            self.current = (master, kind)
        return self.session

    def stop(self):
        if self.session is not None:
            self.session.stop()
            self.session = self.current = self.address = None
            for name in [name for name in os.environ if "CONNECT" in name and name not in self._environment]:
                del os.environ[name]

    def _classic(self, master):
        from pyspark.sql import SparkSession

        return self._configured(SparkSession.builder.master(master)).getOrCreate()

    def _connect(self, master):
        """A client of a server in this process's JVM, as ``builder.remote("local[2]")`` starts it."""
        from pyspark.core.context import SparkContext
        from pyspark.sql import SparkSession
        from pyspark.sql.connect.client import DefaultChannelBuilder

        SparkContext._ensure_initialized()  # a JVM that knows nothing of what follows
        # Server and client take a free port only where Spark is being tested, and else one that others may have.
        os.environ["SPARK_TESTING"] = "1"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the client would set the server's conf again
                session = self._configured(SparkSession.builder.remote(master)).getOrCreate()
            self.address = f"sc://localhost:{DefaultChannelBuilder.default_port()}"
        finally:
            del os.environ["SPARK_TESTING"]
        return session

    def _configured(self, builder):
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
        for name, value in conf.items():
            builder = builder.config(name, value)
        return builder.appName("tests")


@pytest.fixture(scope="session")
def sessions(tmp_path_factory):
    sessions = Sessions(tmp_path_factory.mktemp("spark"))
    yield sessions
    sessions.stop()


@pytest.fixture
def spark(sessions):
    return sessions.get("local[2]")


@pytest.fixture(scope="module")
def connect(sessions):
    """A Spark Connect client; the module's end is its end, since what it does to the environment is not for others."""
    yield sessions.get("local[2]", "connect")
    sessions.stop()


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
