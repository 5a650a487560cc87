"""The store on object storage: a real S3 server on the loopback, which driver, tasks and ranks all talk to."""

from __future__ import annotations

import os
import subprocess
import sys

import fsspec
import pytest
from moto.server import ThreadedMotoServer

pytestmark = pytest.mark.timeout(240)

# A driver of its own: its tasks inherit its environment, where S3's clients look for the server.
SCRIPT = """
import os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
import fsspec, numpy as np
from pyspark.sql import SparkSession
from spark_nn.dataset.lease import shelf
from tests.dataset.test_lease import data, estimator

url = sys.argv[1]
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()

def found():
    s3 = fsspec.filesystem("s3")
    s3.invalidate_cache()
    return sorted(s3.find(url))

def fit(store, **kwargs):
    model = estimator(store, numWorkers=2, epochs=3, validationFraction=0.2, **kwargs).fit(data(spark, 5000, 4))
    return np.load(model.fitted.file.path)

there = {cache: fit(url, cache=cache) for cache in ("none", "memory", "disk")}
files = [path for path in found() if path.endswith(".parquet")]
assert len(files) == 8, files  # four partitions, two splits, written once for the three fits
here = fit(sys.argv[2])
for cache, weights in there.items():
    assert weights.tobytes() == here.tobytes(), cache
shelf().clear()
assert found() == [], found()
fit(url)
print("fitted")
"""


@pytest.fixture
def s3(monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket/spark nn/store"
    server.stop()


def test_a_store_on_s3_serves_driver_tasks_and_ranks(s3, tmp_path):
    command = [sys.executable, "-c", SCRIPT, s3, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["fitted"]
    left = fsspec.filesystem("s3", skip_instance_cache=True).find("bucket")
    assert left == [], "the end of the interpreter removes what the last fit left"
