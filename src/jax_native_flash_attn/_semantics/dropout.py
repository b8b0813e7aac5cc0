"""The dropout keep-mask, a pure function of the key and of absolute positions: any tile of it can be made alone.

The mask is that of `jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (B, N, T, S))`. With JAX's default
`jax_threefry_partitionable`, the random bits of element (b, n, t, s) are a hash of its linear index:
Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the index's two words.
Hence the mask depends neither on block sizes nor on sharding, nor on whether attention is flash or dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import describe, refuse_traced

_WORD = np.uint32(0xFFFF)


@dataclass(frozen=True)
class Dropout:
    """Static part of dropout: the rate, and whether `bernoulli` would draw float64 (it does under x64).

    `lengths` are T and S of the mask, if those of a call are a part of it.
    """

    rate: float
    uniform_bits: int  # of the significand: 23 for float32, 52 for float64
    lengths: tuple[int, int] | None = None

    @property
    def rescaling(self) -> float:
        """Of kept weights (none is at rate 1)."""
        return 1 / (1 - self.rate) if self.rate < 1 else 0.0

    def keep_tile(
        self,
        key_words: jax.Array,
        head_index: jax.Array,
        rows: jax.Array,
        columns: jax.Array,
        T: int,
        S: int,
    ) -> jax.Array:
        """Keep-mask of the elements at `rows` x `columns` of the given heads.

        Args:
          key_words: (..., 2) uint32, the threefry key; with `lengths` (..., 4), and what is added to rows and columns.
          head_index: (...) uint32, b * N + n of each head; `...` broadcasts with that of `key_words`.
          rows, columns: (t,) and (s,) absolute positions, int32.
          T, S: the full lengths, where there are no others in `lengths`.

        Returns:
          (..., t, s) bool.
        """
        lead = (1,) * head_index.ndim
        words = [key_words[..., i] for i in range(key_words.shape[-1])]
        return self.keep_elements(
            [x[..., None] if i == 2 else x[..., None, None] for i, x in enumerate(words)],
            head_index[..., None],
            rows.astype(jnp.uint32).reshape(*lead, -1),
            columns.astype(jnp.uint32).reshape(*lead, 1, -1),
            lambda x: x[..., None],
            T,
            S,
        )

    def keep_elements(
        self,
        key: Sequence[jax.Array],
        head_index: jax.Array,
        rows: jax.Array,
        columns: jax.Array,
        spread: Callable[[jax.Array], jax.Array],
        T: int,
        S: int,
    ) -> jax.Array:
        """As `keep_tile`, all uint32 and broadcasting; `spread` brings what varies by row to the shape of `columns`."""
        if self.lengths is not None:
            rows, columns = rows + key[2], columns + key[3]
        T, S = self.lengths or (T, S)
        high, low = _multiply_wide(head_index, np.uint32(T))
        high, low = _add_wide(high, low, rows)
        row_high, row_low = _multiply_wide(low, np.uint32(S))
        row_high = row_high + high * np.uint32(S)
        high, low = _add_wide(spread(row_high), spread(row_low), columns)
        return self._below_keep_probability(*_threefry2x32((key[0], key[1]), high, low))

    def _below_keep_probability(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """`uniform < 1 - rate` in integers: the uniform is the top bits of the random word(s) times 2**-bits."""
        if self.uniform_bits == 23:
            threshold = math.ceil(float(np.float32(1.0 - self.rate)) * 2**23)
            return ((first ^ second) >> 9) < np.uint32(threshold)
        threshold = math.ceil((1.0 - self.rate) * 2**52)
        if threshold >= 2**52:
            return jnp.ones_like(first, bool)
        low_threshold = np.uint32(threshold & 0xFFFFF)
        high_threshold = np.uint32(threshold >> 20)
        return (first < high_threshold) | ((first == high_threshold) & ((second >> 12) < low_threshold))


def _threefry2x32(key: tuple[jax.Array, jax.Array], x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 3.3), as `jax.random` computes it.

    Unrolled, so that XLA fuses it with what consumes it; JAX's own is a loop over arrays on CPU, several times slower.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def _add_wide(high: jax.Array, low: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) + x as two words; jnp.uint64 would need x64."""
    total = low + x
    return high + (total < low).astype(jnp.uint32), total


def _multiply_wide(a: jax.Array, b: np.uint32) -> tuple[jax.Array, jax.Array]:
    """The two words of a * b, by the schoolbook on 16-bit halves."""
    a0, a1, b0, b1 = a & _WORD, a >> 16, b & _WORD, b >> 16
    low, cross0, cross1, high = a0 * b0, a0 * b1, a1 * b0, a1 * b1
    middle = (low >> 16) + (cross0 & _WORD) + (cross1 & _WORD)
    return (
        high + (cross0 >> 16) + (cross1 >> 16) + (middle >> 16),
        (low & _WORD) | (middle << 16),
    )


