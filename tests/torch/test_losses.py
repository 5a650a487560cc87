"""Losses of rows that count differently, and those that are measured over parts of the rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from spark_nn.errors import ModelFileError
from spark_nn.torch.losses import Criterion, check_measurable

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    "loss",
    ["mse_loss", "l1_loss", torch.nn.MSELoss(), torch.nn.KLDivLoss(reduction="batchmean"), functional.huber_loss],
)
def test_weights_of_one_change_nothing(loss):
    torch.manual_seed(1)
    output, target = torch.randn(7, 4).log_softmax(1), torch.randn(7, 4).softmax(1)
    plain = Criterion(loss)(output, target)
    torch.testing.assert_close(Criterion(loss)(output, target, torch.ones(7)), plain)
    torch.testing.assert_close(Criterion(loss)(output, target, torch.full((7,), 3.0)), 3 * plain)


@pytest.mark.parametrize(
    "loss",
    [
        torch.nn.MSELoss(reduction="sum"),
        torch.nn.CrossEntropyLoss(torch.ones(3)),
        {"a": "mse_loss", "b": torch.nn.CrossEntropyLoss(ignore_index=0)},
    ],
)
def test_what_is_no_mean_over_rows_is_not_measured_in_parts(loss):
    with pytest.raises(ModelFileError, match="no plain mean over rows"):
        check_measurable(loss)


@pytest.mark.parametrize(
    "loss", ["cross_entropy", torch.nn.CrossEntropyLoss(), torch.nn.KLDivLoss(reduction="batchmean")]
)
def test_means_over_rows_are(loss):
    check_measurable(loss)
