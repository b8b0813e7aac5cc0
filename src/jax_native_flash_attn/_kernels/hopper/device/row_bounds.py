"""What the rows of a block attend, of bounds that come with their intervals: see `MaskOperands.row_bounds`."""

import functools
from typing import Any

import jax.numpy as jnp

from ...._semantics.masks import ROWS_OF_BOUNDS
from ..host.intervals import Bounds
from ..operands import QueryTiles
from ..pallas import broadcast_index


def bounds_of_block(ref: Any, head: tuple, block: Any, block_rows: int, S: int, decides_elements: Any) -> Bounds:
    """Of so many rows, a multiple of those that have bounds. Where elements are compared, no tile is full."""
    index, count, parts = broadcast_index(head, ref.shape[:-2]), ref.shape[-2], block_rows // ROWS_OF_BOUNDS
    found = []
    for i in range(parts):
        place = block * parts + i
        part = Bounds(*(ref[(*index, jnp.minimum(place, count - 1), c)] for c in range(4)))
        if count % parts:  # behind the last rows there are those that attend nothing
            largest_start = jnp.where(place < count, part.largest_start, S)
            part = part._replace(largest_start=largest_start, least_stop=jnp.where(place < count, part.least_stop, 0))
        found.append(part)
    kinds = jnp.minimum, jnp.maximum, jnp.minimum, jnp.maximum
    bounds = Bounds(*(functools.reduce(kind, x) for kind, x in zip(kinds, zip(*found, strict=True), strict=True)))
    return bounds._replace(least_stop=jnp.where(decides_elements, 0, bounds.least_stop))


def is_any_masked(tiles: QueryTiles, head: tuple, tile: Any, key: Any, end: Any, decides_elements: Any) -> Any:
    """Whether a row of a query tile may not attend all keys from `key` to `end`."""
    ref, at, decides = tiles.bounds, 0, False
    if ref is None:
        ref, at, decides = tiles.row_bounds, 1, decides_elements
    assert ref is not None
    index = (*broadcast_index(head, ref.shape[:-2]), tile)
    return (ref[(*index, at)] > key) | (ref[(*index, at + 1)] < end) | decides
