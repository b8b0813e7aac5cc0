"""The library: functions for `score_mod` and `mask_mod`."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._convert import as_count

# ---- score_mod: (score, batch, head, query_index, key_index, *score_mod_args) -> score


def alibi(score: Any, batch: Any, head: Any, query_index: Any, key_index: Any, slopes: Any) -> Any:
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409): `score - slope * distance`.

    `score_mod_args` are (slopes,), (N,) real, such as `alibi_slopes(N)`; they may be learned.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import flash_attention, mods
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 64, 8, 32))
      >>> slopes = (mods.alibi_slopes(8),)
      >>> flash_attention(query, key, value, is_causal=True, score_mod=mods.alibi, score_mod_args=slopes).shape
      (2, 64, 8, 32)
    """
    distance = jnp.abs(query_index - key_index).astype(score.dtype)
    return score - slopes[head].astype(score.dtype) * distance


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes that the authors of ALiBi take for so many heads, (num_heads,) float32.

    For a power of two 2^(-8 / N), 2^(-16 / N), ...; otherwise those of the power below, then every other of the next.

    Examples:
      >>> from jax_native_flash_attn import mods
      >>> print(mods.alibi_slopes(4))
      [0.25       0.0625     0.015625   0.00390625]
    """
    num_heads = as_count(num_heads, "num_heads")
    power = 1 << (num_heads.bit_length() - 1)
    own, between = (2.0 ** (-8 / n * np.arange(1, n + 1)) for n in (power, 2 * power))
    return np.concatenate([own, between[::2]])[:num_heads].astype(np.float32)


@dataclass(frozen=True)
class T5RelativeBias:
    """T5's bias for buckets of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    That is `score + table[bucket, head]`.

    `score_mod_args` are (table,), (num_buckets, N) real, as in T5's checkpoints. T5 has no scale: pass scale=1.0.

    Attributes:
      num_buckets: half of them, for each side, are of one distance each or, with growing size, of several.
      max_distance: keys from there on share a bucket.
      is_bidirectional: whether keys behind the query have buckets of their own, as in an encoder; otherwise they share
        that of distance 0, and `is_causal` is meant beside it.
    """

    num_buckets: int = 32
    max_distance: int = 128
    is_bidirectional: bool = True

    def __call__(self, score: Any, batch: Any, head: Any, query_index: Any, key_index: Any, table: Any) -> Any:
        # A bias for each distance first, which scores of a tile share: from `max_distance` on they are alike.
        furthest = self.max_distance
        by_distance = table[self.bucket(jnp.arange(-furthest, furthest + 1, dtype=jnp.int32))]
        distance = jnp.clip(key_index - query_index, -furthest, furthest)
        return score + by_distance[distance + furthest, head].astype(score.dtype)

    def bucket(self, relative: Any) -> Any:
        """Of key_index - query_index, from 0 to num_buckets - 1."""
        count = self.num_buckets // 2 if self.is_bidirectional else self.num_buckets
        first = jnp.where(relative > 0, count, 0) if self.is_bidirectional else 0
        distance = jnp.abs(relative) if self.is_bidirectional else jnp.maximum(-relative, 0)
        exact = count // 2
        ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
        far = exact + (jnp.log(ratio) * ((count - exact) / math.log(self.max_distance / exact))).astype(jnp.int32)
        return first + jnp.where(distance < exact, distance, jnp.minimum(far, count - 1))


@dataclass(frozen=True)
class SoftCap:
    """`cap * tanh(score / cap)` (Gemma 2, 2024, arXiv:2408.00118); `logits_soft_cap` is the same, with a faster kernel.

    As a `score_mod` it comes before a further one: write `lambda score, *at: other(SoftCap(30.0)(score, *at), *at)`.
    """

    cap: float

    def __call__(self, score: Any, batch: Any, head: Any, query_index: Any, key_index: Any) -> Any:
        return self.cap * jnp.tanh(score / self.cap)


# ---- mask_mod: (batch, head, query_index, key_index, *mask_mod_args) -> bool, True where a query attends a key


def causal(batch: Any, head: Any, query_index: Any, key_index: Any) -> Any:
    """`is_causal`, which is faster, as a function: to be joined with others."""
    return key_index <= query_index


def prefix_lm(batch: Any, head: Any, query_index: Any, key_index: Any, prefix_lengths: Any) -> Any:
    """A prefix that all see, then causal (Raffel et al. 2020, arXiv:1910.10683, section 3.2.1).

    `mask_mod_args` are (prefix_lengths,), (B,) integers.
    """
    return (key_index <= query_index) | (key_index < prefix_lengths[batch].astype(key_index.dtype))


def document(batch: Any, head: Any, query_index: Any, key_index: Any, query_ids: Any, key_ids: Any) -> Any:
    """Packed documents: tokens attend those of their own id. `query_segment_ids` is the same, and faster if sorted.

    `mask_mod_args` are (query_ids, key_ids), (B, T) and (B, S) integers, by place: for a call without positions.
    """
    return query_ids[batch, query_index] == key_ids[batch, key_index]


@dataclass(frozen=True)
class SlidingWindow:
    """`left` keys before a query's own and `right` behind it (Beltagy et al. 2020, arXiv:2004.05150).

    `local_window_size=(left, right)` is the same, and faster.
    """

    left: int
    right: int = 0

    def __call__(self, batch: Any, head: Any, query_index: Any, key_index: Any) -> Any:
        distance = key_index - query_index
        return (distance >= -self.left) & (distance <= self.right)


@dataclass(frozen=True)
class Dilated:
    """Every `step`-th of the last `step * count` keys (Child et al. 2019, arXiv:1904.10509; LongNet, arXiv:2307.02486).

    Attributes:
      step: keys at distances 0, step, 2 * step, ... are attended.
      count: how many of them; None for all.
    """

    step: int
    count: int | None = None

    def __call__(self, batch: Any, head: Any, query_index: Any, key_index: Any) -> Any:
        distance = query_index - key_index
        allowed = (distance >= 0) & (distance % self.step == 0)
        return allowed if self.count is None else allowed & (distance < self.step * self.count)


@dataclass(frozen=True)
class Neighbourhood:
    """Neighbourhood attention on an image (Hassani et al. 2023, arXiv:2204.07143): the pixels around a pixel.

    Tokens are pixels, row by row: index = y * width + x. At borders the window is moved inwards, so that each pixel
    attends window_height * window_width others.
    """

    height: int
    width: int
    window_height: int
    window_width: int

    def __call__(self, batch: Any, head: Any, query_index: Any, key_index: Any) -> Any:
        rows = self._near(query_index // self.width, key_index // self.width, self.height, self.window_height)
        return rows & self._near(query_index % self.width, key_index % self.width, self.width, self.window_width)

    @staticmethod
    def _near(query: Any, key: Any, length: int, window: int) -> Any:
        first = jnp.clip(query - window // 2, 0, length - window)
        return (key >= first) & (key < first + window)


def tree(batch: Any, head: Any, query_index: Any, key_index: Any, ancestors: Any, cache_length: Any) -> Any:
    """A tree of draft tokens behind a cache (SpecInfer, Miao et al. 2024, arXiv:2305.09781; Medusa, arXiv:2401.10774).

    Query t is draft token t, and key cache_length + t too; all keys before are seen by all, those behind the draft by
    none. `mask_mod_args` are (ancestors, cache_length), of `tree_ancestors` and an integer, which may be traced.
    """
    draft, count = key_index - cache_length.astype(key_index.dtype), ancestors.shape[1]
    in_draft = (draft >= 0) & (draft < count)
    return (draft < 0) | (in_draft & ancestors[query_index, jnp.clip(draft, 0, count - 1)])


def tree_ancestors(parents: ArrayLike) -> np.ndarray:
    """(n, n) bool: whether token s is token t or one of its ancestors.

    Args:
      parents: (n,) integers: the parent of each token, which comes before it, or a negative number.

    Examples:
      >>> from jax_native_flash_attn import mods
      >>> print(mods.tree_ancestors([-1, 0, 0, 1]).astype(int))
      [[1 0 0 0]
       [1 1 0 0]
       [1 0 1 0]
       [1 1 0 1]]
    """
    parents = np.asarray(parents)
    ancestors = np.eye(len(parents), dtype=bool)
    for token, parent in enumerate(parents):
        if parent >= token:
            raise ValueError(f"parents must come before their children, got token {token} with parent {parent}")
        if parent >= 0:
            ancestors[token] |= ancestors[parent]
    return ancestors
