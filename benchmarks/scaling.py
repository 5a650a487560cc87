"""What more workers are worth, predicted and measured: `python benchmarks/scaling.py`.

A step of `n` ranks is taken to cost what one rank needs for its rows, and what the ring needs to average the gradients:

    step(n)     = crowd * (compute(rows / n) + exchange(n))
    compute(r)  = fixed + each * r
    exchange(n) = 2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency
    crowd       = ceil(n / cores)

`fixed` and `each` are measured with one rank and two sizes of batch, `bandwidth` and `latency` with two ranks that
exchange a large buffer, and none, and do nothing else; nothing is fitted to what is to be predicted. Ranks on one
machine share its cores, and their exchange is work for these, too: so both are stretched where there are more ranks
than cores, by as many as take turns on the busiest one, since all wait for these. What the turns themselves cost, in
caches that are filled anew and in ranks that are waited for while it is not their turn, is left out. Ranks on machines
of their own are not crowded, and have their network's bandwidth and latency.

Where all ranks are on one machine, buffers that fit lie in memory that they share. Such an exchange is measured by
itself: a rank meets the others, and reads what all of them have written.

The same rows are divided among more and more ranks, each with one thread on a core, 16 steps per call. A step counts
with its fastest epoch but the first, and of several rounds the median. Errors are those of the prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from in_step import Gang, each_rank, fitted, network, one_thread

FLOAT = 4  # bytes
SHARED = 512 * 1024  # bytes of all ranks' buffers together, up to which they lie in memory that all of them see
SMALL = (16 * 1024, 240 * 1024)  # bytes of one buffer: two that do, of two ranks
LARGE = 16 * 2**20  # and of one that travels
ROWS = {"mlp": 512, "large": 256}  # of a step, over all ranks
PARAMETERS = {"mlp": 58_881, "large": 4_405_249}
WIDTH = 14  # of a column of what is printed
STEPS = {"mlp": 320, "large": 16}  # of an epoch


@dataclass(frozen=True)
class Share(Gang):
    """A rank that has a part of a step's rows.

    Parameters
    ----------
    rows : int
        Of this rank's, in each step.
    """

    rows: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of this rank's batch, and steps of an epoch."""
        return self.rows, STEPS[self.network]


@dataclass(frozen=True)
class Line:
    """A cost that is a constant and a part for each unit.

    Parameters
    ----------
    fixed, each : float
        Seconds.
    """

    fixed: float
    each: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """The line through two points."""
        (x0, y0), (x1, y1) = points
        each = (y1 - y0) / (x1 - x0)
        return cls(y0 - each * x0, each)

    def at(self, units: float) -> float:
        """Seconds for so many units."""
        return self.fixed + self.each * units


@dataclass(frozen=True)
class Machine:
    """What an exchange costs.

    Parameters
    ----------
    cores : int
        Of the machine that all ranks are on.
    latency : float
        Seconds of a hop of no bytes.
    bandwidth : float
        Bytes per second that a rank sends, receives and adds up.
    memory : Line
        Seconds for the bytes of a buffer that two ranks average in memory that both see.
    """

    cores: int
    latency: float
    bandwidth: float
    memory: Line

    def exchange(self, nbytes: int, ranks: int) -> float:
        """Seconds to average a buffer, with a core for each rank."""
        if ranks == 1:
            return 0.0
        if ranks * nbytes <= SHARED:
            return self.memory.at(nbytes * ranks / 2)
        return 2 * (ranks - 1) / ranks * nbytes / self.bandwidth + 2 * (ranks - 1) * self.latency

    def crowd(self, ranks: int) -> int:
        """How many ranks take turns on the busiest core."""
        return math.ceil(ranks / self.cores)


def train(gang: Share) -> float:
    """Seconds of a step of this rank's."""
    gang.settle()
    from spark_nn.keras.sync import Synchroniser

    with contextlib.closing(gang.join()) as ring:
        model, batch = sized(gang)
        model.optimizer.build(model.trainable_variables)
        sync = Synchroniser(model, ring, gang.rank)
        sync.start_alike()
        with sync.averaged_gradients():
            return gang.rows / fitted(gang, model, batch, [sync.callback()])


