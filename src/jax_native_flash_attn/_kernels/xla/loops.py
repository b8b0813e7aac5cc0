"""The loop nest: over (batch tile, head tile, query tile), and inside over the key/value tiles it may attend.

A block that does not divide its length leaves a last tile that overlaps the one before; each row and column is
*owned* by the first tile that holds it, and only owned ones count.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._semantics.masks import ColumnRange, bounded_range, column_range
from .access import ColumnTile, Index, RowTile
from .masked_tiles import MaskedTiles, TileMask, clamped

Carry = Any


@dataclass(frozen=True)
class Nest(MaskedTiles):
    """The loops of one kernel.

    `differentiable`: they have static trip counts and checkpointed steps, for reverse mode in linear memory.
    `never_skips_rows`: a single key/value tile is visited even if it may be empty (its rows then are of no account).
    """

    differentiable: bool = False
    never_skips_rows: bool = False

    @property
    def visits_one_key_tile(self) -> bool:
        """Whether it is known that every row of tiles visits exactly one key/value tile."""
        return self.has_one_key_tile and (self.mask.key_start is None or self.never_skips_rows)

    @property
    def has_one_key_tile(self) -> bool:
        """Whether it is known that no row of tiles visits more than one key/value tile."""
        return self.tile.follows_band or self.num_key_tiles == 1

    # ---- loops

    def rows(self, body: Callable[[RowTile, Carry], Carry], carry: Carry) -> Carry:
        """Run `body` for every batch tile, head tile and query tile; query tiles vary fastest.

        In a loop for each, whose counters are positions: XLA:CPU would make a kernel of whatever computes these.
        """
        if self.reads_occupied and not self.visits_one_key_tile:
            _ = self.occupied, self.full  # outside of the loops
        axes = [*zip(self.sizes.batch, self.tile.batch, strict=True), (self.sizes.K, self.tile.heads)]

        def over(axes: list[tuple[Any, int]], starts: tuple[Index, ...], carry: Carry) -> Carry:
            if axes:
                length, block = axes[0]
                return self._loop(0, length, block, lambda i, carry: over(axes[1:], (*starts, i), carry), carry)
            *batch, head = starts

            def row(owned: Index, carry: Carry) -> Carry:
                at = RowTile(tuple(batch), head, clamped(owned, self.tile.block_q, self.sizes.T), owned)
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
            return ColumnTile(clamped(owned, block, self.sizes.S), owned)

        def full(owned: Index, carry: Carry) -> Carry:
            return body(column_tile(owned), None, carry)

        def masked(owned: Index, carry: Carry) -> Carry:
            columns = column_tile(owned)
            return body(columns, self.tile_mask(at, columns), carry)

        if self.visits_one_key_tile:
            return masked(0, carry) if has_edges else full(0, carry)
        is_needed, is_full = self.occupied_tiles(at, ranges) if self.reads_occupied else (None, None)
        if self.differentiable:
            # What is visited is decided inside the step, so that the trip count is static.
            def step(owned: Index, carry: Carry) -> Carry:
                inside = (owned >= ranges.first) & (owned < ranges.stop)
                inside = inside if is_needed is None else is_needed[owned // block]
                return lax.cond(inside, lambda c: masked(owned, c), lambda c: c, carry)

            return self._loop(0, self.num_key_tiles * block, block, step if has_edges else full, carry)
        if is_needed is not None:
            carry = self._loop_over(is_needed if is_full is None else is_needed & ~is_full, masked, carry)
            return carry if is_full is None else self._loop_over(is_full, full, carry)
        if has_edges:
            edge_stop = ranges.full_first if has_full else ranges.stop
            carry = self._loop(ranges.first, edge_stop, block, masked, carry)
        if has_full:
            carry = self._loop(ranges.full_first, ranges.full_stop, block, full, carry)
            if has_edges:
                carry = self._loop(ranges.full_stop, ranges.stop, block, masked, carry)
        return carry

    def _loop_over(self, flags: jax.Array, step: Callable, carry: Carry) -> Carry:
        """Over the tiles with a flag alone: a branch for each would copy what it hands on."""
        first = self.tile.block_kv * jnp.argsort(~flags, stable=True).astype(jnp.int32)
        return self._loop(0, flags.sum(), 1, lambda i, carry: step(first[i], carry), carry)

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
        if self.differs_between_shards:
            return ColumnRange(0, 0, 0, count * block), True, False
        if self.mask.key_start is None:
            return self._static_ranges(at)
        traced = column_range(*self.intervals(at), block, count, jnp)
        if self.mask.dead is not None:
            # A dead row's interval holds all keys, but its logits are not theirs: only masked tiles know that.
            any_dead = self.row_slice(self.mask.dead, at).any()
            traced = traced._replace(full_stop=jnp.where(any_dead, traced.full_first, traced.full_stop))
        if self.mask.is_exact is not None:
            is_exact = (self.row_slice(self.mask.is_exact, at) != 0).all()
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
        known = [self._as_of_rows(block * x, at) for x in table]
        if any(x is None for x in known):
            # Both ends of an interval grow with the row.
            first, last = (self.band.interval(at.row + i, self.sizes.S, jnp) for i in (0, self.tile.block_q - 1))
            starts, stops = zip(first, last, strict=True)
            traced = bounded_range(starts, stops, block, count, jnp)
            known = [block * value if x is None else x for x, value in zip(known, traced, strict=True)]
        return ColumnRange(*known), has_edges, has_full

    def _as_of_rows(self, columns: np.ndarray, at: RowTile) -> Index | None:
        """Columns, known of each query tile, as one number, or so far from its first row; None if they are neither."""
        first = int(columns[0])
        if (columns == first).all():
            return first
        if (columns - first == self.tile.block_q * np.arange(len(columns))).all():
            return at.owned + first if first else at.owned
        return None

    @functools.cached_property
    def _range_table(self) -> ColumnRange:
        """Of every query tile, where the band says it all, in tiles."""
        start, stop = self.band.intervals(self.sizes.T, self.sizes.S)
        firsts = [clamped(i * self.tile.block_q, self.tile.block_q, self.sizes.T) for i in range(self.num_query_tiles)]
        rows = [np.s_[i : i + self.tile.block_q] for i in firsts]
        ranges = [column_range(start[i], stop[i], self.tile.block_kv, self.num_key_tiles) for i in rows]
        return ColumnRange(*np.array(ranges).T)
