"""What comparisons with another library's layers share."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.support.environment import fast_compilation


def compiled(function: Callable[..., Any]) -> Any:
    return jax.jit(function, compiler_options=fast_compilation())


def assert_close(actual: Any, expected: Any, atol: float = 1e-6) -> None:
    """Equal to float32 rounding, in units of the largest magnitude anywhere.

    (Not leaf by leaf: the gradient of the bias of the keys is 0 but for rounding.)
    """
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    atol *= max(np.abs(x).max() for x in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
