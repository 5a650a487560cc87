"""Worker side: gradients averaged by TensorFlow's own collective operations, which between GPUs are NCCL's.

Only the gradients go that way. Weights, metrics and digests travel through the gang's own collective, which is
also the judge of what went wrong: TensorFlow says that an operation failed, and the collective which rank is lost.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any, Literal

import tensorflow as tf
from tensorflow.core.protobuf import tensorflow_server_pb2
from tensorflow.python.eager import context as tf_context

from spark_nn.errors import CollectiveError
from spark_nn.gang.collective import Collective, Engine, engine_for
from spark_nn.keras.gradients import Averager

_JOB = "worker"
_LEADER = f"/job:{_JOB}/replica:0/task:0"
# How TensorFlow reports that a collective operation cannot be completed.
_BROKEN = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
)


def averager(engine: Engine, collective: Collective, host: str, timeout: float) -> Averager:
    """What averages the gradients; all ranks call it, before TensorFlow does anything else in the process.

    Parameters
    ----------
    engine : {"auto", "ring", "native"}
        What was asked for, the same on all ranks.
    collective : Collective
        Exchange with the other ranks.
    host : str
        An address of this machine that the other ranks reach.
    timeout : float
        Seconds that a rank may keep silent.
    """
    if engine == "ring" or collective.world == 1:
        return Averager(collective)
    cards = len(tf.config.list_physical_devices("GPU"))
    everywhere = [int(count) for count in collective.all_gather(b"%d" % cards)]
    if engine_for(engine, everywhere) == "ring":
        return Averager(collective)
    join(collective, host, timeout)
    return NativeAverager(collective, "GPU" if all(everywhere) else "CPU")


def join(collective: Collective, host: str, timeout: float) -> None:
    """Start this rank's server, and let TensorFlow's collective operations reach all ranks.

    TensorFlow can do so once per process, and only before its runtime is up.

    Parameters
    ----------
    collective, host, timeout
        See :func:`averager`.

    Raises
    ------
    CollectiveError
        TensorFlow has already been at work in a rank's process.
    """
    context = tf_context.context()
    started = [rank for rank, state in enumerate(collective.all_gather(b"%d" % _running(context))) if state == b"1"]
    if started:
        raise CollectiveError(
            f"TensorFlow is already at work in the process of rank {', '.join(map(str, started))}, and takes its own "
            "collective operations into use only before that: choose collective='ring', or a fresh process"
        )
    # Bound here until the server has it, so that no one else can be given the port in between.
    os.environ["TF_GRPC_REUSE_PORT"] = "true"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, 0))
        port = reserved.getsockname()[1]
        own = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        places = [place.decode() for place in collective.all_gather(own.encode())]
        task = f"/job:{_JOB}/task:{collective.rank}"
        context.configure_collective_ops(collective_leader=_LEADER, device_filters=(task,))
        jobs = tf.compat.v1.ConfigProto().experimental.coordination_config.coordinated_job_list
        jobs.add(name=_JOB, num_tasks=collective.world)
        # Its heartbeats tell of a rank that neither answers nor dies. An operation can have a time limit too, but
        # pays for it with a thread per step, each of which sleeps until the limit has passed.
        context.configure_coordination_service(
            service_type="standalone",
            service_leader=_LEADER,
            coordinated_jobs=list(jobs),
            heartbeat_timeout_in_ms=int(1000 * timeout),
            cluster_register_timeout_in_ms=int(1000 * timeout),
            shutdown_barrier_timeout_in_ms=1000,
        )
        config = context.config
        config.device_filters.append(task)
        config.experimental.collective_group_leader = _LEADER
        context.enable_collective_ops(
            tensorflow_server_pb2.ServerDef(
                cluster=tf.train.ClusterSpec({_JOB: places}).as_cluster_def(),
                default_session_config=config,
                job_name=_JOB,
                task_index=collective.rank,
                protocol="grpc",
                port=port,
            )
        )
        with _judged(collective):
            context.ensure_initialized()


class NativeAverager(Averager):
    """Averages gradients over the ranks by TensorFlow's own operations; rows of sparse ones go through the gang's.

    Every exchange has a number, and meets only those of the other ranks that have the same. A rank that makes fewer
    steps than others therefore leaves them waiting, in an operation that nobody else will come to, while it waits for
    them in the gang's collective at the end of the epoch: an error once the time limit has passed, and never a mixture.

    Parameters
    ----------
    collective : Collective
        Exchange with the other ranks, which have all called :func:`join`.
    device : {"CPU", "GPU"}
        Where the gradients are.
    """

    def __init__(self, collective: Collective, device: Literal["CPU", "GPU"] = "CPU") -> None:
        super().__init__(collective)
        # A group of this averager's own, whatever went before in these processes.
        drawn = collective.all_gather(b"%d" % (1 + secrets.randbelow(2**31 - 2)))
        self._group = int(drawn[0])
        self._device = f"/job:{_JOB}/task:{collective.rank}/device:{device}:0"
        with tf.device(f"/job:{_JOB}/task:{collective.rank}/device:CPU:0"):
            self._number = tf.Variable(0, dtype=tf.int32, trainable=False)
        with tf.device(self._device):
            self._order = tf.Variable(0.0, trainable=False)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """See :meth:`Averager.guarded`."""
        with _judged(self.collective):
            yield

    def _means(self, grads: list[Any]) -> list[Any]:
        # One exchange, whatever the number of layers.
        flat = tf.concat([tf.reshape(grad, [-1]) for grad in grads], axis=0)
        parts = tf.split(self._mean(flat), [tf.size(grad) for grad in grads])
        return [tf.reshape(part, tf.shape(grad)) for part, grad in zip(parts, grads, strict=True)]

    def _mean(self, flat: Any) -> Any:
        number = self._number.assign_add(1)
        with tf.device(self._device):
            total = tf.raw_ops.CollectiveReduceV2(
                input=flat,
                group_size=self.collective.world,
                group_key=self._group,
                instance_key=number,
                ordering_token=[self._order.handle],
                merge_op="Add",
                final_op="Id",
                communication_hint="nccl" if self._device.endswith("GPU:0") else "auto",
            )
            return total / self.collective.world


def _running(context: Any) -> bool:
    """Whether TensorFlow's runtime is up in this process."""
    return context._context_handle is not None


@contextlib.contextmanager
def _judged(collective: Collective) -> Iterator[None]:
    """Let the gang's collective say which rank is lost, where TensorFlow's operations fail."""
    try:
        yield
    except _BROKEN as error:
        # All that TensorFlow runs raises these errors, the reading of a user's files as well.
        if "collective" not in str(error).lower() and "coordination" not in str(error).lower():
            raise
        collective.barrier()  # raises what has become of the others; those that are well come here, too
        raise CollectiveError(
            f"TensorFlow's collective operations failed on rank {collective.rank}: {error}"
        ) from error
