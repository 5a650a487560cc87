"""A gang without Spark: two processes that train networks one after the other, on rows in a folder."""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import secrets
import traceback
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pyarrow as pa

from spark_nn.columns import Tensor
from spark_nn.dataset.fingerprint import Fingerprint
from spark_nn.dataset.manifest import Group, Manifest
from spark_nn.dataset.writer import PartitionWriter, group_rows
from spark_nn.store import RunDir

FEATURES = Tensor("features", ("x",), "array", "float32", 1, (3,))
LABEL = Tensor("label", ("y",), "scalar", "float32", 0, ())
WEIGHT = Tensor("weight", ("w",), "scalar", "float32", 0, ())


def dataset(folder, parts):
    """Rows in so many files of these sizes, of which some are held back."""
    run = RunDir(Path(folder).as_uri())
    run.mkdir("data")
    tensors = [FEATURES, LABEL, WEIGHT]
    writer = PartitionWriter(run, tuple(tensors), 0.15, 1, False)
    chance = np.random.default_rng(3)
    groups = {"train": [], "validation": []}
    for number, rows in enumerate(parts):
        x = chance.random((rows, 3), np.float32)
        y = (x[:, 0] ** 2 + x[:, 1] > 0.8).astype(np.float32)
        lists = pa.ListArray.from_arrays(pa.array(np.arange(0, 3 * rows + 1, 3, dtype=np.int32)), pa.array(x.ravel()))
        arrays = [lists, pa.array(y), pa.array(chance.random(rows, np.float32) + 0.5)]
        report = writer.write(number, [pa.RecordBatch.from_arrays(arrays, ["features", "label", "weight"])])
        for split, (file, counts) in report["files"].items():
            groups[split] += [Group(file, index, count) for index, count in enumerate(counts)]
    content = Fingerprint(sum(parts))
    train, held = (tuple(groups[split]) for split in ("train", "validation"))
    run.writeJson("manifest.json", Manifest(tuple(tensors), group_rows(tensors), train, held, content).toDict())
    return run


def peak(afresh=False):
    """The most memory that this process has held so far, or since it was asked to count afresh, in bytes."""
    if afresh:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def work(pipe, rank, world, data, jobs, timeout):
    """What a rank does; it answers each job with rank 0's result, or with what went wrong."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    from spark_nn.gang.collective import Alone
    from spark_nn.gang.context import GangContext
    from spark_nn.gang.progress import Reporter
    from spark_nn.gang.ring import Ring, listen

    for each in jobs[0][2].preload:
        module, _, function = each.partition(":")
        getattr(importlib.import_module(module), function)()
    ctypes.CDLL(None).prctl(1, 9)  # it dies with the test
    ctypes.CDLL(None).prctl(15, b"spark_nn rank %d" % rank)
    collective = Alone()
    if world > 1:
        listener = listen("127.0.0.1")
        pipe.send(listener.getsockname())
        addresses, secret = pipe.recv()
        collective = Ring.connect(rank=rank, addresses=addresses, listener=listener, secret=secret, timeout=timeout)
    for folder, attempt, trainer in jobs:
        before = peak(afresh=True)
        scratch = Path(folder) / f"scratch-{rank}"
        scratch.mkdir(parents=True, exist_ok=True)
        run = RunDir(Path(folder).as_uri())
        gang = GangContext(
            rank, world, "127.0.0.1", 1, world, attempt, timeout, scratch, run, collective, Reporter(run, 1)
        )
        gang.run.mkdir(f"attempt-{attempt}")
        try:
            found = trainer(gang, data)
        except Exception as error:  # noqa: BLE001
            collective.abort(repr(error))
            found = traceback.format_exc()
        pipe.send((found, peak() - before))


class Outcome:
    """What a job came to: what rank 0 trained, the weights, and the peak of each rank's memory; or what went wrong."""

    def __init__(self, folder, answers):
        self.errors = [found for found, _ in answers if isinstance(found, str)]
        self.peaks = [memory for _, memory in answers]
        self.history = self.weights = None
        if not self.errors:
            trained = answers[0][0]
            self.history = trained["history"]
            self.file = Path(folder) / trained["file"]
            if self.file.suffix == ".safetensors":
                from safetensors.torch import load_file

                self.weights = {name: each.float().numpy() for name, each in load_file(self.file).items()}


def train(data, jobs, world=2, seconds=240.0, timeout=30.0):
    """Train jobs, each a folder, the number of the attempt and a trainer; their outcomes, up to where a rank died."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, rank, world, data, jobs, timeout)))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        if world > 1:
            addresses, secret = received(pipes, seconds), secrets.token_bytes(16)
            for pipe in pipes:
                pipe.send((addresses, secret))
        outcomes = []
        for folder, _, _ in jobs:
            answers = received(pipes, seconds)
            outcomes.append(Outcome(folder, answers))
            if outcomes[-1].errors:
                break
        return outcomes
    finally:
        for process in processes:
            process.kill()
            process.join()


def received(pipes, seconds):
    """What each rank says next; of one that died, that it did."""
    found = {}
    while len(found) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in found], seconds)
        assert ready, f"{len(pipes) - len(found)} ranks gave no answer in {seconds:g} s"
        for pipe in ready:
            try:
                found[pipe] = pipe.recv()
            except EOFError:
                found[pipe] = ("died", 0)
    return [found[pipe] for pipe in pipes]


def trainer(model, arguments=None, *, epochs=2, batch=32, interval=0, **recipe):
    """What an estimator would send."""
    from spark_nn.torch.blueprint import Blueprint, is_module, skeleton_of
    from spark_nn.torch.training import Recipe, TorchTrainer
    from spark_nn.trainer import Schedule

    settings = {
        "weights": None,
        "optimizer": "sgd",
        "optimizerParams": {},
        "learningRate": 0.01,
        "lrScheduler": None,
        "lrSchedulerInterval": "step",
        "clipGradNorm": None,
        "clipGradValue": None,
        "mixedPrecision": "no",
        "stopWhen": None,
        **recipe,
    }
    metrics = settings.pop("metrics", None)
    loss = settings.pop("loss", "binary_cross_entropy_with_logits")
    instance = is_module(model)
    blueprint = Blueprint(
        None if instance else model,
        arguments or {},
        skeleton_of(model) if instance else None,
        loss=loss,
        metrics=metrics,
    )
    schedule = Schedule(epochs, batch, 11, True, checkpointInterval=interval)
    return TorchTrainer(schedule, Recipe(blueprint, **settings))


def divided(made, sharding="fsdp"):
    """The same with the network divided."""
    from spark_nn.torch.training import TorchTrainer

    return TorchTrainer(made.schedule, replace(made.recipe, sharding=sharding))
