"""A boolean mask over T and S as the kernels read it: a bit for each element, in the order in which threads hold tiles.

A thread holds columns c, c + 8, c + 16, ... of a row of a tile (`Layout.WGMMA`). So word m of a row has the columns m,
m + 8, ..., bit by bit, and no thread reads a word that another one needs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ..pallas import pad_axis, round_up

WORDS = 8  # of a row of a tile


def pack_rows(allowed: jax.Array, block_kv: int) -> jax.Array:
    """(batch..., N, T, S) to int32 (batch..., N, T, tiles of keys, WORDS); tiles of up to 256 columns."""
    allowed = pad_axis(allowed, -1, round_up(allowed.shape[-1], block_kv))
    *lead, columns = allowed.shape
    bits = allowed.reshape(*lead, columns // block_kv, block_kv // WORDS, WORDS)
    words = functools.reduce(jnp.bitwise_or, (bits[..., i, :].astype(jnp.int32) << i for i in range(bits.shape[-2])))
    # Joined with what is made of them, XLA would write more than the words.
    return lax.optimization_barrier(words)


def pack_columns(allowed: jax.Array, block_q: int) -> jax.Array:
    """Likewise of transposed tiles: (batch..., N, T, S) to (batch..., N, S, tiles of rows, WORDS)."""
    allowed = pad_axis(allowed, -2, round_up(allowed.shape[-2], block_q))
    *lead, rows, columns = allowed.shape
    bits = allowed.reshape(*lead, rows // block_q, block_q // WORDS, WORDS, columns)
    place = lax.broadcasted_iota(jnp.int32, (*(1,) * (len(lead) + 1), bits.shape[-3], 1, 1), bits.ndim - 3)
    # As a sum, XLA transposes what comes of it; of elementwise operations, the mask, as int32.
    return jnp.moveaxis((bits.astype(jnp.int32) << place).sum(-3, dtype=jnp.int32), -1, -3)


def visited(words: jax.Array, rows: int) -> jax.Array:
    """Which tiles of so many rows hold a bit: (..., blocks of rows, tiles), of words (..., rows, tiles, WORDS)."""
    words = pad_axis(words, -3, round_up(words.shape[-3], rows))
    *lead, count, tiles, _ = words.shape
    return (words.reshape(*lead, count // rows, rows, tiles, WORDS) != 0).any((-3, -1))
