"""The shape of one attention call: everything that decides what it computes, except the numbers.

Axis letters: B batch, T query length, S key/value length, N query heads, K key/value heads,
H head dimension.
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

FORWARD = "forward"
GRADIENT = "gradient"
MODES = (FORWARD, GRADIENT)


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One call; `modes` are those in which benchmarks run it."""

    name: str
    batch: int
    query_length: int
    key_value_length: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    is_causal: bool = False
    local_window_size: tuple[int, int] | None = None
    bias_shape: tuple[int, int, int, int] | None = None
    mask_shape: tuple[int, int, int, int] | None = None
    dtype: str = "float32"
    key_value_lengths: tuple[int, ...] | None = None
    modes: tuple[str, ...] = MODES

    @property
    def score_elements(self) -> int:
        """Number of elements of the (B, N, T, S) array that dense attention makes."""
        return self.batch * self.num_heads * self.query_length * self.key_value_length

    def operations(self, mode: str) -> float:
        """Floating-point operations: two products of the scores that masks leave; 3.5 times that with gradients."""
        products = 4 * self.score_elements * self.head_dim * self._live_fraction()
        return products if mode == FORWARD else 3.5 * products

    def _live_fraction(self) -> float:
        """Part of the T x S scores that causality, window and lengths leave, over the batch."""
        rows = np.arange(self.query_length)[:, None]
        low, high = np.zeros_like(rows), np.full_like(rows, self.key_value_length)
        if self.is_causal:
            high = np.minimum(high, rows + 1)
        if self.local_window_size is not None:
            low = np.maximum(low, rows - self.local_window_size[0])
            high = np.minimum(high, rows + self.local_window_size[1] + 1)
        if self.key_value_lengths is not None:
            high = np.minimum(high, np.asarray(self.key_value_lengths)[None])
        return float(np.maximum(high - low, 0).mean() / self.key_value_length)

    def dense_bytes(self, mode: str) -> int:
        """Estimated temporary bytes of `jax.nn`'s dense code: float32 arrays of all scores.

        The counts are those that XLA:CPU reports: logits and probabilities in the forward pass,
        one array more for their cotangent, and one more for grouped heads.
        """
        arrays = 2 if mode == FORWARD else 3
        arrays += self.num_heads != self.num_key_value_heads
        return arrays * self.score_elements * max(4, np.dtype(jnp.dtype(self.dtype)).itemsize)

    def with_settings(
        self,
        dtype: str | None = None,
        is_causal: bool | None = None,
        local_window_size: tuple[int, int] | None = None,
    ) -> "AttentionShape":
        """Another dtype, causality or window under a name that says so."""
        changes: dict[str, Any] = {}
        suffix = ""
        if is_causal is not None and is_causal != self.is_causal:
            changes["is_causal"] = is_causal
            suffix += "-causal" if is_causal else "-full"
        if local_window_size is not None and local_window_size != self.local_window_size:
            changes["local_window_size"] = local_window_size
            suffix += "-window-{}-{}".format(*local_window_size)
        if dtype is not None and dtype != self.dtype:
            changes["dtype"] = dtype
            suffix += f"-{dtype}"
        if not changes:
            return self
        return dataclasses.replace(self, name=self.name + suffix, **changes)

    def with_length(self, length: int) -> "AttentionShape":
        """The same call with `length` queries and `length` keys, for plots over the length."""
        if self.bias_shape or self.mask_shape or self.key_value_lengths:
            raise ValueError(f"{self.name}: only shapes without bias, mask and lengths are resized")
        resized = plain_shape(self.batch, length, length, self.num_heads, self.num_key_value_heads, self.head_dim)
        return resized.with_settings(self.dtype, self.is_causal, self.local_window_size)


def parse_dimensions(text: str) -> AttentionShape:
    """A plain call from its dimensions: `BxTxNxH` or `B,T,S,N,K,H`.

    In the first form S is T and K is N, unless written as `T/S` and `N/K`: `1x4096x8/2x64` has 8
    query heads on 2 key/value heads, `4x1/32768x8x64` has one query on 32,768 keys.
    """
    if re.fullmatch(r"\d+(,\d+){5}", text):
        return plain_shape(*(int(number) for number in text.split(",")))
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?x(\d+)(?:/(\d+))?x(\d+)", text)
    if match is None:
        raise ValueError(
            f"{text!r} is neither a named shape (--list-shapes) nor BxTxNxH (as 1x4096x8/2x64) nor B,T,S,N,K,H"
        )
    batch, query_length, key_length, heads, key_heads, head_dim = match.groups()
    return plain_shape(
        int(batch),
        int(query_length),
        int(key_length or query_length),
        int(heads),
        int(key_heads or heads),
        int(head_dim),
    )


def plain_shape(
    batch: int,
    query_length: int,
    key_value_length: int,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
) -> AttentionShape:
    """A shape without mask or bias, named as `parse_dimensions` reads it."""
    if num_key_value_heads < 1 or num_heads % num_key_value_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_key_value_heads} key/value heads")
    lengths, heads = f"{query_length}", f"{num_heads}"
    if key_value_length != query_length:
        lengths += f"/{key_value_length}"
    if num_key_value_heads != num_heads:
        heads += f"/{num_key_value_heads}"
    return AttentionShape(
        name=f"{batch}x{lengths}x{heads}x{head_dim}",
        batch=batch,
        query_length=query_length,
        key_value_length=key_value_length,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
    )
