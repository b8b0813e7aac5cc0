"""Launch of the forward kernel; of results over splits of the keys, their combination."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs
from ..protocol import Forward
from .blocks import Blocks
from .device.forward import kernel
from .device.units import NO_KEY
from .host.forward_plan import ForwardOuts, ForwardPlan
from .host.operands import prepare
from .host.tf32 import forward_products
from .pallas import TmaLoad, launch, pad_axis, round_up


def forward(config: Config, inputs: Inputs, sinks: jax.Array | None, blocks: Blocks, cores: int) -> Forward:
    """As `select.forward`, on so many multiprocessors. `sinks`: (batch..., N, T or 1), in place of the inputs'."""
    if blocks.splits == 1:
        is_rounded = config.rounds_out or inputs.query.dtype == jnp.float32  # the same, of float32
        results = _split_forward(
            config,
            inputs,
            sinks,
            blocks,
            cores,
            needs_out=is_rounded or config.adds_rounded,
            needs_unrounded=not is_rounded,
            needs_lse=config.needs_lse,
        )
        wanted = (
            results.out if is_rounded else results.unrounded,
            results.lse,
            results.max_logits,
            results.out if config.adds_rounded else None,
        )
        out, lse, max_logits, rounded = (None if x is None else x[0] for x in wanted)
        assert out is not None
        return Forward(out, lse, max_logits, rounded)
    results = _split_forward(config, inputs, None, blocks, cores, needs_out=False, needs_unrounded=True, needs_lse=True)
    out, lse = _combine(results, sinks)
    rounded = out.astype(inputs.query.dtype)
    return Forward(
        rounded if config.rounds_out else out,
        lse if config.needs_lse else None,
        None if results.max_logits is None else results.max_logits.max(0),
        rounded if config.adds_rounded else None,
    )


def _combine(splits: ForwardOuts, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Out and lse over all splits: the means of the splits' outputs, weighted by their sums of exponentials.

    `sinks`, (batch..., N, T or 1), count once.
    """
    # A row without keys in a split has the lowest lse there, and no weight; without any, zeros as without splits.
    out, lse = splits.unrounded, splits.lse
    assert out is not None
    assert lse is not None
    top = largest = lse.max(0, keepdims=True)
    sinks = None if sinks is None else sinks[None]
    if sinks is not None:
        top = jnp.maximum(largest, sinks)
    weights = jnp.exp(lse - top)
    total = weights.sum(0, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    has_key = largest > NO_KEY
    factors = jnp.where(has_key, weights / total, 0.0)
    lse = jnp.where(has_key, top + jnp.log(total), 0.0 if sinks is None else sinks)
    return (out * jnp.swapaxes(factors, -1, -2)[..., None]).sum(0), lse[0]


def _split_forward(
    config: Config, inputs: Inputs, sinks: jax.Array | None, blocks: Blocks, cores: int, **wanted: bool
) -> ForwardOuts:
    """Results over each split of the tiles; `wanted` as of `ForwardPlan`."""
    z = inputs.sizes
    tma, value_tma = (TmaLoad(columns, inputs.query.dtype) for columns in (z.H, z.D))
    products = forward_products(inputs, tma) if inputs.query.dtype == jnp.float32 else None
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv, tma, value_tma, products=products)
    if sinks is not None:
        operands = replace(operands, sinks=_padded(sinks.astype(jnp.float32), blocks.rows))
    plan = ForwardPlan.make(config, inputs, operands, blocks, cores, needs_max_logits=config.needs_max_logits, **wanted)
    results = launch(
        functools.partial(kernel, plan),
        operands,
        out_types=plan.out_types(),
        scratch=plan.buffers(operands),
        grid={"worker": plan.scheduler.workers},
        warpgroups=blocks.warpgroups + 1,
    )
    out, unrounded, lse, max_logits = results.out, results.unrounded, results.lse, results.max_logits
    return ForwardOuts(
        None if out is None else out[..., : z.T, :, :],
        None if unrounded is None else unrounded[..., : z.T, :, :],
        None if lse is None else lse[..., : z.T],
        None if max_logits is None else max_logits[..., : z.T],
    )


def _padded(sinks: jax.Array, rows: int) -> jax.Array:
    """One for each row: to whole blocks of rows."""
    return sinks if sinks.shape[-1] == 1 else pad_axis(sinks, -1, round_up(sinks.shape[-1], rows))
