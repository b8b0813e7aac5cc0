"""The public functions: their signatures and their mathematics."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.typing import ArrayLike

from ._arguments import check
from ._attention import attention
from ._convert import as_static_bool
from ._implementations import Implementation, by_cudnn, own_implementation
from ._kernels.jax_nn import jax_attention
from ._keywords import explains_keywords
from ._options import MaskMod, Options, ScoreMod, WindowLike


@overload
def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    implementation: Implementation | None = ...,
    return_residual: Literal[False] = ...,
    **options: Unpack[Options],
) -> jax.Array: ...
@overload
def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    implementation: Implementation | None = ...,
    return_residual: Literal[True],
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]: ...
@explains_keywords
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
    local_window_size: WindowLike | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    dropout_rate: float | None = None,
    dropout_rng: jax.Array | None = None,
    deterministic: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    precision: PrecisionLike = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    key_value_positions: ArrayLike | None = None,
    query_offset: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    score_mod: ScoreMod | None = None,
    score_mod_args: tuple[Any, ...] = (),
    mask_mod: MaskMod | None = None,
    mask_mod_args: tuple[Any, ...] = (),
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot product attention in memory linear in T and S; a drop-in for `jax.nn.dot_product_attention`.

    For each query row t and head, over the keys s that the masks allow,

        logits[t, s] = scale * dot(query[t], key[s]) + bias[t, s]
        out[t] = sum_s exp(logits[t, s]) * value[s] / sum_s exp(logits[t, s])

    by the algorithm of FlashAttention-2 (Dao 2023, arXiv:2307.08691): tile by tile, with an online softmax, and
    probabilities recomputed in the derivatives. Axes: B batch, T query length, S key/value length, N query heads,
    K key/value heads (N a multiple of K), H head dimension. Dtypes: bfloat16, float16, float32 or float64; logits
    and softmax are float32, or float64 for float64 inputs.

    Args:
      query: (B, T, N, H) or (T, N, H).
      key: (B, S, K, H) or (S, K, H), of query's dtype.
      value: (B, S, K, D) or (S, K, D), of query's dtype; D may differ from H.
      bias: real, added to the logits; broadcastable to (B, N, T, S), of rank 4 or less. Its gradient has its own shape.
      mask: bool, True where a query may attend a key; broadcastable to (B, N, T, S).
      scale: multiplier of the logits, 1 / sqrt(H) by default; may be traced and differentiated.
      is_causal: query t attends keys s <= t only (aligned at the top left if T != S).
      query_seq_lengths: (B,) integers, of any dtype, as all below; rows from there on give 0.
      key_value_seq_lengths: (B,); keys and values from there on are ignored, even NaN.
      local_window_size: (left, right) or one integer, may be traced: query t attends t - left <= s <= t + right only.
      implementation: None or 'xla', which callers of `jax.nn` say for "not cuDNN": the fastest of our own kernels for
        the call and the platform. Or one of them: 'pure_jax', 'mosaic_gpu' (Hopper GPUs), 'mosaic_tpu', 'cudnn_gpu'
        (cuDNN's, but as this function means it): an error where it cannot run; others do passes that it lacks.
        'cudnn' passes the call to `jax.nn`. 'dense', for quantisers and converters: JAX's functions, T x S arrays.
      return_residual: also return the log-sum-exp of the logits, with its gradient stopped.
      dropout_rate: (extension) probability, in [0, 1], of dropping an attention weight; kept ones are divided by
        `1 - dropout_rate`. A static Python number; None is 0.
      dropout_rng: (extension) PRNG key, required for a positive rate. The kept weights are those of
        `jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (B, N, T, S))`; see `dropout_keep_mask`.
      deterministic: (extension) True for no dropout whatever the rate, as Flax says it.
      block_q, block_kv: (extension) rows and columns of a tile; chosen by shape and platform by default.
      precision: (extension) of the matrix products: whatever JAX takes as such (`jax.lax.Precision`, 'float32', ...).
      query_segment_ids, key_value_segment_ids: (extension) (B, T) and (B, S), of packed sequences: a query attends keys
        of its own id. A negative id is padding: such a row gives 0, such a key is attended by none; both must be
        finite. Any order is right; where ids are sorted, what lies outside of a sequence is skipped.
      query_positions, key_value_positions: (extension) (B, T) and (B, S): what `is_causal` and `local_window_size` go
        by, in place of indices. Tokens may stand in any order; where keys are sorted (within their id), tiles are
        skipped. Ids and positions have any integer dtype, and lie within int32.
      query_offset: (extension) an integer or (B,), may be traced: query t has position t + query_offset, for
        `is_causal` and `local_window_size`. For chunks of a prompt, and for decoding with a cache. None is 0.
      logits_soft_cap: (extension) c > 0, static: logits, with scale and bias, become c * tanh(logits / c); masks come
        behind.
      sinks: (extension) (N,) real: one more logit for each head, in the denominator of the softmax alone. It is neither
        scaled, capped, dropped nor masked. A row without keys then gives 0. -inf is a sink that counts for nothing.
      broadcast_dropout: (extension) drop the same weights in all batch rows and heads, as Flax does by default: those
        of the shape (1, 1, T, S).
      score_mod, score_mod_args: (extension) a function (score, batch, head, query_index, key_index, *args) -> score of
        logits with scale and bias, traced for scalars; soft cap and masks come behind. Indices are positions, if there
        are any. A tuple of pytrees of arrays: these, and arrays that the function captures, are differentiable.
      mask_mod, mask_mod_args: (extension) (batch, head, query_index, key_index, *args) -> bool, True where a query may
        attend a key; or what `mods.make_tile_mask` makes of it. Tiles that it leaves empty are skipped.

    A row that may attend no key gives the mean of value over all S keys, as in `jax.nn`; its log-sum-exp is
    -0.7 * float32's largest number. (With `sinks`, 0 and the sink.)

    Returns:
      Array of query's dtype, and of its shape but for the last axis, which is value's; with `return_residual`, a pair
      with the log-sum-exp, (B, T, N) or (T, N), in key's dtype.

    Raises:
      ValueError: wrong rank, shape or dtype, unknown `implementation`, a rate outside [0, 1], a missing `dropout_rng`.
      TypeError: bias or mask not broadcastable; a traced argument that must be static; no PRNG key; an unknown keyword.
      NotImplementedError: an extension with implementation='cudnn'; other kernels asked for that cannot run there.

    Warns:
      AttentionWarning: legal, but hardly meant: `is_causal` with T < S and no offset or positions, a window with no
        keys, a mask (N, T, S) with B = N or (T, S) with B = T, a query of rank 1 or 2, heads that look like tokens, a
        bias of 0 and 1, lengths that no sequence has, or positions, an offset or a `dropout_rng` that go unread.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import flash_attention
      >>> query = jax.random.normal(jax.random.key(0), (2, 64, 8, 32))
      >>> key, value = jax.random.normal(jax.random.key(1), (2, 2, 64, 4, 32))
      >>> flash_attention(query, key, value, is_causal=True).shape
      (2, 64, 8, 32)
    """
    arguments = {name: x for name, x in locals().items() if name not in ("implementation", "return_residual")}
    return_residual = as_static_bool(return_residual, "return_residual")
    if isinstance(implementation, str) and implementation == "cudnn":
        return by_cudnn(arguments, return_residual)
    checked = check(**arguments, needs_lse=return_residual, implementation=own_implementation(implementation))
    out, lse, _ = attention(*checked, jnp.asarray(query).shape)
    return out if lse is None else (out, lax.stop_gradient(lse.astype(out.dtype)))


