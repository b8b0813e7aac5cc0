"""What of soft cap and sinks in the Hopper kernels can be computed without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.grids import in_part
from tests.support.targets import needs_backend

pytestmark = [needs_backend, in_part(0)]


@pytest.mark.parametrize("end", ["nearest", "near", "far"])
def test_polynomials_are_as_accurate_as_float32(end: str) -> None:
    from jax_native_flash_attn._kernels.hopper.device import soft_cap

    ends = {
        "nearest": (soft_cap._NEAREST, soft_cap._SHORTEST),
        "near": (soft_cap._NEAR, soft_cap._SHORT),
        "far": (soft_cap._FAR, soft_cap._LONG),
    }
    last, coefficients = ends[end]
    y = np.linspace(1e-6, last, 100_001, dtype=np.float32)
    polynomial = np.zeros_like(y)
    for c in coefficients[::-1]:
        polynomial = polynomial * (y * y) + np.float32(c)
    np.testing.assert_allclose(y * polynomial, np.tanh(y.astype(np.float64)), rtol=4e-7)


def test_a_sink_counts_once_over_splits_of_the_keys() -> None:
    from jax_native_flash_attn._kernels.hopper.device.units import NO_KEY
    from jax_native_flash_attn._kernels.hopper.forward import _combine
    from jax_native_flash_attn._kernels.hopper.host.forward_plan import ForwardOuts

    splits, B, T, N, D = 3, 2, 4, 5, 8
    shapes = (splits, B, T, N, D), (splits, B, N, T), (B, N, 1)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    out, lse, sinks = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    lse = lse.at[1].set(2 * NO_KEY).at[:, 0, 0, 0].set(2 * NO_KEY)  # a split, and a row, without keys
    found_out, found_lse = _combine(ForwardOuts(unrounded=out, lse=lse), sinks)
    expected_lse = jnp.logaddexp(jax.nn.logsumexp(lse, 0), sinks)
    weights = jnp.moveaxis(jnp.exp(lse - expected_lse[None]), -1, -2)[..., None]
    np.testing.assert_allclose(found_out, (weights * out).sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_lse, expected_lse, rtol=1e-5)
    np.testing.assert_array_equal(found_out[0, 0, 0], 0)
    np.testing.assert_array_equal(found_lse[0, 0, 0], sinks[0, 0, 0])
