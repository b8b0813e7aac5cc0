"""From a primitive's operands to a Mosaic GPU kernel: block shapes, and rows that share a key/value head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._logits import Config, Inputs
from ._masks import Band
from ._mosaic_blocks import Chip, dkey_dvalue_blocks, dquery_blocks, forward_blocks
from ._mosaic_dkey_dvalue import dkey_dvalue
from ._mosaic_dquery import dquery
from ._mosaic_forward import forward as forward_kernel

_FEW_ROWS = 64  # of one warpgroup
_MAX_BACKWARD_HEAD_DIM = 128  # both gradients of 64 keys fill the registers of a warpgroup


def forward(config: Config, inputs: Inputs, out_dtype: Any, chip: Chip | None = None) -> tuple[jax.Array, ...]:
    """As `_kernels.forward`, with out in `out_dtype`, on `chip` (None: a common one)."""
    z, chip = inputs.sizes, chip or Chip()
    if z.G > 1 and z.T * z.G <= _FEW_ROWS and config.dropout is None:
        packed_config, packed = _pack_groups(config, inputs)
        out, *lse = forward(packed_config, packed, out_dtype, chip)
        out = jnp.swapaxes(out.reshape(*z.batch, z.T, z.G, z.K, z.D), -2, -3).reshape(*z.batch, z.T, z.N, z.D)
        lse = (jnp.swapaxes(x.reshape(*z.batch, z.K, z.T, z.G), -1, -2).reshape(*z.batch, z.N, z.T) for x in lse)
        return (out, *lse)
    scores = [x for x in (inputs.bias, inputs.mask.allowed) if x is not None and 1 not in x.shape[-2:]]
    score_bytes = sum(1 if x.dtype == bool else min(4, np.dtype(x.dtype).itemsize) for x in scores)
    has_dropout, out_bytes = config.dropout is not None, np.dtype(out_dtype).itemsize
    blocks = forward_blocks(z, score_bytes, has_dropout=has_dropout, out_bytes=out_bytes, chip=chip)
    return forward_kernel(config, inputs, blocks, out_dtype, chip.cores)


def cotangent(
    config: Config, inputs: Inputs, out: jax.Array, lse: jax.Array, cotangents: Mapping[str, jax.Array], wanted: Any
) -> dict[str, jax.Array]:
    """As `_kernels.cotangent`, of what `why_not_cotangent` accepts."""
    z, dtype = inputs.sizes, inputs.query.dtype
    length = inputs.mask.key_value_length
    # In padding, NaN would survive a weight of zero (0 * NaN).
    inputs = inputs._replace(key=_without_padding(inputs.key, length), value=_without_padding(inputs.value, length))
    dout = cotangents["out"]
    delta = jnp.swapaxes((dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1), -1, -2)
    if "lse" in cotangents:
        delta -= cotangents["lse"].astype(jnp.float32)
    arguments = dout.astype(dtype), lse.astype(jnp.float32), delta
    results = {}
    if "query" in wanted:
        results["query"] = dquery(config, inputs, dquery_blocks(z), *arguments)
    if "key" in wanted or "value" in wanted:
        gradients = dkey_dvalue(config, inputs, dkey_dvalue_blocks(z), *arguments)
        results |= dict(zip(("key", "value"), gradients, strict=True))
    return {name: results[name] for name in wanted}


def why_not_cotangent(inputs: Inputs, cotangents: Mapping[str, jax.Array], wanted: Any) -> str | None:
    """What the backward kernels lack for these operands."""
    z = inputs.sizes
    if z.H > _MAX_BACKWARD_HEAD_DIM:
        return f"the gradient takes head dimensions up to {_MAX_BACKWARD_HEAD_DIM}, got {z.H}"
    if not set(wanted) <= {"query", "key", "value"} or "out" not in cotangents:
        return f"no kernel for the gradients of {', '.join(wanted)} by {', '.join(cotangents)}"
    if any(x is not None and 1 not in x.shape[-2:] for x in (inputs.bias, inputs.mask.allowed)):
        return "the gradient takes no bias or mask over both T and S"
    arrays = (inputs.query, inputs.key, inputs.value, cotangents["out"], *wanted.values())
    if {x.shape[:-3] for x in arrays} != {z.batch}:
        return "the gradient takes no operands that are shared by a batch"
    return None


def _without_padding(x: jax.Array, length: jax.Array | None) -> jax.Array:
    if length is None:
        return x
    position = jnp.arange(x.shape[-3], dtype=jnp.int32).reshape((1,) * (x.ndim - 3) + (-1, 1, 1))
    return jnp.where((position >= length[..., None, None, None]) & ~jnp.isfinite(x), 0, x)


def _pack_groups(config: Config, inputs: Inputs) -> tuple[Config, Inputs]:
    """The query heads of a group as further rows (t, g) of one head: with few rows, a block then reads keys once."""
    z, mask = inputs.sizes, inputs.mask

    def rows(x: jax.Array | None, trailing: int) -> jax.Array | None:
        """(..., N or 1, T or 1, trailing axes) -> (..., K or 1, T * G or 1, trailing axes)"""
        if x is None or x.shape[x.ndim - trailing - 2 :][:2] == (1, 1):
            return x
        at = x.ndim - trailing - 2
        heads = (1, 1) if x.shape[at] == 1 else (z.K, z.G)
        shape = (*x.shape[:at], *heads, *x.shape[at + 1 :])
        x = jnp.broadcast_to(x.reshape(shape), (*shape[: at + 1], z.G, z.T, *shape[at + 3 :]))
        return jnp.swapaxes(x, at + 1, at + 2).reshape(*shape[: at + 1], z.T * z.G, *shape[at + 3 :])

    grouped = inputs.query.reshape(*inputs.query.shape[:-2], z.K, z.G, z.H)
    query = jnp.moveaxis(grouped, -2, -3).reshape(*inputs.query.shape[:-3], z.T * z.G, z.K, z.H)
    start, stop = mask.key_start, mask.key_stop
    if start is None and config.band != Band():
        # From positions: a table would be a constant, which custom_partitioning does not take.
        row = jnp.arange(z.T, dtype=jnp.int32).reshape((1,) * (len(z.batch) + 1) + (z.T,))
        lower, upper = config.band.lower, config.band.upper
        start = jnp.zeros_like(row) if lower is None else jnp.clip(row + lower, 0, z.S)
        stop = jnp.full_like(row, z.S) if upper is None else jnp.clip(row + upper + 1, 0, z.S)
    packed_mask = mask._replace(
        key_start=rows(start, 0), key_stop=rows(stop, 0), allowed=rows(mask.allowed, 1), dead=rows(mask.dead, 0)
    )
    packed = inputs._replace(query=query, bias=rows(inputs.bias, 1), mask=packed_mask)
    return replace(config, band=Band()), packed
