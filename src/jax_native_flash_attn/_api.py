"""The public functions: their signatures and their mathematics."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ._arguments import check
from ._attention import attention

Implementation = Literal["xla", "pure_jax", "mosaic_gpu", "cudnn"]
_IMPLEMENTATIONS = (None, "xla", "pure_jax", "mosaic_gpu", "cudnn")

# jax.nn's own function, for implementation='cudnn': by the time of a call a user may have put ours in its place. Ours
# carries it, should this module be imported once more by then.
_jax_attention: Any = getattr(jax.nn.dot_product_attention, "replaces", jax.nn.dot_product_attention)


@overload
def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: Any = ...,
    implementation: Implementation | None = ...,
    return_residual: Literal[False] = ...,
    dropout_rate: float = ...,
    dropout_rng: jax.Array | None = ...,
    deterministic: bool = ...,
    block_q: int | None = ...,
    block_kv: int | None = ...,
    precision: Any = ...,
) -> jax.Array: ...
@overload
def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: Any = ...,
    implementation: Implementation | None = ...,
    return_residual: Literal[True],
    dropout_rate: float = ...,
    dropout_rng: jax.Array | None = ...,
    deterministic: bool = ...,
    block_q: int | None = ...,
    block_kv: int | None = ...,
    precision: Any = ...,
) -> tuple[jax.Array, jax.Array]: ...
def flash_attention(
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
    implementation: Implementation | None = None,
    return_residual: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    deterministic: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    precision: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Scaled dot product attention in memory linear in T and S; a drop-in for `jax.nn.dot_product_attention`.

    For each query row :math:`t` and head, over the keys :math:`s` that the masks allow,

    .. math::
        z_{ts} = \mathrm{scale} \; q_t \cdot k_s + \mathrm{bias}_{ts}, \qquad
        \mathrm{out}_t = \sum_s \frac{e^{z_{ts}}}{\sum_{s'} e^{z_{ts'}}} \, v_s

    by the algorithm of FlashAttention-2 (Dao 2023, arXiv:2307.08691): tile by tile, with an online softmax, and
    probabilities recomputed in the derivatives. Axes: B batch, T query length, S key/value length, N query heads,
    K key/value heads (N a multiple of K), H head dimension. Dtypes: bfloat16, float16, float32 or float64; logits
    and softmax are float32, or float64 for float64 inputs.

    Args:
      query: (B, T, N, H) or (T, N, H).
      key: (B, S, K, H) or (S, K, H), of query's dtype.
      value: as key.
      bias: real, added to the logits; broadcastable to (B, N, T, S), of rank 4 or less. Its gradient has its own shape.
      mask: bool, True where a query may attend a key; broadcastable to (B, N, T, S).
      scale: multiplier of the logits, 1 / sqrt(H) by default; may be traced and differentiated.
      is_causal: query t attends keys s <= t only (aligned at the top left if T != S).
      query_seq_lengths: (B,) int32; rows from there on give 0.
      key_value_seq_lengths: (B,) int32; keys and values from there on are ignored, even NaN.
      local_window_size: (left, right) or one integer for both: query t attends t - left <= s <= t + right only.
        May be traced.
      implementation: None, or 'xla', which callers of `jax.nn` say for "not cuDNN", for the fastest of our own kernels
        that support the call where it is compiled for. 'pure_jax' for those in pure JAX, 'mosaic_gpu' for those for
        Hopper GPUs, which is an error where they cannot run; 'cudnn' passes the call to `jax.nn`.
      return_residual: also return the log-sum-exp of the logits, with its gradient stopped.
      dropout_rate: (extension) probability, in [0, 1], of dropping an attention weight; kept ones are divided by
        `1 - dropout_rate`. A static Python number.
      dropout_rng: (extension) PRNG key, required for a positive rate. The kept weights are those of
        `jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (B, N, T, S))`; see `dropout_keep_mask`.
      deterministic: (extension) True for no dropout whatever the rate, and no need of `dropout_rng`, as Flax says it.
      block_q, block_kv: (extension) rows and columns of a tile; chosen by shape and platform by default.
      precision: (extension) of the matrix products: whatever JAX takes as such (`jax.lax.Precision`, 'float32', ...).

    A row that no key may attend gives the mean of value over all S keys, as in `jax.nn`; its log-sum-exp is
    -0.7 * float32's largest number.

    Returns:
      Array of query's shape and dtype; with `return_residual`, a pair with the log-sum-exp, (B, T, N) or (T, N), in
      key's dtype.

    Raises:
      ValueError: wrong rank, shape or dtype, unknown `implementation`, a rate outside [0, 1], a missing `dropout_rng`.
      TypeError: bias or mask not broadcastable; arguments that must be static but are not.
      NotImplementedError: an extension together with implementation='cudnn'; implementation='mosaic_gpu' where it
        cannot run (when the call is compiled).
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {_IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "cudnn":
        extensions = {
            "dropout_rate": dropout_rate != 0 and not deterministic,
            "block_q": block_q is not None,
            "block_kv": block_kv is not None,
            "precision": precision is not None,
        }
        for name, is_given in extensions.items():
            if is_given:
                raise NotImplementedError(f"{name} is not supported by implementation='cudnn', which is jax.nn's")
        return _jax_attention(
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
            implementation="cudnn",
            **({"return_residual": True} if return_residual else {}),
        )
    checked = check(
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
        needs_lse=return_residual,
        implementation=None if implementation == "xla" else implementation,
    )
    out, *lse = attention(*checked, jnp.asarray(query).shape)
    return (out, lax.stop_gradient(lse[0].astype(out.dtype))) if return_residual else out


flash_attention.replaces = _jax_attention  # pyright: ignore[reportFunctionMemberAccess]


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
    checked = check(
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
    out, lse = attention(*checked, jnp.asarray(query).shape)
    return out, lse
