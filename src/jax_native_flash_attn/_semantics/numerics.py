"""Dtypes, constants and layouts that all kernels share."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# `jax.nn` gives a row without keys this log-sum-exp, whatever the dtype.
DEAD_ROW_LSE = -0.7 * float(np.finfo(np.float32).max)


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of logits, softmax state and accumulators: float64 for float64 inputs, otherwise float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def lowest(dtype: DTypeLike) -> float:
    """The logit of a masked key. Finite, because -inf - -inf is NaN in a row whose every key so far is masked."""
    return float(jnp.finfo(dtype).min)


def bias_floor(dtype: DTypeLike) -> float:
    """Biases and sinks are clipped here, far above `lowest`: a user's -inf or finfo.min must not overflow in base 2."""
    return lowest(dtype) / 4
