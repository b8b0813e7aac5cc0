"""The Mosaic GPU kernels lower for CUDA as on a Hopper GPU, without one."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn._kernels.xla.family import XlaKernels
from tests.support.cases import Case, call_types, named_case, static_options
from tests.support.hopper import VMAPS, lowered_text, mosaic_attention, shared_operand_gradients, vmap_arguments
from tests.support.targets import needs_backend

pytestmark = needs_backend


@pytest.mark.parametrize(
    ("shape", "options", "has_residual"),
    [*((shape, "causal", False) for shape in ("tile", "many items", "one row, keys split")), ("prime", "plain", True)],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda_without_a_gpu(shape: str, options: str, has_residual: bool, dtype: str) -> None:
    """What the grid of `test_lowering_transformations` lacks: other shapes."""
    case = named_case(shape, options, dtype=dtype)
    if case.shape[1] == 1 and dtype == "float32":
        pytest.skip("a row of float32 takes pure JAX")
    assert "mosaic_gpu" in lowered_text("mosaic_gpu", "cuda", case=case, return_residual=has_residual)


@pytest.mark.parametrize("H", [64, 80])
def test_rows_of_any_number_are_not_copied(H: int) -> None:
    """But for those whose tiles are several columns wide, and by JAX that cannot swizzle rows, which are padded."""
    arrays = call_types(Case((2, 301, 333, 4, 1, H), "bfloat16")).values()

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
    "bias": {"bias": (False, True, True, True)},
    "mask": {"mask": (False, True, True, True)},
    "bias and mask": {"bias": (True, True, True, True), "bias_dtype": "float32", "mask": (True, False, True, True)},
}


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("options", "head_dim"),
    [
        *((options, 128) for options in ("bias", "mask", "bias and mask")),
        *itertools.product(("plain", "bias and mask"), (16, 144)),
        *((options, 256) for options in GRADIENTS),  # "mask" needs the most shared memory
    ],
)
def test_gradients_lower_for_cuda_without_a_gpu(options: str, head_dim: int) -> None:
    """What the grid of `test_lowering_transformations` lacks: head dimensions, a bias and a mask of heads."""
    case = Case((2, 130, 150, 2, 2, head_dim), "bfloat16", **GRADIENTS[options])

    def gradients(operands: Any) -> Any:
        varying = {name: x for name, x in operands.items() if x.dtype != bool}
        call = functools.partial(mosaic_attention, **static_options(case))
        return jax.grad(lambda v: call(**{**operands, **v}).astype(jnp.float32).sum())(varying)

    text = jax.jit(gradients).trace(call_types(case)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.usefixtures("no_pure_jax")
def test_three_warpgroups_of_the_gradient_of_bias_fit_into_shared_memory() -> None:
    shape = (2, 384, 384, 4, 1, 64)
    full = {"bias": (False, True, True, True), "bias_dtype": "float32", "mask": (True, False, False, True)}
    types = call_types(Case(shape, "bfloat16", **full))

    def gradient(bias: jax.Array, others: Any) -> jax.Array:
        return jax.grad(lambda bias: mosaic_attention(**others, bias=bias).astype(jnp.float32).sum())(bias)

    text = jax.jit(gradient).trace(types.pop("bias"), types).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


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
