"""Checks of the public arguments; each error names the argument, what was given and what is accepted.

Where `jax.nn.dot_product_attention` raises, the type of the error is the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._convert import (
    LARGEST,
    as_4d,
    as_bias,
    as_block,
    as_integers,
    as_mask,
    as_offset,
    as_precision,
    as_scale,
    as_sinks,
    as_soft_cap,
    as_static_bool,
    as_window,
)
from ._semantics.call import Arrays, Settings
from ._semantics.constant_masks import hide_constant_mask
from ._semantics.dropout import check_dropout, head_indices, make_dropout, threefry_words
from ._semantics.masks import Band
from ._semantics.positions import clip_window_side


def check(
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
    query_segment_ids: Any,
    key_value_segment_ids: Any,
    query_positions: Any,
    key_value_positions: Any,
    query_offset: Any,
    logits_soft_cap: Any,
    sinks: Any,
    broadcast_dropout: Any,
    needs_lse: bool,
    needs_max_logits: bool = False,
    implementation: str | None = None,
    blocks: int = 1,
) -> tuple[Settings, Arrays]:
    """The one place that knows the public names; see `flash_attention`. Key and value are one block of `blocks`."""
    is_causal = as_static_bool(is_causal, "is_causal")
    block_q, block_kv = as_block(block_q, "block_q"), as_block(block_kv, "block_kv")
    if as_static_bool(deterministic, "deterministic"):
        dropout_rate = 0.0
    check_dropout(dropout_rate, dropout_rng)
    precision = as_precision(precision)
    query, key, value = (as_4d(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    check_query_key_value(query, key, value)
    B, T, N, H = query.shape
    S = blocks * key.shape[1]
    bias = None if bias is None else as_bias(bias, (B, N, T, S))
    window = as_window(local_window_size)
    query_lengths = as_integers(query_seq_lengths, "query_seq_lengths", B=B)
    key_value_lengths = as_integers(key_value_seq_lengths, "key_value_seq_lengths", B=B)
    scalar_scale = as_scale(scale, H)
    # A number becomes a tracer where what follows is recorded for a compiler. Elsewhere nothing is analysed.
    is_staged = isinstance(scalar_scale if scale is None else jnp.asarray(0.0), Tracer)
    query_ids = as_integers(query_segment_ids, "query_segment_ids", hides=is_staged, B=B, T=T)
    key_ids = as_integers(key_value_segment_ids, "key_value_segment_ids", hides=is_staged, B=B, S=S)
    if (query_ids is None) != (key_ids is None):
        given, missing = ("query", "key_value") if key_ids is None else ("key_value", "query")
        raise ValueError(
            f"{given}_segment_ids need {missing}_segment_ids beside them, got None: "
            "for self-attention pass the same array as both"
        )
    query_positions = as_integers(query_positions, "query_positions", hides=is_staged, B=B, T=T)
    key_positions = as_integers(key_value_positions, "key_value_positions", hides=is_staged, B=B, S=S)
    static_offset, traced_offset = as_offset(query_offset, B)
    if query_positions is not None and not (traced_offset is None and static_offset == 0):
        raise ValueError("query_offset moves rows without query_positions, got both: add it to query_positions")
    soft_cap = as_soft_cap(logits_soft_cap)
    sinks = as_sinks(sinks, N)
    shares_dropout = as_static_bool(broadcast_dropout, "broadcast_dropout")
    mask = None if mask is None else as_mask(mask, (B, N, T, S), is_staged=is_staged)
    band = Band()
    if isinstance(mask, np.ndarray):
        mask, band = hide_constant_mask(mask, T, S) if blocks == 1 else (jnp.asarray(mask), band)
    dropout, dropout_key, head_index = None, None, None
    if dropout_rate > 0:
        dropout, dropout_key = make_dropout(dropout_rate), threefry_words(dropout_rng)
        head_index = head_indices(1, 1) if shares_dropout else head_indices(B, N)
    static_window, traced_window = window, None
    if window is not None and not all(isinstance(side, int) for side in window):
        moves = (
            any(x is not None for x in (query_positions, key_positions, traced_offset))
            or static_offset != 0
            or blocks > 1
        )
        limits = ((-LARGEST, LARGEST),) * 2 if moves else ((-S, T), (-T, S))
        left, right = (clip_window_side(side, *ends) for side, ends in zip(window, limits, strict=True))
        static_window, traced_window = None, jnp.stack([left, right])
    settings = Settings(
        is_causal=is_causal,
        static_window=static_window,
        static_band=band,
        static_offset=static_offset,
        logits_soft_cap=soft_cap,
        dropout=dropout,
        block_q=block_q,
        block_kv=block_kv,
        precision=precision,
        needs_lse=needs_lse,
        needs_max_logits=needs_max_logits,
        implementation=implementation,
        is_staged=is_staged,
    )
    arrays = Arrays(
        query=query,
        key=key,
        value=value,
        scale=scalar_scale,
        bias=bias,
        mask=mask,
        traced_window=traced_window,
        query_lengths=query_lengths,
        key_value_lengths=key_value_lengths,
        query_segment_ids=query_ids,
        key_value_segment_ids=key_ids,
        query_positions=query_positions,
        key_value_positions=key_positions,
        query_offset=traced_offset,
        sinks=sinks,
        dropout_key=dropout_key,
        head_index=head_index,
    )
    return settings, arrays


_FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_query_key_value(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    B, _, N, H = query.shape
    _, S, K, _ = key.shape
    if query.dtype.name not in _FLOAT_DTYPES:
        raise ValueError(f"query must have a dtype of {', '.join(_FLOAT_DTYPES)}, got {query.dtype}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not all(isinstance(n, int) for n in x.shape[1:]):
            raise NotImplementedError(f"{name} must have static axes but for the batch (in an export), got {x.shape}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
    if key.shape != (B, S, K, H):
        raise ValueError(
            f"key must have query's batch size and head dimension, (B, S, K, H) = ({B}, S, K, {H}), got {key.shape}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have key's batch size, length and heads, (B, S, K, D) = ({B}, {S}, {K}, D), got {value.shape}"
        )
    if K == 0 or N % K != 0:
        raise ValueError(f"the number of query heads must be a multiple of key's {K} heads, got {N}")
