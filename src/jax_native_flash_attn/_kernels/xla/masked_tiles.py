"""What masks leave of tiles: which are visited, and which elements of one count.

A block that does not divide its length leaves a last tile that overlaps the one before; each row and column is
*owned* by the first tile that holds it, and only owned ones count.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.call import ModOperands
from ..._semantics.masks import Band, ColumnRange, MaskOperands
from ..._semantics.mods import Program
from ..._semantics.tile_masks import BLOCK, EMPTY, FULL
from .access import ColumnTile, Index, RowTile, TileAccess
from .mods import TileMod


class TileMask(NamedTuple):
    """Mask of one tile: `allowed` (..., t, s), and the rows (..., t, 1) that are dead (None: none are)."""

    allowed: jax.Array
    dead: jax.Array | None

    @property
    def live(self) -> jax.Array:
        """What is allowed of the rows that are not dead."""
        return self.allowed if self.dead is None else self.allowed & ~self.dead


@dataclass(frozen=True)
class MaskedTiles(TileAccess):
    """Attributes:

    band, mask: the masks of a call.
    mask_mod, mods, mask_block: its function of indices, what that reads, and the size of tiles that were classified.
    """

    band: Band
    mask: MaskOperands
    mask_mod: Program | None = field(default=None, kw_only=True)
    mods: ModOperands | None = field(default=None, kw_only=True)
    mask_block: int = field(default=BLOCK, kw_only=True)

    @property
    def num_query_tiles(self) -> int:
        return -(-self.sizes.T // self.tile.block_q)

    @property
    def num_key_tiles(self) -> int:
        return -(-self.sizes.S // self.tile.block_kv)

    @property
    def differs_between_shards(self) -> bool:
        """Whether devices would have to agree on which tiles are empty; they visit all of them instead."""
        if not self.tile.is_sharded:
            return False
        mask = self.mask
        masks = (mask.key_start, mask.key_stop, mask.dead, mask.allowed, mask.tile_classes)
        num_lead = len(self.tile.batch) + 1
        return any(n != 1 for x in masks if x is not None for n in x.shape[:num_lead])

    @property
    def reads_occupied(self) -> bool:
        masks = (self.mask.allowed, self.mask.tile_classes)
        return any(x is not None for x in masks) and not self.differs_between_shards

    @functools.cached_property
    def occupied(self) -> jax.Array:
        """Which tiles the masks leave something of, (query tiles, key/value tiles, batch..., N); sizes 1 stay.

        That is, a boolean mask, or all masks where one is a function of indices. Found once for all the heads that
        share it, before the loops.
        """
        if self.mask.tile_classes is not None:
            return self._count(self.mask.tile_classes != EMPTY) > 0
        assert self.mask.allowed is not None
        # Rows first: XLA:CPU vectorises that.
        by_rows = _any_in_blocks(self.mask.allowed, -2, self.tile.block_q, self.sizes.T)
        return jnp.swapaxes(_any_in_blocks(by_rows, -1, self.tile.block_kv, self.sizes.S), 0, 1)

    @functools.cached_property
    def full(self) -> jax.Array | None:
        """Which tiles are known to need no mask, as `occupied`."""
        if self.mask.tile_classes is None:
            return None
        full = self._count(self.mask.tile_classes != FULL) == 0
        if self.sizes.S % self.tile.block_kv == 0:
            return full
        return full.at[:, -1].set(False)  # the last one does not own all its columns

    def _count(self, blocks: jax.Array) -> jax.Array:
        """How many of the blocks that a tile meets are True: bool (batch..., N, rows, columns) -> as `occupied`.

        By sums over all blocks before: a tile may meet any number of them.
        """
        sums = jnp.pad(blocks, [(0, 0)] * (blocks.ndim - 2) + [(1, 0)] * 2).astype(jnp.int32).cumsum(-2).cumsum(-1)
        lengths = ((self.sizes.T, self.tile.block_q, -2), (self.sizes.S, self.tile.block_kv, -1))
        for length, block, axis in lengths:
            first = jnp.arange(-(-length // block), dtype=jnp.int32) * block
            first = jnp.minimum(first, length - block)
            start, stop = first // self.mask_block, -(-(first + block) // self.mask_block)
            sums = jnp.take(sums, stop, axis) - jnp.take(sums, start, axis)
        return jnp.moveaxis(sums, (-2, -1), (0, 1))

    @property
    def occupied_share(self) -> jax.Array:
        """The share of tiles that are visited for the boolean mask; dead rows attend all keys."""
        share = self.occupied.mean(dtype=jnp.float32)
        return share if self.mask.dead is None else jnp.where(self.mask.dead.any(), 1, share)

    def occupied_tiles(self, at: RowTile, ranges: ColumnRange) -> tuple[jax.Array, jax.Array | None]:
        """Which key/value tiles inside `ranges` the masks leave something of: all of them, if a row is dead.

        And which of these need no mask, if any may.
        """
        occupied, full = (None if x is None else self._of_rows(x, at) for x in (self.occupied, self.full))
        assert occupied is not None
        occupied = occupied.any(0)
        if self.mask.dead is not None:
            occupied |= self.row_slice(self.mask.dead, at).any()
        starts = self.tile.block_kv * jnp.arange(self.num_key_tiles, dtype=jnp.int32)
        occupied &= (starts >= ranges.first) & (starts < ranges.stop)
        return occupied, None if full is None else full.all(0) & occupied

    def _of_rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """Of what is known of each tile, that of a row of them: (batch rows and heads together, key/value tiles)."""
        sizes = (1, self.num_key_tiles, *self.tile.batch, self.tile.heads * self.sizes.G)
        x = self.slice(x, (at.owned // self.tile.block_q, 0, *at.batch, at.head * self.sizes.G), sizes)
        return jnp.moveaxis(x, 1, -1).reshape(-1, x.shape[1])

    def intervals(self, at: RowTile) -> tuple[jax.Array, jax.Array]:
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
        """Which elements of a tile count: two comparisons per element, whatever the intervals are."""
        mask = self.mask
        allowed = self._in_band(at, columns) if mask.key_start is None else self._in_intervals(at, columns)
        dead = None if mask.dead is None else self.row_slice(mask.dead, at)[..., None]
        in_mask = None if mask.allowed is None else self.score_slice(mask.allowed, at, columns)
        in_mod = None
        if self.mask_mod is not None and self.mods is not None:
            in_mod = TileMod(self, self.mask_mod, self.mods).mask(at, columns)
        for elements in (in_mask, mask.matches(lambda x: self.score_slice(x, at, columns)), in_mod):
            if elements is not None:
                allowed &= elements if dead is None else elements | dead
        return TileMask(allowed, dead)

    def _in_intervals(self, at: RowTile, columns: ColumnTile) -> jax.Array:
        start, stop = (x[..., None] for x in self.intervals(at))
        start = jnp.maximum(start, columns.owned)
        position = self.column_positions(columns).reshape((1,) * (start.ndim - 1) + (-1,))
        return (position >= start) & (position < stop)

    def _in_band(self, at: RowTile, columns: ColumnTile) -> jax.Array:
        """As `_in_intervals`, by places inside the tile, moved by one number: no loop gets an array from outside."""
        rows, keys = (jnp.arange(n, dtype=jnp.int32) for n in (self.tile.block_q, self.tile.block_kv))
        rows, keys = jnp.repeat(rows, self.rows_per_position)[:, None], keys[None, :]
        shift, band = columns.column - at.row, self.band
        terms = []
        if band.lower is not None:
            terms.append(keys + (shift - band.lower) >= rows)
        if band.upper is not None:
            terms.append(keys + (shift - band.upper) <= rows)
        if columns.owned is not columns.column:
            terms.append(keys >= columns.owned - columns.column)
        allowed = functools.reduce(jnp.logical_and, terms) if terms else jnp.ones((1, 1), bool)
        return jnp.broadcast_to(allowed, (*(1,) * (len(self.row_shape) - 1), rows.size, keys.size))

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
        return lax.dynamic_slice_in_dim(x, clamped(i * block, block, length), block, axis).any(axis)

    return lax.map(of_block, jnp.arange(-(-length // block), dtype=jnp.int32))


def clamped(start: Index, block: int, length: int) -> Index:
    """Start of the block that owns what follows `start`, the last one moved back so that it ends at `length`."""
    if length % block == 0:
        return start
    return min(start, length - block) if isinstance(start, int) else jnp.minimum(start, length - block)
