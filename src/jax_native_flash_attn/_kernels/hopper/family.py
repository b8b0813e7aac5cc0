"""From a primitive's operands to a Mosaic GPU kernel: block shapes, and rows that share a key/value head."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs
from ..._semantics.masks import Band
from ..._semantics.sizes import Sizes
from ..protocol import Forward
from .blocks import Blocks, Chip, forward_blocks
from .forward import forward as forward_kernel
from .host.head_dims import pad_head_dims
from .host.operands import column_bytes, has_bits_alone, starts_with_addend, term_bytes
from .pallas import cut_last_axis

_FEW_ROWS = 64  # of one warpgroup


def forward(config: Config, inputs: Inputs, blocks: Blocks, cores: int) -> Forward:
    """See `select.forward`. `blocks`: as of `plan`."""
    D = inputs.sizes.D
    results = _forward(config, pad_head_dims(inputs), blocks, cores)
    rounded = None if results.rounded is None else cut_last_axis(results.rounded, D)
    return results._replace(out=cut_last_axis(results.out, D), rounded=rounded)


def _forward(config: Config, inputs: Inputs, blocks: Blocks, cores: int) -> Forward:
    z = inputs.sizes
    sinks = None if inputs.sinks is None else inputs.sinks[..., None]
    if not _packs_groups(config, inputs):
        return forward_kernel(config, inputs, sinks, blocks, cores)
    sinks = _packed_rows(z, sinks, 0)
    results = forward_kernel(_packed(config, inputs), _pack_groups(config, inputs), sinks, blocks, cores)

    def of_heads(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(*z.batch, z.T, z.G, z.K, z.D), -2, -3).reshape(*z.batch, z.T, z.N, z.D)

    def of_rows(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(*z.batch, z.K, z.T, z.G), -1, -2).reshape(*z.batch, z.N, z.T)

    return Forward(
        of_heads(results.out),
        None if results.lse is None else of_rows(results.lse),
        None if results.max_logits is None else of_rows(results.max_logits),
        None if results.rounded is None else of_heads(results.rounded),
    )


def plan(config: Config, inputs: Inputs, chip: Chip) -> Blocks:
    """The block shapes of `forward`; of inputs the types suffice."""
    inputs = jax.eval_shape(pad_head_dims, inputs)
    if _packs_groups(config, inputs):
        packed = _packed(config, inputs)
        inputs, config = jax.eval_shape(functools.partial(_pack_groups, config), inputs), packed
    mask = inputs.mask
    has_lengths_alone = config.band == Band(is_complete=True) and mask.shift is None and inputs.bias is None
    return forward_blocks(
        inputs.sizes,
        term_bytes(inputs),
        column_bytes=column_bytes(inputs),
        has_dropout=config.dropout is not None,
        itemsize=inputs.query.dtype.itemsize,
        chip=chip,
        is_masked=not has_lengths_alone and (config.band != Band() or mask.key_start is not None),
        starts_with_addend=starts_with_addend(config, inputs),
        has_bits_alone=has_bits_alone(inputs),
    )


def _packs_groups(config: Config, inputs: Inputs) -> bool:
    z = inputs.sizes
    return z.G > 1 and z.group_rows <= _FEW_ROWS and config.dropout is None and inputs.mods is None


def _packed(config: Config, inputs: Inputs) -> Config:
    """The bands of rows are in the operands then, but for one that is moved."""
    if inputs.mask.shift is not None:
        return replace(config, band=replace(config.band, rows_per_position=inputs.sizes.G))
    return replace(config, band=Band(is_complete=config.band == Band(is_complete=True)))


def _pack_groups(config: Config, inputs: Inputs) -> Inputs:
    """The query heads of a group as further rows (t, g) of one head: with few rows, a block then reads keys once."""
    z, mask = inputs.sizes, inputs.mask
    rows = functools.partial(_packed_rows, z)
    grouped = inputs.query.reshape(*inputs.query.shape[:-2], z.K, z.G, z.H)
    query = jnp.moveaxis(grouped, -2, -3).reshape(*inputs.query.shape[:-3], z.group_rows, z.K, z.H)
    start, stop = mask.key_start, mask.key_stop
    if start is None and config.band != Band():
        # From positions: a table would be a constant, which custom_partitioning does not take.
        row = jnp.arange(z.T, dtype=jnp.int32).reshape((1,) * (len(z.batch) + 1) + (z.T,))
        start, stop = config.band.interval(row, z.S, jnp)
    packed_mask = mask.without_rows()._replace(
        key_start=rows(start, 0),
        key_stop=rows(stop, 0),
        allowed=rows(mask.allowed, 1),
        dead=rows(mask.dead, 0),
        query_ids=rows(mask.query_ids, 1),
        lowest_position=rows(mask.lowest_position, 1),
        highest_position=rows(mask.highest_position, 1),
    )
    return inputs._replace(query=query, bias=rows(inputs.bias, 1), mask=packed_mask)


def _packed_rows(z: Sizes, x: jax.Array | None, trailing: int) -> jax.Array | None:
    """(..., N or 1, T or 1, trailing axes) -> (..., K or 1, T * G or 1, trailing axes)"""
    if x is None or x.shape[x.ndim - trailing - 2 :][:2] == (1, 1):
        return x
    at = x.ndim - trailing - 2
    heads = (1, 1) if x.shape[at] == 1 else (z.K, z.G)
    shape = (*x.shape[:at], *heads, *x.shape[at + 1 :])
    x = jnp.broadcast_to(x.reshape(shape), (*shape[: at + 1], z.G, z.T, *shape[at + 3 :]))
    return jnp.swapaxes(x, at + 1, at + 2).reshape(*shape[: at + 1], z.group_rows, *shape[at + 3 :])
