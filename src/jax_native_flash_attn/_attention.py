"""From checked arguments to the core and back: the steps of one call, in order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _arguments as arguments
from ._autodiff import taylor
from ._autodiff.primitives import flash_attention_core, flash_attention_p, linear_kernel_p
from ._semantics.call import Config, Inputs
from ._semantics.dropout import Dropout, head_indices, make_dropout, threefry_words
from ._semantics.masks import Band, clip_window_side, hide_constant_mask, make_mask
from ._semantics.numerics import DEAD_ROW_LSE, accumulation_dtype
from ._sharding.lowering import over_explicit_axes


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    *,
    scale: Any,
    is_causal: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: Any,
    dropout_rate: Any,
    dropout_rng: Any,
    deterministic: Any,
    block_q: Any,
    block_kv: Any,
    precision: Any,
    needs_lse: bool,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Check all arguments (see `flash_attention`); out as query and, if needed, lse.

    lse is (B, T, N) or (T, N), in accumulation dtype and differentiable.
    """
    is_causal = arguments.as_static_bool(is_causal, "is_causal")
    blocks = arguments.as_block(block_q, "block_q"), arguments.as_block(block_kv, "block_kv")
    if arguments.as_static_bool(deterministic, "deterministic"):
        dropout_rate = 0.0
    arguments.check_dropout(dropout_rate, dropout_rng)
    precision = arguments.as_precision(precision)
    query_4d, key_4d, value_4d = (
        arguments.as_4d(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    arguments.check_query_key_value(query_4d, key_4d, value_4d)
    B, T, N, _ = query_4d.shape
    S = key_4d.shape[1]
    bias_4d = None if bias is None else arguments.as_bias(bias, (B, N, T, S))
    window = arguments.as_window(local_window_size)
    query_lengths = arguments.as_lengths(query_seq_lengths, "query_seq_lengths", B)
    key_value_lengths = arguments.as_lengths(key_value_seq_lengths, "key_value_seq_lengths", B)
    scalar_scale = arguments.as_scale(scale, query_4d.shape[-1])
    # A number becomes a tracer where what follows is recorded for a compiler. Elsewhere nothing is analysed.
    is_staged = isinstance(scalar_scale if scale is None else jnp.asarray(0.0), Tracer)
    mask_4d = None if mask is None else arguments.as_mask(mask, (B, N, T, S), is_staged=is_staged)
    mask_band = Band()
    if isinstance(mask_4d, np.ndarray):
        mask_4d, mask_band = hide_constant_mask(mask_4d, T, S)

    dropout, dropout_key, head_index = None, None, None
    if dropout_rate > 0:
        dropout, dropout_key = make_dropout(dropout_rate), threefry_words(dropout_rng)
        head_index = head_indices(B, N)
    static_window, traced_window = window, None
    if window is not None and not all(isinstance(side, int) for side in window):
        left, right = clip_window_side(window[0], -S, T), clip_window_side(window[1], -T, S)
        static_window, traced_window = None, jnp.stack([left, right])
    partial = functools.partial(
        _attention,
        is_causal=is_causal,
        static_window=static_window,
        static_band=mask_band,
        dropout=dropout,
        blocks=blocks,
        precision=precision,
        needs_lse=needs_lse,
        implementation=implementation,
    )
    operands = {
        "query": query_4d,
        "key": key_4d,
        "value": value_4d,
        "bias": bias_4d,
        "mask": mask_4d,
        "scale": scalar_scale,
        "traced_window": traced_window,
        "query_lengths": query_lengths,
        "key_value_lengths": key_value_lengths,
        "dropout_key": dropout_key,
        "head_index": head_index,
    }
    taylor.register(flash_attention_p, linear_kernel_p)
    results = over_explicit_axes(partial, operands, _OPERAND_LAYOUTS, needs_lse=needs_lse)
    if is_staged:
        # For `checkify`, which looks for NaN behind the operations that it knows, so not behind our primitives, and
        # has no registry. XLA removes the product; its derivatives check tangents and cotangents.
        results = [x * 1 for x in results]
    shape = jnp.asarray(query).shape
    return tuple(x.reshape(like) for x, like in zip(results, (shape, shape[:-1]), strict=False))


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
    static_band: Band,
    dropout: Dropout | None,
    blocks: tuple[int | None, int | None],
    precision: Any,
    needs_lse: bool,
    implementation: str | None,
) -> tuple[jax.Array, ...]:
    """out (B, T, N, H) and, if needed, lse (B, T, N) in accumulation dtype, of checked 4-D arguments."""
    B, T, N, _ = query.shape
    S = key.shape[1]
    accumulate = accumulation_dtype(query.dtype)
    if 0 in (B, T, N, S):
        return (jnp.zeros_like(query), jnp.full((B, T, N), -jnp.inf, accumulate))[: 2 if needs_lse else 1]

    band, mask_operands = make_mask(
        T,
        S,
        is_causal=is_causal,
        static_window=static_window,
        static_band=static_band,
        traced_window=traced_window,
        query_lengths=query_lengths,
        key_value_lengths=key_value_lengths,
        allowed=mask,
    )
    is_row = None
    if query_lengths is not None:
        # Padded rows may hold NaN, and their cotangents are zero: the two must not meet.
        is_row = jnp.arange(T, dtype=jnp.int32)[None, :] < query_lengths[:, None]
        query = jnp.where(is_row[..., None, None], query, 0)
    H = query.shape[-1]
    if H == 0:
        # Logits are bias and masks alone, as with one dimension of zeros.
        query, key, value = (jnp.pad(x, ((0, 0),) * 3 + ((0, 1),)) for x in (query, key, value))
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        scale=scale.astype(accumulate)[None],
        bias=bias,
        mask=mask_operands,
        dropout_key=None if dropout_key is None else dropout_key[None],
        head_index=head_index,
    )
    config = Config(band, dropout, *blocks, precision, needs_lse, implementation, rounds_out=True)
    out, *lses = flash_attention_core(config, inputs)
    out = out if H > 0 else out[..., :0]
    if is_row is not None:
        out = jnp.where(is_row[..., None, None], out, 0)
    if not needs_lse:
        return (out,)
    (lse,) = lses
    if mask_operands.dead is not None:
        lse = jnp.where(mask_operands.dead, DEAD_ROW_LSE, lse)
    lse = jnp.moveaxis(lse, 1, 2)
    if is_row is not None:
        lse = jnp.where(is_row[..., None], lse, DEAD_ROW_LSE)
    return out, lse
