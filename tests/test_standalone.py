"""A cluster of Spark's own on one machine, as benchmarks/standalone.py starts it."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.toy import ToyEstimator

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parent.parent
DRIVER = """
import sys
import numpy as np
from pyspark.sql import SparkSession
from tests.test_standalone import weights
spark = SparkSession.builder.master(sys.argv[1]).config("spark.ui.enabled", False).getOrCreate()
np.save(sys.argv[2], weights(spark))
"""


@pytest.fixture(scope="module")
def cluster_class():
    return runpy.run_path(str(ROOT / "benchmarks" / "standalone.py"))["Cluster"]


def weights(spark):
    """What two workers learn of rows that are the same on every master."""
    rows = spark.range(0, 600, 1, 2).selectExpr("array(id % 7 / 7D, id % 11 / 11D) AS features", "id % 5 AS label")
    model = ToyEstimator(numWorkers=2, batchSize=50, epochs=3, seed=4, verbose=0).fit(rows)
    return np.load(model.fitted.file.path)


def test_a_fit_on_two_machines_workers_is_that_of_local_tasks(spark, tmp_path, cluster_class):
    folder, found = tmp_path / "cluster", tmp_path / "found.npy"
    with cluster_class(folder) as cluster:
        port = int(cluster.master.rpartition(":")[2])
        processes = [psutil.Process(each.pid) for each in cluster._processes.values()]
        listening = [c.laddr.ip for each in processes for c in each.net_connections("inet") if c.status == "LISTEN"]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**cluster.environment, "PYTHONPATH": paths, "SPARK_WORKER_DIR": str(tmp_path)}
        command = [sys.executable, "-c", DRIVER, cluster.master, str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        for worker in ("work0", "work1"):
            assert list((folder / worker).glob("app-*/*/stderr")), f"{worker} had no executor"
    np.testing.assert_array_equal(np.load(found), weights(spark))
    assert len(processes) == 3 and not any(each.is_running() for each in processes)
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert not list((folder / "store").glob("*")), "left behind in the store"


def test_a_cluster_that_does_not_come_up_says_so_and_goes(tmp_path, cluster_class):
    cluster = cluster_class(tmp_path / "cluster", memory="little")
    with pytest.raises(RuntimeError, match=r"the cluster's worker\d has ended:[\s\S]*--memory"), cluster:
        pass
    assert all(process.poll() is not None for process in cluster._processes.values())
