"""Axis sizes of a call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Axis sizes of one call. `batch` is B behind one axis per enclosing `vmap`; in an export, it may be symbolic."""

    batch: tuple[Any, ...]
    T: int
    S: int
    K: int
    G: int
    H: int
    D: int

    @property
    def N(self) -> int:
        return self.K * self.G

    @property
    def group_rows(self) -> int:
        """Query rows of a key/value head."""
        return self.T * self.G

    @property
    def has_few_scores(self) -> bool:
        """Whether all scores of a head are fewer than the elements of its query and keys."""
        rows = self.group_rows
        return rows * self.S < (rows + self.S) * self.H

    @property
    def has_few_products(self) -> bool:
        """Whether scores are so few that reading and converting query and keys costs more than multiplying them."""
        rows = self.group_rows
        return self.has_few_scores and rows * self.S <= 32 * (rows + self.S)


def static_size(shape: Sequence[Any]) -> int:
    """Number of elements, symbolic axes left out."""
    return math.prod(n for n in shape if isinstance(n, int))
