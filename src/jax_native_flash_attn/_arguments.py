"""Checks of the public arguments; each error names the argument, what was given and what is accepted.

Where `jax.nn.dot_product_attention` raises, the type of the error is the same.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._convert import (
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
    as_static_scale,
    as_window,
    static_or_traced,
)
from ._mod_arguments import as_mods
from ._semantics.call import Arrays, Settings
from ._semantics.constant_masks import hide_constant_mask
from ._semantics.dense import NAME as DENSE
from ._semantics.dropout import Dropout, check_dropout, head_indices, make_dropout, threefry_words
from ._semantics.masks import Band
from ._semantics.numerics import accumulation_dtype
from ._shapes import Axes, as_query_key_value
from ._warnings import (
    warn_of_bias,
    warn_of_causal,
    warn_of_dropout,
    warn_of_layout,
    warn_of_lengths,
    warn_of_positions,
    warn_of_shapes,
    warn_of_window,
)


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
    score_mod: Any,
    score_mod_args: Any,
    mask_mod: Any,
    mask_mod_args: Any,
    needs_lse: bool,
    needs_max_logits: bool = False,
    implementation: str | None = None,
    blocks: int = 1,
) -> tuple[Settings, Arrays]:
    """The one place that knows the public names; see `flash_attention`. Key and value are one block of `blocks`."""
    given = dict(locals())
    is_causal = as_static_bool(is_causal, "is_causal")
    block_q, block_kv = as_block(block_q, "block_q"), as_block(block_kv, "block_kv")
    if implementation == DENSE and (block_q or block_kv):
        raise ValueError(
            f"implementation='dense' has no tiles, got block_q={block_q} and block_kv={block_kv}: leave them out, or "
            "take another implementation"
        )
    dropout_rate = _as_rate(dropout_rate, dropout_rng, deterministic)
    precision = as_precision(precision)
    query, key, value, axes = as_query_key_value(query, key, value, blocks=blocks)
    B, T, N, H, S, *_ = axes
    bias = None if bias is None else as_bias(bias, axes)
    window = as_window(local_window_size)
    query_lengths = as_integers(query_seq_lengths, "query_seq_lengths", axes, "B")
    key_value_lengths = as_integers(key_value_seq_lengths, "key_value_seq_lengths", axes, "B")
    scalar_scale = as_scale(scale, H)
    # A number becomes a tracer where what follows is recorded for a compiler. Elsewhere nothing is analysed.
    is_staged = isinstance(scalar_scale if scale is None else jnp.asarray(0.0), Tracer)
    is_staged &= implementation != DENSE  # of whose program nothing is hidden
    query_ids = as_integers(query_segment_ids, "query_segment_ids", axes, "BT", hides=is_staged)
    key_ids = as_integers(key_value_segment_ids, "key_value_segment_ids", axes, "BS", hides=is_staged)
    _check_pair(query_ids, key_ids)
    query_positions = as_integers(query_positions, "query_positions", axes, "BT", hides=is_staged)
    key_positions = as_integers(key_value_positions, "key_value_positions", axes, "BS", hides=is_staged)
    static_offset, traced_offset = as_offset(query_offset, B)
    if query_positions is not None and not (traced_offset is None and static_offset == 0):
        raise ValueError("query_offset moves rows without query_positions, got both: add it to query_positions")
    soft_cap = as_soft_cap(logits_soft_cap)
    sinks = as_sinks(sinks, N)
    mask = None if mask is None else as_mask(mask, axes, is_staged=is_staged)
    band = Band()
    if isinstance(mask, np.ndarray):
        mask, band = hide_constant_mask(mask, T, S) if blocks == 1 else (jnp.asarray(mask), band)
    is_moved = any(x is not None for x in (query_positions, key_positions, traced_offset)) or static_offset != 0
    dropout, dropped = _as_dropout(dropout_rate, dropout_rng, broadcast_dropout, B, N)
    given_mods = {"score_mod": (score_mod, score_mod_args), "mask_mod": (mask_mod, mask_mod_args)}
    mods, numbers = as_mods(given_mods, accumulation_dtype(query.dtype), axes, moves_rows=is_moved, blocks=blocks)
    static_window, traced_window = static_or_traced(window, T, S, moves=is_moved or blocks > 1)
    if is_causal and all(x is None for x in (query_offset, query_positions, key_positions)):
        warn_of_causal(blocks * T, S)
    if is_moved and not is_causal and window is None and not mods:
        offset = traced_offset if static_offset == 0 else static_offset
        warn_of_positions(query_positions=query_positions, key_value_positions=key_positions, query_offset=offset)
    warn_of_window(window, is_causal=is_causal)
    _warn_of_arrays(given, axes._replace(T=blocks * T), bias, query_lengths, key_value_lengths)
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
        static_scale=as_static_scale(scale, query),
        **mods,
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
        **dropped,
        **numbers,
    )
    return settings, arrays


_SAYS_WHO_ATTENDS = (
    *("bias", "mask", "is_causal", "local_window_size", "query_seq_lengths", "key_value_seq_lengths"),
    *("query_segment_ids", "query_positions", "key_value_positions", "query_offset", "score_mod", "mask_mod"),
)


def _warn_of_arrays(given: dict[str, Any], axes: Axes, bias: Any, query_lengths: Any, key_value_lengths: Any) -> None:
    """By arguments as they were given, and converted, with the axes of whole sequences."""
    B, T, N, _, S, *_ = axes
    warn_of_shapes(np.shape(given["query"]), getattr(given["mask"], "shape", ()), B, T, S, N)
    is_alone = all(given[name] is None or given[name] is False for name in _SAYS_WHO_ATTENDS)
    warn_of_layout(np.shape(given["query"]), np.shape(given["key"]), T, S, is_alone=is_alone)
    warn_of_lengths("query_seq_lengths", given["query_seq_lengths"], query_lengths, T)
    warn_of_lengths("key_value_seq_lengths", given["key_value_seq_lengths"], key_value_lengths, S)
    warn_of_bias(given["bias"], bias)


def _as_rate(rate: Any, rng: Any, deterministic: Any) -> float:
    if as_static_bool(deterministic, "deterministic"):
        return 0.0
    if rate is None:
        warn_of_dropout(rng)
        return 0.0
    check_dropout(rate, rng)
    return rate


def _as_dropout(rate: float, rng: Any, is_shared: Any, B: int, N: int) -> tuple[Dropout | None, dict[str, Any]]:
    """And the arrays that it reads."""
    is_shared = as_static_bool(is_shared, "broadcast_dropout")
    if rate == 0:
        return None, {}
    heads = head_indices(1, 1) if is_shared else head_indices(B, N)
    return make_dropout(rate), {"dropout_key": threefry_words(rng), "head_index": heads}


def _check_pair(query_ids: Any, key_ids: Any) -> None:
    if (query_ids is None) != (key_ids is None):
        given, missing = ("query", "key_value") if key_ids is None else ("key_value", "query")
        raise ValueError(
            f"{given}_segment_ids need {missing}_segment_ids beside them, got None: "
            "for self-attention pass the same array as both"
        )
