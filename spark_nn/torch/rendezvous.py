"""Worker side: the ranks of a gang as the process group of ``torch.distributed``.

Where the ranks meet, rank 0 listens on its own address, and on no other. But neither that server nor what Gloo and
NCCL open has a notion of who calls: whoever reaches the ranks' addresses can disturb them while they train. What is
exchanged here are numbers, never pickles.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Literal

from spark_nn.errors import CollectiveError
from spark_nn.gang.collective import Collective
from spark_nn.gang.ports import interface_of, numeric


@contextlib.contextmanager
def joined(
    collective: Collective, host: str, timeout: float, backend: Literal["gloo", "nccl"] = "gloo"
) -> Iterator[None]:
    """Be a process group for the time of the block; all ranks call it.

    Parameters
    ----------
    collective : Collective
        Exchange with the other ranks, which tells them where to meet.
    host : str
        An address of this machine that the other ranks reach.
    timeout : float
        Seconds that a rank may keep silent.
    backend : {"gloo", "nccl"}
        For CPUs or for GPUs.

    Raises
    ------
    CollectiveError
        This process is in a group already.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise CollectiveError(
            f"torch.distributed is already in use in the process of rank {collective.rank}, which takes part in one "
            "group only: leave init_process_group to the fit, or choose collective='ring'"
        )
    limit = timedelta(seconds=timeout)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        if collective.rank == 0:
            # Bound here: by itself the server would listen on all of the machine's addresses.
            door.bind((host, 0))
            door.listen()
        address = f"{host} {door.getsockname()[1] if collective.rank == 0 else 0}"
        place, port = collective.all_gather(address.encode())[0].decode().split()
        first = collective.rank == 0
        store = dist.TCPStore(
            place,
            int(port),
            collective.world,
            first,
            limit,
            wait_for_workers=False,
            master_listen_fd=os.dup(door.fileno()) if first else None,
        )
    if backend == "gloo" and (name := interface_of(numeric(host))) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name  # in this rank's own process
    dist.init_process_group(backend, store=store, rank=collective.rank, world_size=collective.world, timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()
