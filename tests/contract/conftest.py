"""Every test here that uses a session runs on each kind of it."""

from __future__ import annotations

import pytest
from pyspark.ml import util


@pytest.fixture(scope="module", params=["classic", "connect"])
def kind(request, sessions):
    if request.param == "connect" and not hasattr(util, "_remove_dfs_dir"):
        pytest.skip("pyspark 4.0 cannot overwrite on Spark Connect")
    yield request.param
    if request.param == "connect":
        sessions.stop()  # what it does to the environment is not for others


@pytest.fixture
def spark(sessions, kind):
    session = sessions.get("local[2]", kind)
    session.conf.set("spark.nn.allowedModules", "tests.torch")  # where the functions are that saved networks name
    yield session
    session.conf.unset("spark.nn.allowedModules")
