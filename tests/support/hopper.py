"""Calls of the Mosaic GPU kernels: operands, and their programs for CUDA, without a GPU too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_native_flash_attn import flash_attention
from tests.support.cases import Case, call_types, named_case, static_options

mosaic_attention = functools.partial(flash_attention, implementation="mosaic_gpu")

_TILE = named_case("tile", "plain")


def make_arrays(case: Case) -> list[jax.Array]:
    """Query, key and value, drawn where JAX computes: also of cases that no oracle can hold."""
    types = list(call_types(case).values())[:3]
    keys = jax.random.split(jax.random.key(case.seed), len(types))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, types, strict=True)]


def shared_operand_gradients(implementation: Any, in_axes: Any, kind: str) -> Any:
    """Gradients of a `vmap` in which operands with `None` in `in_axes` are shared: their sums, or one for each."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, scale: jax.Array) -> jax.Array:
        out = flash_attention(query, key, value, bias, scale=scale, is_causal=True, implementation=implementation)
        return (out.astype(jnp.float32) ** 2).sum()

    gradients = functools.partial(jax.grad, argnums=range(5))
    if kind == "gradient of vmap":
        return gradients(lambda *args: jax.vmap(loss, in_axes)(*args).sum())
    return jax.vmap(gradients(loss), in_axes)


VMAPS = {
    "shared keys": (0, None, None, None, None),
    "shared query": (None, 0, 0, None, None),
    "shared value": (None, 0, None, None, None),
    "shared scale": (0, 0, None, 0, None),
    "shared bias": (0, 0, 0, None, 0),
    "all but scale": (None, None, None, None, 0),
}


def vmap_arguments(in_axes: Any) -> list[jax.Array]:
    query, key, value = make_arrays(Case((2, 100, 150, 2, 2, 64), "bfloat16"))
    bias = jax.random.normal(jax.random.key(1), (1, 4, 1, 150))
    arguments = (query, key, value, bias, jnp.float32(0.1))
    return [jnp.stack([x, x * 2, -x]) if axis == 0 else x for x, axis in zip(arguments, in_axes, strict=True)]


def lowered_text(implementation: str | None, *platforms: str, case: Case = _TILE, **options: Any) -> str:
    """The program of a case."""

    def attention(arrays: Any) -> Any:
        merged: dict[str, Any] = {**static_options(case), "implementation": implementation, **options}
        return flash_attention(**arrays, **merged)

    return jax.jit(attention).trace(call_types(case)).lower(lowering_platforms=platforms).as_text()
