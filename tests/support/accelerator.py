"""The pure JAX kernels as they are made for an accelerator, run on the CPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jax_native_flash_attn._kernels.protocol import Forward, LinearPass, Target
from jax_native_flash_attn._kernels.select import replacing
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._kernels.xla.limits import Limits
from jax_native_flash_attn._kernels.xla.tiles import Tiles
from jax_native_flash_attn._semantics.call import Call


class AcceleratorKernels(XlaKernels):
    """Made for an accelerator, whatever they are lowered for, but those of float64."""

    def forward(self, call: Call, target: Target) -> Forward:
        return super().forward(call, _accelerator(call, target))

    def cotangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        return super().cotangent(call, given, _accelerator(call, target))

    def tangent(self, call: Call, given: LinearPass, target: Target) -> dict[str, jax.Array]:
        return super().tangent(call, given, _accelerator(call, target))


def _accelerator(call: Call, target: Target) -> Target:
    return target._replace(platform="cpu" if call.inputs.query.dtype == jnp.float64 else "accelerator")


@contextlib.contextmanager
def accelerator_kernels(limits: Limits = Limits(), *, rounds_float32: bool = False) -> Iterator[None]:  # noqa: B008
    """`rounds_float32`: products are in TensorFloat-32 unless more is asked for."""

    def einsum(self: Tiles, subscripts: str, *operands: jax.Array, dtype: Any = None) -> jax.Array:
        """As `Tiles.einsum`; XLA:CPU cannot run every product of 16-bit floats."""

        def rounded(x: jax.Array) -> jax.Array:
            x = x.astype(dtype or self.plan.product).astype(self.plan.accumulate)
            is_exact = jax.config.jax_default_matmul_precision == "highest"  # pyright: ignore[reportAttributeAccessIssue]
            rounds = rounds_float32 and not is_exact and x.dtype == jnp.float32
            return lax.reduce_precision(x, 8, 10) if rounds else x

        return jnp.einsum(subscripts, *map(rounded, operands), precision=self.config.precision)

    with pytest.MonkeyPatch.context() as patch, replacing(AcceleratorKernels(limits)):
        patch.setattr(Tiles, "einsum", einsum)
        yield
