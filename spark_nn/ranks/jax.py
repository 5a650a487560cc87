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
    from jaxlib import _jax

    # Gloo would listen where the machine's name leads, which may be another network; JAX passes no address on to it.
    if not hasattr(_jax, _GLOO):
        raise ClusterError(
            f"jaxlib {importlib.metadata.version('jaxlib')} makes Gloo's connections in another way than the versions "
            "known here, and could not be kept to the task's address: use jax 0.10"
        )
    setattr(_jax, _GLOO, functools.partial(getattr(_jax, _GLOO), hostname=context.host))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {
        "coordinator_address": context.coordinator,
        "num_processes": context.world,
        "process_id": context.rank,
        "coordinator_bind_address": context.coordinator,
        "initialization_timeout": max(1, int(context.timeout)),
        "heartbeat_timeout_seconds": max(1, int(context.timeout)),
        "shutdown_timeout_seconds": max(1, int(context.timeout)),
        "cluster_detection_method": "deactivate",
    }
    jax.distributed.initialize(**{**given, **options})
    # Who leaves without a word takes the others' processes along.
    context.atEnd.append(jax.distributed.shutdown)
