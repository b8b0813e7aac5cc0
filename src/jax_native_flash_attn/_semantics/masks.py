"""Which keys a query row may attend, as data: one interval of keys per row, never a T x S array.

Causal masks, sliding windows and sequence lengths all say that query row t may attend the keys
`key_start[t] <= s < key_stop[t]`. Static ones (causal, an integer window) are kept as a `Band`, whose
intervals are NumPy vectors, so that the tile schedule is static as well. Anything traced becomes a pair of
arrays. A boolean `mask` argument stays as the caller passed it and is only ever read tile by tile.

Three kinds of rows:

- live rows have at least one key;
- dead rows have none. As in `jax.nn`, they attend all S keys with equal weight: their interval is [0, S) and
  their logits are the constant 0;
- padded rows lie past `query_seq_lengths`. Their interval is empty, so that no tile is visited on their behalf,
  and the public function zeroes them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Band:
    """Static mask: key s is allowed for query t where lower <= s - t <= upper (None: no bound).

    `is_cut` says what the traced part of a mask is: these intervals, cut off at `key_value_length`, and nothing else.
    Rows are then dead only where that is 0, and a kernel needs no interval of each row.
    """

    lower: int | None = None
    upper: int | None = None
    is_cut: bool = False

    @property
    def width(self) -> int | None:
        """How many keys a row may attend, if bounded on both sides."""
        return None if self.lower is None or self.upper is None else self.upper - self.lower + 1

    def interval(self, rows: Any, S: int, xp: Any = np) -> tuple[Any, Any]:
        """The keys [start, stop) of `rows`: positions of any shape, in NumPy or, with xp=jax.numpy, traced."""
        start = xp.zeros_like(rows) if self.lower is None else xp.clip(rows + self.lower, 0, S)
        stop = xp.full_like(rows, S) if self.upper is None else xp.clip(rows + self.upper + 1, 0, S)
        return start, stop

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
    """

    key_start: jax.Array | None = None
    key_stop: jax.Array | None = None
    allowed: jax.Array | None = None
    dead: jax.Array | None = None
    key_value_length: jax.Array | None = None


def make_band(T: int, S: int, *, is_causal: bool, window: tuple[int, int] | None, also: Band) -> Band:
    """The band of a causal mask, a static window and another band, without a bound that cuts nothing off.

    No bound is further out than the lengths, so that sums with positions stay inside int32.
    """
    lower, upper = (-T, S) if window is None else (max(-window[0], -T), min(window[1], S))
    if is_causal:
        upper = min(upper, 0)
    lower = lower if also.lower is None else max(lower, also.lower)
    upper = upper if also.upper is None else min(upper, also.upper)
    return Band(None if lower <= 1 - T else min(lower, S), None if upper >= S - 1 else max(upper, -T))


def hide_constant_mask(mask: np.ndarray, T: int, S: int) -> tuple[jax.Array | None, Band]:
    """A mask that is a constant of a program, (B or 1, N or 1, T or 1, S or 1): as an array or, if it is one, a band.

    XLA's constant folder would run the reductions that find what the array leaves empty, in seconds or minutes; the
    barrier stops it.
    """
    band = _as_band(mask, T, S)
    return (lax.optimization_barrier(jnp.asarray(mask)), Band()) if band is None else (None, band)


def _as_band(mask: np.ndarray, T: int, S: int) -> Band | None:
    """The band that this mask is, in all batch rows and heads; None if it is none."""
    if mask.size == 0 or T == 0 or S == 0:
        return None
    rows, position = mask[0, 0], np.arange(T)
    if not all(np.array_equal(mask[i], rows) for i in np.ndindex(mask.shape[:2])):
        return None
    rows = np.broadcast_to(rows, (rows.shape[0], S))
    count = np.count_nonzero(rows, axis=1)
    first, end = rows.argmax(1), S - rows[:, ::-1].argmax(1)
    if not ((count == end - first) | (count == 0)).all():
        return None
    is_live, first, end = (np.broadcast_to(x, T) for x in (count > 0, first, end))
    if not is_live.any():
        return Band(S, None)
    # A bound shows where it cuts a row that is left, else where it leaves no row.
    starts, ends = is_live & (first > 0), is_live & (end < S)
    one_row, other_row = is_live.argmax(), T - is_live[::-1].argmax()  # the first row with a key; behind the last
    lower = first[starts][0] - position[starts][0] if starts.any() else S - other_row if other_row < T else None
    upper = end[ends][0] - position[ends][0] - 1 if ends.any() else -one_row if one_row > 0 else None
    lower, upper = (None if x is None else int(x) for x in (lower, upper))
    band = Band(lower, upper)
    start, stop = band.intervals(T, S)
    is_same = np.where(is_live, (start == first) & (stop == end), stop <= start)
    return band if is_same.all() else None


