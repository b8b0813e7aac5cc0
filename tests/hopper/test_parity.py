"""The Mosaic GPU kernels on a Hopper GPU: parity with the oracle, and with the pure JAX kernels."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.support.cases import Case, check_case
from tests.support.hopper import (
    OPTIONS,
    SHAPES,
    VMAPS,
    make_arrays,
    mosaic_attention,
    shared_operand_gradients,
    vmap_arguments,
)
from tests.support.targets import why_no_hopper

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if reason := why_no_hopper():
        pytest.skip(reason)


def _case(shape: str, options: str) -> Case:
    return Case(SHAPES[shape], **{"dtype": "bfloat16", **OPTIONS[options]})


def _with_lengths(case: Case, *, of_queries: bool = True) -> Case:
    """Lengths over half of each array, one past it and one of zero, and so on, and NaN in the padding."""
    B, T, S, *_ = case.shape
    lengths = [(n // 2 + 1, n + 3, 0) if of_queries else (0, n // 2 + 1, n + 3) for n in (T, S)]
    lengths = [(some * B)[:B] for some in lengths]
    query_lengths = {"query_seq_lengths": lengths[0]} if of_queries else {}
    return Case(**{**case.__dict__, **query_lengths, "key_value_seq_lengths": lengths[1], "poison": True})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", ["plain", "causal", "window"])
def test_shapes(shape: str, options: str) -> None:
    check_case(_case(shape, options), mosaic_attention)


@pytest.mark.parametrize("shape", ["odd", "wide"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(shape: str, options: str) -> None:
    check_case(_case(shape, options), mosaic_attention)


@pytest.mark.parametrize("shape", ["odd", "short", "wide", "many items", "one row, keys split", "rows, keys split"])
@pytest.mark.parametrize("options", ["plain", "causal", "window", "mask", "bias", "bias of keys", "dropout", "scale"])
def test_lengths_with_poisoned_padding(shape: str, options: str) -> None:
    check_case(_with_lengths(_case(shape, options)), mosaic_attention)


@pytest.mark.parametrize("shape", ["odd", "eighty", "wide", "many items", "one row, keys split", "rows, keys split"])
@pytest.mark.parametrize("options", ["plain", "causal", "bias", "dropout", "scale"])
def test_lengths_of_keys_with_poisoned_padding(shape: str, options: str) -> None:
    check_case(_with_lengths(_case(shape, options), of_queries=False), mosaic_attention)


@pytest.mark.parametrize("shape", ["many items", "one row, keys split", "rows, keys split"])
@pytest.mark.parametrize("options", ["bias", "bias of all", "mask", "mask of keys", "sparse mask", "traced window"])
def test_masks_and_biases_over_items_and_parts(shape: str, options: str) -> None:
    check_case(_case(shape, options), mosaic_attention)


FLOAT32_SHAPES = ["odd", "prime", "eighty", "narrow", "many items", "rows, keys split"]
FLOAT32_OPTIONS = ["plain", "causal", "traced window", "scale", "bias float32", "mask", "mask of keys", "dropout"]


@pytest.mark.parametrize(
    ("shape", "options"),
    [*itertools.product(FLOAT32_SHAPES, ["causal"]), *itertools.product(["prime"], FLOAT32_OPTIONS)],
)
@pytest.mark.parametrize("lengths", ["", "keys", "queries and keys"])
def test_float32(shape: str, options: str, lengths: str) -> None:
    """Beside dense attention in TensorFloat-32."""
    case = Case(SHAPES[shape], **{**OPTIONS[options], "dtype": "float32"})
    case = _with_lengths(case, of_queries=lengths != "keys") if lengths else case
    check_case(case, mosaic_attention, dense_on_cpu=False)


@pytest.mark.parametrize("shape", [(2, 1000, 1000, 8, 2, 64), (1, 3, 20000, 8, 2, 128), (40, 200, 200, 8, 8, 64)])
def test_two_runs_are_bitwise_equal(shape: tuple[int, ...]) -> None:
    def call(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        attention = functools.partial(mosaic_attention, is_causal=True)
        out, pullback = jax.vjp(attention, query, key, value)
        return out, pullback(out)

    arrays = make_arrays(*shape)
    first, second = (jax.tree.map(np.asarray, jax.jit(call)(*arrays)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


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
    B, T, S, N, K, H = (17, 8192, 8192, 128, 128, 128) if kind == "elements" else (3, 4096, 4096, 50, 50, 64)
    operands = make_arrays(B, T, S, N, K, H)
    options: list[str] = []
    if kind != "elements":
        scores = jax.random.normal(jax.random.key(1), (B, N, T, S), jnp.bfloat16)
        operands.append(scores if kind == "bias" else scores > 0)
        options.append(kind)

    def call(query: Any, key: Any, value: Any, *others: Any) -> Any:
        return mosaic_attention(query, key, value, **dict(zip(options, others, strict=True)))

    _check_last_row(_last_row(call, *operands), _last_row(call, *(x[-1:] for x in operands)))


def test_dropout_of_more_than_32_bits_of_scores() -> None:
    operands = make_arrays(3, 6000, 4096, 70, 70, 64)
    options: Any = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(3)}
    implementations: Any = ("mosaic_gpu", "pure_jax")
    found, expected = (
        _last_row(functools.partial(flash_attention, implementation=implementation, **options), *operands)
        for implementation in implementations
    )
    _check_last_row(found, expected)


def test_vmap_over_some_operands() -> None:
    query, key, value = make_arrays(2, 100, 150, 4, 2, 64)
    queries = jnp.stack([query, query * 2, -query])
    run = jax.vmap(lambda q: mosaic_attention(q, key, value, is_causal=True))
    expected = [mosaic_attention(q, key, value, is_causal=True) for q in queries]
    np.testing.assert_array_equal(jax.jit(run)(queries).astype(jnp.float32), jnp.stack(expected).astype(jnp.float32))


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


def test_jacobian_batches_the_cotangents_alone() -> None:
    query, key, value = make_arrays(1, 3, 70, 2, 1, 64)

    def jacobian(implementation: str) -> Any:
        return jax.jacrev(lambda *x: flash_attention(*x, implementation=implementation)[0, :, 0, :2], argnums=(0, 1, 2))

    _close(*(jax.jit(jacobian(x))(query, key, value) for x in ("mosaic_gpu", "pure_jax")))


@pytest.mark.parametrize("with_out", [False, True])
def test_cotangent_of_lse(with_out: bool) -> None:
    arrays = make_arrays(2, 100, 150, 4, 2, 64)
    bias = jax.random.normal(jax.random.key(1), (2, 1, 100, 1))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        out, lse = flash_attention_with_lse(query, key, value, bias, is_causal=True)
        return (lse**2).sum() + ((out.astype(jnp.float32) ** 2).sum() if with_out else 0.0)

    gradients = jax.jit(jax.grad(loss, argnums=range(4)))
    # In float32 the gradients are pure JAX's.
    _close(gradients(*arrays, bias), gradients(*(x.astype(jnp.float32) for x in arrays), bias))


@pytest.mark.parametrize("full", list(itertools.product((False, True), repeat=4)), ids=str)
def test_gradient_of_bias_in_each_shape(full: Any) -> None:
    check_case(Case(SHAPES["odd"], dtype="bfloat16", bias=full, mask=(True, False, False, True)), mosaic_attention)


@pytest.mark.parametrize("scale", [-0.125, 0.3, 3.7, -1e-13, 1e-20])
@pytest.mark.parametrize("mask", [None, (True, False, False, True)])
def test_any_scale_beside_a_bias(scale: float, mask: Any) -> None:
    """Products start with the bias, divided by what is left of the scale."""
    case = Case(SHAPES["odd"], dtype="bfloat16", bias=(False, True, True, True), mask=mask, scale=scale)
    check_case(case, mosaic_attention)


@pytest.mark.parametrize(
    "shape", [(20, 500, 500, 8, 8, 64), (40, 190, 300, 8, 4, 32), (30, 130, 200, 8, 8, 128)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_that_go_through_several_items_of_the_backward(shape: Any, is_causal: bool) -> None:
    arrays = make_arrays(*shape)

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
    arrays = make_arrays(2, 300, 700, 4, 2, 64)
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
    query, key, values = make_arrays(1, 130, 260, 2, 2, 64)
    bias = jnp.where(jnp.arange(130) % 3 == 0, value, 0.0)[None, None, :, None] * jnp.ones((1, 1, 1, 260))
    out, lse = jax.jit(flash_attention_with_lse)(query, key, values, bias)
    expected = values.astype(jnp.float32).mean(1, keepdims=True)
    if value < -1e8:  # where logits have absorbed the products
        _close(out[:, ::3], jnp.broadcast_to(expected, out[:, ::3].shape))
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.isfinite(np.asarray(lse, np.float32)).all()


def test_two_runs_of_the_gradient_of_bias_are_bitwise_equal() -> None:
    query, key, value = make_arrays(30, 200, 200, 4, 4, 32)
    bias = jax.random.normal(jax.random.key(1), (1, 4, 200, 200))
    run = jax.jit(jax.grad(lambda b: mosaic_attention(query, key, value, b).astype(jnp.float32).sum()))
    np.testing.assert_array_equal(run(bias), run(bias))


def test_default_takes_the_kernel_on_hopper() -> None:
    text = jax.jit(flash_attention).lower(*make_arrays(1, 128, 128, 2, 2, 64)).as_text()
    assert "mosaic_gpu" in text
