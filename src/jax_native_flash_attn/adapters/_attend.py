"""Attention as these libraries ask for it: any number of batch axes, masks of any dtype."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._api import flash_attention


def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any, mask: Any, **options: Any) -> jax.Array:
    """`flash_attention` of query (..., T, N, H), key (..., S, K, H), value (..., S, K, D); gives (..., T, N, D).

    Bias and mask are broadcastable to (..., N, T, S). `options` is what else `flash_attention` takes.
    """
    batch = query.shape[:-3]
    mask = as_bool(mask)
    if len(batch) < 2:
        return flash_attention(query, key, value, bias, mask, **options)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    bias, mask = (_over_one_batch_axis(x, batch) for x in (bias, mask))
    out = flash_attention(query, key, value, bias, mask, **options)
    return out.reshape(*batch, *out.shape[1:])


def as_bool(mask: Any) -> Any:
    """True for what is not 0, as `jnp.where` reads a mask.

    A constant of a program stays one: `flash_attention` looks whether it is causal or a window.
    """
    if mask is None or isinstance(mask, Tracer):
        return None if mask is None else mask.astype(bool)
    with jax.ensure_compile_time_eval():
        return jnp.asarray(mask).astype(bool)


def _over_one_batch_axis(x: Any, batch: tuple[int, ...]) -> Any:
    """(B, N, T, S), any of them 1, from (..., N, T, S)."""
    if x is None or math.prod(x.shape[:-3]) == 1:
        return x if x is None else x.reshape(x.shape[-3:])
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])
