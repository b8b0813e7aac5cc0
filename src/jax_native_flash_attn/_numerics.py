"""Dtypes, constants and layouts that all kernels share."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Whether XLA:CPU makes one kernel of a softmax between two products.
CPU_FUSES_SOFTMAX = jax.__version_info__ >= (0, 10)

# `jax.nn` gives a row without keys this log-sum-exp, whatever the dtype.
DEAD_ROW_LSE = -0.7 * float(np.finfo(np.float32).max)


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of logits, softmax state and accumulators: float64 for float64 inputs, otherwise float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def product_dtype(dtype: DTypeLike, platform: str) -> np.dtype:
    """The dtype of the operands of a matrix product: that of the inputs where there is hardware for it."""
    has_hardware = platform != "cpu" or (np.dtype(dtype) == jnp.bfloat16 and _cpu_multiplies_bfloat16())
    return np.dtype(dtype) if has_hardware else accumulation_dtype(dtype)


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether XLA:CPU compiles bfloat16 products to the processor's matrix unit; three times faster than float32 then.

    Without that unit, or in JAX before 0.10, bfloat16 is slower than float32. JAX does not tell; Linux does.
    """
    flags = Path("/proc/cpuinfo")
    return jax.__version_info__ >= (0, 10) and flags.exists() and "amx_bf16" in flags.read_text().split()


def lowest(dtype: DTypeLike) -> float:
    """The logit of a masked key. Finite, because -inf - -inf is NaN in a row whose every key so far is masked."""
    return float(jnp.finfo(dtype).min)


def bias_floor(dtype: DTypeLike) -> float:
    """Biases are clipped here, far above `lowest`: a user's -inf or finfo.min must not overflow in base 2."""
    return lowest(dtype) / 4


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
