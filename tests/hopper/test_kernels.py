"""The Hopper kernels on a GPU, beyond parity with the oracle (`tests/parity`): determinism, sizes, what masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.support.cases import Case, named_case, with_lengths
from tests.support.families import check_family, skip_unless_taken
from tests.support.hopper import VMAPS, make_arrays, mosaic_attention, shared_operand_gradients, vmap_arguments

pytestmark = pytest.mark.gpu(says_why=True)


@pytest.fixture(autouse=True)
def _hopper() -> None:  # pyright: ignore[reportUnusedFunction]
    skip_unless_taken(named_case("tile", "plain"), "mosaic_gpu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1000, 1000, 2, 4, 64), "bfloat16"),
        ((1, 3, 20000, 2, 4, 128), "bfloat16"),
        ((40, 200, 200, 8, 1, 64), "bfloat16"),
        ((2, 1000, 1000, 2, 4, 64), "float32"),
        ((40, 197, 203, 8, 1, 128), "float32"),
    ],
)
def test_two_runs_are_bitwise_equal(shape: Any, dtype: str) -> None:
    def call(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        attention = functools.partial(mosaic_attention, is_causal=True)
        out, pullback = jax.vjp(attention, query, key, value)
        return out, pullback(out)

    arrays = make_arrays(Case(shape, dtype))
    first, second = (jax.tree.map(np.asarray, jax.jit(call)(*arrays)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


# So few heads of keys, with so many rows, that groups of query heads are divided.
_GROUP = (1, 700, 150, 1, 12, 64)
_GROUPS = {
    "window": Case(_GROUP, "bfloat16", local_window_size=(600, 0)),
    "traced window": Case(_GROUP, "float16", local_window_size=(90, 30), traced=frozenset({"window"})),
    "causal, 128": Case((*_GROUP[:-1], 128), "bfloat16", is_causal=True, scale=0.3),
    "two heads, 256": Case((1, 1400, 140, 2, 6, 256), "bfloat16"),
    "lengths": with_lengths(Case((2, 700, 150, 1, 12, 40), "bfloat16", is_causal=True)),
    "bias and mask": Case(_GROUP, "bfloat16", bias=(True, True, True, True), mask=(True, False, False, True)),
    "dropout": Case(_GROUP, "bfloat16", dropout_rate=0.2),
    "float32": Case(_GROUP, "float32", is_causal=True),
    "float32, lengths": with_lengths(Case((2, 700, 150, 1, 12, 64), "float32")),
}


@pytest.mark.parametrize("name", _GROUPS)
def test_groups_in_parts(name: str) -> None:
    check_family(_GROUPS[name], "mosaic_gpu")


@pytest.mark.parametrize("S", [2, 40, 61])
def test_few_float32_keys(S: int) -> None:
    check_family(Case((2, 70, S, 2, 2, 32), "float32"), "mosaic_gpu")


def _last_row(call: Any, *operands: Any) -> Any:
    """Out and gradients of the last batch row, of all that `call` takes."""

    def run(operands: Any) -> Any:
        out, pullback = jax.vjp(lambda *floats: call(*floats, *operands[3:]), *operands[:3])
        return jax.tree.map(lambda x: x[-1].astype(jnp.float32), (out, pullback(out)))

    return jax.tree.map(np.asarray, jax.jit(run)(operands))


def _check_last_row(found: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(y).max())


@pytest.mark.parametrize("kind", ["elements", "bias", "mask"])
def test_offsets_beyond_32_bits(kind: str) -> None:
    """More than 2**31 elements in query, or in a bias or mask: the last batch row is as by itself."""
    B, T, S, N, G, H = (17, 8192, 8192, 128, 1, 128) if kind == "elements" else (3, 4096, 4096, 50, 1, 64)
    operands = make_arrays(Case((B, T, S, N, G, H), "bfloat16"))
    options: list[str] = []
    if kind != "elements":
        scores = jax.random.normal(jax.random.key(1), (B, N, T, S), jnp.bfloat16)
        operands.append(scores if kind == "bias" else scores > 0)
        options.append(kind)

    def call(query: Any, key: Any, value: Any, *others: Any) -> Any:
        return mosaic_attention(query, key, value, **dict(zip(options, others, strict=True)))

    _check_last_row(_last_row(call, *operands), _last_row(call, *(x[-1:] for x in operands)))


def test_dropout_of_more_than_32_bits_of_scores() -> None:
    operands = make_arrays(Case((3, 6000, 4096, 70, 1, 64), "bfloat16"))
    options: Any = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    implementations: Any = ("mosaic_gpu", "pure_jax")
    found, expected = (
        _last_row(functools.partial(flash_attention, implementation=implementation, **options), *operands)
        for implementation in implementations
    )
    _check_last_row(found, expected)


def _close(actual: Any, expected: Any) -> None:
    """Up to the rounding of 16-bit results and weights."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, atol=0.02 * np.abs(e).max(), rtol=0)


