"""Worker side: what PyTorch's process groups need of a rank."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from spark_nn.gang.ports import Port, interface_of
from spark_nn.ranks.context import RankContext

VARIABLES = {"KERAS_BACKEND": "torch"}
PRELOAD = ("spark_nn.ranks.torch:prepare",)


def prepare() -> None:
    """Import what every rank needs, without starting any of it."""
    import torch.distributed  # noqa: F401

    from spark_nn.dataset import petastorm_compat

    petastorm_compat.load()


def environment(context: RankContext) -> dict[str, str]:
    """Variables to set before the function runs."""
    host, _, port = context.coordinator.rpartition(":")
    found = {
        "MASTER_ADDR": host.strip("[]"),
        "MASTER_PORT": port,
        "RANK": str(context.rank),
        "WORLD_SIZE": str(context.world),
        "LOCAL_RANK": str(context.localRank),
        "LOCAL_WORLD_SIZE": str(context.localWorld),
        # Rank 0 has the store already (see `opened`), and init_process_group must not start one on every address.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    # Gloo would listen where the machine's name leads, which may be another network.
    interface = interface_of(context.host)
    return found if interface is None else {**found, "GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def opened(context: RankContext, port: Port) -> Any:
    """The store that the ranks meet in, on rank 0, bound to the task's address alone."""
    if context.rank:
        return None
    from torch.distributed import TCPStore

    # PyTorch closes what it is handed.
    descriptor = port.listening().dup().detach()
    return TCPStore(
        port.host,
        port.number,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=descriptor,
        timeout=timedelta(seconds=context.timeout),
    )


def initialize(context: RankContext, options: dict[str, Any]) -> None:
    """Form the default process group."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(**{"backend": backend, "timeout": timedelta(seconds=context.timeout), **options})
    context.atEnd.append(dist.destroy_process_group)
