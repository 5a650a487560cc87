"""Worker side: what TensorFlow's strategies for several machines need of a rank."""

from __future__ import annotations

import json
from typing import Any

from spark_nn.gang.ports import Port
from spark_nn.ranks.context import RankContext

# As a Keras fit has them, so that both are forked from the same server.
VARIABLES = {"KERAS_BACKEND": "tensorflow"}
PRELOAD = ("spark_nn.keras.training:prepare",)


def environment(context: RankContext) -> dict[str, str]:
    """Variables to set before the function runs."""
    cluster = {role: addresses for role, addresses in context.clusterSpec.items() if role != "evaluator"}
    task = {"type": context.role, "index": context.index}
    found = {
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": task}),
        # The port is held until TensorFlow's server, which starts in this process, shares it.
        "TF_GRPC_REUSE_PORT": "true",
        # The gang's addresses are no business of a proxy's.
        "no_grpc_proxy": context.hosts,
    }
    if "ps" in cluster:
        # A server with fewer threads than others that call it at the same time may wait for itself.
        found["TF_NUM_INTEROP_THREADS"] = str(max(context.cpus, len(cluster.get("worker", [])) + 1))
    return found


def opened(context: RankContext, port: Port) -> None:
    """Nothing: strategies start the servers of the ranks that run the function."""


def served(context: RankContext, port: Port) -> Any:
    """The server of a worker or parameter server, which the chief gives work."""
    import tensorflow as tf

    cluster = {role: addresses for role, addresses in context.clusterSpec.items() if role != "evaluator"}
    return tf.distribute.Server(
        tf.train.ClusterSpec(cluster), job_name=context.role, task_index=context.index, protocol="grpc"
    )
