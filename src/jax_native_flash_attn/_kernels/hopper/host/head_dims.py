"""Head dimensions that the tensor cores take; others are padded with zeros, which add nothing to a product."""

import jax

from ...._semantics.call import Inputs
from ..pallas import pad_axis, round_up

_GRANULE = 16


def pad_head_dim(x: jax.Array) -> jax.Array:
    """(..., H or D)"""
    return pad_axis(x, -1, round_up(x.shape[-1], _GRANULE))


def pad_head_dims(inputs: Inputs) -> Inputs:
    query, key, value = (pad_head_dim(x) for x in (inputs.query, inputs.key, inputs.value))
    return inputs._replace(query=query, key=key, value=value)


def padded_type(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What `pad_head_dim` gives."""
    return jax.ShapeDtypeStruct((*x.shape[:-1], round_up(x.shape[-1], _GRANULE)), x.dtype)
