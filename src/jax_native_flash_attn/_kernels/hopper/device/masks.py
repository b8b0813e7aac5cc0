"""Masks inside a kernel: which key/value tiles a block of query rows visits, and the mask of one tile.

A static `Band` is computed from positions, and so is a complete one, of which a batch row has a number or two: what
rows are moved by, and the length of the keys, where it is cut off. Without a shift, only tiles at the right edge then
need a mask, as without lengths. Other traced intervals are read: see `host/intervals.py`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...._semantics.masks import Band, ColumnRange
from ...._semantics.sizes import Sizes
from ..host.intervals import Bounds, tile_ranges
from ..operands import DEAD, Elements, Operands, QueryTiles, RowIntervals
from ..pallas import broadcast_index, iota, load, pl, spread


def is_outside(ranges: ColumnRange, tile: Any) -> Any:
    """Whether a tile is none of those that all rows attend in full."""
    return (tile < ranges.full_first) | (tile >= ranges.full_stop)


@dataclass(frozen=True)
class Intervals:
    """The interval masks of a call, as a kernel sees them.

    Attributes:
      traced: the intervals of the rows, where they are traced.
      key_value_length: (batch...), or None.
      is_cut: as `Operands.is_cut`.
      shift: what rows are moved by: (batch...), a scalar for all batch rows, or None.
      has_dead_rows: as `Operands.has_dead_rows`.
      query_tiles: of the kernel for the gradients of keys and values.
      elements: ids and positions, and whether they decide of single elements.
      skips_dead_rows: dead rows of a band visit no tile but the first, in place of all.
    """

    band: Band
    T: int
    S: int
    block_kv: int
    traced: RowIntervals | None
    key_value_length: Any | None
    is_cut: bool
    shift: Any | None = None
    has_dead_rows: bool = False
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
    ) -> "Intervals":
        traced, length, is_cut = operands.intervals, operands.length, operands.is_cut
        elements, shift = operands.elements, operands.shift
        if shift is not None and shift.size == 1:
            shift = shift[(0,) * len(shift.shape)]
        return cls(
            band=band,
            T=sizes.T,
            S=sizes.S,
            block_kv=block_kv,
            traced=traced,
            key_value_length=length,
            is_cut=is_cut,
            shift=shift,
            has_dead_rows=operands.has_dead_rows,
            query_tiles=query_tiles,
            elements=elements,
            decides_elements=False if elements is None else elements.is_exact[0] == 0,
            skips_dead_rows=skips_dead_rows,
        )

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
        return self.shift is not None

    @property
    def moves_dead_rows(self) -> bool:
        """Whether single rows without a key, of those that are moved, are to attend all."""
        return self.is_moved and self.has_dead_rows and not self.skips_dead_rows

    def bounds(self, head: tuple) -> tuple[Any, Any]:
        """`lower` and `upper` of the band for the rows of a head, which may be moved; if it has no keys, beyond all."""
        shift = self.shift
        if shift is None:
            return self.band.lower, self.band.upper
        if len(shift.shape) > 0:
            shift = shift[broadcast_index(head[:-1], shift.shape)]
        lower, upper = self.band.moved(shift, self.T, self.S)
        if self.is_cut and upper is not None:
            upper = jnp.where(self.is_dead(head), -self.T, upper)
        elif self.is_cut:
            lower = jnp.where(self.is_dead(head), self.S, lower)
        return lower, upper

    def position(self, row: Any) -> Any:
        """Of a row by its number, before it is moved."""
        group = self.band.rows_per_position
        return row if group == 1 else lax.div(row, jnp.int32(group))

    def any_dead(self, head: tuple, first: Any, last: Any) -> Any:
        """Whether rows between two positions have no key: the first ones or the last ones."""
        lower, upper = self.bounds(head)
        return self.are_dead(
            head, None if lower is None else last + lower, None if upper is None else first + upper
        )

    def are_dead(self, head: tuple, low: Any, high: Any) -> Any:
        """Which rows have no key, where the band has them attend keys from `low` up to `high`, or without end (None)."""
        terms = [] if high is None else [high < 0]
        terms += [] if low is None else [low >= self.end(head)]
        return functools.reduce(jnp.logical_or, terms)

    def moved(self, head: tuple, numbers: Any, row: Any) -> tuple[Any, Any]:
        """The first and the last key, by the band, of the rows `row + numbers`, which are moved."""
        group = self.band.rows_per_position

        def at(bound: Any) -> Any:
            if bound is None:
                return None
            # A scalar comes to `numbers` last: else the compiler would keep what does not change from tile to tile.
            if group == 1:
                return numbers + (row + bound)
            return lax.div(numbers + row, jnp.full_like(numbers, group)) + bound

        lower, upper = self.bounds(head)
        return at(lower), at(upper)

    def right_tiles(self, block_rows: int) -> int:
        """The most tiles that a block of rows can have behind the full ones; all of them if masks are traced."""
        count = -(-self.S // self.block_kv)
        if self.traced is not None or self.is_moved:
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
        if self.traced is not None:
            ref = self.traced.tile_ranges
            assert ref is not None
            index = broadcast_index(head, ref.shape[:-2])
            return ColumnRange(*(ref[(*index, block, c)] for c in range(4)))
        row = jnp.int32(block * block_rows)
        last = jnp.minimum(row + (block_rows - 1), self.T - 1)
        row, last = self.position(row), self.position(last)
        end, (lower, upper) = jnp.int32(self.end(head)), self.bounds(head)
        clip = lambda x: jnp.minimum(jnp.maximum(x, 0), end)  # noqa: E731
        starts = (jnp.int32(0),) * 2 if lower is None else (clip(row + lower), clip(last + lower))
        stops = (end,) * 2 if upper is None else (clip(row + upper + 1), clip(last + upper + 1))
        if self.moves_dead_rows:
            any_dead = self.any_dead(head, row, last)
            # All tiles, none of which is full.
            starts = jnp.where(any_dead, 0, starts[0]), starts[1]
            stops = jnp.where(any_dead, 0, stops[0]), jnp.where(any_dead, self.S, stops[1])
        elif self.is_cut and not (self.is_moved or self.skips_dead_rows):
            stops = tuple(jnp.where(self.is_dead(head), self.S, stop) for stop in stops)
        return tile_ranges(Bounds(*starts, *stops), self.block_kv, self.S)

    def query_tiles_of(self, batch: Any, block: Any, block_q: int, block_keys: int) -> tuple[Any, Any]:
        """First and end of the query tiles with a row that attends a block of keys."""
        head = (*batch, 0)
        tiles, (lower, upper) = self.query_tiles or QueryTiles(), self.bounds(head)
        if tiles.ranges is not None:
            ref = tiles.ranges
            index = broadcast_index(batch, ref.shape[:-2])
            return ref[(*index, block, 0)], ref[(*index, block, 1)]
        key, count = jnp.int32(block * block_keys), -(-self.T // block_q)
        last = jnp.minimum(key + block_keys, self.end(head) if self.is_moved else self.S) - 1
        first, stop = jnp.int32(0), jnp.int32(count)
        if upper is not None:
            first = lax.div(jnp.maximum(key - upper, 0), jnp.int32(block_q))
        if lower is not None:
            end = jnp.maximum(last - lower, -1) + block_q
            stop = jnp.minimum(lax.div(end, jnp.int32(block_q)), stop)
        if self.is_cut and not self.is_moved:
            assert tiles.longest is not None
            longest = tiles.longest[broadcast_index(batch, tiles.longest.shape)]
            first = jnp.where(longest <= 0, 0, first)
            stop = jnp.where((longest > 0) & (longest <= key), 0, stop)
        elif self.is_cut:
            stop = jnp.where(self.length(head) <= key, 0, stop)
        if self.moves_dead_rows:
            any_dead = self.any_dead(head, jnp.int32(0), jnp.int32(self.T - 1))
            first, stop = jnp.where(any_dead, 0, first), jnp.where(any_dead, count, stop)
        return first, stop

    def is_query_edge(self, head: tuple, row: Any, block: Any, block_q: int, block_keys: int) -> Any:
        """Whether a tile needs a mask; keys and rows past the ends do not, as nothing that comes of them is kept."""
        key, edge, (lower, upper) = jnp.int32(block * block_keys), False, self.bounds(head)
        if self.query_tiles is not None and self.query_tiles.bounds is not None:
            ref = self.query_tiles.bounds
            tile = (*broadcast_index(head, ref.shape[:-2]), lax.div(row, jnp.int32(block_q)))
            last = jnp.minimum(key + block_keys, self.S)
            return (ref[(*tile, 0)] > key) | (ref[(*tile, 1)] < last)
        if self.is_cut:
            edge = self.is_dead(head) | (self.end(head) < jnp.minimum(key + block_keys, self.S))
        if upper is not None:
            edge = edge | (row + upper < key + (block_keys - 1))
        if lower is not None:
            edge = edge | (row + (block_q - 1) + lower > key)
        return edge

    def rows(self, head: tuple, row: Any, count: int, layout: Any) -> tuple[jax.Array, jax.Array] | None:
        """The traced intervals of some rows, in registers."""
        if self.traced is None:
            return None
        start, stop = self.traced.key_start, self.traced.key_stop
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
        if self.is_moved:
            low, high = self.moved(head, iota(shape, q_axis), row)
            terms = [] if low is None else [column >= low]
            terms += [] if high is None else [column <= high]
        else:
            position = iota(shape, q_axis) + row
            terms = [] if self.band.lower is None else [column >= position + self.band.lower]
            terms += [] if self.band.upper is None else [column <= position + self.band.upper]
        if self.S % self.block_kv or self.is_cut or not terms:
            terms.append(column < self.end(head))
        result = functools.reduce(jnp.logical_and, terms)
        dead = self.dead(None, head, row, shape, q_axis)
        return result if dead is None else result | dead

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
        if self.is_moved:
            return self.are_dead(head, *self.moved(head, iota(shape, q_axis), row)) if self.moves_dead_rows else None
        if self.is_cut:
            return iota(shape, q_axis) < jnp.where(self.is_dead(head), jnp.int32(shape[q_axis]), 0)
        return None if rows is None else spread(rows[0], shape, q_axis) == DEAD
