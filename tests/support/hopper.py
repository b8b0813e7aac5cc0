"""Calls of the Mosaic GPU kernels: shapes, options, operands, and their programs for CUDA, without a GPU too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_native_flash_attn import flash_attention

mosaic_attention = functools.partial(flash_attention, implementation="mosaic_gpu")

# (B, T, S, K, G, H), lengths around the block shapes and their multiples.
SHAPES = {
    "tile": (1, 128, 128, 1, 1, 64),
    "odd": (2, 301, 333, 2, 2, 64),
    "prime": (1, 509, 521, 1, 3, 128),
    "wide": (1, 200, 190, 2, 1, 256),
    "less wide": (1, 140, 200, 1, 2, 144),
    "narrow": (2, 150, 300, 1, 2, 16),
    "eighty": (1, 260, 140, 2, 2, 80),
    "short": (3, 5, 700, 2, 4, 64),
    "one row": (2, 1, 1000, 2, 4, 128),
    "one key": (2, 70, 1, 1, 2, 32),
    "one head": (3, 131, 77, 1, 1, 64),
    "long": (1, 1100, 1300, 1, 1, 64),
    # More items than multiprocessors, so that blocks go through several; few items, so that keys are split.
    "many items": (5, 70, 90, 16, 2, 32),
    "one row, keys split": (1, 1, 9000, 1, 2, 64),
    "rows, keys split": (2, 70, 5000, 1, 1, 128),
}
CAUSAL: dict[str, Any] = {"is_causal": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": CAUSAL,
    "window": {"local_window_size": (70, 30)},
    "traced window": {"local_window_size": (40, 0), "traced": frozenset({"window"}), "is_causal": True},
    "scale": {"scale": -0.5, "magnitude": 3.0, "traced": frozenset({"scale"})},
    "no scale": {"scale": 0.0, "traced": frozenset({"scale"})},
    "bias": {"bias": (True, True, True, True)},
    "bias of all": {"bias": (False, True, True, True), "is_causal": True},
    "bias of keys": {"bias": (True, False, False, True), "bias_dtype": "float32"},
    "bias of rows": {"bias": (True, True, True, False)},
    "bias of one": {"bias": (False, False, False, False)},
    "bias float32": {"bias": (False, False, True, True), "bias_dtype": "float32"},
    "mask": {"mask": (True, True, True, True)},
    "sparse mask": {"mask": (False, True, True, True), "mask_density": 0.02},
    "mask of keys": {"mask": (True, False, False, True), "is_causal": True},
    "mask of rows": {"mask": (True, True, True, False)},
    "empty mask": {"mask": (False, False, True, True), "mask_density": 0.0},
    "bias and mask": {"bias": (False, True, True, True), "mask": (True, False, False, True)},
    "dropout": {"dropout_rate": 0.3},
    "causal dropout": {"dropout_rate": 0.1, "is_causal": True, "x64": True},
    "float16": {"dtype": "float16", "is_causal": True},
    "x64": {"x64": True, "is_causal": True},
}


def make_types(
    B: int, T: int, S: int, N: int, K: int, H: int, dtype: Any = jnp.bfloat16, D: int | None = None
) -> list[jax.ShapeDtypeStruct]:
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, D or H)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def make_arrays(*sizes: Any) -> list[jax.Array]:
    types = make_types(*sizes)
    keys = jax.random.split(jax.random.key(0), len(types))
    return [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, types, strict=True)]


def shared_operand_gradients(implementation: str, in_axes: Any, kind: str) -> Any:
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
    query, key, value = make_arrays(2, 100, 150, 4, 2, 64)
    bias = jax.random.normal(jax.random.key(1), (1, 4, 1, 150))
    arguments = (query, key, value, bias, jnp.float32(0.1))
    return [jnp.stack([x, x * 2, -x]) if axis == 0 else x for x, axis in zip(arguments, in_axes, strict=True)]


def lowered_text(implementation: str | None, *platforms: str, arrays: Any = None, **options: Any) -> str:
    attention = jax.jit(functools.partial(flash_attention, implementation=implementation, **options))
    return attention.trace(*(arrays or make_types(1, 128, 128, 2, 2, 64))).lower(lowering_platforms=platforms).as_text()
