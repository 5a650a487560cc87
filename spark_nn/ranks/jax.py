"""Worker side: what JAX's distributed runtime needs of a rank."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from typing import Any

from spark_nn.errors import ClusterError
from spark_nn.gang.ports import Port
from spark_nn.ranks.context import RankContext

VARIABLES = {"KERAS_BACKEND": "jax"}
PRELOAD = ("spark_nn.ranks.jax:prepare",)
_GLOO = "make_gloo_tcp_collectives"


def prepare() -> None:
    """Import what every rank needs, without starting any of it."""
    import jax  # noqa: F401

    from spark_nn.dataset import petastorm_compat

    petastorm_compat.load()


def environment(context: RankContext) -> dict[str, str]:
    """Variables to set before the function runs."""
    found = {
        "JAX_COORDINATOR_ADDRESS": context.coordinator,
        "no_grpc_proxy": context.hosts,  # the gang's addresses are no business of a proxy's
    }
    # Without a card JAX would look for one of each kind.
    return found if os.environ.get("CUDA_VISIBLE_DEVICES") else {**found, "JAX_PLATFORMS": "cpu"}


def opened(context: RankContext, port: Port) -> None:
    """Nothing: `initialize` starts the coordinator."""


def initialize(context: RankContext, options: dict[str, Any]) -> None:
    """Form the cluster of processes."""
    import jax

    join(context.coordinator, context.host, context.world, context.rank, context.timeout, **options)
    # Who leaves without a word takes the others' processes along.
    context.atEnd.append(jax.distributed.shutdown)


def join(coordinator: str, host: str, world: int, rank: int, timeout: float, **options: Any) -> None:
    """Make this process one of JAX's cluster.

    Parameters
    ----------
    coordinator : str
        Where rank 0 serves, as ``host:port``.
    host : str
        The address of this machine to be reached at.
    world, rank : int
        How many processes there are, and which this is.
    timeout : float
        Seconds that a rank waits for anything.
    **options
        Of ``jax.distributed.initialize``, in place of these.

    Raises
    ------
    ClusterError
        This version of JAX could not be kept to the address.
    """
    import jax
    from jaxlib import _jax

    # Gloo would listen where the machine's name leads, which may be another network; JAX passes no address on to it.
    if not hasattr(_jax, _GLOO):
        raise ClusterError(
            f"jaxlib {importlib.metadata.version('jaxlib')} makes Gloo's connections in another way than the versions "
            "known here, and could not be kept to the task's address: use jax 0.10"
        )
    setattr(_jax, _GLOO, functools.partial(getattr(_jax, _GLOO), hostname=host))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {
        "coordinator_address": coordinator,
        "num_processes": world,
        "process_id": rank,
        "coordinator_bind_address": coordinator,
        "initialization_timeout": max(1, int(timeout)),
        "heartbeat_timeout_seconds": max(1, int(timeout)),
        "shutdown_timeout_seconds": max(1, int(timeout)),
        "cluster_detection_method": "deactivate",
    }
    jax.distributed.initialize(**{**given, **options})
