"""Traced interval masks as the kernels read them, which XLA computes beforehand.

The rules are those of `_semantics/masks.py`: row t may attend the keys in `[key_start[t], key_stop[t])`. The intervals
come as two int32 vectors, and XLA reduces them to four tile numbers for each block of rows (O(T) work), so that a
kernel knows its trip counts from four scalars. A band is computed in the kernel: see `device/masks.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.masks import ColumnRange, MaskOperands
from ..operands import DEAD, QueryTiles, RowIntervals
from ..pallas import pad_axis, round_up


def tile_ranges(start_min: Any, start_max: Any, stop_min: Any, stop_max: Any, block_kv: int, S: int) -> ColumnRange:
    """As `masks.column_range`, of bounds of the rows' intervals; never empty, which saves the pipelines a case."""
    count = -(-S // block_kv)
    down = lambda x: lax.div(x, jnp.full_like(x, block_kv))  # noqa: E731
    up = lambda x: down(x + (block_kv - 1))  # noqa: E731
    first = jnp.minimum(down(start_min), count - 1)
    stop = jnp.maximum(up(stop_max), first + 1)
    full_first = jnp.minimum(jnp.maximum(up(start_max), first), stop)
    full_stop = jnp.minimum(jnp.maximum(down(stop_min), full_first), stop)
    return ColumnRange(first, full_first, full_stop, stop)


def row_intervals(mask: MaskOperands, T: int, S: int, block_rows: int, block_kv: int) -> RowIntervals | None:
    """Padded to whole blocks of rows; None if no interval is traced."""
    if mask.key_start is None or mask.key_stop is None:
        return None
    start, stop = _padded(mask.key_start, mask.key_stop, T, S, block_rows)
    starts, stops = _blocks(start, block_rows), _blocks(stop, block_rows)
    bounds = (starts.min(-1), starts.max(-1), stops.min(-1), stops.max(-1))
    if mask.dead is not None:
        # A full tile knows nothing of dead rows: their blocks have only masked tiles.
        dead = _padded_dead(mask.dead, T, block_rows)
        start, dead = jnp.broadcast_arrays(start, dead)
        start = jnp.where(dead, DEAD, start)
        any_dead = _blocks(dead, block_rows).any(-1)
        bounds = (*bounds[:2], jnp.where(any_dead, 0, bounds[2]), bounds[3])
    if mask.is_exact is not None:
        bounds = (*bounds[:2], jnp.where(mask.is_exact, bounds[2], 0), bounds[3])
    ranges = jnp.stack([*tile_ranges(*bounds, block_kv, S)], -1)
    return RowIntervals(start, jnp.broadcast_to(stop, start.shape), ranges)


def query_tiles(
    mask: MaskOperands, T: int, S: int, block_q: int, block_keys: int, summed: tuple[int, ...], *, is_cut: bool
) -> QueryTiles | None:
    """For every block of keys, the query tiles that touch it, and for every query tile the keys all its rows may see.

    `ranges`, (batch..., key blocks, 2), has the first and the end of the query tiles of a block, in any head and
    anywhere along a batch axis that is not of size 1 in `summed`; `bounds`, (batch..., N or 1, query tiles, 2), has the
    keys that all rows of a tile attend.

    Of a band that is cut off, only `longest` (batch...), the key_value_length of the longest batch row of those along
    the `summed` axes; 0 if one of them is. None if no mask is traced.
    """
    axes = tuple(i for i, n in enumerate(summed) if n > 1)
    if is_cut and mask.key_value_length is not None:
        length = mask.key_value_length
        any_dead = (length <= 0).any(axes, keepdims=True)
        return QueryTiles(
            longest=jnp.where(any_dead, 0, length.max(axes, keepdims=True)) if axes else length,
        )
    if mask.key_start is None or mask.key_stop is None:
        return None
    start, stop = _padded(mask.key_start, mask.key_stop, T, S, block_q)
    starts, stops = _blocks(start, block_q), _blocks(stop, block_q)
    num_tiles = start.shape[-1] // block_q
    first_key = jnp.arange(0, S, block_keys, dtype=jnp.int32).reshape((1,) * (start.ndim - 1) + (-1, 1))
    attends = (starts.min(-1)[..., None, :] < first_key + block_keys) & (stops.max(-1)[..., None, :] > first_key)
    tile = jnp.arange(num_tiles, dtype=jnp.int32).reshape((1,) * start.ndim + (-1,))
    first = jnp.where(attends, tile, num_tiles).min((-1, -3))
    end = jnp.where(attends, tile + 1, 0).max((-1, -3))
    first, end = first.min(axes, keepdims=True), end.max(axes, keepdims=True)
    low, high = starts.max(-1), stops.min(-1)
    if mask.dead is not None:
        # A tile with a dead row always needs the mask, which knows of it.
        any_dead = _blocks(_padded_dead(mask.dead, T, block_q), block_q).any(-1)
        low, any_dead = jnp.broadcast_arrays(low, any_dead)
        high = jnp.where(any_dead, 0, jnp.broadcast_to(high, low.shape))
    if mask.is_exact is not None:
        high = jnp.where(mask.is_exact, high, 0)
    return QueryTiles(
        ranges=jnp.stack([jnp.minimum(first, end), end], -1),
        bounds=jnp.stack([low, high], -1),
    )


def _padded(start: jax.Array, stop: jax.Array, T: int, S: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Starts and stops of all T rows, and of padding to whole blocks, whose intervals are empty."""
    padded = round_up(T, block)
    start, stop = (jnp.broadcast_to(x, (*x.shape[:-1], T)) for x in (start, stop))
    start, stop = jnp.broadcast_arrays(pad_axis(start, -1, padded, S), pad_axis(stop, -1, padded, 0))
    return start, stop


def _padded_dead(dead: jax.Array, T: int, block: int) -> jax.Array:
    return pad_axis(jnp.broadcast_to(dead, (*dead.shape[:-1], T)), -1, round_up(T, block))


def _blocks(x: jax.Array, block: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
