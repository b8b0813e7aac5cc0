"""From a primitive's operands to a Mosaic GPU kernel: block shapes, and rows that share a key/value head."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._logits import Config, Inputs
from ._masks import Band
from ._mosaic_blocks import forward_blocks
from ._mosaic_forward import forward as forward_kernel

_FEW_ROWS = 64  # of one warpgroup


def forward(config: Config, inputs: Inputs, out_dtype: Any) -> tuple[jax.Array, ...]:
    """As `_kernels.forward`, with out in `out_dtype`."""
    z = inputs.sizes
    if z.G > 1 and z.T * z.G <= _FEW_ROWS and config.dropout is None:
        packed_config, packed = _pack_groups(config, inputs)
        out, *lse = forward(packed_config, packed, out_dtype)
        out = jnp.swapaxes(out.reshape(*z.batch, z.T, z.G, z.K, z.D), -2, -3)
        return (out, *(jnp.swapaxes(x.reshape(*z.batch, z.K, z.T, z.G), -1, -2) for x in lse))
    scores = [x for x in (inputs.bias, inputs.mask.allowed) if x is not None and 1 not in x.shape[-2:]]
    score_bytes = sum(1 if x.dtype == bool else min(4, np.dtype(x.dtype).itemsize) for x in scores)
    blocks = forward_blocks(z, score_bytes, has_dropout=config.dropout is not None)
    return forward_kernel(config, inputs, blocks, out_dtype)


def _pack_groups(config: Config, inputs: Inputs) -> tuple[Config, Inputs]:
    """The query heads of a group as further rows (t, g) of one head: with few rows, a block then reads keys once."""
    z, mask = inputs.sizes, inputs.mask

    def rows(x: jax.Array | None, trailing: int) -> jax.Array | None:
        """(..., K, G, T, trailing axes) -> (..., K, 1, T * G, trailing axes); G and T may both be 1."""
        if x is None:
            return None
        group, row = x.ndim - trailing - 2, x.ndim - trailing - 1
        if x.shape[group] == x.shape[row] == 1:
            return x
        shape = list(x.shape)
        shape[group], shape[row] = z.G, z.T
        x = jnp.swapaxes(jnp.broadcast_to(x, shape), group, row)
        return x.reshape(*shape[:group], 1, z.T * z.G, *shape[row + 1 :])

    query = jnp.moveaxis(inputs.query, -2, -3).reshape(*inputs.query.shape[:-4], z.T * z.G, z.K, 1, z.H)
    start, stop = mask.key_start, mask.key_stop
    if start is None and config.band != Band():
        ones = (1,) * (len(z.batch) + 2)
        start, stop = (jnp.asarray(x).reshape(*ones, z.T) for x in config.band.intervals(z.T, z.S))
    packed_mask = mask._replace(
        key_start=rows(start, 0), key_stop=rows(stop, 0), allowed=rows(mask.allowed, 1), dead=rows(mask.dead, 0)
    )
    packed = inputs._replace(query=query, bias=rows(inputs.bias, 1), mask=packed_mask)
    return replace(config, band=Band()), packed
