"""Parity with jax.nn.dot_product_attention, in the situations that JAX tests it in, and in corner cases.

Three-way: both are compared with the float64 oracle, and the library's error may be at most twice the reference's.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import _implementations, flash_attention
from tests.support.cases import Case, check_case
from tests.support.environment import enable_x64, fast_compilation, full_optimization, lenient_promotion
from tests.support.grids import rotated, thinned
from tests.support.oracle import assert_as_accurate_as_dense, dense_numpy, float64_oracle, masking, to_4d
from tests.support.reference import HAS_RESIDUAL, SIGNATURE, reference_attention

EXTENSIONS = {
    "dropout_rate": None,
    "dropout_rng": None,
    "deterministic": False,
    "block_q": None,
    "block_kv": None,
    "precision": None,
    "query_segment_ids": None,
    "key_value_segment_ids": None,
    "query_positions": None,
    "key_value_positions": None,
    "query_offset": None,
    "logits_soft_cap": None,
    "sinks": None,
    "broadcast_dropout": False,
    "score_mod": None,
    "score_mod_args": (),
    "mask_mod": None,
    "mask_mod_args": (),
}


def normal(seed: int, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def qkv(
    B: int, T: int, S: int, N: int, K: int, H: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(0, (B, T, N, H), dtype), normal(1, (B, S, K, H), dtype), normal(2, (B, S, K, H), dtype)


def oracle(*arrays: Any, **options: Any) -> Any:
    return float64_oracle(*arrays, **options)[0]


def exact_value_and_gradients(
    arrays: Any, dout: Any, mask: Any = None, scale: float | None = None, **selection: Any
) -> list[np.ndarray]:
    """As `value_and_gradients`, in float64."""
    wide = [to_4d(x.astype(np.float64)) for x in arrays]
    query, key, value, *bias = wide
    masks = masking(query, key, mask, **selection)
    full_bias = np.broadcast_to(bias[0] if bias else np.float64(0), masks.allowed.shape)
    scale64 = np.float64(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    results = dense_numpy(query, key, value, full_bias, scale64, masks, to_4d(dout.astype(np.float64)))
    named = results.results(key.shape[2])
    for x in bias:
        named["bias"] = named["bias"].sum(tuple(i for i, n in enumerate(x.shape) if n == 1), keepdims=True)
    names = ("query", "key", "value", "bias")[: len(arrays)]
    return [named["out"].reshape(dout.shape), *(named[k].reshape(x.shape) for k, x in zip(names, arrays, strict=True))]


def value_and_gradients(
    attention: Any, compiler_options: dict[str, Any] | None = None, **options: Any
) -> Callable[..., list[Any]]:
    """A compiled function of arrays (query, key, value and perhaps bias) and dout: [out, gradient of each array]."""

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def run(arrays, dout):
        out, vjp = jax.vjp(lambda *arrays: attention(*arrays, **options), *arrays)
        return [out, *vjp(dout.astype(out.dtype))]

    return lambda arrays, dout: run(tuple(arrays), dout)


def compare(arrays: Any, compiler_options: dict[str, Any] | None = None, **options: Any) -> None:
    """Library, reference and oracle on one call: value and the gradient of every array."""
    dout = normal(9, arrays[0].shape, arrays[0].dtype)
    actual = value_and_gradients(flash_attention, compiler_options, **options)(arrays, dout)
    with lenient_promotion():
        dense = value_and_gradients(reference_attention, compiler_options, **options)(arrays, dout)
    expected = exact_value_and_gradients(arrays, dout, **options)
    # Of all results, because one may be 0 but for rounding: the gradient of query where each row has one key.
    largest = max(np.abs(x).max() for x in expected)
    names = ("out", "query", "key", "value", "bias")
    for name, *results in zip(names, actual, dense, expected, strict=False):
        assert results[0].dtype == results[1].dtype
        floor = 2 * float(jnp.finfo(results[0].dtype).eps) * largest
        assert_as_accurate_as_dense(name, *results, floor=floor)


# ------------------------------------------------------------------------------------------ signature


def test_signature_is_that_of_the_installed_reference():
    ours = inspect.signature(flash_attention).parameters
    for name, parameter in SIGNATURE.parameters.items():
        assert name in ours
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name
    shared = [name for name in ours if name in SIGNATURE.parameters]
    assert shared == list(SIGNATURE.parameters)


def test_extensions_are_keyword_only_with_neutral_defaults():
    ours = inspect.signature(flash_attention).parameters
    extra = {k: p for k, p in ours.items() if k not in SIGNATURE.parameters and k != "return_residual"}
    assert {k: p.default for k, p in extra.items()} == EXTENSIONS
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra.values())
    assert ours["return_residual"].default is False


# ------------------------------------------------------------------- what JAX's own tests go through


@pytest.mark.parametrize(("G", "use_vmap"), thinned(rotated([1, 2, 4], [False, True]), 2))
def test_grouped_query_heads(G: int, use_vmap: bool):
    B, T, N, H = 2, 128, 4, 32
    query, key, value = qkv(B, T, T, N, N // G, H, jnp.bfloat16)
    dout = normal(3, query.shape, jnp.bfloat16)
    # Each group's key/value head repeated: the same attention without groups.
    repeated = query, np.repeat(key, G, axis=2), np.repeat(value, G, axis=2)
    attention = jax.vmap(flash_attention) if use_vmap else flash_attention
    actual = value_and_gradients(attention)((query, key, value), dout)
    with lenient_promotion():
        dense = value_and_gradients(reference_attention)(repeated, dout)
    expected = exact_value_and_gradients((query, key, value), dout)
    for i in (2, 3):
        dense[i] = np.asarray(dense[i]).astype(np.float32).reshape(B, T, N // G, G, H).sum(axis=3)
    for name, *results in zip(("out", "query", "key", "value"), actual, dense, expected, strict=True):
        assert_as_accurate_as_dense(name, *results)


@pytest.mark.parametrize(("use_vmap", "dtype"), thinned(rotated([False, True], ["float32", "bfloat16"]), 2))
@pytest.mark.skipif(not HAS_RESIDUAL, reason="this JAX has no return_residual")
def test_residual(use_vmap: bool, dtype: str):
    query, key, value = qkv(2, 33, 41, 4, 2, 16, dtype)
    options: dict[str, Any] = {"is_causal": True, "return_residual": True}

    def flash(query, key, value):
        return flash_attention(query, key, value, **options)

    out, lse = jax.jit(jax.vmap(flash) if use_vmap else flash)(query, key, value)
    reference_out, reference_lse = reference_attention(query, key, value, **options)
    assert lse.shape == reference_lse.shape == query.shape[:-1]
    assert lse.dtype == reference_lse.dtype == query.dtype
    with enable_x64():
        expected = float64_oracle(query, key, value, is_causal=True)
    assert_as_accurate_as_dense("out", out, reference_out, expected[0])
    assert_as_accurate_as_dense("lse", lse, reference_lse, expected[1])


def test_residual_has_no_gradient():
    query, key, value = qkv(1, 8, 8, 2, 2, 4)

    def lse_sum(*arrays):
        return flash_attention(*arrays, return_residual=True)[1].sum()

    for gradient in jax.grad(lse_sum, argnums=(0, 1, 2))(query, key, value):
        assert not np.asarray(gradient).any()


B, T, S, N, H = 2, 64, 64, 4, 16
LENGTHS = {
    "query_seq_lengths": np.array([T // 2, T // 4], np.int32),
    "key_value_seq_lengths": np.array([S // 4, S // 2], np.int32),
}
CUSTOM = np.tril(np.ones((T, S), bool))[None, None]
MODES = {
    "plain": {},
    "bias": {"bias": (1, N, T, S)},
    "causal": {"is_causal": True},
    "padding": LENGTHS,
    "custom": {"mask": CUSTOM},
    "causal+padding": {"is_causal": True, **LENGTHS},
    "custom+padding": {"mask": CUSTOM, **LENGTHS},
    "bias+causal": {"bias": (1, N, T, S), "is_causal": True},
    "causal+window": {"is_causal": True, "local_window_size": (3, 2)},
    "window": {"local_window_size": (3, 0)},
    "symmetric window": {"local_window_size": 5},
    "window+padding": {"local_window_size": (3, 7), **LENGTHS},
    "causal+custom": {"is_causal": True, "mask": np.eye(T, dtype=bool)[::-1][None, None] | CUSTOM},
}


@pytest.mark.parametrize(
    ("mode", "dtype", "is_optimized"),
    [
        *thinned(((mode, "float32", False) for mode in MODES), 2),
        *thinned(((mode, dtype, True) for mode in MODES for dtype in ("float32", "bfloat16")), 9, 2),
    ],
)
def test_every_mask_mode(mode: str, dtype: str, is_optimized: bool):
    options = dict(MODES[mode])
    arrays = list(qkv(B, T, S, N, N, H, dtype))
    if "bias" in options:
        arrays.append(normal(4, options.pop("bias"), dtype))
    compare(arrays, full_optimization() if is_optimized else None, **options)


@pytest.mark.parametrize(("batch", "use_vmap"), thinned(rotated([1, 5], [False, True]), 2))
def test_bias_gradient_batched_and_not(batch: int, use_vmap: bool):
    S, N, H = 48, 4, 16
    x, bias = normal(0, (batch, S, N, H)), normal(1, (batch, N, S, S))
    mask = np.ones((1, 1, S), bool)

    def gradients(attention):
        def loss(x, bias):
            return (attention(x, x, x, bias, mask) * x).sum()

        def mapped(x, bias):
            return jax.vmap(loss)(x, bias).sum()

        return jax.jit(jax.grad(mapped if use_vmap else loss, argnums=(0, 1)))

    actual = gradients(flash_attention)(x, bias)
    with lenient_promotion():
        dense = gradients(reference_attention)(x, bias)
    with enable_x64():
        wide = x.astype(np.float64), bias.astype(np.float64)
        expected = gradients(oracle)(*wide)
    for name, *results in zip(("x", "bias"), actual, dense, expected, strict=True):
        # The gradient of x is the sum of three.
        floor = 4 * np.finfo(np.float32).eps * np.abs(results[-1])
        assert_as_accurate_as_dense(name, *results, floor=floor)


@pytest.mark.parametrize("use_mask", thinned([False, True], 2))
def test_float64_masks_are_finite_under_debug_infs(use_mask: bool):
    with enable_x64(), jax.debug_infs(True), jax.debug_nans(True):
        query, key, value = qkv(1, 9, 9, 2, 2, 8, np.float64)
        mask = np.tril(np.ones((9, 9), bool)) if use_mask else None
        mask = None if mask is None else mask & (np.arange(9) != 3)[:, None]  # row 3 has no key
        out = flash_attention(query, key, value, None, mask, is_causal=not use_mask)
        gradient = jax.grad(lambda q: flash_attention(q, key, value, None, mask).sum())(query)
    assert np.isfinite(out).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", thinned([0.3, -1.0, 0.0], 2))
def test_scale_static_and_traced(scale: float):
    arrays = qkv(2, 17, 23, 2, 1, 8)
    compare(arrays, scale=scale)
    static = flash_attention(*arrays, scale=scale)
    traced = jax.jit(lambda s: flash_attention(*arrays, scale=s))(np.float32(scale))
    np.testing.assert_allclose(traced, static, rtol=1e-5, atol=1e-6)


def test_gradient_of_scale():
    arrays = qkv(2, 17, 23, 2, 1, 8)
    dout = normal(5, arrays[0].shape)

    def gradient(attention, arrays, dout, scale):
        return jax.grad(lambda s: (attention(*arrays, scale=s) * dout).sum())(scale)

    run = functools.partial(jax.jit, static_argnums=0, compiler_options=fast_compilation())
    actual = run(gradient)(flash_attention, arrays, dout, np.float32(0.4))
    with enable_x64():
        wide = [x.astype(np.float64) for x in arrays]
        expected = run(gradient)(oracle, wide, dout.astype(np.float64), np.float64(0.4))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(("left", "right"), thinned([(0, 0), (5, 2), (100, 0), (-2, 6), (6, -2)], 2))
def test_window_static_and_traced(left: int, right: int):
    window = left, right
    arrays = qkv(1, 40, 37, 2, 2, 8)
    check_case(Case((1, 40, 37, 2, 1, 8), local_window_size=window))
    static = flash_attention(*arrays, local_window_size=window)
    traced = jax.jit(lambda left, right: flash_attention(*arrays, local_window_size=(left, right)))(*window)
    np.testing.assert_allclose(traced, static, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- broadcasting


_BROADCAST = {
    str(shape): shape for shape in ((), (1,), (7,), (5, 1), (5, 7), (1, 5, 7), (4, 1, 7), (2, 1, 1, 1), (2, 4, 5, 7))
}


@pytest.mark.parametrize("name", thinned(_BROADCAST, 2))
def test_bias_and_mask_broadcast(name: str):
    shape = _BROADCAST[name]
    query, key, value = qkv(2, 5, 7, 4, 2, 8)
    bias = normal(3, shape)
    mask = np.array(np.random.default_rng(0).random(shape) < 0.7)
    compare((query, key, value, bias), mask=mask)


def test_unbatched_arrays():
    query, key, value = (x[0] for x in qkv(1, 13, 11, 4, 2, 8))
    compare((query, key, value, normal(4, (4, 13, 11))), is_causal=True, key_value_seq_lengths=np.array([9], np.int32))


def test_arguments_by_position_and_by_name_and_as_numpy_or_lists():
    query, key, value = qkv(1, 5, 5, 1, 1, 4)
    bias, mask = normal(3, (1, 1, 5, 5)), np.tril(np.ones((1, 1, 5, 5), bool))
    expected = flash_attention(query, key, value, bias, mask)
    named = flash_attention(query=query, key=key, value=value, bias=bias, mask=mask)
    lists = flash_attention(*(x.tolist() for x in (query, key, value, bias, mask)))
    np.testing.assert_array_equal(named, expected)
    np.testing.assert_allclose(lists, expected, rtol=1e-6)


def test_float16_runs_and_is_accurate():
    arrays = qkv(2, 24, 31, 4, 2, 16, np.float16)
    out = jax.jit(lambda *x: flash_attention(*x, is_causal=True))(*arrays)
    assert out.dtype == jnp.float16
    with enable_x64():
        expected, _ = float64_oracle(*arrays, is_causal=True)
    assert np.abs(np.asarray(out, np.float64) - np.asarray(expected)).max() < 2e-3


def test_float64_is_float64_throughout():
    with enable_x64():
        arrays = qkv(2, 24, 31, 4, 2, 16, np.float64)
        actual = jax.jit(lambda *x: flash_attention(*x, return_residual=True))(*arrays)
        expected = float64_oracle(*arrays)
    for ours, exact in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-14)


def test_outside_jit_equals_inside():
    arrays = qkv(1, 40, 40, 2, 1, 8)
    eager = flash_attention(*arrays, is_causal=True, block_q=16, block_kv=16)
    jitted = jax.jit(lambda *x: flash_attention(*x, is_causal=True, block_q=16, block_kv=16))(*arrays)
    np.testing.assert_allclose(eager, jitted, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------- corner cases


@pytest.mark.parametrize("is_causal", thinned([False, True], 2))
def test_rows_without_a_key_are_the_mean_of_value(is_causal: bool):
    query, key, value = qkv(2, 6, 9, 2, 1, 4)
    mask = np.ones((1, 1, 6, 9), bool)
    mask[..., 2, :] = False
    lengths = np.array([9, 0], np.int32)
    options = {"mask": mask, "key_value_seq_lengths": lengths, "is_causal": is_causal}
    compare((query, key, value), **options)
    out, lse = flash_attention(query, key, value, **options, return_residual=True)
    np.testing.assert_allclose(out[0, 2], np.repeat(value[0].mean(axis=0), 2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(out[1], np.broadcast_to(value[1].mean(axis=0), (6, 2, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[1], -0.7 * np.finfo(np.float32).max, rtol=1e-6)


def test_rows_past_the_query_length_are_zero():
    query, key, value = qkv(2, 6, 9, 2, 1, 4)
    lengths = np.array([0, 4], np.int32)
    out, lse = flash_attention(query, key, value, query_seq_lengths=lengths, return_residual=True)
    assert not np.asarray(out[0]).any()
    assert not np.asarray(out[1, 4:]).any()
    assert np.asarray(out[1, :4]).any()
    np.testing.assert_allclose(lse[0], -0.7 * np.finfo(np.float32).max, rtol=1e-6)


@pytest.mark.parametrize("is_causal", thinned([False, True], 2))
def test_padding_never_leaks(is_causal: bool):
    query, key, value = qkv(2, 40, 40, 2, 1, 8)
    lengths = {"query_seq_lengths": np.array([33, 40], np.int32), "key_value_seq_lengths": np.array([21, 40], np.int32)}
    run = value_and_gradients(flash_attention, is_causal=is_causal, block_q=16, block_kv=16, **lengths)
    dout = normal(8, query.shape)
    clean = run((query, key, value), dout)
    for bad in (np.nan, np.inf):
        dirty = [x.copy() for x in (query, key, value)]
        dirty[0][0, 33:] = dirty[1][0, 21:] = dirty[2][0, 21:] = bad
        for ours, expected in zip(run(dirty, dout), clean, strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_no_keys_at_all():
    query, key, value = qkv(2, 3, 0, 2, 1, 4)
    out, lse = flash_attention(query, key, value, return_residual=True)
    assert out.shape == query.shape
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()
    gradients = jax.grad(lambda *x: flash_attention(*x).sum(), argnums=(0, 1, 2))(query, key, value)
    assert [g.shape for g in gradients] == [x.shape for x in (query, key, value)]
    assert not np.asarray(gradients[0]).any()


@pytest.mark.parametrize("empty", ["T", "B", "N"])
def test_no_queries(empty: str):
    sizes = {"B": 2, "T": 3, "N": 2} | {empty: 0}
    query, key, value = qkv(sizes["B"], sizes["T"], 5, sizes["N"], 2, 4)
    out, vjp = jax.vjp(flash_attention, query, key, value)
    assert out.shape == query.shape
    gradients = vjp(jnp.zeros(out.shape, out.dtype))
    assert [g.shape for g in gradients] == [x.shape for x in (query, key, value)]
    assert not any(np.asarray(g).any() for g in gradients)


def test_one_query_one_key():
    query, key, value = qkv(1, 1, 1, 1, 1, 1)
    np.testing.assert_allclose(flash_attention(query, key, value, is_causal=True), value, rtol=1e-6)


def test_bias_of_minus_infinity_masks():
    query, key, value = qkv(1, 33, 33, 2, 2, 8)
    bias = np.where(np.tril(np.ones((33, 33), bool)), 0.0, -np.inf).astype(np.float32)[None, None]
    masked = flash_attention(query, key, value, is_causal=True, block_q=16, block_kv=16)
    biased = flash_attention(query, key, value, bias, block_q=16, block_kv=16)
    np.testing.assert_allclose(biased, masked, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda q: flash_attention(q, key, value, bias, block_q=16, block_kv=16).sum())(query)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("magnitude", thinned([1e9, 0.7 * 3.4e38, float(np.finfo(np.float32).max)], 2))
def test_large_negative_bias_masks_and_a_row_full_of_it_is_uniform(magnitude: float):
    # What code without a mask argument does: finfo.min as a bias. exp2 must not overflow on it.
    query, key, value = qkv(1, 5, 12, 1, 1, 8)
    bias = np.zeros((1, 1, 5, 12), np.float32)
    bias[..., 7:] = -magnitude
    bias[0, 0, 3] = -magnitude
    out = flash_attention(query, key, value, bias)
    dense = reference_attention(query, key, value, bias)
    np.testing.assert_allclose(out, dense, rtol=1e-5, atol=1e-5)


def test_very_large_logits():
    query, key, value = qkv(1, 20, 50, 2, 1, 8)
    query = 100 * query
    with enable_x64():
        expected = np.asarray(oracle(query, key, value, scale=30.0))
    # A rounding of the largest logit is a relative error of a probability.
    largest_logit = 30.0 * np.abs(np.einsum("btnh,bsh->bnts", query, key[:, :, 0])).max()
    atol = 4 * np.finfo(np.float32).eps * largest_logit * np.abs(value).max()
    assert atol < 0.05
    for blocks in (None, 16):
        out = flash_attention(query, key, value, scale=30.0, block_q=blocks, block_kv=blocks)
        np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("T", [1, 2, 13, 127])
@pytest.mark.parametrize("blocks", [(1, 1), (16, 16), (32, 8), (1000, 1000)])
def test_block_sizes_change_nothing(T: int, blocks: tuple[int, int]):
    if blocks == (1, 1) and T > 13:
        pytest.skip("as many tiles as elements")
    query, key, value = qkv(1, T, T, 2, 1, 8)
    default = flash_attention(query, key, value, is_causal=True)
    explicit = flash_attention(query, key, value, is_causal=True, block_q=blocks[0], block_kv=blocks[1])
    np.testing.assert_allclose(explicit, default, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pure_jax"])
def test_implementations_on_a_cpu_are_the_default(implementation: Any):
    arrays = qkv(1, 8, 8, 1, 1, 4)
    np.testing.assert_array_equal(flash_attention(*arrays), flash_attention(*arrays, implementation=implementation))


def test_precision_reaches_the_products():
    arrays = qkv(1, 8, 8, 1, 1, 4)

    def text(precision):
        return jax.jit(lambda *x: flash_attention(*x, precision=precision)).lower(*arrays).as_text()

    assert "HIGHEST" in text(jax.lax.Precision.HIGHEST)
    assert "HIGHEST" not in text(None)
    eye = np.eye(2, dtype=np.float32)
    for precision in PRECISIONS:
        products = jax.jit(functools.partial(jnp.dot, precision=precision)).lower(eye, eye).as_text()
        assert _precisions_in(text(precision)) == _precisions_in(products), precision


PRECISIONS = (
    None, *jax.lax.Precision, "default", "high", "highest", "fastest", "float32", "bfloat16", "tensorfloat32",
    "bfloat16_3x", ("highest", "default"), (jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT),
    "F32_F32_F32", jax.lax.DotAlgorithmPreset.F32_F32_F32,
)  # fmt: skip


def _precisions_in(program: str) -> set[str]:
    """Of all products in a program; the default is not written out."""
    found = re.findall(r"precision = \[([^]]*)\]|algorithm = <([^>]*)>", program)
    return {x for pair in found for x in pair} - {"", "DEFAULT, DEFAULT"}


@pytest.mark.gpu
def test_cudnn_passes_through():
    arrays = qkv(2, 64, 64, 4, 2, 64, jnp.bfloat16)
    ours = flash_attention(*arrays, is_causal=True, implementation="cudnn")
    theirs = reference_attention(*arrays, is_causal=True, implementation="cudnn")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "neutral",
    [
        {"dropout_rate": np.float32(0)},
        {"dropout_rate": 0.5, "deterministic": True},
        {"query_offset": np.int64(0)},
        {"broadcast_dropout": np.bool_(False)},
    ],
    ids=str,
)
def test_cudnn_takes_extensions_that_ask_for_nothing(neutral: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    passed: list[dict[str, Any]] = []
    monkeypatch.setattr(_implementations, "jax_attention", lambda **x: passed.append(x))
    arrays = qkv(2, 8, 8, 4, 2, 16, jnp.float32)
    flash_attention(*arrays, is_causal=True, implementation="cudnn", **neutral)
    assert passed[0].keys() <= SIGNATURE.parameters.keys()
    assert passed[0]["is_causal"] is True


def test_default_scale_is_one_over_root_of_head_dimension():
    arrays = qkv(1, 6, 6, 1, 1, 16)
    explicit = flash_attention(*arrays, scale=1 / math.sqrt(16))
    np.testing.assert_allclose(flash_attention(*arrays), explicit, rtol=1e-6)
