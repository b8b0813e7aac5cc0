"""Taylor mode, `jax.experimental.jet`, against nested derivatives of dense attention in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

from jax_native_flash_attn import flash_attention
from tests.support.environment import bernoulli, enable_x64
from tests.support.grids import thinned
from tests.support.oracle import float64_oracle

B, T, S, N, H, ORDER = 1, 5, 6, 2, 4, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"mask": np.random.default_rng(0).random((B, 1, T, S)) < 0.5},
    "lengths": {"key_value_seq_lengths": np.array([4], np.int32), "query_seq_lengths": np.array([3], np.int32)},
    "dropout": {"dropout_rate": 0.3},
}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("setting", thinned(SETTINGS, 2))
def test_series_of_query_key_value_and_bias(setting: str):
    shapes = (B, T, N, H), (B, S, N, H), (B, S, N, H), (1, N, T, S)
    primals = [normal(i, *shape) for i, shape in enumerate(shapes)]
    series = [[normal(10 * k + i, *shape) / 2 for k in range(1, ORDER + 1)] for i, shape in enumerate(shapes)]
    options = SETTINGS[setting]
    ours, keep = options, {}
    if "dropout_rate" in options:
        rng = jax.random.key(0)
        ours, keep = {**options, "dropout_rng": rng}, {"keep": np.asarray(bernoulli(rng, 0.7, (B, N, T, S)))}
    attention = functools.partial(flash_attention, **ours)
    value, terms = jax.jit(lambda p, s: jet.jet(attention, p, s))(primals, series)

    with enable_x64():

        def along(t: Any) -> Any:
            moved = [
                x + sum(t**k / math.factorial(k) * jnp.asarray(c, jnp.float64) for k, c in enumerate(terms, 1))
                for x, terms in zip((jnp.asarray(x, jnp.float64) for x in primals), series, strict=True)
            ]
            return float64_oracle(*moved, **options, **keep)[0]

        def derivatives(t: Any, along: Any = along) -> list[Any]:
            found = [along(t)]
            for _ in range(ORDER):
                along = lambda t, f=along: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]  # noqa: E731
                found.append(along(t))
            return found

        expected = jax.jit(derivatives)(jnp.float64(0))
    for actual, wanted in zip((value, *terms), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_series_of_a_gradient():
    query, key = normal(0, B, T, N, H), normal(1, B, S, N, H)
    gradient = jax.grad(lambda q: jnp.square(flash_attention(q, key, key)).sum())
    series = ([np.ones_like(query), np.zeros_like(query)],)
    _, (first, second) = jax.jit(lambda q: jet.jet(gradient, (q,), series))(query)
    slope = lambda q: jax.jvp(gradient, (q,), (jnp.ones_like(q),))[1]  # noqa: E731
    expected = jax.jit(lambda q: jax.jvp(slope, (q,), (jnp.ones_like(q),)))(query)
    for actual, wanted in zip((first, second), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)
