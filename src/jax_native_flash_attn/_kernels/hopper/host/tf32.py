"""float32 operands as the tensor cores multiply them, in TensorFloat-32: rounded, and transposed for some products.

They cut off the bits that TensorFloat-32 lacks, which would be a systematic error. And they transpose tiles of 16-bit
elements only: of a product that contracts the rows of an operand, the operand comes transposed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Inputs
from ..operands import TransposedOperands
from ..pallas import TmaLoad, pad_axis, round_up

SWIZZLE = 128  # bytes of a row of a tile of what is transposed
TILE = SWIZZLE // 4  # likewise, columns


class Products(NamedTuple):
    """Operands of products, laid out for TMA."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


@dataclass(frozen=True)
class BackwardProducts:
    """Those of the backward, with a multiple of eight rows, and what it reads transposed (`device/turn.py`)."""

    forward: Products
    dout: jax.Array
    transposed: TransposedOperands


def forward_products(inputs: Inputs, tma: TmaLoad) -> Products:
    """Values transposed, (batch..., K, D, S); queries that are not copied anyway are left to the kernel."""
    query, length = inputs.query, inputs.mask.key_value_length
    T, S = query.shape[-3], inputs.key.shape[-3]
    if T % tma.multiple:
        query = pad_axis(rounded(query), -3, round_up(T, tma.multiple))
    key = pad_axis(rounded(inputs.key), -3, round_up(S, tma.multiple))
    value = jnp.moveaxis(rounded(inputs.value, length), -3, -1)
    return Products(query, key, pad_axis(value, -1, round_up(S, 64)))


def rounded(x: jax.Array, length: jax.Array | None = None) -> jax.Array:
    """(batch..., rows, heads, columns), without NaN from `length` on (as of `clean_padding`)."""
    x = lax.reduce_precision(x, 8, 10)
    if length is None:
        return x
    position = lax.broadcasted_iota(jnp.int32, (*(1,) * length.ndim, x.shape[-3], 1, 1), length.ndim)
    return jnp.where((position < length[..., None, None, None]) | jnp.isfinite(x), x, 0.0)
