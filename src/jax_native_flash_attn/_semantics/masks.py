"""Which keys a query row may attend, as data: one interval of keys per row, never a T x S array.

Causal masks, sliding windows and sequence lengths all say that query row t may attend the keys
`key_start[t] <= s < key_stop[t]`. Static ones (causal, an integer window) are kept as a `Band`, whose
intervals are NumPy vectors, so that the tile schedule is static as well. Anything traced becomes a pair of
arrays. Traced lengths and offsets may need no more than a number for each batch row: a `Band` that is complete says
the rest. A boolean `mask` argument stays as the caller passed it and is only ever read tile by tile. Ids and positions
give an interval that holds all keys of a row; where it holds others too, every element of a tile is compared.

Three kinds of rows:

- live rows have at least one key;
- dead rows have none. As in `jax.nn`, they attend all S keys with equal weight: their interval is [0, S) and
  their logits are the constant 0. With sinks there are none: what they would be has an empty interval;
- padded rows lie past `query_seq_lengths` or have a negative id. Their interval is empty, so that no tile is visited on
  their behalf, and the public function zeroes them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The row_start of a row without any key that attends all of them, with logits of 0.
DEAD = -1
# Rows of each block of `MaskOperands.row_bounds`.
ROWS_OF_BOUNDS = 64
_MOST_BLOCKS = 4  # of these rows that a kernel for GPUs has in one block


def rows_in_blocks(T: int) -> int:
    """As many rows as whole blocks of such a kernel have, whatever its blocks."""
    return max(-(-T // n) * n for n in (ROWS_OF_BOUNDS * i for i in range(1, _MOST_BLOCKS + 1)))


@dataclass(frozen=True)
class Band:
    """Static mask: key s is allowed for query t where lower <= s - t <= upper (None: no bound).

    `is_complete` says what the traced part of a mask is: these intervals, of rows moved by `MaskOperands.shift`, cut
    off at `key_value_length`, and nothing else. A kernel then needs no interval of each row. Without a shift, rows are
    dead only where that length is 0. With one, the bounds alone do not say which keys a row may attend.

    `rows_per_position`: query heads may be rows, of which so many in a row are at one position.
    """

    lower: int | None = None
    upper: int | None = None
    is_complete: bool = False
    rows_per_position: int = 1

    @property
    def width(self) -> int | None:
        """How many keys a row may attend, if bounded on both sides."""
        return None if self.lower is None or self.upper is None else self.upper - self.lower + 1

    def interval(self, rows: Any, S: int, xp: Any = np) -> tuple[Any, Any]:
        """The keys [start, stop) of `rows`: positions of any shape, in NumPy or, with xp=jax.numpy, traced."""
        start = xp.zeros_like(rows) if self.lower is None else xp.clip(rows + self.lower, 0, S)
        stop = xp.full_like(rows, S) if self.upper is None else xp.clip(rows + self.upper + 1, 0, S)
        return start, stop

    def moved(self, shift: Any, T: int, S: int) -> tuple[Any, Any]:
        """`lower` and `upper` for rows moved by a traced int32, cut off where they exclude nothing or all.

        No sum passes an end of int32, whatever the shift.
        """
        info = np.iinfo(np.int32)

        def bound(x: int | None) -> Any:
            if x is None:
                return None
            lowest, highest = max(-T - x, int(info.min)), min(S - x, int(info.max))
            return jnp.minimum(jnp.maximum(shift, lowest), highest) + x

        return bound(self.lower), bound(self.upper)

    def intervals(self, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
        """`key_start` and `key_stop` of all rows, each (T,) int32."""
        start, stop = self.interval(np.arange(T), S)
        return start.astype(np.int32), stop.astype(np.int32)


class MaskOperands(NamedTuple):
    """The traced part of a mask. `B`, `N` and the mask's `T`, `S` may each be 1 and then broadcast.

    Attributes:
      key_start, key_stop: (B, N, T) int32, or None where the `Band` says it all.
      allowed: (B, N, T, S) bool, the caller's `mask`, or None.
      dead: (B, N, T) bool, True on rows with no key at all, or None where there are none.
      key_value_length: (B,) int32: keys and values from here on are padding and may hold NaN; or None.
      shift: (B,) int32: what rows are moved by in a `Band` that is complete (the intervals say so too); or None.
      query_ids, key_ids: (B, 1, T, 1) and (B, 1, 1, S) int32: a row attends keys of its own id only; or None.
      lowest_position, highest_position: (B, 1, T, 1) int32, and key_positions: (B, 1, 1, S) int32: a row attends keys
        whose positions are between these, both included; or None.
      is_exact: (B, 1, 1) int32: not 0 where the intervals say all that ids and positions say; None without these. Where
        they do not, every element is compared.
      row_start, row_stop: (B, N, `rows_in_blocks(T)`) int32: `key_start` and `key_stop`, beside ids and positions, as
        kernels for GPUs read them: dead rows have `DEAD` and S, and those behind the last are as padding. None where
        another mask, of elements, decides which rows are dead.
      row_bounds: (B, N, blocks of `ROWS_OF_BOUNDS` rows, 4) int32: of the intervals of these, the least and the largest
        start, and the least and the largest stop; the least stop of dead rows is 0.
      tile_classes: (B, N, tiles of rows, tiles of keys) int8: what all masks leave of a tile, if one is a `mask_mod`;
        see `tile_masks.Tiles`.
    """

    key_start: jax.Array | None = None
    key_stop: jax.Array | None = None
    allowed: jax.Array | None = None
    dead: jax.Array | None = None
    key_value_length: jax.Array | None = None
    shift: jax.Array | None = None
    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    lowest_position: jax.Array | None = None
    highest_position: jax.Array | None = None
    key_positions: jax.Array | None = None
    is_exact: jax.Array | None = None
    row_start: jax.Array | None = None
    row_stop: jax.Array | None = None
    row_bounds: jax.Array | None = None
    tile_classes: jax.Array | None = None

    def without_rows(self) -> "MaskOperands":
        """For other rows: what is known of each row, but for its interval, is made anew."""
        return self._replace(row_start=None, row_stop=None, row_bounds=None)

    def matches(self, read: Callable[[jax.Array], jax.Array] = lambda x: x) -> jax.Array | None:
        """What ids and positions say of each element, (B, 1, T, S), or of those that `read` takes; None without any."""
        terms = []
        if self.query_ids is not None and self.key_ids is not None:
            terms.append(read(self.query_ids) == read(self.key_ids))
        if self.key_positions is not None:
            positions = read(self.key_positions)
            if self.lowest_position is not None:
                terms.append(positions >= read(self.lowest_position))
            if self.highest_position is not None:
                terms.append(positions <= read(self.highest_position))
        return functools.reduce(jnp.logical_and, terms) if terms else None


def make_band(T: int, S: int, *, is_causal: bool, window: tuple[int, int] | None, also: Band, offset: int = 0) -> Band:
    """The band of a causal mask, a static window and another band, without a bound that cuts nothing off.

    `offset` is added to the position of each row. No bound is further out than the lengths, so that sums with positions
    stay inside int32.
    """
    lower, upper = (-T, S) if window is None else (max(offset - window[0], -T), min(offset + window[1], S))
    if is_causal:
        upper = min(upper, offset)
    lower = lower if also.lower is None else max(lower, also.lower)
    upper = upper if also.upper is None else min(upper, also.upper)
    return Band(None if lower <= 1 - T else min(lower, S), None if upper >= S - 1 else max(upper, -T))


class ColumnRange(NamedTuple):
    """Key/value tiles of one query tile: [first, stop) in all; [full_first, full_stop) need no mask."""

    first: Any
    full_first: Any
    full_stop: Any
    stop: Any


def column_range(key_start: Any, key_stop: Any, block_kv: int, num_tiles: int, xp: Any = np) -> ColumnRange:
    """Classify the tiles visited by rows with these intervals: outside the range they are empty.

    Works on NumPy arrays (static schedule) and, with xp=jax.numpy, on traced ones (skipped at run time).
    Rows with an empty interval have key_start = S and key_stop = 0, which widens nothing but rules out full tiles.
    """
    starts, stops = ((xp.min(x), xp.max(x)) for x in (key_start, key_stop))
    return bounded_range(starts, stops, block_kv, num_tiles, xp)


def bounded_range(
    starts: tuple[Any, Any], stops: tuple[Any, Any], block_kv: int, num_tiles: int, xp: Any = np
) -> ColumnRange:
    """`column_range` of rows whose intervals start, and stop, between these: the lowest and the highest of each."""
    first = starts[0] // block_kv
    stop = xp.maximum(first, -(-stops[1] // block_kv))
    full_first = xp.clip(-(-starts[1] // block_kv), first, stop)
    full_stop = xp.clip(stops[0] // block_kv, full_first, stop)
    return ColumnRange(*(xp.minimum(x, num_tiles).astype(np.int32) for x in (first, full_first, full_stop, stop)))
