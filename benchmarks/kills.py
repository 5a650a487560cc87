"""What a fit loses when its processes are killed: `python benchmarks/kills.py`.

A small Keras network with dropout, batch normalisation and early stopping is trained by two workers, again and again.
In each fit a process is killed: which one, how and when is drawn by seed. One table: what was done, how often training
was begun again, whether the weights are those of the undisturbed fit to the last bit, what was left behind (processes,
listening ports, files), and the seconds lost against the bound: twice a start (the one cut short may have to be made
anew), plus the time between two checkpoints, plus what it takes to notice.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_nn import KerasEstimator
from spark_nn.doctor import requireJava

_MARK = "SPARK_NN_KILLS"  # in the environment of all processes of this benchmark
KINDS = ("SIGKILL a rank", "SIGTERM a rank", "SIGSTOP a rank", "SIGKILL a task", "SIGKILL the fork server")
# Seconds that a silent process has.
TIMEOUT = 4.0
# Seconds that Spark needs to end the tasks of a stage that has failed.
SPARK = 3.0


def build() -> Any:
    """The model: whatever must be remembered is in it."""
    import keras

    layers = [keras.layers.Dense(64, "relu"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    return keras.Sequential([*layers, keras.layers.Dense(1, "sigmoid")])


def callbacks() -> list[Any]:
    """Callbacks with a memory, and one that makes the steps slow enough to be hit."""
    import time

    import keras

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(0.01)

    stop = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    return [stop, keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=0.01), Slow()]


def fitted(df: DataFrame, store: str, interval: int) -> tuple[str, Any, float]:
    """Fit; return the digest of the weights, the summary, and the seconds after the rows were written."""
    estimator = KerasEstimator(
        model=build,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["auc"],
        inputCols=["a", "b"],
        validationIndicatorCol="held",
        epochs=4,
        batchSize=64,
        numWorkers=2,
        callbacks=callbacks,
        checkpointInterval=interval,
        timeout=TIMEOUT,
        storeUrl=store,
        verbose=0,
    )
    model = estimator.fit(df)
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in model.model.get_weights())).hexdigest()
    seconds = model.summary.seconds
    return digest, model.summary, seconds["total"] - seconds["materialize"]


def named(name: str) -> list[psutil.Process]:
    """Processes of that name below this one's Spark, or left behind by it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = process.environ().get(_MARK) == tempfile.gettempdir()
            if ours and Path(f"/proc/{process.pid}/comm").read_text().startswith(name):
                found.append(process)
    return found


def tasks() -> list[psutil.Process]:
    """The Spark Python workers that guard a rank: they alone have a folder of the task's."""
    home = Path(tempfile.gettempdir())
    folders = home.glob("**/spark_nn-task-*")
    return [psutil.Process(int(folder.name.rpartition("-")[2])) for folder in folders]


def strike(kind: str, rank: int) -> None:
    """Kill a process."""
    if kind == "SIGKILL the fork server":
        victim = named("spark_nn warm")[0]
    elif kind == "SIGKILL a task":
        victim = tasks()[rank]
    else:
        victim = named(f"spark_nn rank {rank}")[0]
    victim.send_signal(getattr(signal, kind.split()[0]))


@contextlib.contextmanager
def later(seconds: float, kind: str, rank: int) -> Iterator[list[str]]:
    """Strike so many seconds after the ranks' processes are there, while the block runs."""
    trouble: list[str] = []

    def act() -> None:
        while len(named("spark_nn rank")) < 2:
            time.sleep(0.02)
        time.sleep(seconds)
        try:
            strike(kind, rank)
        except (IndexError, psutil.NoSuchProcess):
            trouble.append("nobody was there any more")

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield trouble
    thread.join(10)


def left_behind(store: str) -> list[str]:
    """What a fit has left that it should not have."""
    deadline = time.monotonic() + 10
    while True:
        ranks = named("spark_nn rank")
        found = [f"process {each.pid}" for each in ranks]
        for each in named("spark_nn"):
            with contextlib.suppress(psutil.Error):
                found += [f"port {c.laddr.port}" for c in each.net_connections("tcp") if c.status == "LISTEN"]
        found += [each.name for each in Path(store).glob("run-*")]
        found += [each.name for each in Path(tempfile.gettempdir()).glob("**/spark_nn-task-*")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def measured(act: Callable[[], tuple[str, Any, float]], rounds: int) -> tuple[str, Any, float]:
    """The fit that nothing disturbs: its median time."""
    runs = [act() for _ in range(rounds)]
    assert len({digest for digest, _, _ in runs}) == 1, "the undisturbed fit does not repeat"
    return runs[0][0], runs[0][1], statistics.median(seconds for _, _, seconds in runs)


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--interval", type=int, default=20, help="steps between two checkpoints")
    arguments = parser.parse_args()
    requireJava()
    os.environ["PYSPARK_PYTHON"] = sys.executable
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_MARK] = folder
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # so that whatever is left behind is seen
        store = f"{folder}/store"
        builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", False)
        spark = builder.config("spark.local.dir", f"{folder}/spark").getOrCreate()
        spark.sparkContext.setLogLevel("OFF")
        df = spark.range(0, 6000, 1, 2).select(F.rand(1).alias("a"), F.rand(2).alias("b"))
        df = df.withColumn("label", F.expr("cast(a + b > 1 as int)")).withColumn("held", F.expr("a < 0.2"))
        fitted(df, store, arguments.interval)  # starts Spark's Python and the fork server
        expected, summary, base = measured(lambda: fitted(df, store, arguments.interval), 3)
        start = sum(summary.seconds[phase] for phase in ("start", "import", "build", "trace"))
        lives = 0.9 * (base - summary.seconds["check"] - summary.seconds["materialize"])
        steps = -(-summary.rows // 64) * summary.epochs
        between = arguments.interval * sum(summary.epochSeconds) / steps
        print(f"undisturbed: {base:.1f} s, of which {start:.1f} s before the first step; {steps} steps")
        titles = ("kind", "rank", "after s", "restarts", "bits", "left behind", "lost s", "bound s")
        print("".join(f"{title:>{width}}" for title, width in zip(titles, (26, 6, 9, 10, 8, 13, 8, 9), strict=True)))
        wrong = 0
        for _ in range(arguments.kills):
            kind, rank = draw.choice(KINDS), draw.randrange(2)
            after = draw.uniform(0.0, lives)
            with later(after, kind, rank) as trouble:
                digest, summary, seconds = fitted(df, store, arguments.interval)
            left = left_behind(store)
            notice = TIMEOUT if kind == "SIGSTOP a rank" else 1.0
            lost, bound = seconds - base, 2 * start + between + notice + SPARK
            equal = "equal" if digest == expected else "DIFFER"
            wrong += digest != expected or bool(left) or bool(trouble)
            cells = (kind, rank, f"{after:.2f}", len(summary.restarts), equal, ", ".join(left) or "nothing")
            row = "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, (26, 6, 9, 10, 8, 13), strict=True))
            print(row + f"{lost:8.1f}{bound:9.1f}", *trouble, flush=True)
        spark.stop()
    print(f"{arguments.kills - wrong} of {arguments.kills} as if nothing had happened")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
