"""Launch of the forward kernel; of results over splits of the keys, their combination."""

import functools

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs
from .blocks import Blocks
from .device.forward import kernel
from .device.units import NO_KEY
from .host.forward_plan import ForwardOuts, ForwardPlan
from .host.operands import prepare
from .pallas import TmaLoad, launch


def forward(config: Config, inputs: Inputs, blocks: Blocks, cores: int) -> tuple[jax.Array, ...]:
    """As `select.forward`, on so many multiprocessors."""
    if blocks.splits == 1:
        results = _split_forward(
            config,
            inputs,
            blocks,
            cores,
            needs_out=config.rounds_out or config.adds_rounded,
            needs_unrounded=not config.rounds_out,
            needs_lse=config.needs_lse,
        )
        wanted = (
            results.out if config.rounds_out else results.unrounded,
            *([results.lse] if config.needs_lse else []),
            *([results.out] if config.adds_rounded else []),
        )
        return tuple(x[0] for x in wanted if x is not None)
    results = _split_forward(config, inputs, blocks, cores, needs_out=False, needs_unrounded=True, needs_lse=True)
    out, lse = _combine(results)
    rounded = out.astype(inputs.query.dtype)
    return (
        rounded if config.rounds_out else out,
        *([lse] if config.needs_lse else []),
        *([rounded] if config.adds_rounded else []),
    )


def _combine(splits: ForwardOuts) -> tuple[jax.Array, jax.Array]:
    """Out and lse over all splits: the means of the splits' outputs, weighted by their sums of exponentials."""
    # A row without keys in a split has the lowest lse there, and no weight; without any, zeros as without splits.
    out, lse = splits.unrounded, splits.lse
    assert out is not None
    assert lse is not None
    top = lse.max(0, keepdims=True)
    weights = jnp.exp(lse - top)
    total = weights.sum(0, keepdims=True)
    has_key = top > NO_KEY
    factors = jnp.where(has_key, weights / total, 0.0)
    lse = jnp.where(has_key, top + jnp.log(total), 0.0)
    return (out * jnp.swapaxes(factors, -1, -2)[..., None]).sum(0), lse[0]


def _split_forward(config: Config, inputs: Inputs, blocks: Blocks, cores: int, **wanted: bool) -> ForwardOuts:
    """Results over each split of the tiles; `wanted` as of `ForwardPlan`."""
    z = inputs.sizes
    tma, value_tma = (TmaLoad(columns, inputs.query.dtype) for columns in (z.H, z.D))
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv, tma, value_tma)
    plan = ForwardPlan.make(config, inputs, operands, blocks, cores, **wanted)
    results = launch(
        functools.partial(kernel, plan),
        operands,
        out_types=plan.out_types(),
        scratch=plan.buffers(operands),
        grid={"worker": plan.scheduler.workers},
        warpgroups=blocks.warpgroups + 1,
    )
    out, unrounded, lse = results.out, results.unrounded, results.lse
    return ForwardOuts(
        None if out is None else out[..., : z.T, :, :],
        None if unrounded is None else unrounded[..., : z.T, :, :],
        None if lse is None else lse[..., : z.T],
    )
