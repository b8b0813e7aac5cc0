"""Derivatives that need no kernel, since they are sums over rows: of sinks, and of a bias without a key axis.

With p_t = exp(sink - lse_t), the weight of the sink, and delta_t = do_t . out_t - dl_t:

    dsink = -sum_t p_t delta_t        dbias_t = sum_s dz_ts = dl_t + p_t delta_t

of the cotangents do of out and dl of lse, where p_t is 0 without sinks; of a tangent dsink,

    dlse_t = p_t dsink                dout_t = -p_t dsink out_t

A bias inside a soft cap or `score_mod` has no such sum.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._kernels.protocol import LinearPass, Target
from .._semantics.call import Call, batch_of, sum_to
from .._semantics.numerics import accumulation_dtype
from .._sharding import passes

Arrays = Mapping[str, jax.Array]


def is_shift(call: Call) -> bool:
    """Whether the bias of a call is alike for all keys, and so changes no weight, since these add up to 1."""
    config, inputs = call
    has_rows = inputs.bias is not None and inputs.bias.shape[-1] == 1
    return has_rows and inputs.sinks is None and config.adds_bias


def cotangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """As `passes.cotangent`, of all operands."""
    results: dict[str, jax.Array] = {}
    wanted = dict(given.wanted)
    if (like := wanted.pop("sinks", None)) is not None:
        delta = given.delta(accumulation_dtype(call.inputs.query.dtype))
        results["sinks"] = sum_to(-(_sink_weights(call, given) * delta).sum(-1), like)
    like = wanted.get("bias")
    if like is not None and like.shape[-1] == 1 and call.config.adds_bias:
        results["bias"] = _of_rows(call, given, wanted.pop("bias"))
    return results | passes.cotangent(call, given._replace(wanted=wanted), target) if wanted else results


def tangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """As `passes.tangent`, of all operands."""
    if "sinks" not in given.operands:
        return passes.tangent(call, given, target)
    operands = {name: x for name, x in given.operands.items() if name != "sinks"}
    results: Arrays = {}
    if operands:
        results = passes.tangent(call, given._replace(operands=operands), target)
    share = _sink_weights(call, given) * given.operands["sinks"][..., None]
    own = {"lse": share, "out": -jnp.swapaxes(share, -1, -2)[..., None] * given.out.astype(share.dtype)}
    sums = {name: own[name] + results[name] if name in results else own[name] for name in given.wanted}
    return {name: _as_wanted(sums[name], like) for name, like in given.wanted.items()}


def _as_wanted(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    return sum_to(jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, like.shape)), like)


def _sink_weights(call: Call, given: LinearPass) -> jax.Array:
    """(batch..., N, T)"""
    assert call.inputs.sinks is not None
    return jnp.exp(call.inputs.sinks[..., None] - given.lse)


def _of_rows(call: Call, given: LinearPass, like: jax.ShapeDtypeStruct) -> jax.Array:
    z, mask, dtype = call.sizes, call.inputs.mask, accumulation_dtype(call.inputs.query.dtype)
    cotangents = given.operands
    rows = cotangents["lse"].astype(dtype) if "lse" in cotangents else jnp.zeros((1,) * (len(z.batch) + 2), dtype)
    if call.inputs.sinks is not None:
        rows += _sink_weights(call, given) * given.delta(dtype)
    if mask.key_start is not None and mask.key_stop is not None:
        has_key = mask.key_start < mask.key_stop
        has_key = has_key.reshape(*has_key.shape[:-1], -1, z.T).any(-2)  # in any block of a ring
        rows = jnp.where(has_key, rows, 0)  # padded rows have none
    if mask.dead is not None:
        rows = jnp.where(mask.dead, 0, rows)
    batch = jnp.broadcast_shapes(z.batch, batch_of(cotangents))
    return sum_to(jnp.broadcast_to(rows, (*batch, z.N, z.T))[..., None], like)
