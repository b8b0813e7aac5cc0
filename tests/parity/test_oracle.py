"""The oracle against loops and jax.nn, and the tolerance rule against wrong attention: both must be able to fail."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention
from jax_native_flash_attn._kernels.xla.tiles import Tiles
from tests.support.cases import FAST_COMPILATION, Case, check_case, make_inputs
from tests.support.environment import enable_x64, fast_compilation, lenient_promotion
from tests.support.oracle import dense_float64, dense_numpy, float64_oracle
from tests.support.reference import reference_attention


def loops(query, key, value, bias, mask, scale, causal, window, lengths, keep, rate):
    """Attention one scalar at a time, in Python floats."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    out = np.zeros(query.shape)
    for b in range(B):
        for t in range(min(T, lengths[0][b])):
            for n in range(N):
                k = n // (N // K)
                weights = []
                for s in range(S):
                    ok = mask[b, 0, t, s] and s < lengths[1][b] and (s <= t or not causal)
                    ok = ok and t - window[0] <= s <= t + window[1]
                    dot = sum(float(query[b, t, n, h]) * float(key[b, s, k, h]) for h in range(H))
                    weights.append(math.exp(scale * dot + float(bias[0, n, 0, s])) if ok else 0.0)
                if not any(weights):
                    weights = [1.0] * S
                for s in range(S):
                    if keep[b, n, t, s]:
                        out[b, t, n] += weights[s] / sum(weights) / (1 - rate) * value[b, s, k]
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_oracle_equals_loops(causal: bool):
    B, T, S, N, K, H = 2, 5, 6, 4, 2, 3
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(s) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    bias, mask = rng.standard_normal((1, N, 1, S)), rng.random((B, 1, T, S)) < 0.7
    mask[0, 0, 1] = False
    keep = rng.random((B, N, T, S)) < 0.6
    lengths = (4, 5), (6, 3)
    expected = loops(query, key, value, bias, mask, 0.7, causal, (2, 3), lengths, keep, 0.4)
    with enable_x64():
        out, _ = float64_oracle(
            query, key, value, bias, mask, scale=0.7, is_causal=causal, local_window_size=(2, 3),
            query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1], dropout_rate=0.4, keep=keep,
        )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


def test_the_two_float64_oracles_agree():
    case = Case((2, 9, 7, 2, 2, 4), dtype="float64", mask=(True, True, True, True), is_causal=True, dropout_rate=0.3)
    case = dataclasses.replace(case, query_seq_lengths=(9, 4), key_value_seq_lengths=(7, 3))
    with enable_x64():
        inputs = make_inputs(case)
        arrays, scale = (inputs.query, inputs.key, inputs.value), np.float64(0.3)
        bias = np.random.default_rng(0).standard_normal((2, 4, 9, 7))
        assert not inputs.masks.allowed.any(-1).all()

        def attention(query, key, value, bias, scale):
            return dense_float64(query, key, value, bias, scale, inputs.masks)

        @functools.partial(jax.jit, compiler_options=fast_compilation())
        def run(dout, *arguments):
            out, vjp, lse = jax.vjp(attention, *arguments, has_aux=True)
            return out, lse, *vjp(dout)

        names = "out", "lse", "query", "key", "value", "bias", "scale"
        expected = dict(zip(names, run(inputs.dout, *arrays, bias, scale), strict=True))
    actual = dense_numpy(*arrays, bias, scale, inputs.masks, inputs.dout).results(2)
    live = inputs.masks.allowed.any(-1).transpose(0, 2, 1)
    for name in names:
        a, e = (np.asarray(x)[live] if name == "lse" else np.asarray(x) for x in (actual[name], expected[name]))
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-13)


def test_oracle_equals_jax_nn():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((2, 9, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8))]
    options: dict[str, Any] = {"is_causal": True, "key_value_seq_lengths": np.array([7, 4], np.int32)}

    @functools.partial(jax.jit, static_argnums=0, compiler_options=fast_compilation())
    def gradients(attention, arrays):
        return jax.grad(lambda *x: (attention(*x, **options) ** 2).sum(), argnums=(0, 1, 2))(*arrays)

    with lenient_promotion():
        theirs = gradients(reference_attention, arrays)
    with enable_x64():
        ours = gradients(lambda *x, **o: float64_oracle(*x, **o)[0], [x.astype(np.float64) for x in arrays])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


CASE = Case((2, 53, 67, 3, 1, 12), bias=(False, True, True, True), scale=0.3, traced=frozenset({"scale"}), seed=3)


