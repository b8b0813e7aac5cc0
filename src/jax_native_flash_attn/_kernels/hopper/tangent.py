"""From the operands of a tangent to the Mosaic GPU kernel that computes it, and its launch."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, Inputs, sum_to
from ..protocol import LinearPass
from .backward_blocks import tangent_blocks
from .blocks import Blocks
from .cotangent import is_even
from .device import tangent as tangent_kernel
from .host.head_dims import pad_head_dim, pad_head_dims
from .host.operands import term_bytes
from .host.tangent_plan import Tangent, TangentOuts, TangentPlan
from .pallas import launch


def tangent(call: Call, given: LinearPass, asked: Blocks | None, cores: int) -> dict[str, jax.Array]:
    """See `select.tangent`. `asked`: blocks in place of those that `plan` chooses."""
    config, inputs, dtype = call.config, call.inputs, call.inputs.query.dtype
    blocks = asked or plan(inputs, dbias_type=given.operands.get("bias"))
    batch = jnp.broadcast_shapes(inputs.sizes.batch, given.batch)
    tangents = {
        name: pad_head_dim(x.astype(dtype)) if name in ("query", "key", "value") else x
        for name, x in given.operands.items()
    }
    padded = pad_head_dims(inputs)
    kernel_call = Tangent(
        config,
        padded,
        replace(padded.sizes, batch=batch),
        tangents,
        pad_head_dim(given.out.astype(jnp.float32)),
        given.lse.astype(jnp.float32),
    )
    rounds = config.rounds_out and config.has_all_keys  # in the end: see `Config`
    results = _launch(kernel_call, blocks, dtype if rounds else jnp.float32, cores)
    z = inputs.sizes
    dlse = jnp.zeros((*batch, z.N, z.T), jnp.float32) if results.lse is None else results.lse[..., : z.T]
    by_name = {"out": results.out[..., : z.T, :, : z.D], "lse": dlse}
    return {name: sum_to(by_name[name], like).astype(like.dtype) for name, like in given.wanted.items()}


def _launch(call: Tangent, blocks: Blocks, out_dtype: jax.typing.DTypeLike, cores: int) -> TangentOuts:
    plan = TangentPlan.make(call, blocks, out_dtype, cores)
    operands = plan.operands(call)
    return launch(
        functools.partial(tangent_kernel.kernel, plan),
        operands,
        out_types=plan.out_types(operands),
        scratch=plan.buffers(operands),
        grid={"worker": plan.scheduler.workers},
        warpgroups=blocks.warpgroups + 1,
    )


def plan(inputs: Inputs, dbias_type: jax.Array | None = None) -> Blocks:
    """The block shapes of `tangent`; of arrays the types suffice."""
    inputs = jax.eval_shape(pad_head_dims, inputs)
    without_mask = inputs._replace(bias=dbias_type, mask=inputs.mask._replace(allowed=None))
    return tangent_blocks(inputs.sizes, term_bytes(inputs) + term_bytes(without_mask), is_even=is_even(inputs))
