"""The kernel for the gradients of key and value: keys are resident, query rows are streamed, of all heads of a group.

Scores are transposed, keys along the sublanes: then all four products read their operands as they lie, and the vectors
of the rows (log-sum-exp, delta) run along the lanes as they are in memory.

    each tile   S^T = K Q^T -> logits -> P^T = exp2(logits - lse)     dvalue += P^T dO
                dP^T = V dO^T -> dS^T = P^T (dP^T - delta)            dkey += dS^T Q
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..blocks import Blocks
from ..host.backward import Backward
from ..pallas import pltpu, product
from .gradients import gradients
from .kernel import Kernel, Step
from .logits import At


def dkey_dvalue(
    backward: Backward, blocks: Blocks, out_dtypes: dict[str, Any], precision: Any, interpret: Any
) -> dict[str, jax.Array]:
    """Of 'key' and 'value' those that have a dtype, (batch, K, S, H) and (batch, K, S, D)."""
    z = backward.sizes
    keys, columns = blocks.resident, {"key": z.H, "value": z.D}

    def begin(step: Step) -> None:
        for name in out_dtypes:
            step.scratch[name][...] = jnp.zeros((keys, columns[name]), jnp.float32)

    def tile(step: Step, at: At) -> None:
        refs, scores = step.refs, step.scores
        query, dout = (scores.without_padding(refs[name][at.tile, :], at, is_key=False) for name in ("query", "dout"))
        products = product(refs["key"][at.unit, :], query, "nt", precision)
        of_tile = gradients(scores, at, products, lambda: product(refs["value"][at.unit, :], dout, "nt", precision))
        if "value" in out_dtypes:
            dropped = of_tile.dropped.astype(dout.dtype)
            step.scratch["value"][at.unit, :] += product(dropped, dout, "nn", precision)
        if "key" in out_dtypes:
            step.scratch["key"][at.unit, :] += product(of_tile.dproducts.astype(query.dtype), query, "nn", precision)

    def end(step: Step) -> None:
        for name, dtype in out_dtypes.items():
            total = step.scratch[name][...]
            total = total * step.scores.scale if name == "key" else total
            step.outs[name][...] = total.astype(dtype)

    batch = math.prod(z.batch)
    return Kernel(backward.call, z.batch, blocks, backward.operands(), interpret, streams_rows=True).run(
        begin=begin,
        tile=tile,
        end=end,
        outputs={
            name: (jax.ShapeDtypeStruct((batch, z.K, z.S, columns[name]), dtype), "bks-")
            for name, dtype in out_dtypes.items()
        },
        scratch={name: pltpu.VMEM((keys, columns[name]), jnp.float32) for name in out_dtypes},
    )