def threefry_words(dropout_rng: Any) -> jax.Array:
    """(2,) uint32 words of a threefry key; a key of another implementation seeds one.

    Raises:
      TypeError: no key, typed or as old-style uint32 words.
      ValueError: several keys.
    """
    if not isinstance(dropout_rng, np.ndarray | jax.Array):
        raise _no_key(dropout_rng)
    if not jnp.issubdtype(dropout_rng.dtype, jax.dtypes.prng_key):
        try:
            dropout_rng = jax.random.wrap_key_data(jnp.asarray(dropout_rng))
        except (TypeError, ValueError):
            raise _no_key(dropout_rng) from None
    if dropout_rng.shape != ():
        raise ValueError(
            f"dropout_rng must be a single key, got keys of shape {dropout_rng.shape}: take one, or jax.vmap over them"
        )
    if str(jax.random.key_impl(dropout_rng)) == "threefry2x32":
        return jax.random.key_data(dropout_rng)
    return jax.random.bits(dropout_rng, (2,), jnp.uint32)


def _no_key(given: Any) -> TypeError:
    return TypeError(f"dropout_rng must be a PRNG key, such as jax.random.key(0), got {describe(given)}")


def make_dropout(dropout_rate: float) -> Dropout:
    return Dropout(float(dropout_rate), 52 if jax.config.jax_enable_x64 else 23)  # pyright: ignore[reportAttributeAccessIssue]


def with_place(key_words: jax.Array, first_row: Any, first_key: Any) -> jax.Array:
    """Words of a key, (..., 2), and what `Dropout.lengths` needs beside them, (..., 4)."""
    place = jnp.stack([jnp.asarray(first_row), jnp.asarray(first_key)]).astype(jnp.uint32)
    return jnp.concatenate([key_words, jnp.broadcast_to(place, key_words.shape)], -1)


def head_indices(B: int, N: int) -> jax.Array:
    """(B, N) uint32: b * N + n."""
    return jnp.arange(B * N, dtype=jnp.uint32).reshape(B, N)


def dropout_keep_mask(dropout_rng: jax.Array, dropout_rate: float, shape: tuple[int, int, int, int]) -> jax.Array:
    """The attention weights that `flash_attention(..., dropout_rate, dropout_rng)` keeps, for a dense reference.

    For threefry keys (and JAX's default `jax_threefry_partitionable`) this equals
    `jax.random.bernoulli(dropout_rng, 1 - dropout_rate, shape)`; keys of another implementation seed a threefry key.
    It materialises the whole mask: `flash_attention` itself never does.

    Args:
      dropout_rng: a PRNG key, typed or as old-style uint32 words.
      dropout_rate: the probability with which a weight is dropped.
      shape: (B, N, T, S).

    Returns:
      bool array of `shape`: True where the weight is kept (and divided by `1 - dropout_rate`).

    Raises:
      ValueError: for a rate outside [0, 1], a batch of keys, or a shape that is not 4-D.
      TypeError: for a rate that is not a number, or what is no key.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import dropout_keep_mask
      >>> keep = dropout_keep_mask(jax.random.key(0), 0.1, (1, 2, 16, 16))
      >>> bool((keep == jax.random.bernoulli(jax.random.key(0), 0.9, (1, 2, 16, 16))).all())
      True
    """
    check_dropout(dropout_rate, dropout_rng)
    if len(shape) != 4:
        raise ValueError(f"shape must be (B, N, T, S), got {shape}")
    B, N, T, S = shape
    words = threefry_words(dropout_rng)[None, None]
    return make_dropout(dropout_rate).keep_tile(
        words,
        head_indices(B, N),
        jnp.arange(T, dtype=jnp.int32),
        jnp.arange(S, dtype=jnp.int32),
        T,
        S,
    )


def check_dropout(dropout_rate: Any, dropout_rng: Any) -> None:
    refuse_traced(dropout_rate, "dropout_rate")
    if isinstance(dropout_rate, bool) or not isinstance(dropout_rate, int | float | np.floating):
        raise TypeError(f"dropout_rate must be a Python number (static), such as 0.1, got {describe(dropout_rate)}")
    if not 0 <= dropout_rate <= 1:
        raise ValueError(f"dropout_rate must be a probability, in [0, 1], got {dropout_rate}")
    if dropout_rate > 0 and dropout_rng is None:
        raise ValueError(
            f"dropout_rng must be a PRNG key, such as jax.random.key(0), when dropout_rate > 0 (got {dropout_rate}), "
            "got None: deterministic=True is for none"
        )
