"""How attention over parts of the keys combines."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .numerics import accumulation_dtype


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """out (..., T, N, D), in accumulation dtype, and lse (..., T, N) over all keys, from those over each part of them.

    With w_i = exp(lse_i): out = sum_i w_i out_i / sum_i w_i and lse = log sum_i w_i. An lse of -inf is that of a row
    without keys. Without any, out is 0.
    """
    largest = lax.stop_gradient(jnp.stack(lses).max(0))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)  # every part empty
    weights = [jnp.exp(lse - largest) for lse in lses]
    total = sum(weights[1:], weights[0])
    accumulate = accumulation_dtype(outs[0].dtype)
    numerator = [w[..., None] * out.astype(accumulate) for w, out in zip(weights, outs, strict=True)]
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    lse = jnp.where(is_empty, -jnp.inf, largest + jnp.log(total))
    return sum(numerator[1:], numerator[0]) / total[..., None], lse
