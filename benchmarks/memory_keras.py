"""What memory the workers of a Keras fit on JAX need: `python benchmarks/memory_keras.py`.

Each line is a fit with Adam: of a network that is whole on one worker, and of the same one cut over two. What counts is
the most that a worker's process has held, beyond what it had when it began to build, as Linux counts it (VmHWM).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
from peers import session

WIDTH = 4096


def network(layers: int, folder: str) -> Any:
    """So many layers of 17 million parameters; notes the memory of its process from now on."""
    import os
    import threading
    import time
    from pathlib import Path

    import keras

    def highest() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    before, noted = highest(), Path(folder) / f"{os.getpid()}"

    def note() -> None:
        while True:
            noted.write_text(f"{(highest() - before) / 2**20:.0f}")
            time.sleep(0.05)

    threading.Thread(target=note, daemon=True).start()
    inner = [keras.layers.Dense(WIDTH, "relu", name=f"inner_{place}") for place in range(layers)]
    first, last = keras.layers.Dense(WIDTH, name="first"), keras.layers.Dense(1, name="last")
    return keras.Sequential([keras.Input((2,)), first, *inner, last])


def main() -> None:
    """Measure and print."""
    from spark_nn import KerasEstimator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="layers of 17 million parameters (default: 6)")
    arguments = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # executors do not find this file
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
            most = sorted((int(path.read_text()) for path in Path(folder).glob("[0-9]*")), reverse=True)
        print(f"{title:<24}{', '.join(f'{each:,} MB' for each in most)}")


if __name__ == "__main__":
    main()
