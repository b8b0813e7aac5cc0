"""From the operands of a cotangent to the Mosaic GPU kernels that compute it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs, sum_to
from ..._semantics.sizes import Sizes
from .backward import dbias, dkey_dvalue, dquery
from .blocks import Blocks, Chip, dbias_blocks, dkey_dvalue_blocks, dquery_blocks
from .host.backward import Backward
from .host.dkey_dvalue_plan import KeyGradients
from .host.operands import kind_of, term_bytes
from .operands import TermKind

Shapes = Mapping[str, jax.ShapeDtypeStruct]

_MOST_COLUMNS = 256  # of the gradients of key and value that a warpgroup's registers hold, beside scores


def cotangent(
    config: Config,
    inputs: Inputs,
    out: jax.Array,
    lse: jax.Array,
    cotangents: Mapping[str, jax.Array],
    wanted: Shapes,
    chip: Chip,
) -> dict[str, jax.Array]:
    """See `select.cotangent`."""
    cores, is_even = chip.cores, _is_even(inputs)
    call = _backward(config, inputs, out, lse, cotangents)
    z, tiled_bytes = call.sizes, term_bytes(inputs)
    results: dict[str, jax.Array] = {}
    if "query" in wanted or "scale" in wanted:
        is_summed = "query" in wanted and wanted["query"].shape[:-3] != z.batch
        out_dtype = jnp.float32 if is_summed else inputs.query.dtype
        with_scale = "scale" in wanted
        blocks = dquery_blocks(z, tiled_bytes, with_scale=with_scale, is_even=is_even, is_wide=is_summed)
        rows = dquery(call, blocks, out_dtype, cores, with_scale=with_scale)
        results["query"] = rows.dquery
        if rows.moments is not None:
            dz_x, dz, mean = rows.moments
            # The dz of a row add up to the cotangent of its lse, but for the error of delta, which so drops out.
            excess = dz - cotangents["lse"].astype(jnp.float32) if "lse" in cotangents else dz
            results["scale"] = (dz_x - excess * mean).sum((-1, -2))
    for types in _passes(call, wanted):
        blocks = dkey_dvalue_blocks(z, tiled_bytes, needs_dlogits=types.key is not None, is_even=is_even)
        gradients = dkey_dvalue(call, blocks, types, cores)
        results |= {"key": gradients.key} if gradients.key is not None else {}
        results |= {"value": gradients.value} if gradients.value is not None else {}
    if "bias" in wanted:
        results["bias"] = dbias(call, _dbias_blocks(inputs, z), wanted["bias"])
    return {name: sum_to(results[name], like) for name, like in wanted.items()}


class BackwardPlan(NamedTuple):
    """Block shapes of the kernels for the gradients of query, of key and value, and of a bias, if there is one."""

    dquery: Blocks
    dkey_dvalue: Blocks
    dbias: Blocks | None


def plan(inputs: Inputs) -> BackwardPlan:
    """What `cotangent` takes for all gradients but that of scale; of inputs the types suffice."""
    z, tiled_bytes, is_even = inputs.sizes, term_bytes(inputs), _is_even(inputs)
    return BackwardPlan(
        dquery_blocks(z, tiled_bytes, with_scale=False, is_even=is_even),
        dkey_dvalue_blocks(z, tiled_bytes, needs_dlogits=True, is_even=is_even),
        None if inputs.bias is None else _dbias_blocks(inputs, z),
    )


def _is_even(inputs: Inputs) -> bool:
    """Lengths make items uneven. A boolean mask has intervals too, for its rows without keys."""
    mask = inputs.mask
    return mask.key_value_length is None and (mask.key_start is None or mask.allowed is not None)


def _dbias_blocks(inputs: Inputs, sizes: Sizes) -> Blocks:
    allowed = inputs.mask.allowed
    has_key_mask = allowed is not None and kind_of(allowed) is TermKind.COLUMNS
    return dbias_blocks(sizes, term_bytes(inputs), has_key_mask=has_key_mask)


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


def _passes(call: Backward, wanted: Shapes) -> list[KeyGradients]:
    """The gradients of keys and values that are computed together: those that fit into a warpgroup's registers."""
    key, value = (_kernel_result(call, wanted[name]) if name in wanted else None for name in ("key", "value"))
    if key is None or value is None:
        return [] if key is None and value is None else [KeyGradients(key, value)]
    if key.shape[:-1] == value.shape[:-1] and call.sizes.H + call.sizes.D <= _MOST_COLUMNS:
        return [KeyGradients(key, value)]
    return [KeyGradients(key=key), KeyGradients(value=value)]


def _kernel_result(call: Backward, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A kernel sums over the batch axes that both keys and values lack; the others are left, unrounded."""
    keys = zip(call.inputs.key.shape, call.inputs.value.shape, wanted.shape, call.sizes.batch, strict=False)
    batch = tuple(1 if k == v == w == 1 else n for k, v, w, n in keys)
    if batch == wanted.shape[:-3]:
        return wanted
    return jax.ShapeDtypeStruct((*batch, *wanted.shape[-3:]), jnp.float32)
