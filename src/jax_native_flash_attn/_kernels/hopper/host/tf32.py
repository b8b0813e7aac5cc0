"""float32 operands as the tensor cores multiply them, in TensorFloat-32: rounded, and transposed for some products.

They cut off the bits that TensorFloat-32 lacks, which would be a systematic error. And they transpose tiles of 16-bit
elements only: of a product that contracts the rows of an operand, the operand comes transposed.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Inputs
from ..pallas import pad_axis, round_up

SWIZZLE = 128  # bytes of a row of a tile of what is transposed
TILE = SWIZZLE // 4  # likewise, columns
_GROUP, _PAIR = 8, 2


def rounded(x: jax.Array) -> jax.Array:
    return lax.reduce_precision(x, 8, 10)


def rounded_operands(inputs: Inputs) -> Inputs:
    """Query, key and value. Padding of keys and values holds no NaN then (as of `clean_padding`)."""
    query, key, value = (rounded(x) for x in (inputs.query, inputs.key, inputs.value))
    length = inputs.mask.key_value_length
    if length is not None:
        position = lax.broadcasted_iota(jnp.int32, (*(1,) * length.ndim, value.shape[-3], 1, 1), length.ndim)
        in_length = position < length[..., None, None, None]
        key, value = (jnp.where(in_length | jnp.isfinite(x), x, 0.0) for x in (key, value))
    return inputs._replace(query=query, key=key, value=value)


def transposed(x: jax.Array, *, as_registers: bool) -> jax.Array:
    """(batch..., rows, heads, columns) -> (batch..., heads, columns, rows), padded to whole tiles.

    `as_registers`: in the order in which a left operand in registers has what is contracted (`device/tf32.py`). Of
    eight rows, those that a thread holds side by side, 2 t and 2 t + 1, come to t and t + 4.
    """
    x = pad_axis(x, -3, round_up(x.shape[-3], 2 * TILE))
    if as_registers:
        *batch, rows, heads, columns = x.shape
        x = x.reshape(*batch, rows // _GROUP, _GROUP // _PAIR, _PAIR, heads, columns)
        x = jnp.swapaxes(x, -3, -4).reshape(*batch, rows, heads, columns)
    return jnp.moveaxis(x, -3, -1)
