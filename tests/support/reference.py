"""jax.nn.dot_product_attention as the tests call it."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from tests.support.environment import lenient_promotion

# Bound here, before any test puts something else in its place.
_dot_product_attention = jax.nn.dot_product_attention
SIGNATURE = inspect.signature(_dot_product_attention)
HAS_RESIDUAL = "return_residual" in SIGNATURE.parameters


def reference_attention(query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, **options: Any) -> Any:
    """The reference, which mixes dtypes and ranks inside: strict promotion is lifted around it.

    Keep calls of its derivative in `lenient_promotion()` as well.
    """
    if options.get("local_window_size") is not None and mask is None:
        # JAX 0.7 forgets the window when there is no other mask.
        mask = jnp.ones((1, 1, 1, 1), bool)
    with lenient_promotion():
        return _dot_product_attention(query, key, value, bias, mask, **options)
