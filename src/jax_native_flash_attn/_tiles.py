"""Tile geometry: shapes of arrays, shape of a tile, and which key/value tiles a query tile visits."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Sizes:
    """Axis sizes of one call. `batch` is B behind one axis per enclosing `vmap`."""

    batch: tuple[int, ...]
    T: int
    S: int
    K: int
    G: int
    H: int
    D: int


@dataclass(frozen=True)
class TileShape:
    """A tile holds some batch rows, some key/value heads with their groups, block_q rows, block_kv columns."""

    batch: tuple[int, ...]
    heads: int
    block_q: int
    block_kv: int


# Elements (query rows x keys, over all heads of the tile) that a tile should have where all heads fit into it.
_SMALL_TILE_ELEMENTS = 1 << 18
_WIDE_TILE_ELEMENTS = 1 << 26


def choose_tile(
    sizes: Sizes,
    platform: str,
    *,
    block_q: int | None,
    block_kv: int | None,
    is_banded: bool,
    all_heads: bool,
) -> TileShape:
    """The one place where tile shapes are chosen.

    Args:
      sizes: axis sizes of the call.
      platform: 'cpu' or anything else.
      block_q, block_kv: what the caller asked for, or None.
      is_banded: whether tiles on the edge of a band will be masked; smaller tiles then waste less.
      all_heads: ask for all batch rows and heads at once (reverse mode through a kernel: slicing one head out of an
        array would make its transpose touch the whole array for every tile).
    """
    heads = math.prod(sizes.batch) * sizes.K
    if platform == "cpu" and not all_heads:
        # Threads split one matrix product, not a batch of them: one head at a time, in large squares.
        rows, columns = (512, 512) if is_banded else (1024, 1024)
        block_q = block_q or max(1, rows // sizes.G)
        block_kv = block_kv or (columns if sizes.T * sizes.G >= 64 else 4096)
    else:
        # Kernel launches and bandwidth decide: everything at once, as long as a tile stays moderate.
        side = math.isqrt(max(1, (_SMALL_TILE_ELEMENTS << 4) // max(1, heads * sizes.G)))
        side = min(2048, max(128, 1 << (side.bit_length() - 1)))
        block_q, block_kv = block_q or side, block_kv or side
    block_q, block_kv = balanced_block(sizes.T, block_q), balanced_block(sizes.S, block_kv)
    if all_heads or platform != "cpu":
        return TileShape(sizes.batch, sizes.K, block_q, block_kv)
    # Small problems: several heads in a tile, as many as make it worth a loop step.
    budget = max(1, _SMALL_TILE_ELEMENTS // max(1, sizes.G * block_q * block_kv))
    tile_heads = largest_divisor(sizes.K, budget)
    batch = []
    for n in reversed(sizes.batch):
        full = tile_heads == sizes.K and all(b == m for b, m in zip(batch, reversed(sizes.batch), strict=False))
        batch.append(largest_divisor(n, max(1, budget // (tile_heads * math.prod(batch)))) if full else 1)
    return TileShape(tuple(reversed(batch)), tile_heads, block_q, block_kv)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return max(d for d in range(1, max(1, min(n, limit)) + 1) if n % d == 0)


def balanced_block(length: int, block: int) -> int:
    """At most about `block`, such that blocks of equal size cover `length` with little overlap.

    A length that the block does not divide (a prime, say) is cut into as many blocks of nearly equal size; the last
    one then overlaps the one before by a few rows, which the tile's owner rule ignores.
    """
    if length <= block:
        return max(1, length)
    if length % block == 0:
        return block
    even = -(-length // (-(-length // block)))
    granule = 64 if block % 64 == 0 else 1
    return min(-(-even // granule) * granule, block)


class ColumnRange(NamedTuple):
    """Key/value tiles of one query tile: [first, stop) in all; [full_first, full_stop) need no mask."""

    first: Any
    full_first: Any
    full_stop: Any
    stop: Any


def column_range(key_start: Any, key_stop: Any, block_kv: int, num_tiles: int, xp: Any = np) -> ColumnRange:
    """Classify the tiles visited by rows with these intervals: outside the range they are empty.

    Works on NumPy arrays (static schedule) and, with xp=jax.numpy, on traced ones (skipped at run time).
    Rows with an empty interval have key_start = S and key_stop = 0, which widens nothing but rules out full tiles.
    """
    first = xp.min(key_start) // block_kv
    stop = xp.maximum(first, -(-xp.max(key_stop) // block_kv))
    full_first = xp.clip(-(-xp.max(key_start) // block_kv), first, stop)
    full_stop = xp.clip(xp.min(key_stop) // block_kv, full_first, stop)
    return ColumnRange(*(xp.minimum(x, num_tiles).astype(np.int32) for x in (first, full_first, full_stop, stop)))
