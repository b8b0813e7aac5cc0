"""What the backward kernels share: their operands beside `Inputs`, and the cotangent of a tile's logits.

Notation of `kernels.py`: z the logits, p = exp(z - lse) the weights, c = keep / (1 - rate) the dropout factor, and

    delta_t = do_t . out_t - dl_t        dz_ts = p_ts (c_ts do_t . v_s - delta_t)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs
from ..._semantics.numerics import LOG2E
from ..._semantics.sizes import Sizes
from .device.logits import RowVectors, TileLogits, to_base_2
from .device.pallas import Loads, broadcast_index, pad_axis, pl, plgpu, round_up

_NO_WEIGHT = 1e30
_SHORT = 1 << 15  # scores of a head


@dataclass(frozen=True)
class Backward:
    """One call of the backward; any batch axis of any array may have size 1 and then broadcasts.

    Attributes:
      sizes: with the batch axes that all arrays broadcast to.
      dout: (batch..., T, N, H) in query's dtype.
      lse, delta: (batch..., N, T) in float32.
    """

    config: Config
    inputs: Inputs
    sizes: Sizes
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array

    @property
    def _has_scores(self) -> bool:
        return self.inputs.bias is not None or self.inputs.mask.allowed is not None

    @property
    def _is_short(self) -> bool:
        return self.sizes.T * self.sizes.S <= _SHORT

    def base_2_lse(self, lse: jax.Array) -> jax.Array:
        """What `softmax_weights` takes, of lse as the kernels read it."""
        return lse * LOG2E if self._is_short and not self._has_scores else lse

    def arrays(self, block_rows: int, loads: Loads, *, drops_dead_rows: bool = False) -> dict[str, jax.Array]:
        """By name, as the kernels read them: vectors to whole blocks (TMA clips matrices only).

        lse is in base 2, but with bias or mask in base e, as are the logits that it is subtracted from. Of short calls
        it is in base e too, and goes through `base_2_lse`: a launch less, but in the kernel up to 4% of longer calls.

        Rows past the last get an lse for which all weights are zero: they must not be infinite, whatever the bias.
        So do dead rows, whose logits are constant, for kernels that want dz alone (values get a gradient from them).
        """
        dead = self.inputs.mask.dead if drops_dead_rows else None
        lse = self.lse if self._has_scores or self._is_short else self.lse * LOG2E
        lse = lse if dead is None else jnp.where(dead, _NO_WEIGHT, lse)
        T, padded = self.sizes.T, round_up(self.sizes.T, block_rows)
        return {
            "dout": pad_axis(self.dout, -3, round_up(T, loads.multiple)),
            "lse": pad_axis(lse, -1, padded, _NO_WEIGHT),
            "delta": pad_axis(self.delta, -1, padded),
        }


def row_slice(ref: Any, head: tuple, row: Any, count: int) -> Any:
    """Of lse or delta."""
    return ref.at[(*broadcast_index(head, ref.shape[:-1]), pl.ds(row, count))]


def zeros(*shape: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def softmax_weights(
    logits: TileLogits,
    products: jax.Array,
    scores: dict[str, jax.Array],
    rows: RowVectors,
    tile: Any,
    row_lse: jax.Array,
    masked: Any,
) -> jax.Array:
    """p of a tile before dropout, from its products q . k."""
    row_factor = None
    if logits.has_scores and not logits.is_transposed:
        row_factor = logits.of_rows(to_base_2(row_lse))
        row_lse = row_lse * to_base_2(row_lse)
    lse = logits.of_rows(row_lse)

    def exponents(x: jax.Array, factor: Any) -> jax.Array:
        if row_factor is not None:
            return x * row_factor - lse
        if logits.has_scores:
            # Subtracted before it is scaled, which is as exact (`to_base_2`): a factor for each row would take as many
            # registers as lse, which are many where rows of queries lie along the columns.
            return (x - lse) * factor
        return (x if factor is None else x * factor) - lse

    return jnp.exp2(logits(products, scores, rows, tile, logits.scale * LOG2E, masked, exponents))


def logits_cotangent(
    logits: TileLogits, weights: jax.Array, dweights: jax.Array, rows: RowVectors, tile: Any, row_delta: jax.Array
) -> jax.Array:
    """dz of a tile, from p and its products do . v.

    It is still to go `through_mask` where there are dead rows or NaN in padding.
    """
    if logits.config.dropout is not None:
        dweights = logits.drop(dweights, rows.row, tile) * logits.rescaling
    return weights * (dweights - logits.of_rows(row_delta))
