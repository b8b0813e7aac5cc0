"""What comes between the products of a tile and its masks: `score_mod`, and the soft cap."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...._semantics.numerics import LN2, LOG2E
from ..pallas import iota
from .logits import RowVectors, TileLogits, TileTerms
from .soft_cap import soft_cap


class Changed(NamedTuple):
    """What `TileLogits` takes: products, or tangents of a soft cap; the terms left; what brings them to base 2.

    `slope`: the derivative of `score_mod`, of kernels that need it; None for 1.
    """

    products: jax.Array
    terms: TileTerms
    multiplier: Any
    slope: jax.Array | None


def changed(
    logits: TileLogits, products: jax.Array, terms: TileTerms, rows: RowVectors, tile: Any, multiplier: Any
) -> Changed:
    """Of a tile, whose products come to base 2 by the multiplier; the same, if there is neither."""
    config, slope = logits.config, None
    if config.score_mod is not None and logits.mods is not None:
        scores, slope = logits.mods.score(_scores(logits, products, terms.bias, multiplier), logits.place(rows, tile))
        T, axis = logits.context.sizes.T, logits.q_axis
        if logits.is_transposed and T % logits.block_q:  # rows that are none have no mask, and 0 for their score
            scores = jnp.where(iota(logits.shape, axis) < T - rows.row, scores, 0.0)
        products, terms, multiplier = logits.clipped(scores), terms._replace(bias=None), LOG2E
    cap = config.logits_soft_cap
    if cap is None:
        return Changed(products, terms, multiplier, slope)
    size = 1.0 if not logits.scales_cap else cap if logits.has_terms else cap * LOG2E
    factor = multiplier * (LN2 / cap)
    if terms.bias is not None:
        products, factor = _scores(logits, products, terms.bias, multiplier), 1.0 / cap
    return Changed(soft_cap(products, factor, size), terms._replace(bias=None), cap * LOG2E / size, slope)


def _scores(logits: TileLogits, products: jax.Array, bias: jax.Array | None, multiplier: Any) -> jax.Array:
    """Of products that come to base 2 by the multiplier: in base e, and with the bias."""
    scores = products * (multiplier * LN2)
    return scores if bias is None else scores + logits.clipped(bias)
