"""Over which manual mesh axes arrays vary, which JAX has in their types."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def varying_axes(aval: Any) -> frozenset:
    """The manual mesh axes over which values of this type differ."""
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying


def vary_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Make all operands vary over the manual axes that any of them does; the transpose of this is a `psum`."""
    axes = frozenset().union(*(varying_axes(jax.typeof(x)) for x in operands))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - varying_axes(jax.typeof(x)))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return [cast(x) for x in operands]
