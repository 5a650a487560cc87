"""Networks and references for the tests of PyTorch; it is imported by name only where PyTorch is wanted."""

from __future__ import annotations

import numpy as np

from tests.keras.models import global_batches, relative  # noqa: F401


def mlp(inputs=3, units=8, outputs=1, batch_norm=False, dropout=0.0):
    from torch import nn

    layers = [nn.Linear(inputs, units), nn.ReLU()]
    if batch_norm:
        layers.append(nn.BatchNorm1d(units))
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(units, outputs))


def line(inputs=2):
    from torch import nn

    return nn.Linear(inputs, 1)


def remembering(mark="", rank=0, step=-1):
    """A network with all that must be remembered between two steps; it kills its rank at a step, the first time."""
    import os
    import signal

    from torch import nn

    class Killing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(units=16, batch_norm=True, dropout=0.3)
            self.done = 0

        def forward(self, x):
            if self.training:
                self.done += 1
                with open("/proc/self/comm") as file:
                    mine = file.read().strip() == f"spark_nn rank {rank}"
                if mine and self.done == step and not os.path.exists(mark):
                    with open(mark, "w"):
                        os.kill(os.getpid(), signal.SIGKILL)
            return self.net(x)

    return Killing()


def decay(optimizer):
    import torch

    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def plateau(optimizer):
    import torch

    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)


def after_two(history):
    return len(history["loss"]) == 2


def absolute(predictions, labels):
    return (predictions - labels).abs().mean()


def weights(module):
    return [tensor.detach().numpy() for tensor in module.state_dict().values()]


def single_process(
    build, x, y, world, batch, epochs, seed, *, loss, optimizer, weight=None, scheduler=None, by_step=False, clip=None
):
    """Train in this process with a plain loop of PyTorch's on the global batches; return the network."""
    import torch

    torch.manual_seed(seed)
    net = build()
    made = optimizer(net.parameters())
    schedule = scheduler(made) if scheduler else None
    net.train()
    for _ in range(epochs):
        for given in global_batches(x, y, world, batch, weight):
            inputs, target, *w = map(torch.from_numpy, given)
            made.zero_grad()
            value = loss(net(inputs), target, *w)
            value.backward()
            if clip:
                clip(net.parameters())
            made.step()
            if schedule and by_step:
                schedule.step()
        if schedule and not by_step:
            schedule.step()
    return net.eval()
