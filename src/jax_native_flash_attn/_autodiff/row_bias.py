"""The gradient of a bias without a key axis, which needs no kernel."""

import jax
import jax.numpy as jnp

from .._kernels import select
from .._kernels.protocol import LinearPass, Target
from .._semantics.call import Call, batch_of, sum_to
from .._semantics.numerics import accumulation_dtype


def cotangent(call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
    """As `select.cotangent`, with such a bias among what is wanted or not."""
    like = given.wanted.get("bias")
    if like is None or like.shape[-1] > 1:
        return select.cotangent(call, given, target)
    dbias = {"bias": _of_rows(call, given, like)}
    others = {name: like for name, like in given.wanted.items() if name != "bias"}
    return dbias | select.cotangent(call, given._replace(wanted=others), target) if others else dbias


def _of_rows(call: Call, given: LinearPass, like: jax.ShapeDtypeStruct) -> jax.Array:
    """It changes no weight, since they add up to 1, but shifts lse: sum_s dz_ts = dl_t."""
    z, mask, dtype = call.sizes, call.inputs.mask, accumulation_dtype(call.inputs.query.dtype)
    cotangents = given.operands
    rows = cotangents["lse"].astype(dtype) if "lse" in cotangents else jnp.zeros((1,) * (len(z.batch) + 2), dtype)
    if mask.key_start is not None and mask.key_stop is not None:
        rows = jnp.where(mask.key_start < mask.key_stop, rows, 0)  # padded rows have no key
    if mask.dead is not None:
        rows = jnp.where(mask.dead, 0, rows)
    batch = jnp.broadcast_shapes(z.batch, batch_of(cotangents))
    return sum_to(jnp.broadcast_to(rows, (*batch, z.N, z.T))[..., None], like)
