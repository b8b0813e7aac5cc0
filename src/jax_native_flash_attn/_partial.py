"""Attention over parts of the keys, and how parts combine: the building blocks of ring attention and split decoding."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ._attention import attention
from ._semantics.numerics import accumulation_dtype


def flash_attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Any = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    deterministic: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `flash_attention`, and the log-sum-exp of the logits, both differentiable in every mode.

    (`flash_attention(..., return_residual=True)` follows `jax.nn`: its log-sum-exp has key's dtype and no gradient.)

    Args: as `flash_attention`.

    Returns:
      out, of query's shape and dtype, and lse, (B, T, N) or (T, N), float32 (float64 for float64 inputs). A row without
      any key has the constant lse -0.7 * float32's largest number.

    Raises: as `flash_attention`.
    """
    out, lse = attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        deterministic=deterministic,
        block_q=block_q,
        block_kv=block_kv,
        precision=precision,
        needs_lse=True,
    )
    return out, lse


def merge_attention(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    With w_i = exp(lse_i): out = sum_i w_i out_i / sum_i w_i and lse = log sum_i w_i (FlashAttention, Dao et al. 2022,
    arXiv:2205.14135, section 3.1). Equal, values and gradients, to attention over all keys at once; a row without keys
    in any part gives the mean of the parts' means.

    Args:
      outs: partial results, each (..., T, N, H), as `flash_attention_with_lse` gives them.
      lses: their log-sum-exps, each (..., T, N).

    Returns:
      out, in the dtype of the partial ones, and lse; can be merged further.

    Raises:
      ValueError: no parts, unequal numbers of them, or shapes that do not belong together.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many and at least one, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs must have one shape and lses that shape without the last axis, got {out.shape} and {lse.shape} "
                f"beside {outs[0].shape}"
            )
    accumulate = accumulation_dtype(outs[0].dtype)
    largest = lax.stop_gradient(jnp.stack(lses).max(0))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)  # every part empty
    weights = [jnp.exp(lse - largest) for lse in lses]
    total = sum(weights[1:], weights[0])
    numerator = [w[..., None] * out.astype(accumulate) for w, out in zip(weights, outs, strict=True)]
    out = sum(numerator[1:], numerator[0]) / jnp.where(total == 0, 1, total)[..., None]
    return out.astype(outs[0].dtype), largest + jnp.log(total)
