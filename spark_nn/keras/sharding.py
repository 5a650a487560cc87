"""How a model's variables lie over the ranks: the param `modelParallel`, which driver and workers read alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spark_nn.errors import ParamError

# The axis of the mesh along which ranks take different rows.
DATA = "data"
_EXAMPLE = "{'mesh': {'data': 1, 'model': 2}, 'layout': {'.*kernel': [None, 'model']}}"


@dataclass(frozen=True)
class Sharding:
    """How a model's variables lie over the ranks.

    Parameters
    ----------
    mesh : dict of str to int
        The axes that the ranks are laid out along, and how many there are along each; the last changes first.
    layout : dict of str to tuple
        For patterns that the paths of variables match as a whole, the axis that each dimension is cut along, or None.
    """

    mesh: Mapping[str, int]
    layout: Mapping[str, Sequence[str | None]]

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Sharding:
        """What the param's value says.

        Raises
        ------
        ParamError
            It is not of the right form, has a pattern that is no regular expression, or names an axis that the mesh
            does not have.
        """
        mesh, layout = value.get("mesh"), value.get("layout")
        if set(value) != {"mesh", "layout"} or not isinstance(mesh, Mapping) or not isinstance(layout, Mapping):
            raise ParamError(f"modelParallel={dict(value)!r}: must have a mesh and a layout, such as {_EXAMPLE}")
        if not mesh or not all(isinstance(size, int) and size > 0 for size in mesh.values()):
            raise ParamError(f"modelParallel has the mesh {dict(mesh)!r}: must give each axis a size, 1 or more")
        if not layout:
            raise ParamError(f"modelParallel has no layout, and every rank would hold all of the model: {_EXAMPLE}")
        for pattern, axes in layout.items():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ParamError(
                    f"modelParallel lays out {pattern!r}, which is no regular expression: {error}. Write one that "
                    "matches paths of variables as a whole, such as '.*kernel'"
                ) from error
            if not isinstance(axes, Sequence) or isinstance(axes, str):
                raise ParamError(
                    f"modelParallel lays out {pattern!r} as {axes!r}: must be a list, such as [None, 'model']"
                )
            for axis in axes:
                if axis is not None and axis not in mesh:
                    raise ParamError(
                        f"modelParallel lays out {pattern!r} along {axis!r}, and the mesh has the axes "
                        f"{', '.join(map(repr, mesh))}: name one of them, or None"
                    )
        return cls({**({} if DATA in mesh else {DATA: 1}), **mesh}, layout)

    @property
    def replicas(self) -> int:
        """How many parts the rows are cut in."""
        return self.mesh[DATA]

    @property
    def shape(self) -> tuple[int, ...]:
        """Ranks along each axis."""
        return tuple(self.mesh.values())

    def place(self, rank: int) -> int:
        """Which part of the rows a rank takes."""
        return int(np.unravel_index(rank, self.shape)[list(self.mesh).index(DATA)])

    def check(self, workers: int, batch: int) -> None:
        """Refuse what does not fit the gang.

        Raises
        ------
        ParamError
            The mesh is of more or fewer ranks than there are workers, or the batch cannot be cut.
        """
        if math.prod(self.shape) != workers:
            raise ParamError(
                f"modelParallel has a mesh of {' x '.join(map(str, self.shape))} = {math.prod(self.shape)} ranks, and "
                f"numWorkers={workers}: both must be the same"
            )
        if batch % self.replicas:
            raise ParamError(
                f"batchSize={batch} cannot be cut along the axis {DATA!r} of modelParallel, which has {self.replicas}: "
                "choose a multiple"
            )

    def checkVariable(self, path: str, shape: Sequence[int], pattern: str) -> None:
        """Refuse a variable that cannot be laid out as a pattern says.

        Raises
        ------
        ParamError
            It has another number of dimensions, or one of them cannot be cut evenly.
        """
        axes = self.layout[pattern]
        if len(axes) != len(shape):
            raise ParamError(
                f"modelParallel lays out {pattern!r} as {list(axes)!r}, and the variable {path!r}, which matches, has "
                f"the shape {tuple(shape)}: give an axis or None for each dimension"
            )
        for size, axis in zip(shape, axes, strict=True):
            if axis is not None and size % self.mesh[axis]:
                raise ParamError(
                    f"modelParallel cuts the variable {path!r} of shape {tuple(shape)} into {self.mesh[axis]} along "
                    f"{axis!r}, and {size} is no multiple of that: change the layer's size or the mesh"
                )
