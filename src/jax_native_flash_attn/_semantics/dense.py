"""Attention written out, for `implementation='dense'`: JAX's own functions, and arrays of T x S elements.

For what replaces the functions that a model calls, or reads each operation of its program: quantisers and converters.
So there is no primitive, no jit and no loop of ours here, and derivatives, batching and sharding are JAX's.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from .call import Arrays, Settings
from .join_masks import is_query_row
from .masks import Band, MaskOperands, make_band
from .mods import Program, args_of
from .numerics import DEAD_ROW_LSE, accumulation_dtype, bias_floor, lowest
from .positions import Order, of_keys, of_rows, places, position_bounds, reach_of

NAME = "dense"


@dataclass(frozen=True)
class DensePlan:
    """All scores at once: `shape` is (batch..., N, T, S). There are a few such arrays, in derivatives as well."""

    shape: tuple[int, ...]
    dtype: DTypeLike

    def __str__(self) -> str:
        size = math.prod(self.shape) * jnp.dtype(self.dtype).itemsize / 2**20
        return (
            f"all scores in memory, {' x '.join(map(str, self.shape))} in {self.dtype}: {size:.1f} MiB for each array"
        )


def dense_attention(settings: Settings, arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """out (B, T, N, D) in query's dtype; lse (B, T, N) and largest logits (B, N, T), in accumulation dtype."""
    query, key, value, dtype = arrays.query, arrays.key, arrays.value, accumulation_dtype(arrays.query.dtype)
    (B, T, N, H), (_, S, K, D) = query.shape, value.shape
    product = functools.partial(jnp.einsum, precision=settings.precision, preferred_element_type=dtype)
    if arrays.query_lengths is not None:
        query = jnp.where(_of_query(is_query_row(T, arrays.query_lengths, None)), query, 0)
    if arrays.key_value_lengths is not None:
        is_padding = (jnp.arange(S, dtype=jnp.int32)[None] >= arrays.key_value_lengths[:, None])[..., None, None]
        key, value = (jnp.where(is_padding & ~jnp.isfinite(x), 0, x) for x in (key, value))

    logits = product("btkgh,bskh->bkgts", query.reshape(B, T, K, N // K, H), key).reshape(B, N, T, S)
    logits = logits * arrays.scale.astype(dtype)
    if arrays.bias is not None:
        logits = logits + jnp.maximum(arrays.bias.astype(dtype), bias_floor(dtype))
    if settings.score_mod is not None:
        logits = jnp.maximum(_of_mod(settings.score_mod, arrays, settings.static_offset, [logits]), bias_floor(dtype))
    if settings.logits_soft_cap is not None:
        logits = settings.logits_soft_cap * jnp.tanh(logits / settings.logits_soft_cap)
    allowed, has_key = _visible(settings, arrays, T, S)
    if allowed is not None:
        logits = jnp.where(allowed, logits, lowest(dtype))
    largest = max_logits = lax.stop_gradient(logits).max(-1, keepdims=True)

    # A row without keys weighs all alike, as its logits are the same, unless there is a sink.
    sinks = None if arrays.sinks is None else arrays.sinks.astype(dtype)[None, :, None, None]
    largest = largest if sinks is None else jnp.maximum(largest, lax.stop_gradient(sinks))
    weights = jnp.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - largest)
    weights = _dropped(weights / total, settings, arrays).astype(value.dtype)
    out = product("bkgts,bskd->btkgd", weights.reshape(B, K, N // K, T, S), value).reshape(B, T, N, D)
    lse = largest + jnp.log(total)
    if has_key is not None:
        lse = lse if sinks is not None else jnp.where(has_key, lse, DEAD_ROW_LSE)
        max_logits = jnp.where(has_key, max_logits, -jnp.inf)
    is_row = is_query_row(T, arrays.query_lengths, arrays.query_segment_ids)
    if is_row is not None:
        out = jnp.where(_of_query(is_row), out, 0)
        lse, max_logits = (jnp.where(of_rows(is_row), *x) for x in ((lse, DEAD_ROW_LSE), (max_logits, -jnp.inf)))
    return out.astype(query.dtype), jnp.moveaxis(lse[..., 0], 1, 2), max_logits[..., 0]


def _of_mod(program: Program, arrays: Arrays, static_offset: int, scores: list[jax.Array]) -> jax.Array:
    """Of all scores, (B, N, T, S), which come first if the program reads them; axes may have size 1."""
    assert arrays.mod_args is not None
    assert arrays.batch_number is not None
    assert arrays.head_number is not None
    order = Order(
        query_positions=arrays.query_positions,
        key_positions=arrays.key_value_positions,
        query_offset=arrays.query_offset,
    )
    rows, keys = order.numbers(*places(arrays.query.shape[1], arrays.key.shape[1]), static_offset)
    batch, heads = arrays.batch_number[:, None, None, None], arrays.head_number[None, :, None, None]
    args = [x.reshape(1, 1, 1, 1, *x.shape) for x in args_of(program, arrays.mod_args).values()]
    return program((*scores, batch, heads, of_rows(rows), of_keys(keys)), args)


def _of_query(is_row: jax.Array | None) -> jax.Array:
    assert is_row is not None
    return is_row[..., None, None]


class _Visible(NamedTuple):
    """Which keys a row may attend, broadcastable to (B, N, T, S), and whether it has one, (..., T, 1); None: all do."""

    allowed: jax.Array | None
    has_key: jax.Array | None


def _visible(settings: Settings, arrays: Arrays, T: int, S: int) -> _Visible:
    """Of padded rows this says nothing."""
    positions = arrays.query_positions, arrays.key_value_positions
    order = Order(query_positions=positions[0], key_positions=positions[1], query_offset=arrays.query_offset)
    static: dict[str, Any] = {"is_causal": settings.is_causal, "window": settings.static_window}
    mask, band = MaskOperands(), Band()
    if arrays.traced_window is None and all(x is None for x in order):
        band = make_band(T, S, **static, also=band, offset=settings.static_offset)
    else:
        reach = reach_of(
            is_causal=settings.is_causal, static_window=settings.static_window, traced_window=arrays.traced_window
        )
        mask = MaskOperands(**position_bounds(T, S, order, reach, settings.static_offset))
    if arrays.query_segment_ids is not None and arrays.key_value_segment_ids is not None:
        ids = {"query_ids": of_rows(arrays.query_segment_ids), "key_ids": of_keys(arrays.key_value_segment_ids)}
        mask = mask._replace(**ids)
    rows, columns = (jnp.arange(n, dtype=jnp.int32)[None] for n in (T, S))
    distance = of_keys(columns) - of_rows(rows)
    terms = [] if band.lower is None else [distance >= band.lower]
    terms += [] if band.upper is None else [distance <= band.upper]
    others = [mask.matches(), arrays.mask]
    if settings.mask_mod is not None:
        others.append(_of_mod(settings.mask_mod, arrays, settings.static_offset, []))
    if arrays.key_value_lengths is not None:
        others.append(of_keys(columns < arrays.key_value_lengths[:, None]))
    others = [x for x in others if x is not None]
    if not terms and not others:
        return _Visible(None, None)
    allowed = functools.reduce(jnp.logical_and, terms + others)
    start, stop = band.intervals(T, S)
    return _Visible(allowed, allowed.any(-1, keepdims=True) if others or (stop <= start).any() else None)


def _dropped(weights: jax.Array, settings: Settings, arrays: Arrays) -> jax.Array:
    dropout, key, heads = settings.dropout, arrays.dropout_key, arrays.head_index
    if dropout is None or key is None or heads is None:
        return weights
    T, S = weights.shape[-2:]
    rows, columns = (jnp.arange(n, dtype=jnp.int32) for n in (T, S))
    keep = dropout.keep_tile(key[None, None], heads, rows, columns, T, S)
    return jnp.where(keep, weights * dropout.rescaling, 0)
