"""What memory the workers of a Keras fit on JAX need: `python benchmarks/memory_keras.py`.

Each line is a fit with Adam: of a network that is whole on one worker, and of the same one cut over two. What counts is
the most that a worker's process has held, beyond what it had when it began to build, as Linux counts it (VmHWM).
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
    import keras

    note_peak(folder)
    inner = [keras.layers.Dense(WIDTH, "relu", name=f"inner_{place}") for place in range(layers)]
    first, last = keras.layers.Dense(WIDTH, name="first"), keras.layers.Dense(1, name="last")
    return keras.Sequential([keras.Input((2,)), first, *inner, last])


def main() -> None:
    """Measure and print."""
    from spark_nn import KerasEstimator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="layers of 17 million parameters (default: 6)")
    arguments = parser.parse_args()
    for module in (peers, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)  # executors do not find these files
    spark = session()
    rows = spark.range(256).selectExpr("rand(1) AS a", "rand(2) AS b", "rand(3) AS label")
    parameters = arguments.layers * WIDTH * (WIDTH + 1) + 4 * WIDTH + 1
    print(f"{parameters / 1e6:.0f} million parameters, {4 * parameters / 2**20:.0f} MB; Adam holds two more of them")
    cut = {"mesh": {"model": 2}, "layout": {".*inner_.*kernel": [None, "model"], ".*inner_.*bias": ["model"]}}
    for title, settings in {
        "whole, on 1 worker": {"numWorkers": 1},
        "cut, over 2 workers": {"numWorkers": 2, "modelParallel": cut},
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            KerasEstimator(
                model=network,
                modelParams={"layers": arguments.layers, "folder": folder},
                loss="mse",
                optimizer="adam",
                inputCols=["a", "b"],
                batchSize=64,
                backend="jax",
                storeUrl=folder,
                verbose=0,
                **settings,
            ).fit(rows)
            most = peaks(folder)
        print(f"{title:<24}{', '.join(f'{each:,} MB' for each in most)}")


if __name__ == "__main__":
    main()
