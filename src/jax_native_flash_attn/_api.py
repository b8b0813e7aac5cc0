"""The public function: signature, mathematics, and the order in which the parts are called."""

import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from . import _arguments as arguments
from ._derivatives import flash_attention_core
from ._dropout import Dropout, head_indices, make_dropout, threefry_words
from ._logits import Config, Inputs
from ._masks import make_mask
from ._numerics import DEAD_ROW_LSE, accumulation_dtype
from ._sharding import over_explicit_axes

Implementation = Literal["xla", "cudnn"]


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
      implementation: None or 'xla' for the pure JAX kernels; 'cudnn' passes the call to `jax.nn`.
      return_residual: also return the log-sum-exp of the logits, with its gradient stopped.
      dropout_rate: (extension) probability, in [0, 1], of dropping an attention weight; kept ones are divided by
        `1 - dropout_rate`. A static Python number.
      dropout_rng: (extension) PRNG key, required for a positive rate. The kept weights are those of
        `jax.random.bernoulli(dropout_rng, 1 - dropout_rate, (B, N, T, S))`; see `dropout_keep_mask`.
      block_q, block_kv: (extension) rows and columns of a tile; chosen by shape and platform by default.
      precision: (extension) `jax.lax.Precision` or alike of the matrix products.

    A row that no key may attend gives the mean of value over all S keys, as in `jax.nn`; its log-sum-exp is
    -0.7 * float32's largest number.

    Returns:
      Array of query's shape and dtype; with `return_residual`, a pair with the log-sum-exp, (B, T, N) or (T, N), in
      key's dtype.

    Raises:
      ValueError: wrong rank, shape or dtype, unknown `implementation`, a rate outside [0, 1], a missing `dropout_rng`.
      TypeError: bias or mask not broadcastable; arguments that must be static but are not.
      NotImplementedError: an extension together with implementation='cudnn'.
    """
    arguments.check_static(
        is_causal=is_causal,
        implementation=implementation,
        block_q=block_q,
        block_kv=block_kv,
        dropout_rate=dropout_rate,
    )
    arguments.check_dropout(dropout_rate, dropout_rng)
    precision = arguments.as_precision(precision)
    query_4d, key_4d, value_4d = (
        arguments.as_4d(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    arguments.check_query_key_value(query_4d, key_4d, value_4d)
    B, T, N, _ = query_4d.shape
    S = key_4d.shape[1]
    bias_4d = None if bias is None else arguments.as_bias(bias, (B, N, T, S))
    mask_4d = None if mask is None else arguments.as_mask(mask, (B, N, T, S))
    window = arguments.as_window(local_window_size)
    query_lengths = arguments.as_lengths(query_seq_lengths, "query_seq_lengths", B)
    key_value_lengths = arguments.as_lengths(key_value_seq_lengths, "key_value_seq_lengths", B)
    scalar_scale = arguments.as_scale(scale, query_4d.shape[-1])

    if implementation == "cudnn":
        return jax.nn.dot_product_attention(  # pyright: ignore[reportCallIssue]
            query,
            key,
            value,
            bias_4d,
            mask_4d,
            scale=scale,  # pyright: ignore[reportArgumentType]
            is_causal=bool(is_causal),
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_value_lengths,
            local_window_size=window,
            implementation="cudnn",
            **({"return_residual": True} if return_residual else {}),  # pyright: ignore[reportArgumentType]
        )

    has_dropout = dropout_rate > 0 and dropout_rng is not None
    traced_window = window is not None and not all(isinstance(side, int) for side in window)
    attention = functools.partial(
        _attention,
        is_causal=bool(is_causal),
        static_window=None if traced_window else window,
        dropout=make_dropout(dropout_rate) if has_dropout else None,
        blocks=(block_q, block_kv),
        precision=precision,
    )
    operands = {
        "query": query_4d,
        "key": key_4d,
        "value": value_4d,
        "bias": bias_4d,
        "mask": mask_4d,
        "scale": scalar_scale,
        "traced_window": jnp.stack([jnp.asarray(side, jnp.int32) for side in window]) if traced_window else None,
        "query_lengths": query_lengths,
        "key_value_lengths": key_value_lengths,
        "dropout_key": threefry_words(dropout_rng) if has_dropout else None,
        "head_index": head_indices(B, N) if has_dropout else None,
    }
    out, lse = over_explicit_axes(attention, operands, _OPERAND_LAYOUTS)
    shape = jnp.shape(query)
    if not return_residual:
        return out.reshape(shape)
    return out.reshape(shape), lax.stop_gradient(lse.astype(out.dtype).reshape(shape[:-1]))


# "." is an axis that is never sharded.
_OPERAND_LAYOUTS = {
    "query": "BTNH",
    "key": "BSKH",
    "value": "BSKH",
    "bias": "BNTS",
    "mask": "BNTS",
    "scale": "",
    "traced_window": ".",
    "query_lengths": "B",
    "key_value_lengths": "B",
    "dropout_key": ".",
    "head_index": "BN",
}


def _attention(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: jax.Array,
    traced_window: jax.Array | None,
    query_lengths: jax.Array | None,
    key_value_lengths: jax.Array | None,
    dropout_key: jax.Array | None,
    head_index: jax.Array | None,
    is_causal: bool,
    static_window: tuple[int, int] | None,
    dropout: Dropout | None,
    blocks: tuple[int | None, int | None],
    precision: Any,
) -> tuple[jax.Array, jax.Array]:
    """out (B, T, N, H) and differentiable lse (B, T, N) in accumulation dtype, of checked 4-D arguments."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    G = N // K
    accumulate = accumulation_dtype(query.dtype)
    if 0 in (B, T, N, S):
        return jnp.zeros_like(query), jnp.full((B, T, N), -jnp.inf, accumulate)

    def grouped(x: jax.Array | None) -> jax.Array | None:
        """(B, N or 1, T, S) -> (B, K, G, T, S), heads still broadcast if they were."""
        if x is None:
            return None
        heads = (1, 1) if x.shape[1] == 1 else (K, G)
        return x.reshape(x.shape[0], *heads, *x.shape[2:])

    band, mask_operands = make_mask(
        T,
        S,
        is_causal=is_causal,
        static_window=static_window,
        traced_window=traced_window,
        query_lengths=query_lengths,
        key_value_lengths=key_value_lengths,
        allowed=grouped(mask),
    )
    is_row = None
    if query_lengths is not None:
        # Padded rows may hold NaN, and their cotangents are zero: the two must not meet.
        is_row = jnp.arange(T, dtype=jnp.int32)[None, :] < query_lengths[:, None]
        query = jnp.where(is_row[..., None, None], query, 0)
    inputs = Inputs(
        query=query.reshape(B, T, K, G, H),
        key=key,
        value=value,
        scale=scale.astype(accumulate)[None],
        bias=grouped(bias),
        mask=mask_operands,
        dropout_key=None if dropout_key is None else dropout_key[None],
        head_index=None if head_index is None else head_index.reshape(B, K, G),
    )
    out, lse = flash_attention_core(Config(band, dropout, *blocks, precision), inputs)
    if mask_operands.dead is not None:
        lse = jnp.where(mask_operands.dead, DEAD_ROW_LSE, lse)
    out, lse = out.reshape(B, T, N, H), jnp.moveaxis(lse.reshape(B, N, T), 1, 2)
    if is_row is not None:
        out = jnp.where(is_row[..., None, None], out, 0)
        lse = jnp.where(is_row[..., None], lse, DEAD_ROW_LSE)
    return out, lse
