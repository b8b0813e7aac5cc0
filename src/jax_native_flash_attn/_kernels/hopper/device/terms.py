"""What is in registers for the logits of a tile, beside its products."""

from typing import Any, NamedTuple

import jax


class RowVectors(NamedTuple):
    """What the masks and terms of a tile say for each query row, in registers."""

    row: Any  # the first
    intervals: Any  # a pair, None, or a function that loads it where it is needed
    bias: jax.Array | None
    mask: jax.Array | None
    is_whole: Any | None  # as `Intervals.is_whole`

    def pair(self) -> Any:
        return self.intervals() if callable(self.intervals) else self.intervals


class TileTerms(NamedTuple):
    """Bias and mask of a tile, in registers, and what functions read of its keys.

    The order of fields is that in which a barrier takes them.
    """

    mask: jax.Array | None
    bias: jax.Array | None
    read: tuple[jax.Array, ...] = ()
