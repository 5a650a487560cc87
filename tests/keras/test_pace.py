"""How many steps run in one call: a pure function of the model and the schedule."""

import pytest

from spark_nn.keras.pace import steps_per_execution


@pytest.mark.parametrize(
    ("parameters", "batch", "steps", "expected"),
    [
        (100, 32, 10_000, 32),  # a linear model
        (60_000, 256, 2_000, 8),  # a small network of dense layers
        (4_400_000, 256, 2_000, 1),
        (25_000_000, 32, 100_000, 1),
        (100, 32, 100, 8),  # of a short epoch, ten calls are left
        (100, 32, 9, 1),
        (0, 1, 1, 1),
    ],
)
def test_small_models_run_many_steps_in_one_call(parameters, batch, steps, expected):
    assert steps_per_execution(parameters, batch, steps) == expected


def test_larger_models_and_batches_never_run_more():
    for steps in (1, 50, 1000):
        for grown in ((2, 1), (1, 2), (10, 10)):
            size = (10_000, 64)
            larger = [one * factor for one, factor in zip(size, grown, strict=True)]
            assert 1 <= steps_per_execution(*larger, steps) <= steps_per_execution(*size, steps)


def test_an_epoch_has_ten_calls_where_it_has_ten_steps():
    for steps in range(10, 500):
        assert steps // steps_per_execution(10, 10, steps) >= 10
