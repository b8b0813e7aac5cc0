"""Weights of a tile, made again of the log-sum-exp, and the gradient of its logits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .logits import At, Scores


class TileGradients(NamedTuple):
    """Of a tile.

    Attributes:
      weights: p; `dropped`: what dropout leaves of it, rescaled.
      dlogits: the gradient dz of the logits.
      dproducts: that of what a soft cap gets, so of the products times scale and of the bias.
      slope, visible: as of `Logits`.
    """

    weights: jax.Array
    dropped: jax.Array
    dlogits: jax.Array
    dproducts: jax.Array
    slope: jax.Array | None
    visible: jax.Array | None


def gradients(scores: Scores, at: At, products: jax.Array, value_products: Callable[[], jax.Array]) -> TileGradients:
    """`value_products()` are those of the gradient of out and values."""
    logits, slope, visible = scores.logits(products, at)
    weights = jnp.exp2(logits - scores.vector("lse", at))
    keep = scores.keep(at, weights.shape)
    dweights = scores.drop(value_products(), keep)
    dlogits = weights * (dweights - scores.vector("delta", at))
    dproducts = dlogits if slope is None else dlogits * slope
    if visible is not None:
        # What is masked may hold NaN, and rows without keys have logits that are constant.
        dlogits, dproducts = (jnp.where(visible, x, 0.0) for x in (dlogits, dproducts))
        if scores.sums_rows:
            # Behind the last row, so may its log-sum-exp.
            weights = scores.only_of_rows(weights, at)
    return TileGradients(weights, scores.drop(weights, keep), dlogits, dproducts, slope, visible)
