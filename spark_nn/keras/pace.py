"""Worker side: how many steps Keras runs in one call."""

from __future__ import annotations

# Seconds that Keras spends around a call, in Python, whatever the model: 0.2 to 1 ms, by machine and callbacks.
_CALL = 5e-4
# A core's floating-point operations per second in the layers of small models.
_SPEED = 6e10
# Seconds of the smallest step: that many operations of the graph are run one by one.
_LEAST = 2e-4
# The share of a step's time that calls may cost.
_SHARE = 0.03
# Beyond this, nothing is left to gain, and progress comes in jumps.
_MOST = 32
# So that progress within an epoch can be seen.
_CALLS = 10


def steps_per_execution(parameters: int, batch: int, steps: int) -> int:
    """Steps to run in one call of Keras's training function.

    It depends on the model and the schedule alone, and never on a time measured: the ranks must agree on it, and a run
    that is repeated must take the same steps together.

    Parameters
    ----------
    parameters : int
        Of the model.
    batch : int
        Rows that one rank takes in a step.
    steps : int
        Steps of an epoch.

    Returns
    -------
    int
        A power of two: 1 for models whose steps take long anyway, more the smaller the model, and never so many that
        an epoch has fewer than ten calls.
    """
    # A multiplication and an addition per weight and row, forward once and backward twice. Weights that are shared,
    # as in convolutions, work more often than that: such a step takes longer than thought, which does no harm.
    step = max(_LEAST, 6 * parameters * batch / _SPEED)
    wanted = min(_CALL / (_SHARE * step), _MOST, steps / _CALLS)
    return int(2 ** (max(1, int(wanted)).bit_length() - 1))
