"""Derivatives of 16-bit calls where products round their operands, as on a GPU: emulated on the CPU.

Operands of 16 bits are multiplied as such, and float32 in TensorFloat-32 unless more is asked for.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jax_native_flash_attn._kernels.xla import family
from jax_native_flash_attn._kernels.xla.plan import Plan, make_plan
from jax_native_flash_attn._kernels.xla.tiles import Tiles
from tests.lowering import Call
from tests.test_hopper_numbers import check_transformation


def _einsum(self: Tiles, subscripts: str, *operands: jax.Array, dtype: Any = None) -> jax.Array:
    def rounded(x: jax.Array) -> jax.Array:
        x = x.astype(dtype or self.plan.product).astype(self.plan.accumulate)
        is_exact = jax.config.jax_default_matmul_precision == "highest"  # pyright: ignore[reportAttributeAccessIssue]
        return x if is_exact or x.dtype != jnp.float32 else lax.reduce_precision(x, 8, 10)

    return jnp.einsum(subscripts, *map(rounded, operands), preferred_element_type=self.plan.accumulate)


@pytest.fixture(autouse=True, scope="module")
def _accelerator() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    def planned(call: Any, target: Any, **options: Any) -> Plan:
        platform = "cpu" if call.inputs.query.dtype == jnp.float64 else "accelerator"
        return make_plan(call, target._replace(platform=platform), **options)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "make_plan", planned)
        patch.setattr(Tiles, "einsum", _einsum)
        yield
    jax.clear_caches()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "mask", "option"),
    [
        ("jvp", "none", "nothing"),
        ("jacfwd", "traced window", "dropout"),
        ("forward over reverse", "causal", "nothing"),
        ("reverse over forward", "none", "nothing"),
        ("reverse over forward", "mask of rows", "bias of rows"),
        ("reverse over reverse", "mask of keys", "lengths of keys"),
        ("third order", "none", "nothing"),
    ],
)
def test_derivatives_are_as_accurate_as_dense_attention(name: str, mask: str, option: str, dtype: str):
    check_transformation(name, Call(dtype, 64, mask, option, False))
