"""From the operands of a cotangent to the kernels that compute it."""

from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, sum_to
from ..protocol import LinearPass
from .device.dbias import dbias
from .device.dkey_dvalue import dkey_dvalue
from .device.dquery import dquery
from .host.backward import Backward, make_backward
from .host.operands import unflat
from .plan import BackwardBlocks, products_precision


def cotangent(call: Call, given: LinearPass, blocks: BackwardBlocks, interpret: Any) -> dict[str, jax.Array]:
    """See `select.cotangent`."""
    wanted, backward = given.wanted, make_backward(call, given)
    batch, precision = backward.sizes.batch, products_precision(call)
    results: dict[str, jax.Array] = {}

    def dtype_of(name: str) -> Any:
        """What is summed over batch axes is not rounded before."""
        return wanted[name].dtype if wanted[name].shape[:-3] == batch else jnp.float32

    def rows_first(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(unflat(x, batch), -2, -3)

    if "query" in wanted or "scale" in wanted:
        with_scale = "scale" in wanted
        dtype = dtype_of("query") if "query" in wanted else jnp.float32
        rows = dquery(backward, blocks.dquery, dtype, precision, interpret, with_scale=with_scale)
        results["query"] = rows_first(rows.pop("query"))
        if with_scale:
            results["scale"] = _of_scale(backward, given, {name: unflat(x, batch) for name, x in rows.items()})
    keys = {name: dtype_of(name) for name in ("key", "value") if name in wanted}
    if keys:
        found = dkey_dvalue(backward, blocks.dkey_dvalue, keys, precision, interpret)
        results |= {name: rows_first(x) for name, x in found.items()}
    if "bias" in wanted and blocks.dbias is not None:
        results["bias"] = dbias(backward, blocks.dbias, wanted["bias"], precision, interpret)
    return {name: sum_to(results[name], like) for name, like in wanted.items()}


def _of_scale(backward: Backward, given: LinearPass, moments: dict[str, jax.Array]) -> jax.Array:
    """The gradient of scale, (batch...): see docs/design.md."""
    dz_x, dz, p_x, p = (moments[name][..., 0, :] for name in ("dz_x", "dz", "p_x", "p"))
    mean = p_x / jnp.maximum(p, jnp.finfo(jnp.float32).tiny)
    # The dz of a row add up to the cotangent of its lse, but for the error of delta, which so drops out.
    excess = dz - given.operands["lse"].astype(jnp.float32) if "lse" in given.operands else dz
    sinks = backward.call.inputs.sinks
    if sinks is not None:
        # With a sink, they and its own do, -p delta.
        excess = excess - jnp.exp(sinks[..., None] - backward.lse) * backward.delta
    return (dz_x - excess * mean).sum((-1, -2))
