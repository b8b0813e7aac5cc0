"""From the operands of a cotangent to the Mosaic GPU kernels that compute it."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs, sum_to
from .backward import Backward
from .blocks import Chip, dbias_blocks, dkey_dvalue_blocks, dquery_blocks
from .dbias import dbias
from .dkey_dvalue import dkey_dvalue
from .dquery import dquery
from .operands import score_bytes

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def cotangent(
    config: Config,
    inputs: Inputs,
    out: jax.Array,
    lse: jax.Array,
    cotangents: Mapping[str, jax.Array],
    wanted: Shapes,
    chip: Chip | None = None,
) -> dict[str, jax.Array]:
    """As `xla.kernels.cotangent`, on `chip` (None: a common one)."""
    cores, mask = (chip or Chip()).cores, inputs.mask
    # Lengths make items uneven. A boolean mask has intervals too, for its rows without keys.
    is_even = mask.key_value_length is None and (mask.key_start is None or mask.allowed is not None)
    call = _backward(config, inputs, out, lse, cotangents)
    z, tiled_bytes = call.sizes, score_bytes(inputs)
    results: dict[str, jax.Array] = {}
    if "query" in wanted or "scale" in wanted:
        is_summed = "query" in wanted and wanted["query"].shape[:-3] != z.batch
        out_dtype = jnp.float32 if is_summed else inputs.query.dtype
        with_scale = "scale" in wanted
        blocks = dquery_blocks(z, tiled_bytes, with_scale=with_scale, is_even=is_even)
        results["query"], *moments = dquery(call, blocks, out_dtype, cores, with_scale=with_scale)
        if moments:
            dz_x, dz, mean = moments
            # The dz of a row add up to the cotangent of its lse, but for the error of delta, which so drops out.
            excess = dz - cotangents["lse"].astype(jnp.float32) if "lse" in cotangents else dz
            results["scale"] = (dz_x - excess * mean).sum((-1, -2))
    for shapes in _passes(call, wanted):
        blocks = dkey_dvalue_blocks(z, tiled_bytes, needs_dlogits="key" in shapes, is_even=is_even)
        results |= dkey_dvalue(call, blocks, shapes, cores)
    if "bias" in wanted:
        allowed = mask.allowed
        has_key_mask = allowed is not None and allowed.shape[-2] == 1
        results["bias"] = dbias(call, dbias_blocks(z, tiled_bytes, has_key_mask=has_key_mask), wanted["bias"])
    return {name: sum_to(results[name], like) for name, like in wanted.items()}


def _backward(
    config: Config, inputs: Inputs, out: jax.Array, lse: jax.Array, cotangents: Mapping[str, jax.Array]
) -> Backward:
    z, dtype = inputs.sizes, inputs.query.dtype
    if "out" in cotangents:
        dout = cotangents["out"]
        delta = jnp.swapaxes((dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1), -1, -2)
    else:
        dout, delta = jnp.zeros(out.shape, dtype), jnp.zeros(lse.shape, jnp.float32)
    if "lse" in cotangents:
        delta = delta - cotangents["lse"].astype(jnp.float32)
    batch = jnp.broadcast_shapes(z.batch, dout.shape[:-3], delta.shape[:-2], lse.shape[:-2])
    return Backward(config, inputs, replace(z, batch=batch), dout.astype(dtype), lse.astype(jnp.float32), delta)


def _passes(call: Backward, wanted: Shapes) -> list[Shapes]:
    """The gradients of keys and values that are computed together: at 128 columns both fill a warpgroup's registers."""
    shapes = {name: _kernel_result(call, wanted[name]) for name in ("key", "value") if name in wanted}
    same_batch = len({x.shape for x in shapes.values()}) == 1
    return [shapes] if same_batch and call.sizes.H <= 128 else [{name: x} for name, x in shapes.items()]


def _kernel_result(call: Backward, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A kernel sums over the batch axes that both keys and values lack; the others are left, unrounded."""
    keys = zip(call.inputs.key.shape, call.inputs.value.shape, wanted.shape, call.sizes.batch, strict=False)
    batch = tuple(1 if k == v == w == 1 else n for k, v, w, n in keys)
    if batch == wanted.shape[:-3]:
        return wanted
    return jax.ShapeDtypeStruct((*batch, *wanted.shape[-3:]), jnp.float32)
