"""What XLA and processors do well or badly, and what is done about it."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from ..._semantics.numerics import LOG2E, accumulation_dtype

# Whether XLA:CPU makes one kernel of a softmax between two products.
CPU_FUSES_SOFTMAX = jax.__version_info__ >= (0, 10)

# Whether XLA:CPU converts all of a 16-bit operand to 32 bits before a loop that slices it.
CPU_CONVERTS_BEFORE_LOOPS = jax.__version_info__ < (0, 11)

# Whether XLA:CPU multiplies bfloat16 other than by way of float32 arrays; before, that is slower in all cases.
_CPU_TAKES_BFLOAT16 = jax.__version_info__ >= (0, 10)


def product_dtype(dtype: DTypeLike, platform: str, *, has_few_products: bool) -> np.dtype:
    """The dtype of the operands of a matrix product: that of the inputs where there is hardware for it.

    A CPU without it multiplies bfloat16 more slowly than float32, but where scores are few (`Sizes.has_few_products`),
    converting the operands costs more.
    """
    if platform == "cpu":
        takes_bfloat16 = _CPU_TAKES_BFLOAT16 and (has_few_products or cpu_multiplies_bfloat16())
        if np.dtype(dtype) != jnp.bfloat16 or not takes_bfloat16:
            return accumulation_dtype(dtype)
    return np.dtype(dtype)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has a matrix unit for bfloat16; products are three times faster than float32's then.

    JAX does not tell; Linux does.
    """
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" in flags.read_text().split()


def in_row_major_layout(x: jax.Array) -> jax.Array:
    """Keep XLA from choosing another layout inside a loop, and copying all of the array for it beforehand."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_jvp
def exp_polynomial(x: jax.Array) -> jax.Array:
    """exp(x) of float32 x <= 1, in a loop of XLA:CPU's faster than its own; exactly 0 from -88 down.

    Range reduction to powers of two and a minimax polynomial of degree 5, relative error 1.5e-7.
    """
    x = jnp.maximum(x * np.float32(LOG2E), np.float32(-127.0))
    whole = jnp.floor(x)
    fraction = x - whole
    result = jnp.full_like(x, 1.8775767e-3)
    for c in (8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1):
        result = result * fraction + np.float32(c)
    return result * lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)


@exp_polynomial.defjvp
def _exp_polynomial_jvp(primals, tangents):  # pyright: ignore[reportUnusedFunction]
    (x,), (dx,) = primals, tangents
    y = exp_polynomial(x)
    return y, y * dx