@pytest.mark.parametrize("in_axes", VMAPS.values(), ids=VMAPS)
@pytest.mark.parametrize("kind", ["gradient of vmap", "vmap of gradient"])
def test_gradients_of_shared_operands(in_axes: Any, kind: str) -> None:
    arguments = vmap_arguments(in_axes)
    actual, expected = (
        jax.jit(shared_operand_gradients(x, in_axes, kind))(*arguments) for x in ("mosaic_gpu", "pure_jax")
    )
    _close(actual, expected)


@pytest.mark.parametrize(
    "shape", [(20, 500, 500, 8, 1, 64), (40, 190, 300, 4, 2, 32), (30, 130, 200, 8, 1, 128)], ids=str
)
@pytest.mark.parametrize(("is_causal", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (True, "float32")])
def test_blocks_that_go_through_several_items_of_the_backward(shape: Any, is_causal: bool, dtype: str) -> None:
    arrays = make_arrays(Case(shape, dtype))

    def gradients(implementation: str) -> Any:
        def run(*arrays: jax.Array) -> Any:
            out, pullback = jax.vjp(
                lambda *x: flash_attention(*x, is_causal=is_causal, implementation=implementation), *arrays
            )
            return out, pullback(out)

        return jax.jit(run)(*arrays)

    first, second = gradients("mosaic_gpu"), gradients("mosaic_gpu")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _close(first, gradients("pure_jax"))


@pytest.mark.parametrize("value", [-1e4, -1e8, -1e9, -1e10, -1e30, float(jnp.finfo(jnp.float32).min), -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_bias_that_masks_is_a_mask(value: float, dtype: Any) -> None:
    """Also where a row has no other bias in all of the first tiles: the kernel visits the last ones first."""
    arrays = make_arrays(Case((2, 300, 700, 2, 2, 64), "bfloat16"))
    mask = jnp.arange(700)[None] <= jnp.arange(300)[:, None]
    mask &= jax.random.uniform(jax.random.key(1), mask.shape) < 0.1
    mask = mask.at[:, 0].set(True)[None, None]

    def gradients(*masking: Any) -> Any:
        def call(*arrays: jax.Array) -> Any:
            return mosaic_attention(*arrays, *masking)

        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(out)

    _close(jax.jit(gradients)(jnp.where(mask, 0.0, value).astype(dtype)), jax.jit(gradients)(None, mask))


@pytest.mark.parametrize("value", [-1e4, -1e9, -1e10, -1e30, -jnp.inf])
def test_rows_that_a_bias_masks_are_finite(value: float) -> None:
    """All keys are equal there."""
    query, key, values = make_arrays(Case((1, 130, 260, 2, 1, 64), "bfloat16"))
    bias = jnp.where(jnp.arange(130) % 3 == 0, value, 0.0)[None, None, :, None] * jnp.ones((1, 1, 1, 260))
    out, lse = jax.jit(flash_attention_with_lse)(query, key, values, bias)
    expected = values.astype(jnp.float32).mean(1, keepdims=True)
    if value < -1e8:  # where logits have absorbed the products
        _close(out[:, ::3], jnp.broadcast_to(expected, out[:, ::3].shape))
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.isfinite(np.asarray(lse, np.float32)).all()


def test_two_runs_of_the_gradient_of_bias_are_bitwise_equal() -> None:
    query, key, value = make_arrays(Case((30, 200, 200, 4, 1, 32), "bfloat16"))
    bias = jax.random.normal(jax.random.key(1), (1, 4, 200, 200))
    run = jax.jit(jax.grad(lambda b: mosaic_attention(query, key, value, b).astype(jnp.float32).sum()))
    np.testing.assert_array_equal(run(bias), run(bias))


def test_default_takes_the_kernel_on_hopper() -> None:
    text = jax.jit(flash_attention).lower(*make_arrays(named_case("tile", "plain"))).as_text()
    assert "mosaic_gpu" in text