def clip_window_side(side: Any, lowest: int, highest: int) -> jax.Array:
    """A side of a traced window, cut off where it changes nothing any more; int32, from any integer dtype."""
    if not isinstance(side, int):
        # In its own dtype, which may be narrower than int32 or wider, signed or not.
        bounds = jnp.iinfo(side.dtype)
        side = jnp.clip(side, max(lowest, int(bounds.min)), min(highest, int(bounds.max)))
    else:
        side = min(max(side, lowest), highest)
    return jnp.asarray(side, jnp.int32)


def make_mask(
    T: int,
    S: int,
    *,
    is_causal: bool,
    static_window: tuple[int, int] | None,
    traced_window: jax.Array | None,
    query_lengths: jax.Array | None,
    key_value_lengths: jax.Array | None,
    allowed: jax.Array | None,
    static_band: Band = Band(),
) -> tuple[Band, MaskOperands]:
    """Intersect all masks of a call into one static band and the operands it cannot express.

    `static_band` is what `hide_constant_mask` made of the mask.
    """
    band = make_band(T, S, is_causal=is_causal, window=static_window, also=static_band)
    lower, upper = band.lower, band.upper
    start, stop = band.intervals(T, S)
    traced = (
        query_lengths is not None
        or key_value_lengths is not None
        or traced_window is not None
        or bool((stop <= start).any())  # the static form has no dead rows
    )
    if not traced and allowed is None:
        return band, MaskOperands()

    others = query_lengths, traced_window, allowed, lower
    is_cut = key_value_lengths is not None and all(x is None for x in others) and bool((stop > 0).all())
    start, stop = (jnp.asarray(x)[None, None, :] for x in (start, stop))
    rows = jnp.arange(T, dtype=jnp.int32)[None, None, :]
    if traced_window is not None:
        left, right = traced_window
        start, stop = jnp.maximum(start, rows - left), jnp.minimum(stop, rows + right + 1)
    if key_value_lengths is not None:
        stop = jnp.minimum(stop, key_value_lengths[:, None, None])
    if allowed is None:
        has_key = start < stop
    else:
        is_banded = band != Band() or traced_window is not None or key_value_lengths is not None
        has_key = _rows_with_a_key(start, stop, allowed, is_banded=is_banded)
    dead = ~has_key
    if query_lengths is not None:
        padded = rows >= query_lengths[:, None, None]
        dead &= ~padded
        start, stop = jnp.where(padded, S, start), jnp.where(padded, 0, stop)
    start, stop = jnp.where(dead, 0, start), jnp.where(dead, S, stop)
    return Band(lower, upper, is_cut), MaskOperands(start, stop, allowed, dead, key_value_lengths)


def _rows_with_a_key(start: jax.Array, stop: jax.Array, allowed: jax.Array, *, is_banded: bool) -> jax.Array:
    """Whether a row's interval holds an allowed key; (B, N, T), axes of size 1 where nothing varies."""
    if not is_banded:
        return _any_of_rows(allowed)
    if allowed.shape[3] == 1:
        return (start < stop) & allowed[..., 0]
    if allowed.shape[2] > 1:
        return _any_inside(start, stop, allowed)
    # One mask for all rows, and an interval each: counts of allowed keys up to either end, not a T x S array.
    count = jnp.cumsum(allowed[:, :, 0], -1, dtype=jnp.int32)
    count = jnp.concatenate([jnp.zeros_like(count[..., :1]), count], -1)
    lead = jnp.broadcast_shapes(start.shape[:2], stop.shape[:2], count.shape[:2])
    count = jnp.broadcast_to(count, (*lead, count.shape[-1]))
    S = allowed.shape[3]
    start, stop = (jnp.broadcast_to(jnp.clip(x, 0, S), (*lead, x.shape[-1])) for x in (start, stop))
    before, upto = (jnp.take_along_axis(count, x, -1) for x in (start, stop))
    return upto > before


def _any_of_rows(allowed: jax.Array) -> jax.Array:
    """any(-1), in two steps: XLA:CPU vectorises a reduction of an axis that is not the last, four times faster."""
    lanes = 32
    *lead, T, S = allowed.shape
    if T == 1 or S % lanes != 0:
        return allowed.any(-1)
    # The barrier keeps XLA from joining the steps.
    return lax.optimization_barrier(allowed.reshape(*lead, T, S // lanes, lanes).any(-2)).any(-1)


@jax.jit
def _any_inside(start: jax.Array, stop: jax.Array, allowed: jax.Array) -> jax.Array:
    """In one compiled reduction, which makes no array of the size of its operand."""
    columns = jnp.arange(allowed.shape[-1], dtype=jnp.int32)[None, None, None, :]
    return ((columns >= start[..., None]) & (columns < stop[..., None]) & allowed).any(-1)


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
    first = xp.min(key_start) // block_kv
    stop = xp.maximum(first, -(-xp.max(key_stop) // block_kv))
    full_first = xp.clip(-(-xp.max(key_start) // block_kv), first, stop)
    full_stop = xp.clip(xp.min(key_stop) // block_kv, full_first, stop)
    return ColumnRange(*(xp.minimum(x, num_tiles).astype(np.int32) for x in (first, full_first, full_stop, stop)))
