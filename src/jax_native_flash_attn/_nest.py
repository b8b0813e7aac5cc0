"""The loop nest: over (batch tile, head tile, query tile), and inside over the key/value tiles it may attend.

Every operand is read and every result written through a `Nest`, which knows which axes a tile cuts. Operands may
have size 1 in any axis (then they broadcast); results may too (then they are summed). Axis layouts:

    query-like  (batch..., T, N, H)     key-like    (batch..., S, K, H)
    row-like    (batch..., N, T)        score-like  (batch..., N, T, S)

and inside a tile, where N is split into (heads, G) and G joins the rows, (batch..., heads, G * block_q, ...). Operands
keep N whole: splitting it before the loops would make XLA:CPU copy each of them.

A block that does not divide its length leaves a last tile that overlaps the one before; each row and column is
*owned* by the first tile that holds it, and only owned ones count.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._masks import Band, MaskOperands
from ._tiles import ColumnRange, Sizes, TileShape, column_range

Index = Any  # int or int32 scalar
Carry = Any


class RowTile(NamedTuple):
    """Where a row of tiles stands: the first batch rows, first head, first query row, and its number."""

    batch: tuple[Index, ...]
    head: Index
    row: Index
    number: Index


class ColumnTile(NamedTuple):
    """First column of a key/value tile, and the first one it owns."""

    column: Index
    owned: Index


class TileMask(NamedTuple):
    """Mask of one tile: `allowed` (..., t, s), and the rows (..., t, 1) that are dead (None: none are)."""

    allowed: jax.Array
    dead: jax.Array | None


@dataclass(frozen=True)
class Nest:
    sizes: Sizes
    tile: TileShape
    band: Band
    mask: MaskOperands
    differentiable: bool = False
    """Loops have static trip counts and checkpointed steps, for reverse mode in linear memory."""

    @property
    def num_query_tiles(self) -> int:
        return -(-self.sizes.T // self.tile.block_q)

    @property
    def num_key_tiles(self) -> int:
        return -(-self.sizes.S // self.tile.block_kv)

    @property
    def visits_one_key_tile(self) -> bool:
        """Whether it is known that every row of tiles visits exactly one key/value tile."""
        return self.num_key_tiles == 1 and self.mask.key_start is None

    # ---- loops

    def rows(self, body: Callable[[RowTile, Carry], Carry], carry: Carry) -> Carry:
        """Run `body` for every batch tile, head tile and query tile; query tiles vary fastest."""
        counts = [n // b for n, b in zip(self.sizes.batch, self.tile.batch, strict=True)]
        counts += [self.sizes.K // self.tile.heads, self.num_query_tiles]

        def step(flat: Index, carry: Carry) -> Carry:
            position = []
            for count in reversed(counts):
                position.append(0 if count == 1 else flat % count)
                flat = flat if count == 1 else flat // count
            *batch, head, number = reversed(position)
            row = _clamped(number, self.tile.block_q, self.sizes.T)
            starts = tuple(i * b for i, b in zip(batch, self.tile.batch, strict=True))
            return body(RowTile(starts, head * self.tile.heads, row, number), carry)

        return self._loop(0, math.prod(counts), step, carry)

    def columns(self, at: RowTile, body: Callable[[ColumnTile, TileMask | None, Carry], Carry], carry: Carry) -> Carry:
        """Run `body` for every key/value tile that some row of `at` may attend, in order.

        Empty tiles are skipped (never emitted if the schedule is static, else at run time), full tiles get no mask.
        """
        ranges, has_edges, has_full = self._column_ranges(at)
        data_dependent = self.mask.allowed is not None

        def column_tile(j: Index) -> ColumnTile:
            return ColumnTile(_clamped(j, self.tile.block_kv, self.sizes.S), j * self.tile.block_kv)

        def full(j: Index, carry: Carry) -> Carry:
            return body(column_tile(j), None, carry)

        def masked(j: Index, carry: Carry) -> Carry:
            columns = column_tile(j)
            mask = self._tile_mask(at, columns)
            if not data_dependent:
                return body(columns, mask, carry)
            return lax.cond(mask.allowed.any(), lambda c: body(columns, mask, c), lambda c: c, carry)

        if self.visits_one_key_tile:
            return masked(0, carry) if has_edges else full(0, carry)
        if self.differentiable:
            # The range decides inside the step, so that the trip count is static.
            def step(j: Index, carry: Carry) -> Carry:
                inside = (j >= ranges.first) & (j < ranges.stop)
                return lax.cond(inside, lambda c: masked(j, c), lambda c: c, carry)

            return self._loop(0, self.num_key_tiles, step if has_edges else full, carry)
        if has_edges:
            edge_stop = ranges.full_first if has_full else ranges.stop
            carry = self._loop(ranges.first, edge_stop, masked, carry)
        if has_full:
            carry = self._loop(ranges.full_first, ranges.full_stop, full, carry)
            if has_edges:
                carry = self._loop(ranges.full_stop, ranges.stop, masked, carry)
        return carry

    def _loop(self, start: Index, stop: Index, step: Callable, carry: Carry) -> Carry:
        if isinstance(start, int) and isinstance(stop, int):
            if stop - start <= 1:
                return step(start, carry) if stop > start else carry
            if self.differentiable:
                steps = jnp.arange(start, stop, dtype=jnp.int32)
                checked = jax.checkpoint(lambda carry, i: (step(i, carry), None), prevent_cse=False)
                return lax.scan(checked, carry, steps)[0]
        return lax.fori_loop(jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32), step, carry)

    def _column_ranges(self, at: RowTile) -> tuple[ColumnRange, bool, bool]:
        """The range of `at`, and whether any row of tiles has masked tiles, or unmasked ones."""
        block, count = self.tile.block_kv, self.num_key_tiles
        traced = column_range(*self._intervals(at), block, count, jnp)
        if self.mask.dead is not None:
            # A dead row's interval holds all keys, but its logits are not theirs: only masked tiles know that.
            any_dead = self.row_slice(self.mask.dead, at).any()
            traced = traced._replace(full_stop=jnp.where(any_dead, traced.full_first, traced.full_stop))
        if self.mask.key_start is not None:
            return traced, True, self.mask.allowed is None
        start, stop = self.band.intervals(self.sizes.T, self.sizes.S)
        firsts = [_clamped(i, self.tile.block_q, self.sizes.T) for i in range(self.num_query_tiles)]
        slices = [np.s_[i : i + self.tile.block_q] for i in firsts]
        ranges = ColumnRange(*np.array([column_range(start[s], stop[s], block, count) for s in slices]).T)
        has_edges = bool((ranges.stop - ranges.first > ranges.full_stop - ranges.full_first).any())
        has_full = bool((ranges.full_stop > ranges.full_first).any())

        def static_if_known(table: np.ndarray, value: Index) -> Index:
            if isinstance(at.number, int):
                return int(table[at.number])
            return int(table[0]) if (table == table[0]).all() else value

        known = ColumnRange(*(static_if_known(*pair) for pair in zip(ranges, traced, strict=True)))
        return known, has_edges, has_full

    def _intervals(self, at: RowTile) -> tuple[jax.Array, jax.Array]:
        """First key and end of the keys of each row of a tile, (batch..., K, G, block_q) with axes of size 1."""
        if self.mask.key_start is not None and self.mask.key_stop is not None:
            return self.row_slice(self.mask.key_start, at), self.row_slice(self.mask.key_stop, at)
        # From the position: a table would be a constant, which custom_partitioning does not take.
        rows = self.row_positions(at).reshape((1,) * (len(self.sizes.batch) + 2) + (-1,))
        S = self.sizes.S
        start = jnp.zeros_like(rows) if self.band.lower is None else jnp.clip(rows + self.band.lower, 0, S)
        stop = jnp.full_like(rows, S) if self.band.upper is None else jnp.clip(rows + self.band.upper + 1, 0, S)
        return start, stop

    def _tile_mask(self, at: RowTile, columns: ColumnTile) -> TileMask:
        """Which elements of a tile count: two comparisons per element, whatever the masks behind them."""
        mask = self.mask
        start, stop = (x[..., None] for x in self._intervals(at))
        start = jnp.maximum(start, columns.owned)
        position = self.column_positions(columns).reshape((1,) * (start.ndim - 1) + (-1,))
        allowed = (position >= start) & (position < stop)
        dead = None if mask.dead is None else self.row_slice(mask.dead, at)[..., None]
        if mask.allowed is not None:
            in_mask = self.score_slice(mask.allowed, at, columns)
            allowed &= in_mask if dead is None else in_mask | dead
        return TileMask(allowed, dead)

    # ---- positions

    def row_positions(self, at: RowTile) -> jax.Array:
        return at.row + jnp.arange(self.tile.block_q, dtype=jnp.int32)

    def column_positions(self, columns: ColumnTile) -> jax.Array:
        return columns.column + jnp.arange(self.tile.block_kv, dtype=jnp.int32)

    def owned_rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """Zero the rows of a tile, (batch..., heads, rows, H), that the tile before owns."""
        if self.sizes.T % self.tile.block_q == 0:
            return x
        owned = self.row_positions(at) >= at.number * self.tile.block_q
        owned = jnp.tile(owned, self.sizes.G).reshape((1,) * (x.ndim - 2) + (-1, 1))
        return jnp.where(owned, x, 0)

    # ---- the rows of a tile: block_q positions for each query head of a group, as one axis or as two

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.tile.batch, self.tile.heads, self.sizes.G * self.tile.block_q)

    def group_rows(self, x: jax.Array, axis: int) -> jax.Array:
        """Split the rows axis into (G, block_q)."""
        axis %= x.ndim
        return x.reshape(*x.shape[:axis], self.sizes.G, self.tile.block_q, *x.shape[axis + 1 :])

    @staticmethod
    def merge_axes(x: jax.Array, axis: int) -> jax.Array:
        """Merge axes `axis` and the next: (G, block_q) into rows, or (heads, G) into query heads."""
        axis %= x.ndim
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def split_heads(self, x: jax.Array, axis: int) -> jax.Array:
        """Split an axis of query heads into (heads, G); one that broadcasts into (1, 1)."""
        axis %= x.ndim
        heads = (1, 1) if x.shape[axis] == 1 else (-1, self.sizes.G)
        return x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])

    # ---- reading

    def query_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., T, N, H) -> (batch..., heads, rows, H)"""
        x = self.split_heads(self.slice(x, *self._query_window(at)), -2)
        return self.merge_axes(jnp.moveaxis(x, -4, -2), -3)

    def key_slice(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., S, K, H) -> (batch..., heads, block_kv, H)"""
        starts = (*at.batch, columns.column, at.head, 0)
        sizes = (*self.tile.batch, self.tile.block_kv, self.tile.heads, x.shape[-1])
        return jnp.moveaxis(self.slice(x, starts, sizes), -3, -2)

    def row_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., N, T) -> (batch..., heads, G, block_q)"""
        return self.split_heads(self.slice(x, *self._row_window(at)), -2)

    def score_slice(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., N, T, S) -> (batch..., heads, G, block_q, block_kv)"""
        return self.split_heads(self.slice(x, *self._score_window(at, columns)), -3)

    def batch_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch...) -> (batch..., 1, 1, 1), of the tile's batch rows"""
        return self.slice(x, at.batch, self.tile.batch)[..., None, None, None]

    def head_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., N) -> (batch..., heads, G)"""
        window = (*at.batch, at.head * self.sizes.G), (*self.tile.batch, self.tile.heads * self.sizes.G)
        return self.split_heads(self.slice(x, *window), -1)

    # ---- writing; results start from zeros

    def write_query(self, result: jax.Array, x: jax.Array, at: RowTile, *, add: bool) -> jax.Array:
        """(batch..., heads, rows, H) into (batch..., T, N, H)"""
        x = self.merge_axes(jnp.moveaxis(self.group_rows(x, -2), -2, -4), -3)
        return _write(result, x, self._query_window(at)[0], add)

    def write_row(self, result: jax.Array, x: jax.Array, at: RowTile, *, add: bool) -> jax.Array:
        """(batch..., heads, rows) into (batch..., N, T)"""
        x = self.merge_axes(self.group_rows(x, -1), -3)
        return _write(result, x, self._row_window(at)[0], add)

    def add_key_transposed(self, result: jax.Array, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., heads, H, block_kv) onto (batch..., K, H, S)"""
        return _write(result, x, (*at.batch, at.head, 0, columns.column), True)

    def add_score(self, result: jax.Array, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., heads, rows, block_kv) onto (batch..., N, T, S)"""
        x = self.merge_axes(self.group_rows(x, -2), -4)
        return _write(result, x, self._score_window(at, columns)[0], True)

    def add_batch(self, result: jax.Array, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch...) of the tile onto (batch...)"""
        return _write(result, x, at.batch, True)

    # ---- windows: where a tile starts in each axis, and how far it reaches

    def _query_window(self, at: RowTile) -> tuple[tuple[Index, ...], tuple[int, ...]]:
        sizes = (*self.tile.batch, self.tile.block_q, self.tile.heads * self.sizes.G, -1)
        return (*at.batch, at.row, at.head * self.sizes.G, 0), sizes

    def _row_window(self, at: RowTile) -> tuple[tuple[Index, ...], tuple[int, ...]]:
        sizes = (*self.tile.batch, self.tile.heads * self.sizes.G, self.tile.block_q)
        return (*at.batch, at.head * self.sizes.G, at.row), sizes

    def _score_window(self, at: RowTile, columns: ColumnTile) -> tuple[tuple[Index, ...], tuple[int, ...]]:
        starts, sizes = self._row_window(at)
        return (*starts, columns.column), (*sizes, self.tile.block_kv)

    @staticmethod
    def slice(x: jax.Array, starts: tuple[Index, ...], sizes: tuple[int, ...]) -> jax.Array:
        sizes = tuple(n if n == 1 or size == -1 else size for n, size in zip(x.shape, sizes, strict=True))
        if sizes == x.shape:
            return x
        return lax.dynamic_slice(x, _starts(x, starts), sizes)


def _write(result: jax.Array, x: jax.Array, starts: tuple[Index, ...], add: bool) -> jax.Array:
    """Put a tile into its place in `result`, or add it there; axes in which `result` has size 1 are summed."""
    summed = tuple(axis for axis, (n, m) in enumerate(zip(result.shape, x.shape, strict=True)) if n == 1 and m != 1)
    if summed:
        x = x.sum(summed, keepdims=True)
    x = x.astype(result.dtype)
    if x.shape == result.shape:
        return result + x if add else x
    first = _starts(result, starts)
    if add:
        x += lax.dynamic_slice(result, first, x.shape)
    return lax.dynamic_update_slice(result, x, first)


def _starts(x: jax.Array, starts: tuple[Index, ...]) -> list[jax.Array]:
    return [jnp.int32(0 if n == 1 else start) for n, start in zip(x.shape, starts, strict=True)]


def _clamped(i: Index, block: int, length: int) -> Index:
    """Start of block i, the last one moved back so that it ends at `length`."""
    start = i * block
    if length % block == 0:
        return start
    return min(start, length - block) if isinstance(start, int) else jnp.minimum(start, length - block)
