"""Networks and references for the tests of PyTorch; it is imported by name only where PyTorch is wanted."""

from __future__ import annotations

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


def sometimes():
    """Layers that only some batches, or none, make use of; one looks up few of many rows."""
    import torch
    from torch import nn

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)
            self.first, self.never = nn.Linear(3, 4), nn.Linear(3, 4)
            self.rare = nn.Linear(4, 4)
            self.last = nn.Linear(4, 1)
            self.scale = nn.Parameter(torch.ones(4, 4)[:, :2].t())  # which lies in memory otherwise than in shape

        def forward(self, x):
            found = self.table((x[:, 0] * 50).long()) + self.first(x)
            rows = x[:, 1] > 0.96
            if rows.any():
                found = found.index_add(0, rows.nonzero()[:, 0], self.rare(found[rows]))
            return self.last(found + (found @ self.scale.t() @ self.scale) / 10)

    return Sometimes()


def sometimes_optimizer(parameters):
    """For dense and sparse gradients alike, with momentum, by which a gradient of zeros differs from none."""
    import torch

    class Momentum(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.05})

        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                    state["moment"] = state.get("moment", torch.zeros_like(parameter)) * 0.9 + gradient
                    parameter -= 0.05 * state["moment"]

    return Momentum(parameters)


def tied():
    """A network that uses one matrix twice, holds a table that is no weight, and a vector that is not saved."""
    import torch
    from torch import nn

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(3, 3), nn.Linear(3, 3)
            self.out.weight = self.into.weight
            self.alias = [self.into.weight]
            self.register_buffer("table", torch.arange(3.0))
            self.register_buffer("spare", torch.full((3,), 0.5), persistent=False)

        def forward(self, x):
            return (self.out(torch.tanh(self.into(x))) + self.table * self.spare) @ self.alias[0][:, :1]

    torch.manual_seed(3)
    return Tied()


def several(kinds=4):
    """Numbers and a category in, a price and a class out."""
    from torch import nn

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(kinds, 3)
            self.numbers = nn.Linear(2, 3)
            self.price, self.kind = nn.Linear(3, 1), nn.Linear(3, kinds)

        def forward(self, numbers, color):
            found = (self.numbers(numbers) + self.table(color.long().reshape(-1))).relu()
            return {"price": self.price(found), "kind": self.kind(found)}

    return Several()


def lazy(units=4, classes=1):
    from torch import nn

    return nn.Sequential(nn.LazyLinear(units), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(classes))


def not_a_module():
    return 3


def mlp_of(units):
    return mlp(units=units)


def wide(units=1100):
    """Layers of which one is large enough to be a group of its own, and whose parts are of different sizes."""
    from torch import nn

    return nn.Sequential(nn.Linear(3, units), nn.ReLU(), nn.Linear(units, 1001), nn.ReLU(), nn.Linear(1001, 1))


def transformer(words=4201, width=256):
    """A small transformer over three numbers as words, with dropout, a table, and a bias that is used twice."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(words, width)
            self.register_buffer("places", torch.arange(3.0)[:, None] / 3, persistent=False)
            layer = nn.TransformerEncoderLayer(width, 4, 2048, dropout=0.1, batch_first=True)
            self.blocks = nn.TransformerEncoder(layer, 2)
            self.norm = nn.LayerNorm(width)
            self.tracked = nn.BatchNorm1d(width)
            self.head = nn.Linear(width, 1)
            self.again = nn.Linear(1, 1)
            self.again.bias = self.head.bias

        def forward(self, x):
            found = self.words((x.clamp(0, 1) * 4000).long()) + self.places
            return self.again(self.head(self.tracked(self.norm(self.blocks(found)).mean(1))))

    return Transformer()


def tied_by_attribute(words=4201, width=256):
    """A table whose rows are looked up and, outside of its layer, compared with; and a layer that is asked its type."""
    from torch import nn

    class Compared(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(words, width)
            self.inner = nn.Linear(width, width)

        def forward(self, x):
            found = self.words((x.clamp(0, 1) * 4000).long()).mean(1).to(self.inner.weight.dtype)
            return (self.inner(found) @ self.words.weight.T)[:, :1000].amax(1, keepdim=True)

    return Compared()


def skipping(units=1100):
    """A network that skips one of its layers, another one in each process."""
    from torch import nn

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, units), nn.Linear(units, 1)
            self.inner = nn.ModuleList(nn.Linear(units, units) for _ in range(2))

        def forward(self, x):
            found = self.first(x)
            with open("/proc/self/comm") as file:
                rank = int(file.read().split()[-1]) if self.training else None
            for number, layer in enumerate(self.inner):
                if number != rank:
                    found = layer(found).relu()
            return self.last(found)

    return Skipping()


def deep(layers, units):
    """Layers of the same size."""
    from torch import nn

    inner = [layer for _ in range(layers) for layer in (nn.Linear(units, units), nn.ReLU())]
    return nn.Sequential(nn.Linear(3, units), *inner, nn.Linear(units, 1))


def scaled():
    """A network with a weight that is a number, and a tensor that is neither weight nor buffer."""
    import torch
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.shift = torch.ones(3)

        def forward(self, x):
            return ((x + self.shift) * self.scale).sum(1, keepdim=True)

    return Scaled()


def asked():
    """A network that looks at its weights when it is made."""
    net = line(3)
    net.bias.data.fill_(net.weight.detach().max().item())
    return net
