"""What a fit was like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class TrainingSummary:
    """What a fit was like. It is saved and loaded with the model.

    Parameters
    ----------
    history : dict of str to list
        For each metric its value after each epoch (a list, where it has one per class), over the rows of all
        workers: ``loss`` and the model's metrics, the same with ``val_`` where there are validation rows. NaN for an
        epoch that does not have it.
    rows : int
        Rows trained on.
    validationRows : int
        Rows held back.
    skippedRows : int
        Rows left out because they cannot be used (`handleInvalid`).
    numWorkers : int
        Spark tasks that trained together.
    rowsPerSecond : float
        Training rows per second, all workers together, without start-up and validation.
    epochSeconds : list of float
        Seconds of each epoch's training.
    restarts : list of str
        Why training was begun again, each time, after a machine had failed.
    seconds : dict of str to float
        Where the time of the fit went: ``check`` (params, columns, cluster), ``materialize`` (rows to Parquet, or
        finding them there), ``lost`` (attempts that failed), ``wait`` (for other models of the same call), ``start``
        (Spark's tasks and the workers' processes), ``import`` (of the framework, where that has not been done
        beforehand), ``build`` (the model, or from a checkpoint), ``trace`` (until the first step is done), ``train``
        (the rest, validation too), ``publish`` (the model), ``finish`` (until the driver knows), and ``total``. Only
        those that the fit had; with ``parameterServers=1`` nothing between ``start`` and ``finish`` is told apart.
    logDir : str or None
        The folder below the param `logDir` that TensorBoard finds the fit in; a URL without user, password and query.
    """

    history: dict[str, list[Any]]
    rows: int
    validationRows: int
    skippedRows: int
    numWorkers: int
    rowsPerSecond: float
    epochSeconds: list[float]
    restarts: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    logDir: str | None = None

    @property
    def epochs(self) -> int:
        """Epochs that were trained; fewer than asked for where a callback stopped early."""
        return max((len(values) for values in self.history.values()), default=0)

    @property
    def bestEpoch(self) -> int | None:
        """The epoch of the smallest loss, 1 for the first: of ``val_loss`` where there is one, else of ``loss``.

        The earliest of several that are alike. None where no epoch has a loss that is a number. The model's weights
        are those of the last epoch, unless a callback (``EarlyStopping`` with ``restore_best_weights``) put others
        back.
        """
        losses = self.history.get("val_loss") or self.history.get("loss") or []
        known = [(loss, epoch) for epoch, loss in enumerate(losses, 1) if not math.isnan(loss)]
        return min(known)[1] if known else None

    def toPandas(self) -> pd.DataFrame:
        """The history as a table: a row per epoch, with its number as ``epoch``, ``seconds``, and every metric.

        A metric that has a value per class is a column of lists; what an epoch does not have is NaN.

        Returns
        -------
        pandas.DataFrame
            A new one.
        """
        from spark_nn import summary_view

        return summary_view.table(self)

    def plot(self, metrics: Sequence[str] | None = None, ax: Any = None) -> Any:
        """Draw the history by matplotlib: ``loss`` with ``val_loss``, and a panel of its own for each other metric.

        Parameters
        ----------
        metrics : sequence of str, optional
            Which metrics, by the names they have in training; what validation says of each is drawn with it. Default:
            all that are a number per epoch.
        ax : matplotlib.axes.Axes or sequence of them, optional
            Where to draw: all of them on one, or each on its own. Default: a new figure.

        Returns
        -------
        list of matplotlib.axes.Axes
            The panels, in the order of the metrics.

        Raises
        ------
        ParamError
            A metric is not in the history, or there are fewer axes than metrics.
        ImportError
            matplotlib is not installed.
        """
        from spark_nn import summary_view

        return summary_view.plot(self, metrics, ax)

    def __repr__(self) -> str:
        from spark_nn import summary_view

        return summary_view.text(self)

    def _repr_html_(self) -> str:
        """The summary as notebooks show it."""
        from spark_nn import summary_view

        return summary_view.page(self)

    def toDict(self) -> dict[str, Any]:
        """The summary as JSON can hold it.

        Returns
        -------
        dict
            The fields by their names.
        """
        return asdict(self)

    @classmethod
    def fromDict(cls, value: dict[str, Any]) -> TrainingSummary:
        """The summary that :meth:`toDict` described.

        Parameters
        ----------
        value : dict
            What that returned.

        Returns
        -------
        TrainingSummary
            One that is equal.
        """
        return cls(**value)
