"""Every test here that uses a session runs on each kind of it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", params=["classic", "connect"])
def kind(request, sessions):
    yield request.param
    if request.param == "connect":
        sessions.stop()  # what it does to the environment is not for others


@pytest.fixture
def spark(sessions, kind):
    return sessions.get("local[2]", kind)
