"""Where the ranks of ``torch.distributed`` meet, and who may."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(120)

SCRIPT = """
import psutil
import torch.distributed as dist
from spark_nn.errors import CollectiveError
from spark_nn.gang.collective import Alone
from spark_nn.torch.rendezvous import joined

for _ in range(2):
    with joined(Alone(), "127.0.0.1", 20.0):
        assert dist.get_world_size() == 1
        here = psutil.Process().net_connections()
        print(*{each.laddr.ip for each in here if each.status == psutil.CONN_LISTEN})
        try:
            with joined(Alone(), "127.0.0.1", 20.0):
                pass
        except CollectiveError as error:
            print(error)
    assert not dist.is_initialized()
"""


def test_nothing_listens_beyond_the_address_of_the_gang_and_a_group_ends_with_its_block():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == lines[2] == "127.0.0.1"
    assert "already in use in the process of rank 0" in lines[1]
