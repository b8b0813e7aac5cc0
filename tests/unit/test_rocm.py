"""AMD GPUs: no test runs on one. Programs for them are lowered, and hold the pure JAX kernels of accelerators."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jax_native_flash_attn import explain, flash_attention

OPTIONS: dict[str, Any] = {"is_causal": True, "local_window_size": (100, 0), "logits_soft_cap": 20.0}


def arrays(dtype: str) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((2, 256, heads, 64), dtype) for heads in (4, 2, 2)]


def program(*arrays: jax.Array, implementation: Any = None) -> Any:
    """Value, gradient and tangent."""
    attention = functools.partial(flash_attention, **OPTIONS, implementation=implementation)
    out, pullback = jax.vjp(attention, *arrays)
    return out, pullback(out), jax.jvp(attention, arrays, arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_for_rocm_are_those_of_an_accelerator(dtype: str) -> None:
    types = arrays(dtype)
    for implementation in (None, "pure_jax"):
        found = explain(*types, **OPTIONS, implementation=implementation, platform="rocm")
        assert [x.family for x in (found.forward, found.gradient, found.tangent)] == ["pure_jax"] * 3
    traced = jax.jit(program).trace(*types)
    of_rocm, of_cpu = (traced.lower(lowering_platforms=(x,)).as_text() for x in ("rocm", "cpu"))
    assert "stablehlo.dot_general" in of_rocm
    assert "custom_call" not in of_rocm
    assert of_rocm != of_cpu
    asked = jax.jit(functools.partial(program, implementation="pure_jax")).trace(*types)
    assert of_rocm == asked.lower(lowering_platforms=("rocm",)).as_text()


def test_exports_for_rocm() -> None:
    exported = export.export(jax.jit(program), platforms=("rocm",))(*arrays("bfloat16"))
    assert exported.platforms == ("rocm",)
    assert export.deserialize(exported.serialize()).out_avals[0].dtype == jnp.bfloat16