def train_alone(gang: Share) -> float:
    """Seconds of a step of a rank that has nobody to talk to."""
    gang.settle()
    return gang.rows / fitted(gang, *sized(gang))


def sized(gang: Share) -> tuple[Any, Any]:
    """The network, and a batch of this rank's size."""
    model, batch = network(gang.network)
    return model, tuple(np.resize(part, (gang.rows, *part.shape[1:])) for part in batch)


def exchanges(gang: Share) -> dict[int, float]:
    """Seconds to average buffers of several sizes, and, as that of no bytes, to meet.

    The lower quartile of many: the others tell what else the machine does.
    """
    gang.settle()
    found = {}
    with contextlib.closing(gang.join()) as ring:
        for nbytes in (0, *SMALL, LARGE):
            buffer, seconds = np.zeros(nbytes // FLOAT, np.float32), []
            for _ in range(40 if nbytes == LARGE else 1000):
                began = time.perf_counter()
                if nbytes:
                    ring.all_reduce(buffer, "mean")
                else:
                    ring.barrier()
                seconds.append(time.perf_counter() - began)
            found[nbytes] = statistics.quantiles(seconds)[0]
    return found


def machine() -> Machine:
    """What an exchange costs here, by two ranks: each of them sends a large buffer once, in two hops."""
    found = each_rank(exchanges, Share("", 1, 1), 2)[0]
    bandwidth = LARGE / (found[LARGE] - 2 * found[0])
    memory = Line.through([(size, found[size]) for size in SMALL])
    return Machine(len(os.sched_getaffinity(0)), found[0], bandwidth, memory)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--ranks", type=int, default=4, help="at most")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    one_thread()
    here = machine()
    print(f"{here.cores} cores; ring {here.bandwidth / 2**20:,.0f} MiB/s, {here.latency * 1e6:.0f} us a hop", end="; ")
    print(f"shared memory {1 / here.memory.each / 2**20:,.0f} MiB/s, {here.memory.fixed * 1e6:.0f} us")
    for name in arguments.networks:
        base = Share(name, 16, arguments.epochs)
        table(base, here, arguments.ranks, arguments.rounds)


def slowest(line: Callable[[Share], float], share: Share, ranks: int) -> float:
    """Seconds of a step of so many ranks."""
    return float(max(each_rank(line, share, ranks)))


def table(base: Share, here: Machine, most: int, rounds: int) -> None:
    """Measure a network and print what was predicted and what was found."""
    name, rows = base.network, ROWS[base.network]
    sizes = (rows // most, rows)
    points, steps = [], []
    for _ in range(rounds):
        points.append([slowest(train_alone, replace(base, rows=size), 1) for size in sizes])
        shares = [replace(base, rows=rows // n, spin=n <= here.cores) for n in range(2, most + 1)]
        steps.append([slowest(train, share, n) for n, share in enumerate(shares, 2)])
    alone_seconds = [statistics.median(each) for each in zip(*points, strict=True)]
    measured = [alone_seconds[1], *(statistics.median(each) for each in zip(*steps, strict=True))]
    compute = Line.through(list(zip(sizes, alone_seconds, strict=True)))
    nbytes = PARAMETERS[name] * FLOAT
    print(f"\n{name}: {PARAMETERS[name]:,} parameters, {rows} rows a step, milliseconds, median of {rounds}")
    titles = ("ranks", "rows each", "compute", "exchange", "crowd", "predicted", "measured", "error", "rows/s to one")
    print("".join(f"{title:>{WIDTH}}" for title in titles))
    for n, seconds in enumerate(measured, 1):
        parts = compute.at(rows // n), here.exchange(nbytes, n), here.crowd(n)
        expected = (parts[0] + parts[1]) * parts[2]
        times = f"{parts[0] * 1e3:{WIDTH}.2f}{parts[1] * 1e3:{WIDTH}.2f}{parts[2]:{WIDTH}}"
        both = f"{expected * 1e3:{WIDTH}.2f}{seconds * 1e3:{WIDTH}.2f}{expected / seconds - 1:{WIDTH}.0%}"
        print(f"{n:{WIDTH}}{rows // n:{WIDTH}}{times}{both}{measured[0] / seconds * (rows // n * n) / rows:{WIDTH}.2f}")


if __name__ == "__main__":
    main()
