"""The kernel for the gradient of query: query rows are resident, keys are streamed.

    each tile   S = Q K^T -> logits -> P = exp2(logits - lse)
                dP = dO V^T -> dS = P (dP - delta) -> gradient += dS K

The first two products of a tile wait for nothing but their operands, so the second is computed beside the exponentials
of the first; the third waits for both. They may be computed for parts of a tile: then less waits in registers.

With the gradient of scale, three sums of each row are kept as well, in 128 parts: see `cotangent.py`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..blocks import Blocks
from ..host.backward import Backward
from ..pallas import LANES, gathered, lane_sums, pltpu, product
from .gradients import gradients
from .kernel import Kernel, Step
from .logits import At, parts_of

_MOMENTS = ("dz_x", "dz", "p_x", "p")


def dquery(
    backward: Backward, blocks: Blocks, out_dtype: Any, precision: Any, interpret: Any, *, with_scale: bool
) -> dict[str, jax.Array]:
    """'query' (batch, N, T, H), and with `with_scale` the sums over a row of `_MOMENTS`, (batch, N, 1, T)."""
    z = backward.sizes
    rows, moments = blocks.resident, _MOMENTS if with_scale else ()

    def begin(step: Step) -> None:
        step.scratch["acc"][...] = jnp.zeros((rows, z.H), jnp.float32)
        for name in moments:
            step.scratch[name][...] = jnp.zeros((rows, LANES), jnp.float32)

    def tile(step: Step, at: At) -> None:
        refs, scratch, dproducts = step.refs, step.scratch, []
        for part in parts_of(at, blocks.part):
            products = product(refs["query"][part.unit, :], refs["key"][part.tile, :], "nt", precision)
            of_part = gradients(
                step.scores,
                part,
                products,
                lambda part=part: product(refs["dout"][part.unit, :], refs["value"][part.tile, :], "nt", precision),
            )
            dproducts.append(of_part.dproducts.astype(refs["key"].dtype))
            if with_scale:
                x = products if of_part.slope is None else products * of_part.slope
                x = x if of_part.visible is None else jnp.where(of_part.visible, x, 0.0)
                p, dz = of_part.weights, of_part.dlogits
                for name, term in zip(moments, (dz * x, dz, p * x, p), strict=True):
                    scratch[name][at.unit, :] += lane_sums(term)
        key = step.scores.without_padding(refs["key"][at.tile, :], at, is_key=True)
        joined = dproducts[0] if len(dproducts) == 1 else jnp.concatenate(dproducts, -1)
        scratch["acc"][at.unit, :] += product(joined, key, "nn", precision)

    def end(step: Step) -> None:
        step.outs["query"][...] = (step.scratch["acc"][...] * step.scores.scale).astype(out_dtype)
        for name in moments:
            total = step.scratch[name][...].sum(-1, keepdims=True)
            step.outs[name][...] = gathered(jnp.broadcast_to(total, (rows, LANES)))

    batch = math.prod(z.batch)
    row_type = jax.ShapeDtypeStruct((batch, z.N, 1, z.T), jnp.float32)
    return Kernel(backward.call, z.batch, blocks, backward.operands(), interpret).run(
        begin=begin,
        tile=tile,
        end=end,
        outputs={
            "query": (jax.ShapeDtypeStruct((batch, z.N, z.T, z.H), out_dtype), "bnt-"),
            **{name: (row_type, "bn-t") for name in moments},
        },
        scratch={
            "acc": pltpu.VMEM((rows, z.H), jnp.float32),
            **{name: pltpu.VMEM((rows, LANES), jnp.float32) for name in moments},
        },
    )
