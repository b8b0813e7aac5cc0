"""The mask of a band whose rows are moved by a number that a kernel reads: a traced offset (`MaskOperands.shift`).

Rows without a key are the first ones, the last ones, or all. They attend all keys, where they are to: a block of rows
with such a row visits all tiles, none of which is full.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.masks import ColumnRange
from ..host.intervals import Bounds, tile_ranges
from ..operands import Operands
from ..pallas import ROW, broadcast_index, iota, plgpu
from .masks import Intervals


def make_intervals(band: Any, sizes: Any, block_kv: int, operands: Operands, **others: Any) -> Intervals:
    """The masks of a call; further arguments are those of `Intervals.make`."""
    shift = operands.shift
    if shift is None:
        return Intervals.make(band, sizes, block_kv, operands, **others)
    if shift.size == 1:
        shift = shift[(0,) * len(shift.shape)]
    attends = operands.has_dead_rows and not others.get("skips_dead_rows", False)
    return MovedIntervals.make(band, sizes, block_kv, operands, shift=shift, attends_without_key=attends, **others)


@dataclass(frozen=True)
class MovedIntervals(Intervals):
    """Attributes:

    shift: what rows are moved by: a scalar, or (batch...).
    attends_without_key: whether rows without a key attend all.
    """

    shift: Any = None
    attends_without_key: bool = False

    def of_head(self, head: tuple) -> "MovedIntervals":
        return replace(self, shift=self._shift_of(head))

    @property
    def is_moved(self) -> bool:
        return True

    @property
    def has_empty_rows(self) -> bool:
        return not self.attends_without_key

    @property
    def has_constant_logits(self) -> bool:
        return self.attends_without_key or self.is_cut

    def bounds(self, head: tuple) -> tuple[Any, Any]:
        """If a head has no keys, beyond all."""
        lower, upper = self.band.moved(self._shift_of(head), self.T, self.S)
        if not self.is_cut:
            return lower, upper
        if upper is not None:
            return lower, jnp.where(self.is_dead(head), -self.T, upper)
        return jnp.where(self.is_dead(head), self.S, lower), upper

    def _shift_of(self, head: tuple) -> Any:
        shift = self.shift
        return shift[broadcast_index(head[:-1], shift.shape)] if len(shift.shape) > 0 else shift

    def right_tiles(self, block_rows: int) -> int:
        return -(-self.S // self.block_kv)

    def ranges(self, head: tuple, block: Any, block_rows: int) -> ColumnRange:
        row = jnp.int32(block * block_rows)
        first, last = self._position(row), self._position(jnp.minimum(row + (block_rows - 1), self.T - 1))
        bounds = self.bounds_between(head, first, last)
        if self.attends_without_key:
            any_dead = self._any_dead(head, first, last)
            bounds = Bounds(
                jnp.where(any_dead, 0, bounds.least_start),
                bounds.largest_start,
                jnp.where(any_dead, 0, bounds.least_stop),
                jnp.where(any_dead, self.S, bounds.largest_stop),
            )
        return tile_ranges(bounds, self.block_kv, self.S)

    def query_tiles_of(self, batch: Any, block: Any, block_q: int, block_keys: int) -> tuple[Any, Any]:
        if self.query_tiles is not None:
            return super().query_tiles_of(batch, block, block_q, block_keys)
        head, key = (*batch, 0), jnp.int32(block * block_keys)
        end = self.end(head)
        first, stop = self.query_tiles_between(batch, key, jnp.minimum(key + block_keys, end) - 1, block_q)
        if self.is_cut:
            stop = jnp.where(end <= key, 0, stop)
        if self.attends_without_key:
            any_dead = self._any_dead(head, 0, self.T - 1)
            first = jnp.where(any_dead, 0, first)
            stop = jnp.where(any_dead, -(-self.T // block_q), stop)
        return first, stop

    def allowed(
        self, rows: tuple[jax.Array, jax.Array] | None, head: tuple, row: Any, column: Any, shape: Any, q_axis: int
    ) -> Any:
        column = iota(shape, 1 - q_axis) + column
        low, high = self._keys_of(head, iota(shape, q_axis), row)
        terms = [] if low is None else [column >= low]
        terms += [] if high is None else [column <= high]
        if self.S % self.block_kv or self.is_cut:
            terms.append(column < self.end(head))
        result = functools.reduce(jnp.logical_and, terms)
        if not self.attends_without_key:
            return result
        dead = self._are_dead(head, low, high)
        return result | (dead & (column < self.S) if self.S % self.block_kv else dead)

    def dead(
        self, rows: tuple[jax.Array, jax.Array] | None, head: tuple, row: Any, shape: Any, q_axis: int
    ) -> jax.Array | None:
        if not self.attends_without_key:
            return None
        return self._are_dead(head, *self._keys_of(head, iota(shape, q_axis), row))

    def have_keys(self, head: tuple, row: Any, count: int) -> jax.Array | None:
        if not self.attends_without_key:
            return None
        numbers = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=ROW)
        low, high = self._keys_of(head, numbers, row)
        # Not the negation of `_are_dead`, which has no lowering for vectors.
        terms = [] if high is None else [high >= 0]
        terms += [] if low is None else [low < self.end(head)]
        return functools.reduce(jnp.logical_and, terms)

    def _position(self, row: Any) -> Any:
        """Of a row by its number, before it is moved."""
        group = self.band.rows_per_position
        return row if group == 1 else lax.div(row, jnp.int32(group))

    def _keys_of(self, head: tuple, numbers: Any, row: Any) -> tuple[Any, Any]:
        """The first and the last key that the band leaves to the rows `row + numbers`, outside of which keys may be."""
        group = self.band.rows_per_position

        def at(bound: Any) -> Any:
            if bound is None:
                return None
            if group == 1:
                # In this order the compiler finds nothing to keep in registers from tile to tile.
                return numbers + (row + bound)
            return lax.div(numbers + row, jnp.full_like(numbers, group)) + bound

        lower, upper = self.bounds(head)
        return at(lower), at(upper)

    def _are_dead(self, head: tuple, low: Any, high: Any) -> Any:
        """Which rows have no key, of their first and last key by the band."""
        terms = [] if high is None else [high < 0]
        terms += [] if low is None else [low >= self.end(head)]
        return functools.reduce(jnp.logical_or, terms)

    def _any_dead(self, head: tuple, first: Any, last: Any) -> Any:
        """Whether one of the rows between two positions, both included, has no key."""
        lower, upper = self.bounds(head)
        return self._are_dead(head, None if lower is None else last + lower, None if upper is None else first + upper)
