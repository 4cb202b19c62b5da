"""What options have in common, so that one measurement teaches something about all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autocompress.search.option_table import Floats, OptionTable
from autocompress.search.solver import padded

Levels = NDArray[np.int64]

SD_CHOICE = 0.8
SD_OPTION = 0.4
_SD_LABEL = 0.7
_SD_ROLE = 0.5
_SD_ROLE_LABEL = 0.3
_SD_DEPTH = 0.4
_DEPTH_POWERS = 2


@dataclass(frozen=True, eq=False)
class OptionFeatures:
    """Every option of every choice as one row; rows of a choice lie together.

    The logarithm of an option's true damage is taken to be that of its predicted damage plus a sum
    of effects: of its label, its role, both together, its depth, its choice and itself. Each effect
    is Gaussian around 0, so that what is not measured stays as predicted. Effects of a choice and
    of an option (standard deviations `SD_CHOICE`, `SD_OPTION`) belong to one choice alone and are
    not spelled out as columns.

    Attributes:
        offsets: first row of each choice, (n_choices,).
        n_options: options of each choice, (n_choices,).
        damage: predicted damage, (n_rows,).
        shared: the effects that a row has in common with rows of other choices, each column
            scaled by its prior standard deviation, (n_rows, n_shared).
    """

    offsets: Levels
    n_options: Levels
    damage: Floats
    shared: Floats

    @classmethod
    def of(cls, table: OptionTable) -> OptionFeatures:
        """The features of an option table."""
        n_options = np.array([len(labels) for labels in table.labels], dtype=np.int64)
        choice = np.repeat(np.arange(len(n_options)), n_options)
        role = np.unique(np.array(table.roles), return_inverse=True)[1][choice]
        label = np.unique(np.concatenate(table.labels), return_inverse=True)[1]
        both = np.unique(role * (label.max() + 1) + label, return_inverse=True)[1]
        groups = ((label, _SD_LABEL), (role, _SD_ROLE), (both, _SD_ROLE_LABEL))
        columns = [sd * np.eye(int(group.max()) + 1)[group] for group, sd in groups]
        depth = _depth_columns(np.array(table.depths)[choice])
        return cls(
            offsets=np.concatenate(([0], np.cumsum(n_options)[:-1])).astype(np.int64),
            n_options=n_options,
            damage=np.concatenate(table.damage),
            shared=np.concatenate([*columns, depth], axis=1),
        )

    @property
    def n_rows(self) -> int:
        """Options of all choices."""
        return len(self.damage)

    @cached_property
    def choice(self) -> Levels:
        """Choice of each row, (n_rows,)."""
        return np.repeat(np.arange(len(self.n_options)), self.n_options)

    def rows(self, levels: Levels) -> Levels:
        """Rows of levels (..., n_choices)."""
        return self.offsets + levels

    def by_choice(self, values: Floats) -> Floats:
        """Values of all rows as (n_choices, most options), infinity where there is no option."""
        return padded(np.split(values, self.offsets[1:]))


def _depth_columns(depth: Floats) -> Floats:
    """Powers of the position along the blocks, from -1 to 1; zero outside the blocks."""
    inside = (depth >= 0) & (depth <= 1)
    position = np.where(inside, 2 * depth - 1, 0.0)
    return _SD_DEPTH * np.column_stack([position**p for p in range(1, _DEPTH_POWERS + 1)])
