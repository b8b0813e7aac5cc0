"""The weights of a tile and the cotangent of its logits, which all backward kernels compute.

Notation of `xla/forward.py`: z the logits, p = exp(z - lse) the weights, c = keep / (1 - rate) the dropout factor, and

    delta_t = do_t . out_t - dl_t        dz_ts = p_ts (c_ts do_t . v_s - delta_t)

Inside a soft cap, z = c tanh(x / c) for once, the cotangent of x is dz (1 - (z / c)^2), and that of y, where a
`score_mod` gives x = F(y), F'(y) times that.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...._semantics.numerics import LOG2E
from ..operands import RowOperands
from .changes import changed
from .context import KernelContext
from .logits import TileLogits
from .terms import RowVectors, TileTerms
from .units import to_base_2


@dataclass(frozen=True)
class BackwardContext(KernelContext):
    row_operands: RowOperands


def scaled_lse(rows: RowOperands, lse: jax.Array) -> jax.Array:
    """What `softmax_weights` takes, of lse as it is read."""
    return lse * LOG2E if rows.scales_lse else lse


class Weights(NamedTuple):
    """p of a tile before dropout, and that times the derivative of `changed`, or itself where that is 1."""

    p: jax.Array
    through: jax.Array

    def where(self, allowed: jax.Array) -> "Weights":
        """Elsewhere 0."""
        p = jnp.where(allowed, self.p, 0.0)
        return Weights(p, p if self.through is self.p else jnp.where(allowed, self.through, 0.0))


def softmax_weights(
    logits: TileLogits,
    products: Any,
    terms: TileTerms,
    rows: RowVectors,
    tile: Any,
    row_lse: jax.Array,
    masked: Any,
) -> Weights:
    """Of a tile, from its products q . k, `prepared` or not."""
    row_factor = None
    if logits.has_terms and not logits.is_transposed:
        row_factor = logits.of_rows(to_base_2(row_lse))
        row_lse = row_lse * to_base_2(row_lse)
    lse = logits.of_rows(row_lse)

    def exponents(x: jax.Array, factor: Any) -> jax.Array:
        if row_factor is not None:
            return x * row_factor - lse
        if logits.has_terms:
            # Subtracted before it is scaled, which is as exact (`to_base_2`): a factor for each row would take as many
            # registers as lse, which are many where rows of queries lie along the columns.
            return (x - lse) * factor
        return (x if factor is None else x * factor) - lse

    x, terms, multiplier, slope = changed(logits, products, terms, rows, tile, logits.scale * LOG2E)
    p = jnp.exp2(logits(x, terms, rows, tile, multiplier, masked, exponents))
    through = p if logits.config.logits_soft_cap is None else p * (1.0 - x * x)
    # Where there is no weight, as in padding, a derivative need not be finite.
    return Weights(p, through if slope is None else jnp.where(p > 0, through * slope, 0.0))


def logits_cotangent(
    logits: TileLogits, weights: jax.Array, dweights: jax.Array, rows: RowVectors, tile: Any, row_delta: jax.Array
) -> jax.Array:
    """dz of a tile, from p and its products do . v; or, from p through `changed`, dz through it.

    It is still to go `through_mask` where there are dead rows or NaN in padding.
    """
    if logits.config.dropout is not None:
        dweights = logits.drop(dweights, rows.row, tile) * logits.rescaling
    return weights * (dweights - logits.of_rows(row_delta))
