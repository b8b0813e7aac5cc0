"""From a call to what `jax.nn` takes: batch axes as one, masks in cuDNN's forms, padding without NaN."""

import math

import jax
import jax.numpy as jnp

from ..._semantics.call import Call
from .public import Operands, Request

# Biases are clipped here, since cuDNN errs where two numbers far below are subtracted: so says `jax.nn`, which gives
# masked keys twice this number. Far enough for masked keys to weigh nothing beside those with the lowest bias.
LOWEST_BIAS = -(2.0**40)

Batch = tuple[int, ...]


def request_of(call: Call) -> Request:
    """Of a call that is supported."""
    config, band = call.config, call.config.band
    assert config.static_scale is not None
    return Request(config.static_scale, band.upper == 0, None if band.lower is None else -band.lower)


def prepare(call: Call, batch: Batch, bias_batch: Batch | None = None) -> Operands:
    """The operands of `jax.nn`, with one axis for all of `batch`.

    Args:
      batch: batch axes, to which those of the call broadcast.
      bias_batch: those of the bias, if they are not the call's own.
    """
    inputs, z = call.inputs, call.sizes
    mask, length = inputs.mask, inputs.mask.key_value_length
    key, value = inputs.key, inputs.value
    query_lengths = key_lengths = None
    if length is not None:
        position = jnp.arange(z.S, dtype=jnp.int32).reshape((1,) * length.ndim + (z.S,))
        padded = (position >= length[..., None])[..., None, None]
        key, value = (jnp.where(padded & ~jnp.isfinite(x), 0, x) for x in (key, value))
        # Without a key, a kernel would divide by 0. What it gives for such rows is replaced.
        key_lengths = fold(jnp.clip(length, 1, z.S), batch, 0)
        query_lengths = fold(_rows(call), batch, 0)
    bias, allowed = inputs.bias, mask.allowed
    if bias is not None:
        bias = jnp.maximum(bias, LOWEST_BIAS)
        if allowed is not None:
            bias = jnp.where(allowed, bias, 2 * LOWEST_BIAS)
            allowed = None
        bias = fold_term(bias if bias_batch is None else _with_batch(bias, bias_batch), batch)
    elif allowed is not None:
        allowed = fold_term(jnp.broadcast_to(allowed, (*allowed.shape[:-2], z.T, z.S)), batch)
    query, key, value = (fold(x, batch, 3) for x in (inputs.query, key, value))
    return Operands(query, key, value, bias, allowed, query_lengths, key_lengths)


def _rows(call: Call) -> jax.Array:
    """How many query rows are no padding: (batch...), at least 1."""
    mask, T = call.inputs.mask, call.sizes.T
    if mask.key_start is None or mask.key_stop is None:
        return jnp.full((1,) * len(call.sizes.batch), T, jnp.int32)
    is_row = (mask.key_start < mask.key_stop)[..., 0, :]  # rows without a key attend all
    return jnp.maximum(is_row.sum(-1, dtype=jnp.int32), 1)


def fold(x: jax.Array, batch: Batch, trailing: int) -> jax.Array:
    """(batch..., trailing axes) -> (B, trailing axes)"""
    shape = x.shape[x.ndim - trailing :]
    return jnp.broadcast_to(x, (*batch, *shape)).reshape(-1, *shape)


def fold_term(x: jax.Array, batch: Batch) -> jax.Array:
    """(batch..., N, T, S) -> (B or 1, N, T, S): 1 where all batch rows share it."""
    return x.reshape(1, *x.shape[-3:]) if math.prod(x.shape[:-3]) == 1 else fold(x, batch, 3)


def _with_batch(x: jax.Array, batch: Batch) -> jax.Array:
    return jnp.broadcast_to(x, (*jnp.broadcast_shapes(x.shape[:-3], batch), *x.shape[-3:]))


def sizes_of_terms(call: Call) -> tuple[int, int]:
    """Elements of the larger of bias and mask as given, and of both as one, as `prepare` gives it, with rows and keys.

    (0, 0) without either.
    """
    z = call.sizes
    terms = [x for x in (call.inputs.bias, call.inputs.mask.allowed) if x is not None]
    if not terms:
        return 0, 0
    *batch, N, _, _ = jnp.broadcast_shapes(*(x.shape for x in terms))
    rows = 1 if math.prod(batch) == 1 else math.prod(z.batch)
    return max(math.prod(x.shape) for x in terms), rows * N * z.T * z.S
