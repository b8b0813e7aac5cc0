"""The pure JAX kernels as they are made for an accelerator, run on the CPU. What it patches is private to them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jax_native_flash_attn._kernels.xla import family
from jax_native_flash_attn._kernels.xla.plan import Plan, make_plan
from jax_native_flash_attn._kernels.xla.tiles import Tiles


@contextlib.contextmanager
def accelerator_kernels(*, rounds_float32: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """All but those of float64. `rounds_float32`: products are in TensorFloat-32 unless more is asked for."""

    def planned(call: Any, target: Any, **options: Any) -> Plan:
        platform = "cpu" if call.inputs.query.dtype == jnp.float64 else "accelerator"
        return make_plan(call, target._replace(platform=platform), **options)

    def einsum(self: Tiles, subscripts: str, *operands: jax.Array, dtype: Any = None) -> jax.Array:
        """As `Tiles.einsum`; XLA:CPU cannot run every product of 16-bit floats."""

        def rounded(x: jax.Array) -> jax.Array:
            x = x.astype(dtype or self.plan.product).astype(self.plan.accumulate)
            is_exact = jax.config.jax_default_matmul_precision == "highest"  # pyright: ignore[reportAttributeAccessIssue]
            rounds = rounds_float32 and not is_exact and x.dtype == jnp.float32
            return lax.reduce_precision(x, 8, 10) if rounds else x

        return jnp.einsum(subscripts, *map(rounded, operands), precision=self.config.precision)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "make_plan", planned)
        patch.setattr(Tiles, "einsum", einsum)
        yield patch
    jax.clear_caches()
