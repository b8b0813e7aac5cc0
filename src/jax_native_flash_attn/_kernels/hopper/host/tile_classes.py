"""Which tiles kernels visit where a `mask_mod` says it: lists for each block, of classes of tiles that XLA found."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Config
from ...._semantics.masks import MaskOperands
from ...._semantics.tile_masks import EMPTY, FULL, PARTIAL, regrouped
from ..operands import WHOLE, QueryTiles, RowIntervals
from ..pallas import pad_axis, round_up


def kernel_classes(config: Config, mask: MaskOperands, T: int, S: int, block_rows: int, block_kv: int) -> jax.Array:
    """Of tiles of this size, (batch..., N or 1, blocks of rows, tiles); rows without keys attend all."""
    assert mask.tile_classes is not None
    classes = regrouped(mask.tile_classes, config.mask_block, -2, T, block_rows)
    classes = regrouped(classes, config.mask_block, -1, S, block_kv)
    if S % block_kv:  # the last one has keys that are none
        tile = lax.broadcasted_iota(jnp.int32, (*(1,) * (classes.ndim - 1), classes.shape[-1]), classes.ndim - 1)
        classes = jnp.where(tile == classes.shape[-1] - 1, jnp.minimum(classes, PARTIAL), classes)
    if mask.dead is None:
        return classes
    dead = jnp.broadcast_to(mask.dead, (*mask.dead.shape[:-1], T))
    dead = pad_axis(dead, -1, round_up(T, block_rows)).reshape(*dead.shape[:-1], -1, block_rows).any(-1)
    return jnp.where(dead[..., None], jnp.int8(PARTIAL), classes)


def are_whole(intervals: RowIntervals, T: int, S: int, block_rows: int) -> jax.Array:
    """Of blocks of rows: `RowIntervals.is_whole`. Dead rows attend what the `mask_mod` excludes, so those have none."""
    start, stop = intervals.key_start, intervals.key_stop
    row = lax.broadcasted_iota(jnp.int32, start.shape, start.ndim - 1)
    is_whole = ((start == 0) & (stop == S)) | (row >= T)
    return is_whole.reshape(*start.shape[:-1], -1, block_rows).all(-1).astype(jnp.int32)


def with_order(intervals: RowIntervals, classes: jax.Array) -> RowIntervals:
    """Intervals whose tile ranges are of places in a list for each block of rows: tiles in part, then full ones."""
    order, partial, visited = _listed(classes, (PARTIAL, FULL))
    edges = jnp.where(visited == 0, 1, partial)  # of a block without any, its first tile, which pipelines need
    visited = jnp.maximum(visited, 1)
    ranges = jnp.stack([jnp.zeros_like(edges), edges, visited, visited], -1)
    return replace(intervals, tile_ranges=ranges, tile_order=order)


def with_classes(intervals: RowIntervals, classes: jax.Array) -> RowIntervals:
    """Intervals with a class for each tile, in place of ranges."""
    assert intervals.is_whole is not None
    is_whole = (classes == PARTIAL) & (intervals.is_whole[..., None] != 0)
    return replace(intervals, tile_ranges=None, tile_classes=jnp.where(is_whole, WHOLE, classes.astype(jnp.int32)))


def query_tiles_of_classes(classes: jax.Array, summed: tuple[int, ...]) -> QueryTiles:
    """As `intervals.query_tiles`, of classes with blocks of keys; lists are for all heads, and along `summed` axes."""
    axes = tuple(i for i, n in enumerate(summed) if n > 1)
    largest = classes.max((*axes, classes.ndim - 3), keepdims=True).squeeze(-3)
    order, _, visited = _listed(jnp.swapaxes(jnp.minimum(largest, PARTIAL), -1, -2), (PARTIAL,))
    return QueryTiles(firsts=jnp.zeros_like(visited), ends=visited, order=order, classes=classes)


def _listed(classes: jax.Array, kinds: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers of the tiles along the last axis, those of the first kind first; how many these are, and all kinds."""
    count = classes.shape[-1]
    tile = lax.broadcasted_iota(jnp.int32, classes.shape, classes.ndim - 1)
    rank = jnp.full(classes.shape, len(kinds), jnp.int32)
    for place, kind in enumerate(kinds):
        rank = jnp.where(classes == kind, place, rank)
    order = jnp.sort(rank * count + tile, -1) % count
    return order, (classes == kinds[0]).sum(-1, dtype=jnp.int32), (classes != EMPTY).sum(-1, dtype=jnp.int32)
