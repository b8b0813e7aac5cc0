"""From the operands of a cotangent to the Mosaic GPU kernels that compute it."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, Config, Inputs, sum_to
from ..protocol import LinearPass
from .backward import dbias, dkey_dvalue, dquery, fused, products
from .backward_blocks import dbias_blocks, dkey_dvalue_blocks, dquery_blocks, fits_both_key_gradients
from .blocks import BackwardBlocks
from .host.backward import Backward
from .host.dkey_dvalue_plan import KeyGradients
from .host.fused_plan import fused_order, makes_all
from .host.head_dims import pad_head_dim, pad_head_dims, padded_type
from .host.operands import kind_of, term_bytes
from .operands import TermKind
from .pallas import cut_last_axis

Shapes = Mapping[str, jax.ShapeDtypeStruct]

_WITH_HEAD_DIM = ("query", "key", "value")


def cotangent(
    call: Call, given: LinearPass, asked: BackwardBlocks | None, cores: int, *, at_once: bool
) -> dict[str, jax.Array]:
    """See `select.cotangent`. `asked`: blocks in place of those that `plan` chooses; `at_once`: as of that."""
    inputs, cotangents = pad_head_dims(call.inputs), given.operands
    wanted = {name: padded_type(x) if name in _WITH_HEAD_DIM else x for name, x in given.wanted.items()}
    backward = _backward(call.config, inputs, given)
    order = (asked or plan(call.config, inputs, cores, at_once=at_once)).fused
    if order is not None and makes_all(inputs, backward.sizes.batch, wanted):
        gradients = fused(backward, order, wanted["query"].dtype, wanted["key"].dtype)
        results = {"query": gradients.query, "key": gradients.key, "value": gradients.value}
    else:
        results = _by_several(call.config, backward, wanted, cotangents, asked, cores, at_once=at_once)
    results = {name: sum_to(results[name], like) for name, like in wanted.items()}
    return {
        name: cut_last_axis(x, given.wanted[name].shape[-1]) if name in _WITH_HEAD_DIM else x
        for name, x in results.items()
    }


def _by_several(
    config: Config,
    backward: Backward,
    wanted: Shapes,
    cotangents: Mapping[str, jax.Array],
    asked: BackwardBlocks | None,
    cores: int,
    *,
    at_once: bool,
) -> dict[str, jax.Array]:
    """By a kernel for the gradient of query, one or two for those of key and value, and one for that of a bias."""
    inputs = backward.inputs
    needs_dquery = "query" in wanted or "scale" in wanted  # one kernel
    if inputs.query.dtype == jnp.float32:
        turned = products(backward, dquery=needs_dquery, dkey="key" in wanted, dvalue="value" in wanted)
        backward = replace(backward, products=turned)
    results: dict[str, jax.Array] = {}
    if needs_dquery:
        is_summed = "query" in wanted and wanted["query"].shape[:-3] != backward.sizes.batch
        dtype = inputs.query.dtype
        out_dtype = jnp.dtype(jnp.float32 if is_summed else wanted.get("query", inputs.query).dtype)
        with_scale = "scale" in wanted
        blocks = asked or plan(
            config, inputs, cores, at_once=at_once, with_scale=with_scale, is_wide=out_dtype != dtype
        )
        rows = dquery(backward, blocks.dquery, out_dtype, cores, with_scale=with_scale)
        results["query"] = rows.dquery
        if rows.moments is not None:
            dz_x, dz, mean = rows.moments
            # The dz of a row add up to the cotangent of its lse, but for the error of delta, which so drops out.
            excess = dz - cotangents["lse"].astype(jnp.float32) if "lse" in cotangents else dz
            if inputs.sinks is not None:
                # With a sink, they and its own do, -p delta.
                excess = excess - jnp.exp(inputs.sinks[..., None] - backward.lse) * backward.delta
            results["scale"] = (dz_x - excess * mean).sum((-1, -2))
    for types in _passes(backward, wanted):
        needed = {"needs_key": types.key is not None, "needs_value": types.value is not None}
        blocks = asked or plan(config, inputs, cores, at_once=at_once, **needed)
        gradients = dkey_dvalue(backward, blocks.dkey_dvalue, types, cores)
        results |= {"key": gradients.key} if gradients.key is not None else {}
        results |= {"value": gradients.value} if gradients.value is not None else {}
    if "bias" in wanted and (tiles := (asked or plan(config, inputs, cores, at_once=at_once)).dbias) is not None:
        results["bias"] = dbias(backward, tiles, wanted["bias"])
    return results


def plan(
    config: Config,
    inputs: Inputs,
    cores: int,
    *,
    at_once: bool,
    with_scale: bool = False,
    is_wide: bool = False,
    needs_key: bool = True,
    needs_value: bool | None = None,
) -> BackwardBlocks:
    """The block shapes of `cotangent`; of inputs the types suffice.

    `at_once`: whether so many blocks of threads as there are multiprocessors are sure to run at once. `with_scale`: for
    the gradient of scale, too. `is_wide`: for that of query in float32, of 16 bits. `needs_key`, `needs_value`: for
    those that are computed together; None: for that of value if it fits beside that of key.
    """
    inputs = jax.eval_shape(pad_head_dims, inputs)
    z, tiled_bytes, even, itemsize = inputs.sizes, term_bytes(inputs), is_even(inputs), inputs.query.dtype.itemsize
    if needs_value is None:
        needs_value = fits_both_key_gradients(z, itemsize)
    allowed = inputs.mask.allowed
    has_key_mask = allowed is not None and kind_of(allowed) is TermKind.COLUMNS
    return BackwardBlocks(
        dquery_blocks(z, tiled_bytes, with_scale=with_scale, is_even=even, is_wide=is_wide, itemsize=itemsize),
        dkey_dvalue_blocks(
            z, tiled_bytes, needs_key=needs_key, needs_value=needs_value, is_even=even, itemsize=itemsize
        ),
        None if inputs.bias is None else dbias_blocks(z, tiled_bytes, has_key_mask=has_key_mask, itemsize=itemsize),
        fused_order(config, inputs, cores, at_once=at_once),
    )


def is_even(inputs: Inputs) -> bool:
    """Lengths make items uneven. A boolean mask has intervals too, for its rows without keys; a band may be moved."""
    mask = inputs.mask
    is_traced = mask.key_start is not None and mask.allowed is None and mask.shift is None
    return mask.key_value_length is None and not is_traced


def _backward(config: Config, inputs: Inputs, given: LinearPass) -> Backward:
    """`inputs` with the head dimensions of the kernels, all else with those of the call."""
    z, dtype, delta = inputs.sizes, inputs.query.dtype, given.delta(jnp.float32)
    dout = given.operands["out"] if "out" in given.operands else jnp.zeros(given.out.shape, dtype)
    batch = jnp.broadcast_shapes(z.batch, dout.shape[:-3], delta.shape[:-2], given.lse.shape[:-2])
    return Backward(
        config, inputs, replace(z, batch=batch), pad_head_dim(dout.astype(dtype)), given.lse.astype(jnp.float32), delta
    )


def _passes(call: Backward, wanted: Shapes) -> list[KeyGradients]:
    """The gradients of keys and values that are computed together: those that fit into a warpgroup's registers."""
    key, value = (_kernel_result(call, wanted[name]) if name in wanted else None for name in ("key", "value"))
    if key is None or value is None:
        return [] if key is None and value is None else [KeyGradients(key, value)]
    if key.shape[:-1] == value.shape[:-1] and fits_both_key_gradients(call.sizes, call.inputs.query.dtype.itemsize):
        return [KeyGradients(key, value)]
    return [KeyGradients(key=key), KeyGradients(value=value)]


def _kernel_result(call: Backward, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A kernel sums over the batch axes that both keys and values lack; the others are left, unrounded."""
    keys = zip(call.inputs.key.shape, call.inputs.value.shape, wanted.shape, call.sizes.batch, strict=False)
    batch = tuple(1 if k == v == w == 1 else n for k, v, w, n in keys)
    if batch == wanted.shape[:-3]:
        return wanted
    return jax.ShapeDtypeStruct((*batch, *wanted.shape[-3:]), jnp.float32)
