"""`score_mod` and `mask_mod` in the Hopper kernels, on a GPU: against dense attention in float64.

Compiling takes nearly all of the time: XLA_PYTHON_CLIENT_MEM_FRACTION=0.08 and `-n 8` take an eighth of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import explain, flash_attention, mods
from tests.support.cases import named_case
from tests.support.families import skip_unless_taken
from tests.support.hopper_mods import CALLS, attention, check, floats, split, value_and_gradients

pytestmark = pytest.mark.gpu(says_why=True)
IMPLEMENTATIONS = ("mosaic_gpu", "pure_jax")


@pytest.fixture(autouse=True)
def _hopper() -> None:  # pyright: ignore[reportUnusedFunction]
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")


@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "mosaic_gpu") for name in CALLS), *((name, "pure_jax") for name in ("gate", "rows without keys"))],
)
def test_value_and_gradients(name: str, implementation: str) -> None:
    check(CALLS[name], implementation)


def test_two_runs_are_bitwise_equal() -> None:
    call = CALLS["prefix, alibi, bias"]
    traced, _ = split(call.options)
    run = jax.jit(lambda x, t: value_and_gradients(lambda x: attention(call, x, t), call, x))
    first, second = (jax.tree.map(np.asarray, run(floats(call), traced)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("name", ["alibi", "prefix", "gate", "soft cap"])
def test_tangents(name: str) -> None:
    """Of query, key and value, beside those of pure JAX."""
    call = CALLS[name]
    traced, _ = split(call.options)
    arrays = floats(call)
    scale = arrays.pop("scale")
    directions = jax.tree.map(lambda x: jnp.sin(x.astype(jnp.float32)).astype(x.dtype), arrays)

    def run(implementation: str) -> Any:
        function = lambda x: attention(call, {**x, "scale": scale}, traced, implementation=implementation)  # noqa: E731
        return jax.jit(lambda x, dx: jax.jvp(function, (x,), (dx,))[1])(arrays, directions).astype(jnp.float32)

    ours, theirs = map(run, IMPLEMENTATIONS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.03 * float(jnp.abs(theirs).max()))


def test_what_is_empty_is_not_visited() -> None:
    """What is infinite there would show: 0 * inf is NaN."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 512, 2, 64), jnp.bfloat16)
    value = value.at[:, 256:384].set(jnp.inf)
    out = flash_attention(
        query, key, value, mask_mod=lambda b, h, q, k: (k < 200) | (k >= 400), implementation="mosaic_gpu"
    )
    assert jnp.isfinite(out).all()


def test_explain_tells_which_kernels() -> None:
    x = jax.ShapeDtypeStruct((1, 1024, 8, 64), "bfloat16")
    slopes = (jax.ShapeDtypeStruct((8,), "float32"),)
    options = {"score_mod": mods.alibi, "score_mod_args": slopes, "is_causal": True}
    found = explain(x, x, x, **options)
    assert {found.forward.family, found.gradient.family, found.tangent.family} == {"mosaic_gpu"}
