"""Masks inside a Mosaic GPU kernel: which key/value tiles a block of query rows visits, and the mask of one tile.

The rules are those of `masks.py`: row t may attend the keys in `[key_start[t], key_stop[t])`. A static `Band` is
computed from positions, and so is one that is cut off at the length of the keys: only tiles at the right edge then need
a mask, as without lengths. Other traced intervals come as two int32 vectors, and XLA reduces them beforehand to four
tile numbers for each block of rows (O(T) work), so that the kernel knows its trip counts from four scalars.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._semantics.masks import Band, ColumnRange, MaskOperands
from .device.pallas import broadcast_index, iota, load, pad_axis, pl, round_up, spread

_DEAD = -1  # the key_start of a row without any key: it attends all of them, with logits of 0


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


def interval_operands(mask: MaskOperands, T: int, S: int, block_rows: int, block_kv: int) -> dict[str, jax.Array]:
    """Traced intervals as 'key_start', 'key_stop' (..., T, padded to blocks) and 'ranges' (..., blocks, 4)."""
    if mask.key_start is None or mask.key_stop is None:
        return {}
    padded = round_up(T, block_rows)
    start, stop = (jnp.broadcast_to(x, (*x.shape[:-1], T)) for x in (mask.key_start, mask.key_stop))
    start, stop = pad_axis(start, -1, padded, S), pad_axis(stop, -1, padded, 0)
    start, stop = jnp.broadcast_arrays(start, stop)
    blocks = (*start.shape[:-1], padded // block_rows, block_rows)
    starts, stops = start.reshape(blocks), stop.reshape(blocks)
    bounds = (starts.min(-1), starts.max(-1), stops.min(-1), stops.max(-1))
    if mask.dead is not None:
        # A full tile knows nothing of dead rows: their blocks have only masked tiles.
        dead = pad_axis(jnp.broadcast_to(mask.dead, (*mask.dead.shape[:-1], T)), -1, padded)
        start, dead = jnp.broadcast_arrays(start, dead)
        start = jnp.where(dead, _DEAD, start)
        any_dead = dead.reshape(*dead.shape[:-1], -1, block_rows).any(-1)
        bounds = (*bounds[:2], jnp.where(any_dead, 0, bounds[2]), bounds[3])
    ranges = jnp.stack([*tile_ranges(*bounds, block_kv, S)], -1)
    return {"key_start": start, "key_stop": jnp.broadcast_to(stop, start.shape), "ranges": ranges}


def query_ranges(
    mask: MaskOperands, T: int, S: int, block_q: int, block_keys: int, summed: tuple[int, ...], *, is_cut: bool
) -> dict[str, jax.Array]:
    """Of traced masks: which query tiles a block of keys meets, and which of them need a mask.

    'query_ranges', (batch..., key blocks, 2), has the first and the end of the query tiles of a block, in any head and
    anywhere along a batch axis that is not of size 1 in `summed`; 'query_bounds', (batch..., N or 1, query tiles, 2),
    has the keys that all rows of a tile attend.

    Of a band that is cut off, 'longest' (batch...), the key_value_length of the longest batch row of those along the
    `summed` axes; 0 if one of them is.
    """
    axes = tuple(i for i, n in enumerate(summed) if n > 1)
    if is_cut and mask.key_value_length is not None:
        length = mask.key_value_length
        any_dead = (length <= 0).any(axes, keepdims=True)
        return {"longest": jnp.where(any_dead, 0, length.max(axes, keepdims=True)) if axes else length}
    if mask.key_start is None or mask.key_stop is None:
        return {}
    padded = round_up(T, block_q)
    start, stop = (jnp.broadcast_to(x, (*x.shape[:-1], T)) for x in (mask.key_start, mask.key_stop))
    start, stop = jnp.broadcast_arrays(pad_axis(start, -1, padded, S), pad_axis(stop, -1, padded, 0))
    starts, stops = (x.reshape(*x.shape[:-1], padded // block_q, block_q) for x in (start, stop))
    first_key = jnp.arange(0, S, block_keys, dtype=jnp.int32).reshape((1,) * (start.ndim - 1) + (-1, 1))
    attends = (starts.min(-1)[..., None, :] < first_key + block_keys) & (stops.max(-1)[..., None, :] > first_key)
    tile = jnp.arange(padded // block_q, dtype=jnp.int32).reshape((1,) * start.ndim + (-1,))
    first = jnp.where(attends, tile, padded // block_q).min((-1, -3))
    end = jnp.where(attends, tile + 1, 0).max((-1, -3))
    first, end = first.min(axes, keepdims=True), end.max(axes, keepdims=True)
    low, high = starts.max(-1), stops.min(-1)
    if mask.dead is not None:
        # A tile with a dead row always needs the mask, which knows of it.
        dead = pad_axis(jnp.broadcast_to(mask.dead, (*mask.dead.shape[:-1], T)), -1, padded)
        any_dead = dead.reshape(*dead.shape[:-1], padded // block_q, block_q).any(-1)
        low, any_dead = jnp.broadcast_arrays(low, any_dead)
        high = jnp.where(any_dead, 0, jnp.broadcast_to(high, low.shape))
    return {
        "query_ranges": jnp.stack([jnp.minimum(first, end), end], -1),
        "query_bounds": jnp.stack([low, high], -1),
    }


@dataclass(frozen=True)
class Intervals:
    """The interval masks of a call, as a kernel sees them; `refs` are those of `interval_operands`.

    `skips_dead_rows`: dead rows of a band that is cut off visit no tile but the first, in place of all.
    """

    band: Band
    T: int
    S: int
    block_kv: int
    refs: dict[str, Any]
    skips_dead_rows: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether the intervals are those of the band, cut off at the length of the keys (`Band.is_cut`)."""
        return "length" in self.refs and not self.is_traced

    def length(self, head: tuple) -> Any:
        """From which key on keys and values are padding."""
        ref = self.refs["length"]
        return ref[broadcast_index(head[:-1], ref.shape)]

    def is_dead(self, head: tuple) -> Any:
        """Of a band that is cut off, whether the rows of a head have no key: all of them or none."""
        return self.length(head) <= 0

    def end(self, head: tuple) -> Any:
        """No row of a head attends a key from here on, but for dead ones."""
        if not self.is_cut:
            return self.S
        return jnp.minimum(self.length(head), self.S)

    def right_tiles(self, block_rows: int) -> int:
        """The most tiles that a block of rows can have behind the full ones; all of them if masks are traced."""
        count = -(-self.S // self.block_kv)
        if "ranges" in self.refs:
            return count
        start, stop = self.band.intervals(self.T, self.S)
        first = np.arange(0, self.T, block_rows)
        last = np.minimum(first + block_rows, self.T) - 1
        end = -(-stop[last] // self.block_kv)
        full_stop = np.maximum(stop[first] // self.block_kv, -(-start[last] // self.block_kv))
        # Cut off, a block has no more of them, and at least the one with the cut.
        return int(np.maximum(end - full_stop, int(self.is_cut)).max())

    @property
    def is_traced(self) -> bool:
        return "key_start" in self.refs

    @property
    def has_left_edge(self) -> bool:
        """Whether tiles before the full ones can need a mask."""
        return self.is_traced or self.band.lower is not None

    @property
    def has_right_edge(self) -> bool:
        return self.is_traced or self.is_cut or self.band.upper is not None or self.S % self.block_kv != 0

    def ranges(self, head: tuple, block: Any, block_rows: int) -> ColumnRange:
        """Tiles of a block of rows of one head, as scalars."""
        if "ranges" in self.refs:
            ref = self.refs["ranges"]
            index = broadcast_index(head, ref.shape[:-2])
            return ColumnRange(*(ref[(*index, block, c)] for c in range(4)))
        row = jnp.int32(block * block_rows)
        last = jnp.minimum(row + (block_rows - 1), self.T - 1)
        end, (lower, upper) = jnp.int32(self.end(head)), (self.band.lower, self.band.upper)
        clip = lambda x: jnp.minimum(jnp.maximum(x, 0), end)  # noqa: E731
        starts = (jnp.int32(0),) * 2 if lower is None else (clip(row + lower), clip(last + lower))
        stops = (end,) * 2 if upper is None else (clip(row + upper + 1), clip(last + upper + 1))
        if self.is_cut and not self.skips_dead_rows:
            stops = tuple(jnp.where(self.is_dead(head), self.S, stop) for stop in stops)
        return tile_ranges(starts[0], starts[1], stops[0], stops[1], self.block_kv, self.S)

    def query_tiles(self, batch: Any, block: Any, block_q: int, block_keys: int) -> tuple[Any, Any]:
        """First and end of the query tiles with a row that attends a block of keys."""
        if "query_ranges" in self.refs:
            ref = self.refs["query_ranges"]
            index = broadcast_index(batch, ref.shape[:-2])
            return ref[(*index, block, 0)], ref[(*index, block, 1)]
        key, count = jnp.int32(block * block_keys), -(-self.T // block_q)
        last = jnp.minimum(key + block_keys, self.S) - 1
        first, stop = jnp.int32(0), jnp.int32(count)
        if self.band.upper is not None:
            first = lax.div(jnp.maximum(key - self.band.upper, 0), jnp.int32(block_q))
        if self.band.lower is not None:
            end = jnp.maximum(last - self.band.lower, -1) + block_q
            stop = jnp.minimum(lax.div(end, jnp.int32(block_q)), stop)
        if self.is_cut:
            longest = self.refs["longest"]
            longest = longest[broadcast_index(batch, longest.shape)]
            first = jnp.where(longest <= 0, 0, first)
            stop = jnp.where((longest > 0) & (longest <= key), 0, stop)
        return first, stop

    def is_query_edge(self, head: tuple, row: Any, block: Any, block_q: int, block_keys: int) -> Any:
        """Whether a tile needs a mask; keys and rows past the ends do not, as nothing that comes of them is kept."""
        key, edge = jnp.int32(block * block_keys), False
        if "query_bounds" in self.refs:
            ref = self.refs["query_bounds"]
            tile = (*broadcast_index(head, ref.shape[:-2]), lax.div(row, jnp.int32(block_q)))
            last = jnp.minimum(key + block_keys, self.S)
            return (ref[(*tile, 0)] > key) | (ref[(*tile, 1)] < last)
        if self.is_cut:
            edge = self.is_dead(head) | (self.end(head) < jnp.minimum(key + block_keys, self.S))
        if self.band.upper is not None:
            edge = edge | (row + self.band.upper < key + (block_keys - 1))
        if self.band.lower is not None:
            edge = edge | (row + (block_q - 1) + self.band.lower > key)
        return edge

    def rows(self, head: tuple, row: Any, count: int, layout: Any) -> tuple[jax.Array, jax.Array] | None:
        """The traced intervals of some rows, in registers."""
        if "key_start" not in self.refs:
            return None
        start, stop = self.refs["key_start"], self.refs["key_stop"]
        index = (*broadcast_index(head, start.shape[:-1]), pl.ds(row, count))
        start, stop = (load(ref.at[index], layout=layout) for ref in (start, stop))
        return start, stop

    def allowed(
        self, rows: tuple[jax.Array, jax.Array] | None, head: tuple, row: Any, column: Any, shape: Any, q_axis: int
    ) -> Any:
        """Mask of the tile from (row, column) on, in registers: all but what lies outside of the rows' intervals.

        Rows of the tile lie along axis `q_axis` of `shape`. A dead row that does not skip its tiles has all keys.
        """
        column = iota(shape, 1 - q_axis) + column
        if rows is not None:
            start, stop = (spread(x, shape, q_axis) for x in rows)
            return (column >= start) & (column < stop)
        position = iota(shape, q_axis) + row
        terms = []
        if self.band.lower is not None:
            terms.append(column >= position + self.band.lower)
        if self.band.upper is not None:
            terms.append(column <= position + self.band.upper)
        if self.S % self.block_kv or self.is_cut or not terms:
            terms.append(column < self.end(head))
        result = functools.reduce(jnp.logical_and, terms)
        dead = self.dead(None, head, shape, q_axis)
        return result if dead is None else result | dead

    def dead(self, rows: tuple[jax.Array, jax.Array] | None, head: tuple, shape: Any, q_axis: int) -> jax.Array | None:
        """Which rows have no key at all."""
        if self.is_cut:
            return iota(shape, q_axis) < jnp.where(self.is_dead(head), jnp.int32(shape[q_axis]), 0)
        return None if rows is None else spread(rows[0], shape, q_axis) == _DEAD
