"""Masks inside a kernel: which key/value tiles a block of query rows visits, and the mask of one tile.

A static `Band` is computed from positions, and so is one that is cut off at the length of the keys: only tiles at the
right edge then need a mask, as without lengths. One whose rows are moved by a number is in `moved_masks.py`. Other
traced intervals are read: see `host/intervals.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...._semantics.masks import DEAD, Band, ColumnRange
from ...._semantics.sizes import Sizes
from ..host.intervals import Bounds, tile_ranges
from ..operands import Elements, Operands, QueryTiles, RowIntervals
from ..pallas import ROW, broadcast_index, iota, load, pl, spread
from .row_bounds import bounds_of_block, is_any_masked


def within_band(band: Band, row: Any, column: Any, end: Any | None, shape: Any, q_axis: int) -> jax.Array:
    """The mask of the tile from (row, column) on, in registers; `end` of the keys, if it is to be compared."""
    key, position = iota(shape, 1 - q_axis) + column, iota(shape, q_axis) + row
    terms = [] if band.lower is None else [key >= position + band.lower]
    terms += [] if band.upper is None else [key <= position + band.upper]
    terms += [] if end is None else [key < end]
    return functools.reduce(jnp.logical_and, terms)


@dataclass(frozen=True)
class Intervals:
    """The interval masks of a call, as a kernel sees them.

    Attributes:
      traced: the intervals of the rows, where they are traced.
      key_value_length: (batch...), or None.
      is_cut: as `Operands.is_cut`.
      query_tiles: of the kernel for the gradients of keys and values.
      elements: ids and positions, and whether they decide of single elements.
      skips_dead_rows: dead rows of a band that is cut off visit no tile but the first, in place of all.
    """

    band: Band
    T: int
    S: int
    block_kv: int
    traced: RowIntervals | None
    key_value_length: Any | None
    is_cut: bool
    query_tiles: QueryTiles | None = None
    elements: Elements | None = None
    decides_elements: Any = False
    skips_dead_rows: bool = False

    @classmethod
    def make(
        cls,
        band: Band,
        sizes: Sizes,
        block_kv: int,
        operands: Operands,
        *,
        query_tiles: QueryTiles | None = None,
        skips_dead_rows: bool = False,
        **others: Any,
    ) -> Self:
        """`others` are fields of a subclass."""
        elements = operands.elements
        return cls(
            band=band,
            T=sizes.T,
            S=sizes.S,
            block_kv=block_kv,
            traced=operands.intervals,
            key_value_length=operands.length,
            is_cut=operands.is_cut,
            query_tiles=query_tiles,
            elements=elements,
            decides_elements=False if elements is None else elements.is_exact[0] == 0,
            skips_dead_rows=skips_dead_rows,
            **others,
        )

    def of_head(self, head: tuple) -> "Intervals":
        """For one head alone: what each use would read from global memory has been read."""
        return self

    @property
    def has_length(self) -> bool:
        return self.key_value_length is not None

    def length(self, head: tuple) -> Any:
        """From which key on keys and values are padding."""
        ref = self.key_value_length
        assert ref is not None
        return ref[broadcast_index(head[:-1], ref.shape)]

    def is_dead(self, head: tuple) -> Any:
        """Of a band that is cut off, whether the rows of a head have no key: all of them or none."""
        return self.length(head) <= 0

    def end(self, head: tuple) -> Any:
        """No row of a head attends a key from here on, but for dead ones."""
        if not self.is_cut:
            return self.S
        return jnp.minimum(self.length(head), self.S)

    @property
    def is_moved(self) -> bool:
        """Whether rows are moved by a number."""
        return False

    @property
    def has_empty_rows(self) -> bool:
        """Whether rows may attend no key: padded ones, and beside sinks those that masks leave none."""
        return self.is_traced

    @property
    def has_constant_logits(self) -> bool:
        """Whether a masked logit may have a cotangent all the same: of dead rows, or NaN from padding."""
        return self.is_traced or self.is_cut

    def bounds(self, head: tuple) -> tuple[Any, Any]:
        """`lower` and `upper` of the band for the rows of a head."""
        return self.band.lower, self.band.upper

    def right_tiles(self, block_rows: int) -> int:
        """The most tiles that a block of rows can have behind the full ones; all of them if masks are traced."""
        count = -(-self.S // self.block_kv)
        if self.traced is not None:
            return count
        start, stop = self.band.intervals(self.T, self.S)
        first = np.arange(0, self.T, block_rows)
        last = np.minimum(first + block_rows, self.T) - 1
        end = -(-stop[last] // self.block_kv)
        full_stop = np.maximum(stop[first] // self.block_kv, -(-start[last] // self.block_kv))
        # Cut off, a block has no more of them, and at least the one with the cut.
        return int(np.maximum(end - full_stop, int(self.is_cut)).max())

    def has_many_edges(self, block_rows: int) -> bool:
        """Whether more tiles than the last one of a block of rows can need a mask."""
        return self.has_left_edge or self.right_tiles(block_rows) > 1

    @property
    def is_traced(self) -> bool:
        return self.traced is not None

    @property
    def has_left_edge(self) -> bool:
        """Whether tiles before the full ones can need a mask."""
        return self.is_traced or self.band.lower is not None

    @property
    def has_right_edge(self) -> bool:
        return self.is_traced or self.is_cut or self.band.upper is not None or self.S % self.block_kv != 0

    def ranges(self, head: tuple, block: Any, block_rows: int) -> ColumnRange:
        """Tiles of a block of rows of one head, as scalars."""
        if self.traced is not None and self.traced.row_bounds is not None:
            bounds = bounds_of_block(self.traced.row_bounds, head, block, block_rows, self.S, self.decides_elements)
            return tile_ranges(bounds, self.block_kv, self.S)
        if self.traced is not None:
            ref = self.traced.tile_ranges
            assert ref is not None
            index = broadcast_index(head, ref.shape[:-2])
            return ColumnRange(*(ref[(*index, block, c)] for c in range(4)))
        row = jnp.int32(block * block_rows)
        bounds = self.bounds_between(head, row, jnp.minimum(row + (block_rows - 1), self.T - 1))
        if self.is_cut and not self.skips_dead_rows:
            stops = (jnp.where(self.is_dead(head), self.S, stop) for stop in (bounds.least_stop, bounds.largest_stop))
            bounds = Bounds(bounds.least_start, bounds.largest_start, *stops)
        return tile_ranges(bounds, self.block_kv, self.S)

    def tile_at(self, head: tuple, block: Any) -> Callable[[Any], Any] | None:
        """The tile at a place in `ranges`, or None where that is its number."""
        if self.traced is None or self.traced.tile_order is None:
            return None
        ref = self.traced.tile_order
        index = (*broadcast_index(head, ref.shape[:-2]), block)
        return lambda place: ref[(*index, place)]

    def bounds_between(self, head: tuple, first: Any, last: Any) -> Bounds:
        """Of what the band leaves to the rows between two positions, both included."""
        end, (lower, upper) = jnp.int32(self.end(head)), self.bounds(head)
        clip = lambda x: jnp.minimum(jnp.maximum(x, 0), end)  # noqa: E731
        starts = (jnp.int32(0),) * 2 if lower is None else (clip(first + lower), clip(last + lower))
        stops = (end,) * 2 if upper is None else (clip(first + upper + 1), clip(last + upper + 1))
        return Bounds(*starts, *stops)

    def query_tiles_of(self, batch: Any, block: Any, block_q: int, block_keys: int) -> tuple[Any, Any]:
        """First and end of the query tiles with a row that attends a block of keys."""
        tiles = self.query_tiles or QueryTiles()
        if tiles.firsts is not None:
            assert tiles.ends is not None
            first, end = (x[(*broadcast_index(batch, x.shape[:-1]), block)] for x in (tiles.firsts, tiles.ends))
            return jnp.minimum(first, end), end
        key = jnp.int32(block * block_keys)
        first, stop = self.query_tiles_between(batch, key, jnp.minimum(key + block_keys, self.S) - 1, block_q)
        if self.is_cut:
            assert tiles.longest is not None
            longest = tiles.longest[broadcast_index(batch, tiles.longest.shape)]
            first = jnp.where(longest <= 0, 0, first)
            stop = jnp.where((longest > 0) & (longest <= key), 0, stop)
        return first, stop

    def query_tiles_between(self, batch: Any, key: Any, last: Any, block_q: int) -> tuple[Any, Any]:
        """Of what the band leaves to the keys between two, both included."""
        lower, upper = self.bounds((*batch, 0))
        count = -(-self.T // block_q)
        first, stop = jnp.int32(0), jnp.int32(count)
        if upper is not None:
            first = lax.div(jnp.maximum(key - upper, 0), jnp.int32(block_q))
        if lower is not None:
            end = jnp.maximum(last - lower, -1) + block_q
            stop = jnp.minimum(lax.div(end, jnp.int32(block_q)), stop)
        return first, stop

    def is_query_edge(self, head: tuple, row: Any, block: Any, block_q: int, block_keys: int) -> Any:
        """Whether a tile needs a mask; keys and rows past the ends do not, as nothing that comes of them is kept."""
        key, edge, (lower, upper) = jnp.int32(block * block_keys), False, self.bounds(head)
        tiles, last = self.query_tiles or QueryTiles(), jnp.minimum(key + block_keys, self.S)
        if tiles.bounds is not None or tiles.row_bounds is not None:
            return is_any_masked(tiles, head, lax.div(row, jnp.int32(block_q)), key, last, self.decides_elements)
        if self.is_cut:
            edge = self.is_dead(head) | (self.end(head) < last)
        if upper is not None:
            edge = edge | (row + upper < key + (block_keys - 1))
        if lower is not None:
            edge = edge | (row + (block_q - 1) + lower > key)
        return edge

    def is_whole(self, head: tuple, row: Any) -> Any | None:
        """Whether, in the block of rows of this one, only a `mask_mod` and the end of the keys exclude any."""
        if self.traced is None or self.traced.is_whole is None:
            return None
        ref, length = self.traced.is_whole, self.traced.key_start.shape[-1]
        block = lax.div(jnp.int32(row), jnp.int32(length // ref.shape[-1]))
        return ref[(*broadcast_index(head, ref.shape[:-1]), block)] != 0

    def rows(self, head: tuple, row: Any, count: int, layout: Any) -> tuple[jax.Array, jax.Array] | None:
        """The traced intervals of some rows, in registers."""
        if self.traced is None:
            return None
        start, stop = self.traced.key_start, self.traced.key_stop
        index = (*broadcast_index(head, start.shape[:-1]), pl.ds(row, count))
        return load(start.at[index], layout=layout), load(stop.at[index], layout=layout)

    def allowed(
        self, rows: tuple[jax.Array, jax.Array] | None, head: tuple, row: Any, column: Any, shape: Any, q_axis: int
    ) -> Any:
        """Mask of the tile from (row, column) on, in registers: all but what lies outside of the rows' intervals.

        Rows of the tile lie along axis `q_axis` of `shape`. A dead row that does not skip its tiles has all keys.
        """
        if rows is not None:
            column = iota(shape, 1 - q_axis) + column
            start, stop = (spread(x, shape, q_axis) for x in rows)
            return (column >= start) & (column < stop)
        has_end = self.S % self.block_kv or self.is_cut or self.band.lower is self.band.upper is None
        result = within_band(self.band, row, column, self.end(head) if has_end else None, shape, q_axis)
        dead = self.dead(None, head, row, shape, q_axis)
        return result if dead is None else result | dead

    def have_keys(self, head: tuple, row: Any, count: int) -> jax.Array | None:
        """Which rows from one on have a key, as a vector; None if all that `allowed` and `dead` do not tell of have."""
        pair = self.rows(head, row, count, ROW)
        return None if pair is None else pair[0] != DEAD

    def matches(self, head: tuple, row: Any, column: Any, shape: Any, q_axis: int, layouts: tuple[Any, Any]) -> Any:
        """What ids and positions say of the tile from (row, column) on; `layouts` of vectors along rows and keys."""
        elements = self.elements
        assert elements is not None

        def vector(ref: Any, start: Any, axis: int) -> jax.Array:
            index = (*broadcast_index(head, ref.shape[:-1]), pl.ds(start, shape[axis]))
            return spread(load(ref.at[index], layout=layouts[axis == q_axis]), shape, axis)

        rows = functools.partial(vector, start=row, axis=q_axis)
        keys = functools.partial(vector, start=column, axis=1 - q_axis)
        terms = []
        if elements.query_ids is not None:
            terms.append(rows(elements.query_ids) == keys(elements.key_ids))
        if elements.lowest_position is not None:
            terms.append(keys(elements.key_positions) >= rows(elements.lowest_position))
        if elements.highest_position is not None:
            terms.append(keys(elements.key_positions) <= rows(elements.highest_position))
        return functools.reduce(jnp.logical_and, terms)

    def dead(
        self, rows: tuple[jax.Array, jax.Array] | None, head: tuple, row: Any, shape: Any, q_axis: int
    ) -> jax.Array | None:
        """Which rows of a tile, from `row` on, have no key at all, and so attend all."""
        if self.is_cut:
            return iota(shape, q_axis) < jnp.where(self.is_dead(head), jnp.int32(shape[q_axis]), 0)
        return None if rows is None else spread(rows[0], shape, q_axis) == DEAD
