"""From a call to the forward kernel, and back to the layout of results."""

from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Call
from ..protocol import Forward
from .blocks import Blocks
from .device.forward import forward as forward_kernel
from .host.operands import unflat
from .plan import products_precision


def forward(call: Call, blocks: Blocks, interpret: Any) -> Forward:
    """See `select.forward`."""
    results = forward_kernel(call, blocks, products_precision(call), interpret)
    batch, dead = call.sizes.batch, call.inputs.mask.dead

    def of(name: str) -> jax.Array | None:
        return unflat(results[name], batch) if name in results else None

    out, rounded, lse, max_logits = (of(name) for name in ("out", "rounded", "lse", "max_logits"))
    assert out is not None
    if max_logits is not None:
        max_logits = max_logits[..., 0, :]
        max_logits = max_logits if dead is None else jnp.where(dead, -jnp.inf, max_logits)
    return Forward(
        jnp.swapaxes(out, -2, -3),
        None if lse is None else lse[..., 0, :],
        max_logits,
        None if rounded is None else jnp.swapaxes(rounded, -2, -3),
    )
