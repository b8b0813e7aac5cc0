"""What the backward kernels share: one call of them, and what they read of each query row."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ...._semantics.call import Config, Inputs
from ...._semantics.numerics import LOG2E
from ...._semantics.sizes import Sizes
from ..operands import RowOperands
from ..pallas import TmaLoad, pad_axis, round_up
from .tf32 import BackwardProducts

_NO_WEIGHT = 1e30
_SHORT = 1 << 15  # scores of a head


@dataclass(frozen=True)
class Backward:
    """One call of the backward; any batch axis of any array may have size 1 and then broadcasts.

    Attributes:
      sizes: with the batch axes that all arrays broadcast to.
      dout: (batch..., T, N, D) in query's dtype.
      lse, delta: (batch..., N, T) in float32.
      products: of float32, operands of products in place of those of `inputs`, and of dout.
    """

    config: Config
    inputs: Inputs
    sizes: Sizes
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array
    products: BackwardProducts | None = None

    def row_operands(self, block_rows: int, dout_tma: TmaLoad, *, drops_dead_rows: bool = False) -> RowOperands:
        """As the kernels read them: vectors to whole blocks (TMA clips matrices only).

        lse is in base 2, but with bias, mask or `score_mod` in base e, as are the logits that it is subtracted from. Of
        short calls it is in base e too, and the kernel scales it: a launch less, but in the kernel up to 4% of longer
        calls.

        Rows past the last get an lse for which all weights are zero: they must not be infinite, whatever the bias.
        So do dead rows, whose logits are constant, for kernels that want dz alone (values get a gradient from them).
        """
        dead = self.inputs.mask.dead if drops_dead_rows else None
        lse, scales_lse = prepare_lse(self.config, self.inputs, self.lse, block_rows, dead)
        T, padded = self.sizes.T, round_up(self.sizes.T, block_rows)
        return RowOperands(
            self.products.dout if self.products else pad_axis(self.dout, -3, round_up(T, dout_tma.multiple)),
            lse,
            pad_axis(self.delta, -1, padded),
            scales_lse=scales_lse,
        )

    def in_parts(self, parts: int) -> "Backward":
        """The same call, each group of query heads in so many parts that have their keys to themselves."""

        def repeated(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, parts, axis=-2)

        z, inputs, products = self.sizes, self.inputs, self.products
        inputs = inputs._replace(key=repeated(inputs.key), value=repeated(inputs.value))
        if products is not None:
            forward = products.forward
            forward = forward._replace(key=repeated(forward.key), value=repeated(forward.value))
            products = replace(products, forward=forward)
        sizes = replace(z, K=z.K * parts, G=z.G // parts)
        return replace(self, inputs=inputs, sizes=sizes, products=products)


def prepare_lse(
    config: Config, inputs: Inputs, lse: jax.Array, block_rows: int, dead: jax.Array | None = None
) -> tuple[jax.Array, bool]:
    """As `Backward.row_operands` says, without weights in `dead` rows; and whether the kernel is to scale it."""
    has_terms = inputs.bias is not None or inputs.mask.allowed is not None or config.score_mod is not None
    is_short = inputs.sizes.T * inputs.sizes.S <= _SHORT
    lse = lse if has_terms or is_short else lse * LOG2E
    lse = lse if dead is None else jnp.where(dead, _NO_WEIGHT, lse)
    return pad_axis(lse, -1, round_up(inputs.sizes.T, block_rows), _NO_WEIGHT), is_short and not has_terms
