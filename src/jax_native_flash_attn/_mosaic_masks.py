"""Masks inside a Mosaic GPU kernel: which key/value tiles a block of query rows visits, and the mask of one tile.

The rules are those of `_masks.py`: row t may attend the keys in `[key_start[t], key_stop[t])`. A static `Band` is
computed from positions. Traced intervals come as two int32 vectors, and XLA reduces them beforehand to four tile numbers
for each block of rows (O(T) work), so that the kernel knows its trip counts from four scalars.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._masks import Band, MaskOperands
from ._mosaic import ROW, broadcast_index, columns_of, iota, pad_axis, pl, plgpu, round_up
from ._tiles import ColumnRange

_DEAD = -1  # the key_start of a row without any key: it attends all of them, with logits of 0


def tile_ranges(start_min: Any, start_max: Any, stop_min: Any, stop_max: Any, block_kv: int, S: int) -> ColumnRange:
    """As `_tiles.column_range`, of bounds of the rows' intervals; never empty, so that a pipeline needs no exception."""
    count = -(-S // block_kv)
    down = lambda x: lax.div(x, jnp.full_like(x, block_kv))  # noqa: E731
    up = lambda x: down(x + (block_kv - 1))  # noqa: E731
    first = jnp.minimum(down(start_min), count - 1)
    stop = jnp.maximum(up(stop_max), first + 1)
    full_first = jnp.minimum(jnp.maximum(up(start_max), first), stop)
    full_stop = jnp.minimum(jnp.maximum(down(stop_min), full_first), stop)
    return ColumnRange(first, full_first, full_stop, stop)


def interval_operands(mask: MaskOperands, T: int, S: int, block_rows: int, block_kv: int) -> dict[str, jax.Array]:
    """Arrays of the traced intervals: 'key_start', 'key_stop' (..., T, padded to blocks) and 'ranges' (..., blocks, 4)."""
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


@dataclass(frozen=True)
class Intervals:
    """The interval masks of a call, as a kernel sees them; `refs` are those of `interval_operands`."""

    band: Band
    T: int
    S: int
    block_kv: int
    refs: dict[str, Any]

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
        return int(np.maximum(end - full_stop, 0).max())

    @property
    def has_left_edge(self) -> bool:
        """Whether tiles before the full ones can need a mask."""
        return "ranges" in self.refs or self.band.lower is not None

    @property
    def has_right_edge(self) -> bool:
        return "ranges" in self.refs or self.band.upper is not None or self.S % self.block_kv != 0

    def ranges(self, head: tuple, block: Any, block_rows: int) -> ColumnRange:
        """Tiles of a block of rows of one head, as scalars."""
        if "ranges" in self.refs:
            ref = self.refs["ranges"]
            index = broadcast_index(head, ref.shape[:-2])
            return ColumnRange(*(ref[(*index, block, c)] for c in range(4)))
        row = jnp.int32(block * block_rows)
        last = jnp.minimum(row + (block_rows - 1), self.T - 1)
        S, (lower, upper) = self.S, (self.band.lower, self.band.upper)
        clip = lambda x: jnp.minimum(jnp.maximum(x, 0), S)  # noqa: E731
        starts = (jnp.int32(0),) * 2 if lower is None else (clip(row + lower), clip(last + lower))
        stops = (jnp.int32(S),) * 2 if upper is None else (clip(row + upper + 1), clip(last + upper + 1))
        return tile_ranges(*starts, *stops, self.block_kv, S)

    def rows(self, head: tuple, row: Any, count: int) -> tuple[jax.Array, jax.Array] | None:
        """The traced intervals of some rows, in registers."""
        if "ranges" not in self.refs:
            return None
        start, stop = self.refs["key_start"], self.refs["key_stop"]
        index = (*broadcast_index(head, start.shape[:-1]), pl.ds(row, count))
        start, stop = (plgpu.load(ref.at[index], layout=ROW, optimized=False) for ref in (start, stop))
        return start, stop

    def allowed(self, rows: tuple[jax.Array, jax.Array] | None, row: Any, tile: Any, shape: tuple[int, int]) -> Any:
        """Mask of a tile in registers; what a row's interval leaves out and the columns past S."""
        column = iota(shape, 1) + tile * self.block_kv
        if rows is not None:
            return (column >= columns_of(rows[0], shape)) & (column < columns_of(rows[1], shape))
        position = iota(shape, 0) + row
        terms = []
        if self.band.lower is not None:
            terms.append(column >= position + self.band.lower)
        if self.band.upper is not None:
            terms.append(column <= position + self.band.upper)
        if self.S % self.block_kv or not terms:
            terms.append(column < self.S)
        result = terms[0]
        for term in terms[1:]:
            result = result & term
        return result

    def dead(self, rows: tuple[jax.Array, jax.Array] | None, shape: tuple[int, int]) -> jax.Array | None:
        """Which rows have no key at all."""
        return None if rows is None else columns_of(rows[0], shape) == _DEAD
