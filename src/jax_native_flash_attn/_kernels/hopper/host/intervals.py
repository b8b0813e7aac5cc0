"""Traced interval masks as the kernels read them, which XLA computes beforehand.

The rules are those of `_semantics/masks.py`: row t may attend the keys in `[key_start[t], key_stop[t])`. The intervals
come as two int32 vectors, and XLA reduces them to four tile numbers for each block of rows (O(T) work), so that a
kernel knows its trip counts from four scalars. Those of a complete band are computed in the kernel: see
`device/masks.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.masks import DEAD, ROWS_OF_BOUNDS, ColumnRange, MaskOperands
from ...._semantics.visible import first_and_end
from ..operands import QueryTiles, RowIntervals
from ..pallas import pad_axis, round_up


class Bounds(NamedTuple):
    """Of the intervals of each block of rows."""

    least_start: Any
    largest_start: Any
    least_stop: Any
    largest_stop: Any


def tile_ranges(bounds: Bounds, block_kv: int, S: int) -> ColumnRange:
    """As `masks.column_range`, of bounds of the rows' intervals; never empty, which saves the pipelines a case."""
    count = -(-S // block_kv)
    down = lambda x: lax.div(x, jnp.full_like(x, block_kv))  # noqa: E731
    up = lambda x: down(x + (block_kv - 1))  # noqa: E731
    first = jnp.minimum(down(bounds.least_start), count - 1)
    stop = jnp.maximum(up(bounds.largest_stop), first + 1)
    full_first = jnp.minimum(jnp.maximum(up(bounds.largest_start), first), stop)
    full_stop = jnp.minimum(jnp.maximum(down(bounds.least_stop), full_first), stop)
    return ColumnRange(first, full_first, full_stop, stop)


def row_intervals(
    mask: MaskOperands, T: int, S: int, block_rows: int, block_kv: int, *, skips_empty: bool = False
) -> RowIntervals | None:
    """Padded to whole blocks of rows; None if no interval is traced.

    `skips_empty`: tile ranges leave out what the boolean mask empties at either end. It is read in all other tiles.
    """
    if mask.key_start is None or mask.key_stop is None:
        return None
    if mask.row_start is not None and block_rows % ROWS_OF_BOUNDS == 0:
        assert mask.row_start.shape[-1] >= round_up(T, block_rows), block_rows
        return RowIntervals(mask.row_start, mask.row_stop, None, row_bounds=mask.row_bounds)
    start, stop, dead = _padded(mask, T, S, block_rows)
    visited = start, stop
    if skips_empty:
        assert mask.allowed is not None
        first, end = first_and_end(mask.allowed)
        first, end = pad_rows(first, T, block_rows, S), pad_rows(end, T, block_rows)
        visited = jnp.maximum(start, first), jnp.minimum(stop, end)
        if dead is not None:
            visited = jnp.where(dead, start, visited[0]), jnp.where(dead, stop, visited[1])
    bounds = _bounds(mask, start, stop, dead, block_rows, *visited)
    start = start if dead is None else jnp.where(dead, DEAD, start)
    return RowIntervals(start, stop, jnp.stack([*tile_ranges(bounds, block_kv, S)], -1))


def query_tiles(
    mask: MaskOperands,
    T: int,
    S: int,
    block_q: int,
    block_keys: int,
    summed: tuple[int, ...],
    *,
    is_computed: bool,
    visited: jax.Array | None = None,
) -> QueryTiles | None:
    """For every block of keys, the query tiles that touch it, and for every query tile the keys all its rows may see.

    `firsts` and `ends`, (batch..., key blocks), have the first and the end of the query tiles of a block, in any head
    and anywhere along a batch axis that is not of size 1 in `summed`; a block without any has an end of 0. `bounds`,
    (batch..., N or 1, query tiles, 2), has the keys that all rows of a tile attend; or there are `row_bounds`, as of
    `MaskOperands`.

    `visited`: (batch..., N or 1, key blocks, query tiles), whether a boolean mask leaves anything in these.

    Of intervals that the kernel computes, only `longest` (batch...), the key_value_length of the longest batch row of
    those along the `summed` axes; 0 if one of them is. None if no mask is traced, and of a kernel that computes
    intervals of rows that are moved: all along those axes then have the same numbers.
    """
    axes = tuple(i for i, n in enumerate(summed) if n > 1)
    if is_computed:
        length = mask.key_value_length
        if length is None or mask.shift is not None:
            return None
        any_dead = (length <= 0).any(axes, keepdims=True)
        return QueryTiles(
            longest=jnp.where(any_dead, 0, length.max(axes, keepdims=True)) if axes else length,
        )
    if mask.key_start is None or mask.key_stop is None:
        return None
    dead, bounds, row_bounds = None, None, None
    if mask.row_bounds is not None and block_q == ROWS_OF_BOUNDS:
        row_bounds = mask.row_bounds
        least_start, largest_stop = row_bounds[..., 0], row_bounds[..., 3]
    else:
        start, stop, dead = _padded(mask, T, S, block_q)
        least_start, low, high, largest_stop = _bounds(mask, start, stop, dead, block_q, start, stop)
        bounds = jnp.stack([low, high], -1)
    num_tiles = least_start.shape[-1]
    first_key = jnp.arange(0, S, block_keys, dtype=jnp.int32).reshape((1,) * (least_start.ndim - 1) + (-1, 1))
    attends = (least_start[..., None, :] < first_key + block_keys) & (largest_stop[..., None, :] > first_key)
    if visited is not None:
        has_dead = False if dead is None else dead.reshape(*dead.shape[:-1], num_tiles, block_q).any(-1)[..., None, :]
        attends &= visited | has_dead
    tile = jnp.arange(num_tiles, dtype=jnp.int32).reshape((1,) * least_start.ndim + (-1,))
    first = jnp.where(attends, tile, num_tiles).min((-1, -3))
    end = jnp.where(attends, tile + 1, 0).max((-1, -3))
    first, end = first.min(axes, keepdims=True), end.max(axes, keepdims=True)
    return QueryTiles(firsts=first, ends=end, bounds=bounds, row_bounds=row_bounds)


def pad_rows(x: jax.Array, T: int, block: int, value: Any = 0) -> jax.Array:
    """(..., T or 1) -> (..., T), and padding to whole blocks."""
    return pad_axis(jnp.broadcast_to(x, (*x.shape[:-1], T)), -1, round_up(T, block), value)


def _padded(mask: MaskOperands, T: int, S: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Starts, stops and deadness of all T rows, and of padding to whole blocks, whose intervals are empty."""

    def rows(x: jax.Array, value: Any) -> jax.Array:
        return pad_rows(x, T, block, value)

    assert mask.key_start is not None
    assert mask.key_stop is not None
    start, stop = rows(mask.key_start, S), rows(mask.key_stop, 0)
    if mask.dead is None:
        start, stop = jnp.broadcast_arrays(start, stop)
        return start, stop, None
    start, stop, dead = jnp.broadcast_arrays(start, stop, rows(mask.dead, False))
    return start, stop, dead


def _bounds(
    mask: MaskOperands,
    start: jax.Array,
    stop: jax.Array,
    dead: jax.Array | None,
    block: int,
    first: jax.Array,
    end: jax.Array,
) -> Bounds:
    """Of full tiles by `start` and `stop`, of visited ones by `first` and `end`.

    A tile that is full knows nothing of dead rows, nor of ids: where these count, no stop is far enough for one.
    """
    least_stop = stop if dead is None else jnp.where(dead, 0, stop)
    least_stop = least_stop if mask.is_exact is None else jnp.where(mask.is_exact != 0, least_stop, 0)
    vectors = jnp.broadcast_arrays(first, start, least_stop, end)
    operands = [x.reshape(*x.shape[:-1], -1, block) for x in vectors]
    lowest, largest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max

    def combine(x: tuple, y: tuple) -> tuple:
        kinds = (jnp.minimum, jnp.maximum, jnp.minimum, jnp.maximum)
        return tuple(kind(a, b) for kind, a, b in zip(kinds, x, y, strict=True))

    initial = tuple(map(jnp.int32, (largest, lowest, largest, lowest)))
    return Bounds(*lax.reduce(tuple(operands), initial, combine, (first.ndim,)))
