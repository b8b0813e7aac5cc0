"""The Mosaic GPU kernels lower for CUDA as on a Hopper GPU, without one."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_native_flash_attn import flash_attention_with_lse
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from tests.support.cases import SHAPES, Case, call_types, named_case, static_options
from tests.support.grids import in_part, rotated, thinned
from tests.support.hopper import VMAPS, lowered_text, mosaic_attention, shared_operand_gradients, vmap_arguments
from tests.support.targets import needs_backend, pretend_gpu

pytestmark = needs_backend


@pytest.mark.parametrize(
    ("shape", "dtype"),
    thinned(rotated(["tile", "many items", "one row, keys split", "prime"], ["bfloat16", "float32"]), 2),
)
def test_lowers_for_cuda_without_a_gpu(shape: str, dtype: str) -> None:
    """What the grid of `test_lowering_transformations` lacks: other shapes."""
    options, has_residual = ("plain", True) if shape == "prime" else ("causal", False)
    case = named_case(shape, options, dtype=dtype)
    if case.shape[1] == 1 and dtype == "float32":
        pytest.skip("a row of float32 takes pure JAX")
    assert "mosaic_gpu" in lowered_text("mosaic_gpu", "cuda", case=case, return_residual=has_residual)


@pytest.mark.parametrize(
    ("shape", "H", "D", "dtype"),
    thinned(
        [
            ("odd", 192, 128, "bfloat16"),
            ("short", 192, 128, "bfloat16"),  # query heads packed into rows
            ("one row, keys split", 64, 128, "bfloat16"),
            ("odd", 128, 64, "float32"),
            ("odd", 72, 72, "bfloat16"),
            ("odd", 20, 1, "float32"),
        ],
        3,
    ),
)
def test_values_of_another_dimension_lower_for_cuda(shape: str, H: int, D: int, dtype: str) -> None:
    case = Case((*SHAPES[shape][:-1], H), dtype, value_dim=D, is_causal=True)
    assert "mosaic_gpu" in lowered_text("mosaic_gpu", "cuda", case=case)


@pytest.mark.parametrize("H", thinned([64, 80], 2))
def test_rows_of_any_number_are_not_copied(H: int) -> None:
    """But for those whose tiles are several columns wide, and by JAX that cannot swizzle rows, which are padded."""
    arrays = call_types(Case((2, 301, 333, 4, 1, H), "bfloat16")).values()

    def gradients(*arrays: jax.Array) -> Any:
        out, pullback = jax.vjp(mosaic_attention, *arrays)
        return out, pullback(out)

    text = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    rows = rf"tensor<2x3\d\dx4x({H}xbf16|{H // 2}xui32)"  # two numbers are copied as one
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
    ("options", "H", "D", "dtype"),
    thinned(
        [
            *((options, 128, None, "bfloat16") for options in ("bias", "mask", "bias and mask")),
            *(
                (options, H, None, "bfloat16")
                for options, H in itertools.product(("plain", "bias and mask"), (16, 144))
            ),
            *((options, 256, None, "bfloat16") for options in GRADIENTS),  # "mask" needs the most shared memory
            ("plain", 192, 128, "bfloat16"),
            ("bias and mask", 192, 128, "bfloat16"),
            ("mask", 64, 128, "bfloat16"),
            ("plain", 16, 256, "bfloat16"),
            ("bias", 256, 16, "bfloat16"),
            ("plain", 40, 72, "bfloat16"),
            ("bias and mask", 128, None, "float32"),  # needs the most shared memory, and a kernel for each gradient
            ("plain", 128, 16, "float32"),
            ("mask", 80, 112, "float32"),
        ],
        9,
        8,
    ),
)
def test_gradients_lower_for_cuda_without_a_gpu(options: str, H: int, D: int | None, dtype: str) -> None:
    """What the grid of `test_lowering_transformations` lacks: head dimensions, a bias and a mask of heads."""
    case = Case((2, 130, 150, 2, 2, H), dtype, value_dim=D, **GRADIENTS[options])

    def gradients(operands: Any) -> Any:
        varying = {name: x for name, x in operands.items() if x.dtype != bool}
        call = functools.partial(mosaic_attention, **static_options(case))
        return jax.grad(lambda v: call(**{**operands, **v}).astype(jnp.float32).sum())(varying)

    text = jax.jit(gradients).trace(call_types(case)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize("S", thinned([61, 40], 2))
def test_gradients_of_few_float32_keys_lower_for_cuda(S: int) -> None:
    """One tile of keys is turned then, whose number is no constant."""
    query, *keys = call_types(Case((2, 70, S, 2, 1, 32), "float32")).values()

    def gradients(query: jax.Array, *keys: jax.Array) -> Any:
        out, pullback = jax.vjp(mosaic_attention, query, *keys)
        return pullback(out)

    assert "mosaic_gpu" in jax.jit(gradients).trace(query, *keys).lower(lowering_platforms=("cuda",)).as_text()


ADDED: dict[str, dict[str, Any]] = {
    "soft cap": {"logits_soft_cap": 50.0, "is_causal": True},
    "soft cap, no fixed maximum": {"logits_soft_cap": 500.0, "bias": jax.ShapeDtypeStruct((2, 1, 1, 150), jnp.float32)},
    "soft cap and mask": {"logits_soft_cap": 50.0, "mask": jax.ShapeDtypeStruct((1, 4, 130, 150), bool)},
    "sinks": {"sinks": jax.ShapeDtypeStruct((4,), jnp.float32), "is_causal": True},
    "all": {
        "logits_soft_cap": 50.0,
        "sinks": jax.ShapeDtypeStruct((4,), jnp.float32),
        "bias": jax.ShapeDtypeStruct((1, 4, 130, 150), jnp.bfloat16),
        "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
    },
}


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("options", "head_dim"), thinned([*((options, 64) for options in ADDED), ("all", 128), ("all", 256)], 7, 4)
)
def test_gradients_inside_a_soft_cap_and_beside_sinks_lower_for_cuda(options: str, head_dim: int) -> None:
    """Of scale too, whose kernel leaves other sums then."""
    traced = {name: x for name, x in ADDED[options].items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in ADDED[options].items() if name not in traced}
    types = call_types(Case((2, 130, 150, 2, 2, head_dim), "bfloat16"))
    types |= {"scale": jax.ShapeDtypeStruct((), jnp.float32), **traced}

    def gradients(operands: Any) -> Any:
        varying = {name: x for name, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        call = functools.partial(mosaic_attention, **static)
        return jax.grad(lambda v: call(**{**operands, **v}).astype(jnp.float32).sum())(varying)

    assert "mosaic_gpu" in jax.jit(gradients).trace(types).lower(lowering_platforms=("cuda",)).as_text()


MOVED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal": ((2, 130, 150, 2, 2, 64), {"is_causal": True}),
    "causal, 256": ((2, 130, 150, 2, 1, 256), {"is_causal": True}),
    "window, lengths": (
        (2, 130, 150, 2, 2, 128),
        {"local_window_size": (40, 20), "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32)},
    ),
    "window, bias": (
        (2, 130, 150, 2, 2, 64),
        {"local_window_size": (40, 20), "bias": jax.ShapeDtypeStruct((1, 4, 130, 150), jnp.bfloat16)},
    ),
    "sinks": ((2, 130, 150, 2, 2, 64), {"is_causal": True, "sinks": jax.ShapeDtypeStruct((4,), jnp.float32)}),
    "rows of a group": ((2, 3, 4000, 2, 3, 128), {"is_causal": True, "local_window_size": (90, 0)}),
}


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("dtype", "T", "heads"), thinned([("bfloat16", 1032, 4), ("float32", 2048, 8), ("bfloat16", 500, 1)], 2)
)
def test_groups_in_parts(dtype: str, T: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head of keys is too few blocks for a GPU: in long calls a few query heads have the keys to themselves."""
    pretend_gpu(monkeypatch, "9.0")
    case = Case((1, T, 1200, 1, 8, 64), dtype, local_window_size=(300, 0))

    def gradients(query: jax.Array, *keys: jax.Array) -> Any:
        out, pullback = jax.vjp(functools.partial(mosaic_attention, **static_options(case)), query, *keys)
        return pullback(out)

    text = jax.jit(gradients).trace(*call_types(case).values()).lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert re.search(rf"-> \(tensor<1x\d+x{heads}x64x\w+>, tensor<1x\d+x{heads}x64x\w+>\)", kernels[-1])
    assert [x.shape for x in jax.eval_shape(gradients, *call_types(case).values())[1:]] == [(1, 1200, 1, 64)] * 2


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(("options", "offset"), thinned(zip(MOVED, itertools.cycle([(), (2,)]), strict=False), 6))
def test_an_offset_reaches_the_kernels_as_a_number(options: str, offset: tuple[int, ...]) -> None:
    """No kernel reads an interval of each row, as it does of a traced window."""
    shape, added = MOVED[options]
    types = call_types(Case(shape, "bfloat16"))
    types |= {name: x for name, x in added.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {name: x for name, x in added.items() if name not in types}

    def gradients(operands: Any, masks: Any) -> Any:
        varying = {name: x for name, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}

        def loss(varying: Any) -> Any:
            return mosaic_attention(**{**operands, **varying}, **masks, **static).astype(jnp.float32).sum()

        return jax.value_and_grad(loss)(varying)

    def integers(masks: Any) -> set[str]:
        """Types of what kernels read."""
        text = jax.jit(gradients).trace(types, masks).lower(lowering_platforms=("cuda",)).as_text()
        kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
        assert len(kernels) >= 3
        return {found for line in kernels for found in re.findall(r"tensor<([^>]*i32)>", line.rsplit(" : ", 1)[1])}

    numbers = integers({"query_offset": jax.ShapeDtypeStruct(offset, jnp.int32)})
    assert numbers <= {"1xi32", "2xi32", "i32"}
    if options == "causal":
        traced = jax.ShapeDtypeStruct((), jnp.int32)
        assert not integers({"local_window_size": (traced, traced)}) <= {"1xi32", "2xi32", "i32"}


@pytest.mark.usefixtures("no_pure_jax")
@pytest.mark.parametrize(
    ("shape", "dtype", "is_moved"),
    thinned(
        [
            ("tile", "float16", False),
            ("short", "bfloat16", False),
            ("short", "bfloat16", True),
            ("one row, keys split", "bfloat16", False),
            ("rows, keys split", "float32", False),
        ],
        3,
    ),
)
def test_largest_logits_lower_for_cuda(shape: str, dtype: str, is_moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside cap, sinks and an offset; of query heads that become rows too, and of parts of the keys."""
    pretend_gpu(monkeypatch, "9.0")
    types = call_types(named_case(shape, "plain", dtype=dtype))
    if is_moved:
        types["query_offset"] = jax.ShapeDtypeStruct((), jnp.int32)
    else:
        types["sinks"] = jax.ShapeDtypeStruct(types["query"].shape[-2:-1], jnp.float32)
    run = functools.partial(flash_attention_with_lse, logits_soft_cap=50.0, return_max_logits=True, is_causal=is_moved)
    traced = jax.jit(lambda operands: run(**operands)).trace(types)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("no_pure_jax")
def test_the_gradient_of_a_bias_of_rows_inside_a_soft_cap_takes_pure_jax() -> None:
    """It is no sum over rows then, and the kernel for a bias goes along the keys."""
    types = call_types(Case((1, 128, 128, 2, 1, 64), "bfloat16", bias=(False, True, True, False)))

    def loss(bias: jax.Array, others: Any) -> jax.Array:
        return mosaic_attention(**others, bias=bias, logits_soft_cap=50.0).astype(jnp.float32).sum()

    operands = types.pop("bias"), types
    assert "mosaic_gpu" in jax.jit(loss).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(AssertionError, match="took the pure JAX kernels"):
        jax.jit(jax.grad(loss)).trace(*operands).lower(lowering_platforms=("cuda",))


@in_part(1)
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
    thinned(
        [
            *((name, "gradient of vmap") for name in ("shared keys", "shared value", "shared bias")),
            *((name, "vmap of gradient") for name in ("shared keys", "shared query", "shared scale", "all but scale")),
        ],
        4,
    ),
)
def test_gradients_of_shared_operands_lower_for_cuda(shared: str, kind: str) -> None:
    in_axes = VMAPS[shared]
    run = jax.jit(shared_operand_gradients("mosaic_gpu", in_axes, kind))
    arguments = jax.eval_shape(functools.partial(vmap_arguments, in_axes))
    assert "mosaic_gpu" in run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
