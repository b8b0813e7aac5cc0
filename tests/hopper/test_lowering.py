"""The Mosaic GPU kernels lower for CUDA as on a Hopper GPU, without one."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn._kernels.xla.family import XlaKernels
from tests.support.hopper import (
    CAUSAL,
    SHAPES,
    VMAPS,
    lowered_text,
    make_types,
    mosaic_attention,
    shared_operand_gradients,
    vmap_arguments,
)
from tests.support.targets import needs_backend

pytestmark = needs_backend


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *((shape, CAUSAL) for shape in ("tile", "many items", "one row, keys split")),
        *(("prime", x) for x in ({}, CAUSAL, {"local_window_size": (5, 5)}, {"return_residual": True})),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda_without_a_gpu(shape: str, options: dict[str, Any], dtype: str) -> None:
    B, T, S, K, G, H = SHAPES[shape]
    if T == 1 and dtype == "float32":
        pytest.skip("a row of float32 takes pure JAX")
    arrays = make_types(B, T, S, K * G, K, H, jnp.dtype(dtype))
    assert "mosaic_gpu" in lowered_text("mosaic_gpu", "cuda", arrays=arrays, **options)


@pytest.mark.parametrize(
    ("shape", "H", "D", "dtype"),
    [
        ("odd", 192, 128, "bfloat16"),
        ("short", 192, 128, "bfloat16"),  # query heads packed into rows
        ("one row, keys split", 64, 128, "bfloat16"),
        ("odd", 128, 64, "float32"),
    ],
)
def test_values_of_another_dimension_lower_for_cuda(shape: str, H: int, D: int, dtype: str) -> None:
    B, T, S, K, G, _ = SHAPES[shape]
    arrays = make_types(B, T, S, K * G, K, H, jnp.dtype(dtype), D)
    assert "mosaic_gpu" in lowered_text("mosaic_gpu", "cuda", arrays=arrays, is_causal=True)


@pytest.mark.parametrize("H", [64, 256])
@pytest.mark.parametrize("which", ["bias", "mask", "both"])
def test_bias_and_mask_lower_for_cuda_without_a_gpu(H: int, which: str) -> None:
    bias = None if which == "mask" else jax.ShapeDtypeStruct((1, 2, 200, 300), jnp.bfloat16)
    mask = None if which == "bias" else jax.ShapeDtypeStruct((2, 1, 1, 300), bool)
    arrays = [*make_types(2, 200, 300, 2, 1, H), bias, mask]
    assert "mosaic_gpu" in lowered_text("mosaic_gpu", "cuda", arrays=arrays)


@pytest.mark.parametrize("H", [64, 80])
def test_rows_of_any_number_are_not_copied(H: int) -> None:
    """But for those whose tiles are several columns wide, and by JAX that cannot swizzle rows, which are padded."""
    arrays = make_types(2, 301, 333, 4, 4, H)

    def gradients(*arrays: jax.Array) -> Any:
        out, pullback = jax.vjp(mosaic_attention, *arrays)
        return out, pullback(out)

    text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    rows = rf"tensor<2x3\d\dx4x{H}x"
    assert not re.search(rf"stablehlo\.slice.*{rows}", text)
    is_padded = H > 64 or jax.__version_info__ < (0, 11, 2)
    assert bool(re.search(rf"stablehlo\.pad.*{rows}", text)) == is_padded


@pytest.fixture
def no_pure_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("took the pure JAX kernels")

    for name in ("forward", "cotangent"):
        monkeypatch.setattr(XlaKernels, name, refuse)


GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": CAUSAL,
    "window": {"local_window_size": (70, 30)},
    "lengths": {"key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32)},
    "lengths of both": {
        "query_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
        "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
    },
    "bias": {"bias": jax.ShapeDtypeStruct((1, 4, 130, 150), jnp.bfloat16)},
    "bias of keys": {"bias": jax.ShapeDtypeStruct((2, 1, 1, 150), jnp.bfloat16)},
    "bias of rows": {"bias": jax.ShapeDtypeStruct((2, 4, 130, 1), jnp.bfloat16)},
    "mask": {"mask": jax.ShapeDtypeStruct((1, 4, 130, 150), bool)},
    "bias and mask": {
        "bias": jax.ShapeDtypeStruct((2, 4, 130, 150), jnp.float32),
        "mask": jax.ShapeDtypeStruct((2, 1, 130, 150), bool),
    },
    "scale": {"scale": jax.ShapeDtypeStruct((), jnp.float32)},
    "dropout": {"dropout_rate": 0.1},
}


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("options", "H", "D"),
    [
        *((options, 128, 128) for options in GRADIENTS),
        *((options, H, H) for options, H in itertools.product(("plain", "bias and mask"), (16, 144, 256))),
        ("mask", 256, 256),  # needs the most shared memory
        ("causal", 192, 128),
        ("bias and mask", 192, 128),
        ("lengths", 64, 128),
        ("scale", 96, 64),
        ("dropout", 16, 256),
        ("bias of keys", 256, 16),
    ],
)
def test_gradients_lower_for_cuda_without_a_gpu(options: str, H: int, D: int) -> None:
    traced = {name: x for name, x in GRADIENTS[options].items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in GRADIENTS[options].items() if name not in traced}

    def gradients(operands: Any) -> Any:
        varying = {name: x for name, x in operands.items() if x.dtype not in (jnp.int32, bool)}
        rng = jax.random.key(0) if "dropout_rate" in static else None
        loss = lambda v: mosaic_attention(**{**operands, **v}, dropout_rng=rng, **static).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss)(varying)

    query, key, value = make_types(2, 130, 150, 4, 2, H, D=D)
    operands = {"query": query, "key": key, "value": value, **traced}
    text = jax.jit(gradients).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.usefixtures("no_pure_jax")
def test_three_warpgroups_of_the_gradient_of_bias_fit_into_shared_memory() -> None:
    T = 384
    mask = jax.ShapeDtypeStruct((2, 1, 1, T), bool)

    def gradient(bias: jax.Array, mask: jax.Array, *arrays: jax.Array) -> jax.Array:
        return jax.grad(lambda bias: mosaic_attention(*arrays, bias, mask).astype(jnp.float32).sum())(bias)

    operands = jax.ShapeDtypeStruct((1, 4, T, T), jnp.float32), mask, *make_types(2, T, T, 4, 4, 64)
    assert "mosaic_gpu" in jax.jit(gradient).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("shared", "kind"),
    [
        *((name, "gradient of vmap") for name in ("shared keys", "shared value", "shared bias")),
        *((name, "vmap of gradient") for name in ("shared keys", "shared query", "shared scale", "all but scale")),
    ],
)
def test_gradients_of_shared_operands_lower_for_cuda(shared: str, kind: str) -> None:
    in_axes = VMAPS[shared]
    run = jax.jit(shared_operand_gradients("mosaic_gpu", in_axes, kind))
    arguments = jax.eval_shape(functools.partial(vmap_arguments, in_axes))
    assert "mosaic_gpu" in run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
