"""What the pure JAX kernels compute for an accelerator, run on the CPU: generated calls against the float64 oracle."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._kernels.xla import forward as kernel
from jax_native_flash_attn._kernels.xla.limits import Limits
from jax_native_flash_attn._kernels.xla.tiles import Tiles
from tests.support.accelerator import accelerator_kernels
from tests.support.cases import FAST_COMPILATION, Case, cases, check_case, features
from tests.support.grids import rotated, thinned


@pytest.fixture(autouse=True, scope="module")
def _accelerator() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Every kernel is made for an accelerator, with limits so small that these calls take each of the forms."""
    limits = Limits(
        accelerator_scores=1 << 14,
        accelerator_least=1 << 11,
        accelerator_keys=1 << 10,
        accelerator_large=1 << 10,
        accelerator_large_tile=1 << 9,
    )
    with accelerator_kernels(limits):
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_generated_calls_are_as_accurate_as_dense_attention(dtype: str):
    @settings(max_examples=1)
    @given(cases((dtype,)))
    def check(case: Case):
        check_case(case, compiler_options=FAST_COMPILATION)

    check()


WIDE = (2, 96, 96, 1, 2, 16)
CASES = {
    "decoding": Case((2, 1, 130, 1, 3, 8), key_value_seq_lengths=(77, 130), poison=True),
    "few rows": Case((1, 17, 17, 2, 1, 16), key_value_seq_lengths=(11,), poison=True),
    "lengths": Case(
        (2, 101, 131, 1, 2, 16),
        query_seq_lengths=(11, 101),
        key_value_seq_lengths=(50, 131),
        poison=True,
        scale=0.3,
        traced=frozenset(["scale"]),
    ),
    "bias and mask": Case(WIDE, bias=(False, True, True, True), mask=(True, False, False, True)),
    "bias of every score": Case(WIDE, bias=(True, True, True, True)),
    "dropout": Case(WIDE, dropout_rate=0.5),
    "bounded": Case(WIDE),
    "unbounded": Case(WIDE, magnitude=6.0, scale=1.0),
    "causal": Case((1, 128, 128, 2, 2, 32), is_causal=True),
    # Of logits with bounds, lse is the sum of rounded weights: 2.01 times the error of dense attention if that counts.
    "scale": Case(
        (3, 139, 139, 1, 1, 8),
        key_value_seq_lengths=(70, 105, 46),
        scale=-0.5,
        traced=frozenset(["scale"]),
        seed=2147483646,
    ),
    "window": Case((1, 151, 151, 1, 3, 16), local_window_size=17),
    "soft cap, few rows": Case((1, 17, 17, 2, 1, 16), **features("soft cap")),
    "soft cap": Case(WIDE, **features("soft cap", "sinks", "segments"), scale=0.3),
    "shuffled segments": Case(WIDE, **features("shuffled segments", "value dimension", "largest logits", "bias")),
    "positions": Case(WIDE, **features("positions", "shared dropout", "window")),
}


@pytest.mark.parametrize(("name", "dtype"), thinned(rotated(CASES, ["float32", "bfloat16"]), 2))
def test_forms(name: str, dtype: str):
    check_case(dataclasses.replace(CASES[name], dtype=dtype), compiler_options=FAST_COMPILATION)


def _arrays(scale: float) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(scale * rng.standard_normal((1, 64, 2, 16)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize(("scale", "is_bounded"), [(1.0, True), (4.0, False), (np.nan, False)])
def test_bounds_are_decided_at_run_time(scale: float, is_bounded: bool, monkeypatch: pytest.MonkeyPatch):
    taken = []
    forward = kernel.forward

    def watched(tiles: Tiles, bounds: jax.Array | None = None) -> Any:
        jax.debug.callback(lambda: taken.append(bounds is not None))
        return forward(tiles, bounds)

    monkeypatch.setattr(kernel, "forward", watched)
    # A new function, which JAX lowers with what is watched.
    jax.block_until_ready(jax.jit(lambda *x: flash_attention(*x))(*_arrays(scale)))
    jax.effects_barrier()
    assert taken == [is_bounded]


@pytest.mark.parametrize("which", ["query", "value"])
def test_nan_reaches_the_gradients_through_cotangents_of_zero(which: str):
    """0 * NaN is NaN, as in dense attention: a tile without cotangents is left out only where nothing else counts."""
    arrays = dict(zip(("query", "key", "value"), _arrays(1.0), strict=True))
    arrays[which] = arrays[which].at[0, 3, 1, 2].set(jnp.nan)
    gradient = jax.grad(lambda query: (0 * flash_attention(query, arrays["key"], arrays["value"])).sum())
    assert jnp.isnan(gradient(arrays["query"])[0, 3, 1]).all()


def test_cotangents_of_zero_have_derivatives():
    """A tile without cotangents is left out only where these are not differentiated: here, at an optimum."""
    arrays = _arrays(1.0)

    def hvp(attention: Any) -> Any:
        def loss(*arrays: jax.Array) -> jax.Array:
            out = attention(*arrays)
            return jnp.square(out - jax.lax.stop_gradient(out)).sum()

        return jax.jvp(jax.grad(loss, (0, 1, 2)), arrays, arrays[::-1])[1]

    def dense(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    for actual, expected in zip(hvp(flash_attention), hvp(dense), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _decode(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> jax.Array:
    return flash_attention(query, key, value, key_value_seq_lengths=lengths, implementation="pure_jax")


def _decode_arguments() -> list[jax.ShapeDtypeStruct]:
    key = jax.ShapeDtypeStruct((2, 256, 2, 16), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((2, 1, 4, 16), jnp.bfloat16)
    return [query, key, key, jax.ShapeDtypeStruct((2,), jnp.int32)]


def test_layouts_are_fixed_on_a_gpu_but_not_in_an_exported_program():
    traced = jax.jit(_decode).trace(*_decode_arguments())
    assert "LayoutConstraint" in traced.lower(lowering_platforms=("cuda",)).as_text()
    for platforms in (("cuda",), ("cpu", "cuda")):
        exported = jax.export.export(jax.jit(_decode), platforms=platforms)(*_decode_arguments())
        assert "LayoutConstraint" not in exported.mlir_module()
