"""Reading and writing tiles: every operand is sliced and every result written through a `TileAccess`.

Operands may have size 1 in any axis (then they broadcast); results may too (then they are summed). Axis layouts:

    query-like  (batch..., T, N, H)     key-like    (batch..., S, K, H)
    row-like    (batch..., N, T)        score-like  (batch..., N, T, S)

Inside a tile N is split into key/value heads and groups, and the groups join the query rows:

    (lead..., rows, H)   (lead..., block_kv, H)   (lead..., rows)   (lead..., rows, block_kv)

where lead is the tile's batch rows and heads, and rows is block_q * G, in that order (where XLA splits the tile over
devices, lead is batch rows, heads and groups, and rows is block_q): with one head in a tile, a slice
of query is a matrix as it stands. What a tile has only one of is no axis: plain matrices are what XLA:CPU updates in
place; and there lead is a single axis, since it multiplies bfloat16 as such only with one batch axis. Operands keep N
whole: splitting it before the loops would make XLA:CPU copy each of them.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._semantics.sizes import Sizes
from .shapes import TileShape

Index = Any  # int or int32 scalar


class RowTile(NamedTuple):
    """Where a row of tiles stands: the first batch rows, first head, first query row, and the first one it owns."""

    batch: tuple[Index, ...]
    head: Index
    row: Index
    owned: Index


class ColumnTile(NamedTuple):
    """First column of a key/value tile, and the first one it owns."""

    column: Index
    owned: Index


@dataclass(frozen=True)
class TileAccess:
    sizes: Sizes
    tile: TileShape

    # ---- axes inside a tile

    @property
    def _lead(self) -> tuple[int, ...]:
        lead = (*self.tile.batch, self.tile.heads, *((self.sizes.G,) if self.tile.is_sharded else ()))
        if all(n == 1 for n in lead):
            return ()
        return (math.prod(lead),) if self.tile.merges_lead else lead

    def _into_lead(self, x: jax.Array) -> jax.Array:
        """(batch..., heads, ...) -> (lead..., ...)"""
        n = len(self.tile.batch) + 1
        if not self._lead:
            return x.reshape(x.shape[n:])
        if self.tile.is_sharded:
            return jnp.expand_dims(x, n)
        if not self.tile.merges_lead:
            return x
        if any(size != 1 for size in x.shape[:n]):
            x = jnp.broadcast_to(x, (*self.tile.batch, self.tile.heads, *x.shape[n:]))
        return x.reshape(math.prod(x.shape[:n]), *x.shape[n:])

    @property
    def rows_per_position(self) -> int:
        return 1 if self.tile.is_sharded else self.sizes.G

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(lead..., rows)"""
        return (*self._lead, self.tile.block_q * self.rows_per_position)

    def _split_heads(self, x: jax.Array, axis: int) -> jax.Array:
        """Split an axis of query heads into (heads, G); one of size 1 into (1, 1)."""
        axis %= x.ndim
        heads = (1, 1) if x.shape[axis] == 1 else (-1, self.sizes.G)
        return x.reshape(*x.shape[:axis], *heads, *x.shape[axis + 1 :])

    def inside(self, x: jax.Array) -> jax.Array:
        """(batch..., heads, G, block_q, ...) -> (lead..., rows, ...); where G and block_q are 1, so is rows."""
        n = len(self.tile.batch) + 1
        if self.tile.is_sharded:
            return x if self._lead else x.reshape(x.shape[n + 1 :])
        x = jnp.swapaxes(x, n, n + 1)
        if x.shape[n : n + 2] != (1, 1):
            x = jnp.broadcast_to(x, (*x.shape[:n], self.tile.block_q, self.sizes.G, *x.shape[n + 2 :]))
        return self._into_lead(x.reshape(*x.shape[:n], -1, *x.shape[n + 2 :]))

    def _outside(self, x: jax.Array, *inner: int) -> jax.Array:
        """(lead..., ...) -> (batch..., heads, inner...); with query heads if XLA splits the tile over devices."""
        return x.reshape(*self.tile.batch, self.tile.heads * (self.sizes.G // self.rows_per_position), *inner)

    def _rows_outside(self, x: jax.Array, *inner: int) -> jax.Array:
        """(lead..., rows, ...) -> (batch..., heads * G, block_q, inner...)"""
        if self.tile.is_sharded:
            return self._outside(x, self.tile.block_q, *inner)
        n = len(self.tile.batch) + 1
        x = jnp.swapaxes(self._outside(x, self.tile.block_q, self.sizes.G, *inner), n, n + 1)
        return x.reshape(*self.tile.batch, self.tile.heads * self.sizes.G, self.tile.block_q, *inner)

    # ---- reading

    def query_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., T, N, H) -> (lead..., rows, H)"""
        x = self.slice(x, *self._query_window(at))
        if self.sizes.G == 1 and not self.tile.is_sharded and x.shape[-3] == self.tile.block_q:
            return self.key_rows(x)  # XLA:CPU then has one kernel for both
        x = self._split_heads(x, -2)
        return self.inside(jnp.moveaxis(x, -4, -2))  # the moves cancel where there is one head

    def key_slice(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., S, K, H) -> (lead..., block_kv, H)"""
        return self.key_rows(self.key_window(x, at, columns))

    def key_window(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., S, K, H) -> (batch..., block_kv, heads, H)"""
        starts = (*at.batch, columns.column, at.head, 0)
        sizes = (*self.tile.batch, self.tile.block_kv, self.tile.heads, x.shape[-1])
        return self.slice(x, starts, sizes)

    def key_rows(self, x: jax.Array) -> jax.Array:
        """(batch..., block_kv, heads, H) -> (lead..., block_kv, H)"""
        return self._into_lead(jnp.moveaxis(x, -3, -2))

    def row_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., N, T) -> (lead..., rows); one row where both N and T are 1"""
        return self.inside(self._split_heads(self.slice(x, *self._row_window(at)), -2))

    def score_slice(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(batch..., N, T, S) -> (lead..., rows, block_kv); one row where both N and T are 1"""
        return self.inside(self._split_heads(self.slice(x, *self._score_window(at, columns)), -3))

    def batch_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch...) -> (lead..., 1, 1), of the tile's batch rows"""
        return self._into_lead(self.slice(x, at.batch, self.tile.batch)[..., None, None, None])

    def head_slice(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., N) -> (batch..., heads, G)"""
        window = (*at.batch, at.head * self.sizes.G), (*self.tile.batch, self.tile.heads * self.sizes.G)
        return self._split_heads(self.slice(x, *window), -1)

    # ---- writing; results start from zeros

    def write_query(self, result: jax.Array, x: jax.Array, at: RowTile, *, add: bool) -> jax.Array:
        """(lead..., rows, H) into (batch..., T, N, H)"""
        if self.tile.is_sharded:
            x = jnp.swapaxes(self._rows_outside(x, x.shape[-1]), -3, -2)
            return _write(result, x, self._query_window(at)[0], add)
        x = jnp.swapaxes(self._outside(x, self.tile.block_q, self.sizes.G, x.shape[-1]), -4, -3)
        x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        return _write(result, x, self._query_window(at)[0], add)

    def write_row(self, result: jax.Array, x: jax.Array, at: RowTile, *, add: bool) -> jax.Array:
        """(lead..., rows) into (batch..., N, T)"""
        return _write(result, self._rows_outside(x), self._row_window(at)[0], add)

    def add_key(self, result: jax.Array, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(lead..., block_kv, H) onto (batch..., S, K, H); of a sharded tile onto (batch..., S, N, H)"""
        x = jnp.moveaxis(self._outside(x, *x.shape[-2:]), -3, -2)
        return _write(result, x, (*at.batch, columns.column, at.head, 0), True)

    def add_key_transposed(self, result: jax.Array, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """(lead..., H, block_kv) onto (batch..., K, H, S); of a sharded tile onto (batch..., N, H, S)"""
        return _write(result, self._outside(x, *x.shape[-2:]), (*at.batch, at.head, 0, columns.column), True)

    def write_score(self, result: jax.Array, x: jax.Array, at: RowTile, columns: ColumnTile, *, add: bool) -> jax.Array:
        """(lead..., rows, block_kv) into (batch..., N, T, S)"""
        return _write(result, self._rows_outside(x, x.shape[-1]), self._score_window(at, columns)[0], add)

    def add_batch(self, result: jax.Array, x: jax.Array, at: RowTile) -> jax.Array:
        """(lead...) onto (batch...); of a sharded tile onto (batch..., N)"""
        if self.tile.is_sharded:
            return _write(result, self._outside(x), (*at.batch, 0), True)
        return _write(result, self._outside(x).sum(-1), at.batch, True)

    def add_arg(self, result: jax.Array, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., any) onto the same of all batch rows: what all heads, rows and keys share"""
        return _write(result, x, (*at.batch, *(0,) * (x.ndim - len(at.batch))), True)

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
        return lax.dynamic_slice(x, _starts(x, starts), sizes, allow_negative_indices=False)


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
        x += lax.dynamic_slice(result, first, x.shape, allow_negative_indices=False)
    return lax.dynamic_update_slice(result, x, first, allow_negative_indices=False)


def _starts(x: jax.Array, starts: tuple[Index, ...]) -> list[Index]:
    starts = tuple(0 if n == 1 else start for n, start in zip(x.shape, starts, strict=True))
    return [np.int32(start) if isinstance(start, int) else start for start in starts]
