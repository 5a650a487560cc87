"""LightningModules for the tests; imported only where the package is."""

from __future__ import annotations

import os
import signal

import torch
from pytorch_lightning import LightningModule
from torch.nn import functional
from torchmetrics import SumMetric
from torchmetrics.classification import BinaryAccuracy

from tests.torch import models


class Net(LightningModule):
    """The network of `models.mlp`; it may kill its rank at a step, the first time."""

    def __init__(self, units=8, mark="", rank=0, step=-1):
        super().__init__()
        self.save_hyperparameters()
        self.net = models.mlp(units=units)
        self.spare = torch.nn.Linear(2, 2)  # which forward and the steps do without
        self.still = torch.nn.Dropout(0.9).eval()  # which would be noticed in training
        self.accuracy, self.held, self.positive = BinaryAccuracy(), BinaryAccuracy(), SumMetric()

    def forward(self, x):
        return self.net(self.still(x))

    def measured(self, batch):
        x, y = batch
        assert y.dtype is torch.int64 and y.ndim == 1
        output = self(x)[:, 0]
        return functional.binary_cross_entropy_with_logits(output, y.float()), output, y

    def training_step(self, batch, batch_idx):
        own = self.hparams
        if (self.global_rank, self.global_step) == (own.rank, own.step) and not os.path.exists(own.mark):
            with open(own.mark, "w"):
                os.kill(os.getpid(), signal.SIGKILL)
        loss, output, y = self.measured(batch)
        self.accuracy(output.sigmoid(), y)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"train_loss": loss, "size": float(len(y))}, prog_bar=True)
        self.log("last", float(self.global_step == self.trainer.estimated_stepping_batches - 1), batch_size=1)
        self.positive.update(y.sum())
        self.log("positive", self.positive)
        self.seen += y.sum()
        assert batch_idx == self.global_step - self.current_epoch * self.trainer.num_training_batches
        return {"loss": loss, "more": output}

    def validation_step(self, batch):
        with torch.no_grad():
            loss, output, y = self.measured(batch)
        self.held.update(output.sigmoid(), y)
        self.log("val_loss", loss)
        self.log("size", len(y))
        self.log("late", 3.0)

    def on_train_epoch_start(self):
        self.seen = torch.zeros(())

    def on_train_epoch_end(self):
        self.log("positive_of_a_rank", self.seen)
        if self.current_epoch == 1:
            self.log("late", 1.0)
        self.log("half", self.global_step / self.trainer.estimated_stepping_batches)

    def on_validation_epoch_end(self):
        self.log("val_accuracy", self.held.compute())
        self.log("val_accuracy_too", self.held)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        scheduler = {"scheduler": models.decay(optimizer), "interval": "step", "name": "rate"}
        return [optimizer], [scheduler]


class Bare(LightningModule):
    """With the fewest lines."""

    def __init__(self):
        super().__init__()
        self.net = models.mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return functional.mse_loss(self(batch[0])[:, 0], batch[1].float())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Bare):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Hooked(Bare):
    def on_after_backward(self):
        pass


class Thawing(Bare):
    """Puts a part into evaluation, and later trains what it did not."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False).eval()

    def on_train_epoch_start(self):
        self.net[2].eval()
        self.net[0].requires_grad_(self.current_epoch == 2)


class Asking(Bare):
    def training_step(self, batch):
        return super().training_step(batch) * self.trainer.accumulate_grad_batches


class Silent(Bare):
    def training_step(self, batch):
        return None


class Unfinished(LightningModule):
    def training_step(self, batch):
        return None