flash_attention.replaces = jax_attention  # pyright: ignore[reportFunctionMemberAccess]


@overload
def flash_attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    implementation: Implementation | None = ...,
    return_max_logits: Literal[False] = ...,
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def flash_attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    implementation: Implementation | None = ...,
    return_max_logits: Literal[True],
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array, jax.Array]: ...
@explains_keywords
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
    local_window_size: WindowLike | None = None,
    implementation: Implementation | None = None,
    dropout_rate: float | None = None,
    dropout_rng: jax.Array | None = None,
    deterministic: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    precision: PrecisionLike = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    key_value_positions: ArrayLike | None = None,
    query_offset: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    score_mod: ScoreMod | None = None,
    score_mod_args: tuple[Any, ...] = (),
    mask_mod: MaskMod | None = None,
    mask_mod_args: tuple[Any, ...] = (),
    return_max_logits: bool = False,
) -> tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, jax.Array]:
    """As `flash_attention`, and the log-sum-exp of the logits, both differentiable in every mode.

    (`flash_attention(..., return_residual=True)` follows `jax.nn`: its log-sum-exp has key's dtype and no gradient.)

    Args:
      return_max_logits: also return the largest logit of each head, as clipping of queries and keys needs it (QK-clip,
        Kimi K2, arXiv:2507.20534, section 2.1). All other arguments are as of `flash_attention`, but
        `implementation` is not 'cudnn'.

    Returns:
      out, of query's shape but for its last axis, value's, and its dtype; and lse, (B, T, N) or (T, N), float32
      (float64 for float64 inputs). It is of logits with scale, bias and cap, and with the sink. A row without any key
      has the constant lse -0.7 * float32's largest number, or that of its sink.
      With `return_max_logits` also (N,) float32: the largest logit over batch, rows and the keys that masks leave, with
      scale, bias and cap, without sinks; -inf if there is none. It has no gradient. Inside a `shard_map` it is that of
      the shard: take `jax.lax.pmax`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `flash_attention`.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import flash_attention_with_lse
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 64, 8, 32))
      >>> out, lse = flash_attention_with_lse(query, key, value)
      >>> out.shape, lse.shape
      ((2, 64, 8, 32), (2, 64, 8))
    """
    arguments = {name: x for name, x in locals().items() if name not in ("implementation", "return_max_logits")}
    needs_max_logits = as_static_bool(return_max_logits, "return_max_logits")
    asked: dict[str, Any] = {"implementation": own_implementation(implementation), "needs_lse": True}
    checked = check(**arguments, **asked, needs_max_logits=needs_max_logits)
    out, lse, max_logits = attention(*checked, jnp.asarray(query).shape)
    assert lse is not None
    return (out, lse) if max_logits is None else (out, lse, max_logits)