def dense(query, key, value, bias, mask, *, scale, return_residual, **_: Any):
    """Plain attention for CASE, to be broken in the tests below."""
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * scale
    logits = logits + jnp.broadcast_to(bias, logits.shape)
    probs = jax.nn.softmax(logits, axis=-1)
    lse = jax.scipy.special.logsumexp(logits, axis=-1).transpose(0, 2, 1)
    return jnp.einsum("bnts,bsnh->btnh", probs, value, precision="highest"), jax.lax.stop_gradient(lse)


def test_the_tolerance_accepts_dense_attention():
    check_case(CASE, dense)


BROKEN = {
    "the last key is forgotten": lambda q, k, v, b: (q, k.at[:, -1].set(0), v, b),
    "a product in bfloat16": lambda q, k, v, b: (q.astype(jnp.bfloat16).astype(jnp.float32), k, v, b),
    "value off by 30 units in the last place": lambda q, k, v, b: (q, k, v * (1 + 30 * 2.0**-23), b),
    "no gradient of bias": lambda q, k, v, b: (q, k, v, jax.lax.stop_gradient(b)),
    "no gradient of key in one row": lambda q, k, v, b: (q, k.at[0, 5].set(jax.lax.stop_gradient(k[0, 5])), v, b),
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_tolerance_rejects_broken_attention(how: str):
    def broken(query, key, value, bias, mask, **options):
        query, key, value, bias = BROKEN[how](query, key, value, bias)
        return dense(query, key, value, bias, mask, **options)

    with pytest.raises(AssertionError, match="times that of dense attention"):
        check_case(CASE, broken)


# What is left where exact results are 0 or cancel: dense attention is then exact by luck, or adds in another order.
ROUNDINGS = {
    "one key, where a cap is reached": Case(
        (1, 1, 1, 1, 1, 8), magnitude=6.0, key_value_seq_lengths=(1,), scale=1.0, logits_soft_cap=2.0,
        block_q=32, block_kv=16, seed=25134,
    ),
    "one key, that is dropped, where a cap is reached": Case(
        (1, 1, 1, 1, 1, 8), "float16", magnitude=6.0, bias=(False, True, True, True), bias_dtype="bfloat16",
        dropout_rate=0.5, logits_soft_cap=0.5, with_lse=True, block_q=16, block_kv=16, seed=1360,
    ),
    "many rows of a group of heads": Case(
        (1, 97, 97, 1, 5, 10), "float64", magnitude=6.0, mask=(True, False, True, False), mask_density=0.0,
        scale=1.0, value_dim=8, block_q=128, block_kv=32, seed=3681221,
    ),
    "one key, dropped in some rows; the largest of several errors": Case(
        (1, 61, 1, 1, 2, 8), "bfloat16", bias=(True, True, False, False), mask_density=0.9, poison=True, scale=-0.5,
        dropout_rate=0.1, broadcast_dropout=True, value_dim=1, query_positions="permuted",
        key_value_positions="restarting", query_offset=0, integer_dtype="uint64", block_q=32, block_kv=32,
        unbatched=True, x64=True, seed=400,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ROUNDINGS)
def test_the_tolerance_accepts_roundings(what: str):
    check_case(ROUNDINGS[what], compiler_options=FAST_COMPILATION)


@jax.custom_vjp
def off_by_30_units(x: jax.Array) -> jax.Array:
    return x


off_by_30_units.defvjp(lambda x: (x, None), lambda _, g: (g * (1 + 30 * jnp.finfo(g.dtype).eps),))


def test_the_tolerance_rejects_more_than_roundings(monkeypatch: pytest.MonkeyPatch):
    def broken(query, key, value, *arguments, **options):
        return flash_attention(query, key, off_by_30_units(value), *arguments, **options)

    with pytest.raises(AssertionError, match="value: error"):
        check_case(ROUNDINGS["many rows of a group of heads"], broken, FAST_COMPILATION)
    monkeypatch.setattr(Tiles, "through_cap", lambda self, x, logits: x)
    with pytest.raises(AssertionError, match="query: error"):
        check_case(ROUNDINGS["one key, where a cap is reached"], compiler_options=FAST_COMPILATION)


def test_generated_inputs_follow_from_the_case():
    first, second = make_inputs(CASE), make_inputs(CASE)
    np.testing.assert_array_equal(first.query, second.query)
    assert first.bias is not None
    assert first.bias.shape == (1, 3, 53, 67)
