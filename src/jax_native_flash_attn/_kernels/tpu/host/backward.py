"""What the backward kernels share: one call of them, and what they read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ...._semantics.call import Call
from ...._semantics.numerics import LOG2E
from ...._semantics.sizes import Sizes
from ...protocol import LinearPass
from .operands import Operand, flat, with_heads_first


@dataclass(frozen=True)
class Backward:
    """One call of the backward; any batch axis of any array may have size 1 and then broadcasts.

    Attributes:
      sizes: with the batch axes that all arrays broadcast to.
      dout: (batch..., T, N, D) in query's dtype.
      lse, delta: (batch..., N, T) in float32.
    """

    call: Call
    sizes: Sizes
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array

    def operands(self) -> Mapping[str, Operand]:
        inputs = self.call.inputs
        return {
            "query": with_heads_first(inputs.query, "bnt-"),
            "key": with_heads_first(inputs.key, "bks-"),
            "value": with_heads_first(inputs.value, "bks-"),
            "dout": with_heads_first(self.dout, "bnt-"),
            "lse": flat((self.lse * LOG2E)[..., None, :], "bn-t"),
            "delta": flat(self.delta[..., None, :], "bn-t"),
        }


def make_backward(call: Call, given: LinearPass) -> Backward:
    inputs, z, lse, delta = call.inputs, call.sizes, given.lse.astype(jnp.float32), given.delta(jnp.float32)
    dout = given.operands["out"] if "out" in given.operands else jnp.zeros(given.out.shape, inputs.query.dtype)
    batch = jnp.broadcast_shapes(z.batch, dout.shape[:-3], delta.shape[:-2], lse.shape[:-2])
    return Backward(call, replace(z, batch=batch), dout.astype(inputs.query.dtype), lse, delta)
