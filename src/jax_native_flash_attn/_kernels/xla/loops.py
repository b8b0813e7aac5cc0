"""The loop nest: over (batch tile, head tile, query tile), and inside over the key/value tiles it may attend.

A block that does not divide its length leaves a last tile that overlaps the one before; each row and column is
*owned* by the first tile that holds it, and only owned ones count.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._semantics.masks import Band, ColumnRange, MaskOperands, bounded_range, column_range
from .access import ColumnTile, Index, RowTile, TileAccess

Carry = Any


class TileMask(NamedTuple):
    """Mask of one tile: `allowed` (..., t, s), and the rows (..., t, 1) that are dead (None: none are)."""

    allowed: jax.Array
    dead: jax.Array | None

    @property
    def live(self) -> jax.Array:
        """What is allowed of the rows that are not dead."""
        return self.allowed if self.dead is None else self.allowed & ~self.dead


@dataclass(frozen=True)
class Nest(TileAccess):
    """The loops of one kernel.

    `differentiable`: they have static trip counts and checkpointed steps, for reverse mode in linear memory.
    `never_skips_rows`: a single key/value tile is visited even if it may be empty (its rows then are of no account).
    """

    band: Band
    mask: MaskOperands
    differentiable: bool = False
    never_skips_rows: bool = False

    @property
    def num_query_tiles(self) -> int:
        return -(-self.sizes.T // self.tile.block_q)

    @property
    def num_key_tiles(self) -> int:
        return -(-self.sizes.S // self.tile.block_kv)

    @property
    def visits_one_key_tile(self) -> bool:
        """Whether it is known that every row of tiles visits exactly one key/value tile."""
        is_known = self.mask.key_start is None or self.never_skips_rows
        return is_known and (self.tile.follows_band or self.num_key_tiles == 1)

    @property
    def _differs_between_shards(self) -> bool:
        """Whether devices would have to agree on which tiles are empty; they visit all of them instead."""
        if not self.tile.is_sharded:
            return False
        masks = (self.mask.key_start, self.mask.key_stop, self.mask.dead, self.mask.allowed)
        num_lead = len(self.tile.batch) + 1
        return any(n != 1 for x in masks if x is not None for n in x.shape[:num_lead])

    @property
    def _reads_occupied(self) -> bool:
        return self.mask.allowed is not None and not self._differs_between_shards

    # ---- loops

    def rows(self, body: Callable[[RowTile, Carry], Carry], carry: Carry) -> Carry:
        """Run `body` for every batch tile, head tile and query tile; query tiles vary fastest.

        In a loop for each, whose counters are positions: XLA:CPU would make a kernel of whatever computes these.
        """
        if self._reads_occupied and not self.visits_one_key_tile:
            _ = self._occupied  # outside of the loops
        axes = [*zip(self.sizes.batch, self.tile.batch, strict=True), (self.sizes.K, self.tile.heads)]

        def over(axes: list[tuple[Any, int]], starts: tuple[Index, ...], carry: Carry) -> Carry:
            if axes:
                length, block = axes[0]
                return self._loop(0, length, block, lambda i, carry: over(axes[1:], (*starts, i), carry), carry)
            *batch, head = starts

            def row(owned: Index, carry: Carry) -> Carry:
                at = RowTile(tuple(batch), head, _clamped(owned, self.tile.block_q, self.sizes.T), owned)
                return body(at, carry)

            return self._loop(0, self.sizes.T, self.tile.block_q, row, carry)

        return over(axes, (), carry)

    def columns(self, at: RowTile, body: Callable[[ColumnTile, TileMask | None, Carry], Carry], carry: Carry) -> Carry:
        """Run `body` for every key/value tile that some row of `at` may attend, in order.

        Empty tiles are skipped (never emitted if the schedule is static, else at run time), full tiles get no mask.
        """
        if self.tile.follows_band:
            start = jnp.clip(at.row + (self.band.lower or 0), 0, self.sizes.S - self.tile.block_kv)
            columns = ColumnTile(start, start)
            return body(columns, self.tile_mask(at, columns), carry)
        if self.visits_one_key_tile and self.mask.key_start is not None:
            return body(ColumnTile(0, 0), self.tile_mask(at, ColumnTile(0, 0)), carry)
        ranges, has_edges, has_full = self._column_ranges(at)
        block = self.tile.block_kv

        def column_tile(owned: Index) -> ColumnTile:
            return ColumnTile(_clamped(owned, block, self.sizes.S), owned)

        def full(owned: Index, carry: Carry) -> Carry:
            return body(column_tile(owned), None, carry)

        def masked(owned: Index, carry: Carry) -> Carry:
            columns = column_tile(owned)
            return body(columns, self.tile_mask(at, columns), carry)

        if self.visits_one_key_tile:
            return masked(0, carry) if has_edges else full(0, carry)
        is_needed = self._occupied_tiles(at, ranges) if self._reads_occupied else None
        if self.differentiable:
            # What is visited is decided inside the step, so that the trip count is static.
            def step(owned: Index, carry: Carry) -> Carry:
                inside = (owned >= ranges.first) & (owned < ranges.stop)
                inside = inside if is_needed is None else is_needed[owned // block]
                return lax.cond(inside, lambda c: masked(owned, c), lambda c: c, carry)

            return self._loop(0, self.num_key_tiles * block, block, step if has_edges else full, carry)
        if is_needed is not None:
            # A loop over those tiles alone: a branch for each would copy what it hands on.
            needed = block * jnp.argsort(~is_needed, stable=True).astype(jnp.int32)
            return self._loop(0, is_needed.sum(), 1, lambda i, carry: masked(needed[i], carry), carry)
        if has_edges:
            edge_stop = ranges.full_first if has_full else ranges.stop
            carry = self._loop(ranges.first, edge_stop, block, masked, carry)
        if has_full:
            carry = self._loop(ranges.full_first, ranges.full_stop, block, full, carry)
            if has_edges:
                carry = self._loop(ranges.full_stop, ranges.stop, block, masked, carry)
        return carry

    def _loop(self, start: Index, stop: Index, by: int, step: Callable, carry: Carry) -> Carry:
        """`step(i, carry)` for i from start on, below stop."""
        if isinstance(start, int) and isinstance(stop, int):
            if stop - start <= by:
                return step(start, carry) if stop > start else carry
            if self.differentiable:
                steps = jnp.arange(start, stop, by, dtype=jnp.int32)
                checked = jax.checkpoint(lambda carry, i: (step(i, carry), None), prevent_cse=False)
                return lax.scan(checked, carry, steps)[0]
        stop = jnp.asarray(stop, jnp.int32)
        return lax.while_loop(
            lambda state: state[0] < stop,
            lambda state: (state[0] + by, step(*state)),
            (jnp.asarray(start, jnp.int32), carry),
        )[1]

    def _column_ranges(self, at: RowTile) -> tuple[ColumnRange, bool, bool]:
        """The range of `at`, in columns, and whether any row of tiles has masked tiles, or unmasked ones."""
        block, count = self.tile.block_kv, self.num_key_tiles
        if self._differs_between_shards:
            return ColumnRange(0, 0, 0, count * block), True, False
        if self.mask.key_start is None:
            return self._static_ranges(at)
        traced = column_range(*self._intervals(at), block, count, jnp)
        if self.mask.dead is not None:
            # A dead row's interval holds all keys, but its logits are not theirs: only masked tiles know that.
            any_dead = self.row_slice(self.mask.dead, at).any()
            traced = traced._replace(full_stop=jnp.where(any_dead, traced.full_first, traced.full_stop))
        if self.mask.is_exact is not None:
            is_exact = self.row_slice(self.mask.is_exact, at).all()
            traced = traced._replace(full_stop=jnp.where(is_exact, traced.full_stop, traced.full_first))
        return ColumnRange(*(x * block for x in traced)), True, True

    def _static_ranges(self, at: RowTile) -> tuple[ColumnRange, bool, bool]:
        """`_column_ranges` where the band says it all."""
        block, count = self.tile.block_kv, self.num_key_tiles
        table = self._range_table
        has_edges = bool((table.stop - table.first > table.full_stop - table.full_first).any())
        has_full = bool((table.full_stop > table.full_first).any())
        if isinstance(at.owned, int):
            number = at.owned // self.tile.block_q
            return ColumnRange(*(int(x[number]) * block for x in table)), has_edges, has_full
        # Both ends of an interval grow with the row.
        first, last = (self.band.interval(at.row + i, self.sizes.S, jnp) for i in (0, self.tile.block_q - 1))
        starts, stops = zip(first, last, strict=True)
        traced = bounded_range(starts, stops, block, count, jnp)
        pairs = zip(table, traced, strict=True)
        known = ColumnRange(*(block * (int(x[0]) if (x == x[0]).all() else value) for x, value in pairs))
        return known, has_edges, has_full

    @functools.cached_property
    def _range_table(self) -> ColumnRange:
        """Of every query tile, where the band says it all, in tiles."""
        start, stop = self.band.intervals(self.sizes.T, self.sizes.S)
        firsts = [_clamped(i * self.tile.block_q, self.tile.block_q, self.sizes.T) for i in range(self.num_query_tiles)]
        rows = [np.s_[i : i + self.tile.block_q] for i in firsts]
        ranges = [column_range(start[i], stop[i], self.tile.block_kv, self.num_key_tiles) for i in rows]
        return ColumnRange(*np.array(ranges).T)

    @functools.cached_property
    def _occupied(self) -> jax.Array:
        """Which tiles the boolean mask leaves something of, (query tiles, key/value tiles, batch..., N); sizes 1 stay.

        Found once for all the heads that share the mask, before the loops.
        """
        assert self.mask.allowed is not None
        # Rows first: XLA:CPU vectorises that.
        by_rows = _any_in_blocks(self.mask.allowed, -2, self.tile.block_q, self.sizes.T)
        return jnp.swapaxes(_any_in_blocks(by_rows, -1, self.tile.block_kv, self.sizes.S), 0, 1)

    @property
    def occupied_share(self) -> jax.Array:
        """The share of tiles that are visited for the boolean mask; dead rows attend all keys."""
        share = self._occupied.mean(dtype=jnp.float32)
        return share if self.mask.dead is None else jnp.where(self.mask.dead.any(), 1, share)

    def _occupied_tiles(self, at: RowTile, ranges: ColumnRange) -> jax.Array:
        """Which key/value tiles inside `ranges` the boolean mask leaves something of: all of them, if a row is dead."""
        sizes = (1, self.num_key_tiles, *self.tile.batch, self.tile.heads * self.sizes.G)
        occupied = self.slice(
            self._occupied, (at.owned // self.tile.block_q, 0, *at.batch, at.head * self.sizes.G), sizes
        )
        occupied = occupied.any(tuple(axis for axis in range(occupied.ndim) if axis != 1))
        if self.mask.dead is not None:
            occupied |= self.row_slice(self.mask.dead, at).any()
        starts = self.tile.block_kv * jnp.arange(self.num_key_tiles, dtype=jnp.int32)
        return (starts >= ranges.first) & (starts < ranges.stop) & occupied

    def _intervals(self, at: RowTile) -> tuple[jax.Array, jax.Array]:
        """First key and end of the keys of each row of a tile, (lead..., rows) with axes of size 1."""
        if self.mask.key_start is not None and self.mask.key_stop is not None:
            return self.row_slice(self.mask.key_start, at), self.row_slice(self.mask.key_stop, at)
        # From the position: a table would be a constant, which custom_partitioning does not take.
        rows = jnp.repeat(self.row_positions(at), self.rows_per_position)
        rows = rows.reshape((1,) * (len(self.row_shape) - 1) + (-1,))
        S = self.sizes.S
        start, stop = self.band.interval(rows, S, jnp)
        return start, stop

    def tile_mask(self, at: RowTile, columns: ColumnTile) -> TileMask:
        """Which elements of a tile count: two comparisons per element, whatever the masks behind them."""
        mask = self.mask
        start, stop = (x[..., None] for x in self._intervals(at))
        start = jnp.maximum(start, columns.owned)
        position = self.column_positions(columns).reshape((1,) * (start.ndim - 1) + (-1,))
        allowed = (position >= start) & (position < stop)
        dead = None if mask.dead is None else self.row_slice(mask.dead, at)[..., None]
        in_mask = None if mask.allowed is None else self.score_slice(mask.allowed, at, columns)
        for elements in (in_mask, mask.matches(lambda x: self.score_slice(x, at, columns))):
            if elements is not None:
                allowed &= elements if dead is None else elements | dead
        return TileMask(allowed, dead)

    # ---- positions

    def row_positions(self, at: RowTile) -> jax.Array:
        return at.row + jnp.arange(self.tile.block_q, dtype=jnp.int32)

    def column_positions(self, columns: ColumnTile) -> jax.Array:
        return columns.column + jnp.arange(self.tile.block_kv, dtype=jnp.int32)

    def owned_rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """Zero the rows of a tile, (lead..., rows, H), that the tile before owns."""
        if self.sizes.T % self.tile.block_q == 0:
            return x
        owned = self.row_positions(at) >= at.owned
        owned = jnp.repeat(owned, self.rows_per_position).reshape((1,) * (x.ndim - 2) + (-1, 1))
        return jnp.where(owned, x, 0)


def _any_in_blocks(x: jax.Array, axis: int, block: int, length: int) -> jax.Array:
    """Whether any element of each block of an axis, of that length or 1, is True: (blocks, ...) without that axis."""
    axis %= x.ndim
    if x.shape[axis] == 1:
        return jnp.moveaxis(x, axis, 0)
    if length % block == 0:
        blocks = x.reshape(*x.shape[:axis], length // block, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(blocks.any(axis + 1), axis, 0)

    def of_block(i: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, _clamped(i * block, block, length), block, axis).any(axis)

    return lax.map(of_block, jnp.arange(-(-length // block), dtype=jnp.int32))


def _clamped(start: Index, block: int, length: int) -> Index:
    """Start of the block that owns what follows `start`, the last one moved back so that it ends at `length`."""
    if length % block == 0:
        return start
    return min(start, length - block) if isinstance(start, int) else jnp.minimum(start, length - block)
