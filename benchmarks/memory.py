"""What memory the workers of a PyTorch fit need: `python benchmarks/memory.py`.

Each line is a fit with Adam on two workers: the network whole on each, and divided between them; and divided with a
checkpoint amid the epoch. What counts is the most that a worker's process has held from where it has imported PyTorch
to its end, as Linux counts it (VmHWM).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import cloudpickle
import peers
from peers import note_peak, peaks, session

WIDTH = 4096


def network(layers: int, folder: str) -> Any:
    """So many layers of 17 million parameters; notes the memory of its process from now on."""
    from torch import nn

    note_peak(folder)
    inner = [layer for _ in range(layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(nn.Linear(2, WIDTH), *inner, nn.Linear(WIDTH, 1))


def main() -> None:
    """Measure and print."""
    from spark_nn import TorchEstimator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of 17 million parameters (default: 12)")
    arguments = parser.parse_args()
    for module in (peers, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)  # executors do not find these files
    spark = session()
    rows = spark.range(32).selectExpr("rand(1) AS a", "rand(2) AS b", "rand(3) AS label")
    parameters = arguments.layers * WIDTH * (WIDTH + 1) + 4 * WIDTH + 1
    print(f"{parameters:,} parameters, {parameters * 4 / 2**20:.0f} MB; Adam on two workers")
    print(f"{'':32}{'MB on each worker':>20}{'of the whole':>15}{'seconds a step':>16}")
    whole = 0.0
    ways = {"whole": ("none", -1), "divided": ("fsdp", -1), "divided, with a checkpoint": ("fsdp", 1)}
    for name, (sharding, interval) in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            estimator = TorchEstimator(
                model=network, modelParams={"layers": arguments.layers, "folder": folder}, loss="mse_loss",
                inputCols=["a", "b"], numWorkers=2, batchSize=16, epochs=1, verbose=0, learningRate=1e-5,
                sharding=sharding, checkpointInterval=interval,
            )  # fmt: skip
            seconds = estimator.fit(rows).summary.epochSeconds[0] / 2
            most = peaks(folder)[:2]
        whole = whole or most[0]
        print(f"{name:32}{'{} and {}'.format(*most):>20}{most[0] / whole:15.2f}{seconds:16.1f}", flush=True)
    spark.stop()


if __name__ == "__main__":
    main()
