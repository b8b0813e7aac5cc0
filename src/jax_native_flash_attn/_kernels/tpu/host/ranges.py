"""Which tiles are visited, and which of these need no mask: four numbers for each resident block, in scalar memory.

XLA makes them of the intervals of the rows before a kernel, O(T) work. Where the intervals are static, they are
constants. So there is one way to say it, and index maps and kernels read the same numbers. The rules are those of
`_semantics/masks.py`. Of a boolean mask, one number for each tile says whether it leaves anything of that.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...._semantics.call import Call
from ..blocks import Blocks

_MOST = np.iinfo(np.int32).max
_SCALAR_BYTES = 256 << 10  # of scalar memory, for which tiles a mask leaves


class RowBlocks(NamedTuple):
    """Of the rows of each query block, (batch..., blocks): the ends of their intervals, lowest and highest of each.

    In NumPy, as `xp`, where the intervals are static: the ranges are then constants of the program.
    """

    least_start: Any
    most_start: Any
    least_stop: Any
    most_stop: Any
    xp: Any


def row_blocks(call: Call, block_q: int) -> RowBlocks:
    """A tile that is full knows nothing of dead rows, nor of ids and boolean masks: where these count, none is."""
    config, inputs = call
    mask, z, xp = inputs.mask, inputs.sizes, jnp
    if mask.key_start is None or mask.key_stop is None:
        xp = np
        start, stop = (x.reshape((1,) * (len(z.batch) + 1) + (z.T,)) for x in config.band.intervals(z.T, z.S))
    else:
        start, stop = mask.key_start, mask.key_stop
    full_stop = stop
    if mask.dead is not None:
        full_stop = jnp.where(mask.dead, 0, full_stop)
    if mask.is_exact is not None:
        full_stop = jnp.where(mask.is_exact != 0, full_stop, 0)
    blocks = -(-z.T // block_q)

    def reduced(x: Any, kind: Any, neutral: int) -> Any:
        x = xp.broadcast_to(x, (*x.shape[:-1], z.T))
        x = xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block_q - z.T)], constant_values=neutral)
        # Of all heads: a scalar memory would not hold more.
        return kind(x.reshape(*x.shape[:-1], blocks, block_q), (-1, -3))

    least_start, most_start, least_stop, most_stop = xp.broadcast_arrays(
        reduced(start, xp.min, _MOST),
        reduced(start, xp.max, 0),
        reduced(full_stop, xp.min, _MOST),
        reduced(stop, xp.max, 0),
    )
    return RowBlocks(least_start, most_start, least_stop, most_stop, xp)


def key_tiles(call: Call, blocks: Blocks) -> jax.Array:
    """Of each block of query rows, (batch..., query blocks, 4): tiles of keys, as a `ColumnRange`."""
    bounds, tile = row_blocks(call, blocks.resident), blocks.tile
    xp, (count, has_rest) = bounds.xp, divmod(call.sizes.S, tile)
    first = xp.minimum(bounds.least_start // tile, count + (has_rest > 0))
    stop = xp.maximum(-(-bounds.most_stop // tile), first)
    full_first = xp.clip(-(-bounds.most_start // tile), first, stop)
    # No tile is full that reaches past the last key.
    full_stop = xp.clip(xp.minimum(bounds.least_stop // tile, count), full_first, stop)
    return _as_ranges(call, first, full_first, full_stop, stop)


def query_tiles(call: Call, blocks: Blocks) -> jax.Array:
    """Of each block of keys, (batch..., key blocks, 4): tiles of query rows, likewise."""
    bounds, tile, keys = row_blocks(call, blocks.tile), blocks.tile, blocks.resident
    z, xp = call.sizes, bounds.xp
    lead = (1,) * (bounds.least_start.ndim - 1)
    first_key = xp.arange(-(-z.S // keys), dtype=xp.int32).reshape(*lead, -1, 1) * keys
    least_start, most_start, least_stop, most_stop = (x[..., None, :] for x in bounds[:4])
    attends = (least_start < first_key + keys) & (most_stop > first_key)
    number = xp.arange(bounds.least_start.shape[-1], dtype=xp.int32).reshape(*lead, 1, -1)
    first = xp.where(attends, number, _MOST).min(-1)
    stop = xp.where(attends, number + 1, 0).max(-1)
    first = xp.minimum(first, stop)
    # What is computed for keys behind the last one, no other key's gradient is made of.
    holds_all = (most_start <= first_key) & (least_stop >= xp.minimum(first_key + keys, z.S))
    is_full = holds_all & ((number + 1) * tile <= z.T)
    # The first run of full tiles.
    full_first = xp.clip(xp.where(is_full, number, _MOST).min(-1), first, stop)
    is_end = ~is_full & (number >= full_first[..., None])
    full_stop = xp.clip(xp.where(is_end, number, _MOST).min(-1), full_first, stop)
    return _as_ranges(call, first, full_first, full_stop, stop)


def occupied_tiles(call: Call, blocks: Blocks, *, streams_rows: bool) -> jax.Array | None:
    """Whether a boolean mask leaves any score of a tile, in any head: (batch..., resident blocks, tiles), 0 or 1.

    None without such a mask, and if this would not fit into scalar memory: then every tile of a range is visited.
    """
    mask, z = call.inputs.mask, call.sizes
    if mask.allowed is None:
        return None
    block_q, block_kv = (blocks.tile, blocks.resident) if streams_rows else (blocks.resident, blocks.tile)
    # Rows without a key attend all.
    attended = mask.allowed if mask.dead is None else mask.allowed | mask.dead[..., None]
    counts = -(-z.T // block_q), -(-z.S // block_kv)
    *lead, heads, rows, keys = attended.shape
    if math.prod(lead) * math.prod(counts) * 4 > _SCALAR_BYTES:
        return None
    # (Of an axis that broadcasts, the one element is that of every block.)
    sizes = block_q if rows > 1 else 1, block_kv if keys > 1 else 1
    blocks_of = -(-rows // sizes[0]), -(-keys // sizes[1])
    padding = ((0, blocks_of[0] * sizes[0] - rows), (0, blocks_of[1] * sizes[1] - keys))
    attended = jnp.pad(attended, ((0, 0),) * (attended.ndim - 2) + padding)
    attended = attended.reshape(*lead, heads, blocks_of[0], sizes[0], blocks_of[1], sizes[1]).any((-5, -3, -1))
    attended = jnp.broadcast_to(attended, (*lead, *counts))
    return (jnp.swapaxes(attended, -1, -2) if streams_rows else attended).astype(jnp.int32)


def _as_ranges(call: Call, first: Any, full_first: Any, full_stop: Any, stop: Any) -> jax.Array:
    if call.inputs.mask.allowed is not None:
        full_stop = full_first
    xp = np if isinstance(first, np.ndarray) else jnp
    return jnp.asarray(xp.stack([first, full_first, full_stop, stop], -1).astype(np.int32))


def has_edges(call: Call, blocks: Blocks, *, streams_rows: bool) -> bool:
    """Whether any tile may need a mask: also the last one of the streamed axis, if it ends behind that."""
    config, inputs = call
    z, mask, band = inputs.sizes, inputs.mask, config.band
    is_cut = (z.T if streams_rows else z.S) % blocks.tile != 0
    has_band = band.lower is not None or band.upper is not None
    return is_cut or has_band or mask.key_start is not None or mask.allowed is not None


def most_steps(call: Call, blocks: Blocks, *, over_rows: bool) -> int:
    """How many blocks of `streamed` keys (or query rows, `over_rows`) a resident block has at most."""
    z, band = call.sizes, call.config.band
    length, width = (z.T if over_rows else z.S), band.width
    steps = -(-length // blocks.streamed)
    if width is None or call.inputs.mask.key_start is not None:
        return steps
    # Of so many in a row, anywhere.
    reach = max(1, width + blocks.resident - 1)
    return max(1, min(steps, -(-(reach - 1) // blocks.streamed) + 1))
