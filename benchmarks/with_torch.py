"""How fast PyTorch trains as a stage of Spark: `python benchmarks/train.py --framework torch`.

Two tables, each line the median of three rounds measured in turn, of which the fastest epoch but the first counts.
The first: one worker of a fit against a plain loop of PyTorch's over tensors in memory, in a process of its own. The
second: two workers of a fit against what pyspark's TorchDistributor starts, the same loop under DistributedDataParallel
over Gloo, on the same rows. All compute with one thread per process, and all shuffle their rows in every epoch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cloudpickle
from peers import BATCH, FEATURES, apart, made, session, show

from spark_nn.doctor import requireJava
from spark_nn.gang.worker import child_environment

WIDTHS = {"mlp": (256, 128), "large": (2048, 2048)}


def network(widths: tuple[int, ...]) -> Any:
    """A network of as many layers as widths, and a number out."""
    from torch import nn

    sizes = (FEATURES, *widths)
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


def tensors(source: str) -> Any:
    """All rows, in memory."""
    import pyarrow.parquet as pq
    import torch

    table = pq.read_table(source).combine_chunks()
    features = table.column("features").combine_chunks().flatten().to_numpy().reshape(-1, FEATURES)
    return torch.from_numpy(features.copy()), torch.from_numpy(table.column("label").to_numpy().copy())


def loop(source: str, widths: tuple[int, ...], epochs: int, rank: int = 0, world: int = 1) -> float:
    """A plain loop, in step with others where there are several; seconds of the fastest epoch but the first."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(1)
    x, y = (each[rank::world] for each in tensors(source))
    x = x.contiguous()
    net = network(widths)
    optimizer = torch.optim.Adam(net.parameters())
    forward = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    seconds = []
    for _ in range(epochs):
        began = time.perf_counter()
        order = torch.randperm(len(x))
        for start in range(0, len(x), BATCH // world):
            rows = order[start : start + BATCH // world]
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(forward(x[rows])[:, 0], y[rows])
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - began)
    return float(min(seconds[1:]))


def distributed(source: str, widths: tuple[int, ...], epochs: int) -> float:
    """The same under TorchDistributor."""
    from pyspark.ml.torch.distributor import TorchDistributor

    # Nested, so that it travels by value: the processes do not find this file, nor what it imports.
    def worker(source: str, widths: tuple[int, ...], epochs: int, folder: str) -> float:
        import sys

        import torch.distributed as dist

        sys.path.insert(0, folder)
        from with_torch import loop

        dist.init_process_group("gloo")
        found = loop(source, widths, epochs, dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()
        return found

    folder = str(Path(__file__).parent)
    distributor = TorchDistributor(num_processes=2, local_mode=True, use_gpu=False)
    return float(distributor.run(worker, source, widths, epochs, folder))


def fit(df: Any, widths: tuple[int, ...], epochs: int, **settings: Any) -> float:
    """Seconds of the fastest epoch but the first of a fit."""
    from spark_nn import TorchEstimator

    estimator = TorchEstimator(model=network, modelParams={"widths": list(widths)}, loss="mse_loss", verbose=0)
    estimator.setParams(batchSize=BATCH, epochs=epochs, **settings)
    return min(estimator.fit(df).summary.epochSeconds[1:])


def with_torch(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    requireJava()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # executors do not find this file
    epochs = arguments.epochs
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        spark = session()
        environment = child_environment(os.environ, 1, [])
        for name in arguments.networks:
            if name not in WIDTHS:
                continue
            widths = WIDTHS[name]
            # The large one is measured on as many rows as take about as long.
            rows = arguments.rows if name == "mlp" else arguments.rows // 16
            part = made(spark, rows, f"{folder}/{name}")
            df = spark.read.parquet(part)
            one, two = [], []
            for _ in range(arguments.rounds):
                seconds = {
                    "plain loop, in memory": apart(loop, part, widths, epochs),
                    "plain loop, our environment": apart(loop, part, widths, epochs, environment=environment),
                    "ours, from memory": fit(df, widths, epochs, cache="memory"),
                    "ours, from disk": fit(df, widths, epochs, cache="none"),
                }
                one.append({line: rows / 1000 / each for line, each in seconds.items()})
                seconds = {
                    "TorchDistributor, in memory": distributed(part, widths, epochs),
                    "ours, ring": fit(df, widths, epochs, cache="memory", numWorkers=2),
                    "ours, Gloo": fit(df, widths, epochs, cache="memory", numWorkers=2, collective="native"),
                }
                two.append({line: rows / 1000 / each for line, each in seconds.items()})
            title = f"PyTorch, {name}, {rows:,} rows x {FEATURES} in batches of {BATCH}"
            show(f"{title}, one worker", "thousand rows/s", one, "plain loop, in memory")
            both = [
                {**pair, "plain loop, in memory": alone["plain loop, in memory"]}
                for pair, alone in zip(two, one, strict=True)
            ]
            show(f"{title}, two workers", "thousand rows/s", both, "TorchDistributor, in memory")
        spark.stop()
