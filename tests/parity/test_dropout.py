"""Dropout: the kept weights are those that jax.random.bernoulli keeps, whatever the block sizes."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import dropout_keep_mask, flash_attention
from jax_native_flash_attn._semantics.dropout import make_dropout
from tests.support.environment import bernoulli, enable_x64, fast_compilation
from tests.support.grids import rotated, thinned
from tests.support.oracle import float64_oracle

FAST = fast_compilation()
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 33, 64), (3, 2, 17, 1), (2, 2, 0, 3)]


def qkv(B: int, T: int, S: int, N: int, K: int, H: int, dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


keep_mask = functools.partial(jax.jit, static_argnums=(1, 2), compiler_options=FAST)(dropout_keep_mask)


@pytest.mark.parametrize(("rate", "x64"), thinned(rotated([0.0, 0.1, 0.5, 0.999, 1.0], [False, True]), 2))
def test_keep_mask_is_bernoulli_bit_for_bit(rate: float, x64: bool):
    with enable_x64(x64):
        for shape in SHAPES:
            rng = jax.random.key(hash(shape) % 1000)
            keep = jax.jit(lambda rng: dropout_keep_mask(rng, rate, shape), compiler_options=FAST)(rng)  # noqa: B023
            assert keep.dtype == bool
            np.testing.assert_array_equal(keep, bernoulli(rng, 1 - rate, shape))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_keep_mask_of_extreme_rates(rate: float):
    keep = np.asarray(keep_mask(jax.random.key(0), rate, (2, 2, 8, 8)))
    assert keep.all() if rate == 0.0 else not keep.any()


def test_keep_mask_under_jit_and_of_old_style_keys():
    shape = (2, 2, 16, 9)
    expected = jax.random.bernoulli(jax.random.key(3), 0.7, shape)
    jitted = jax.jit(lambda rng: dropout_keep_mask(rng, 0.3, shape))
    np.testing.assert_array_equal(jitted(jax.random.key(3)), expected)
    np.testing.assert_array_equal(jitted(jax.random.PRNGKey(3)), expected)


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("x64", [False, True])
def test_old_style_and_typed_keys_give_the_same_output(old_style: bool, x64: bool):
    with enable_x64(x64):
        query, key, value = qkv(1, 12, 20, 2, 2, 8)
        rng = (jax.random.PRNGKey if old_style else jax.random.key)(5)
        keep = bernoulli(rng, 0.6, (1, 2, 12, 20))
        out = flash_attention(query, key, value, dropout_rate=0.4, dropout_rng=rng)
    with enable_x64():
        expected, _ = float64_oracle(query, key, value, dropout_rate=0.4, keep=np.asarray(keep))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_dropout_that_batch_rows_and_heads_share():
    query, key, value = qkv(3, 12, 20, 4, 2, 8)
    rng = jax.random.key(5)
    keep = np.asarray(bernoulli(rng, 0.6, (1, 1, 12, 20)))
    np.testing.assert_array_equal(dropout_keep_mask(rng, 0.4, (1, 1, 12, 20)), keep)
    options: dict[str, Any] = {"dropout_rate": 0.4, "dropout_rng": rng, "broadcast_dropout": True}
    attention = functools.partial(flash_attention, **options, block_q=8, block_kv=8)
    with enable_x64():
        expected, _ = float64_oracle(query, key, value, dropout_rate=0.4, keep=np.broadcast_to(keep, (3, 4, 12, 20)))
    for function in (attention, jax.vmap(attention)):
        out = jax.jit(function, compiler_options=FAST)(query, key, value)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_agree_with_dropout_keep_mask(impl: str):
    query, key, value = qkv(1, 40, 50, 2, 1, 8)
    rng = jax.random.key(1, impl=impl)
    keep = np.asarray(keep_mask(rng, 0.25, (1, 2, 40, 50)))
    assert abs(keep.mean() - 0.75) < 0.05  # 4,000 draws: seven standard deviations
    assert (keep != np.asarray(keep_mask(jax.random.key(2, impl=impl), 0.25, keep.shape))).any()
    out = flash_attention(query, key, value, dropout_rate=0.25, dropout_rng=rng, block_q=16, block_kv=16)
    with enable_x64():
        expected, _ = float64_oracle(query, key, value, dropout_rate=0.25, keep=keep)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_value_and_gradients_equal_those_of_dense_attention_with_the_same_mask(rate: float):
    B, T, S, N, K, H = 2, 37, 45, 4, 2, 8
    rng = jax.random.key(7)
    with enable_x64():
        query, key, value = qkv(B, T, S, N, K, H, np.float64)
        bias = np.random.default_rng(1).standard_normal((1, N, 1, S))
        mask = np.random.default_rng(2).random((B, 1, T, S)) < 0.8
        mask[1, :, 5] = False  # a row without a key is dropped from like any other
        options = {"is_causal": True, "key_value_seq_lengths": np.array([45, 30], np.int32), "dropout_rate": rate}
        keep = np.asarray(bernoulli(rng, 1 - rate, (B, N, T, S)))
        dout = np.random.default_rng(3).standard_normal(query.shape)

        def results(attention, **extra):
            @functools.partial(jax.jit, compiler_options=FAST)
            def run(*arrays):
                out, vjp = jax.vjp(lambda *x: attention(*x, mask, **options, **extra), *arrays)
                return [out, *vjp(dout)]

            return run(query, key, value, bias)

        def oracle(*arguments, **options):
            return float64_oracle(*arguments, **options)[0]

        expected = results(oracle, keep=keep)
        actual = results(flash_attention, dropout_rng=rng, block_q=16, block_kv=32)
    for ours, exact in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-12)


def test_gradient_equals_finite_differences():
    # Independent of every oracle: dropping logits in one pass and probabilities in the other fails here.
    rng = jax.random.key(11)
    with enable_x64():
        arrays = qkv(1, 9, 10, 2, 1, 4, np.float64)
        weights = np.random.default_rng(4).standard_normal(arrays[0].shape)

        @jax.jit
        def loss(arrays):
            out = flash_attention(*arrays, dropout_rate=0.4, dropout_rng=rng, block_q=16, block_kv=16)
            return (out * weights).sum()

        gradients = jax.grad(loss)(arrays)
        for i in range(3):
            direction = np.random.default_rng(20 + i).standard_normal(arrays[i].shape)
            moved = [[*arrays[:i], arrays[i] + step * direction, *arrays[i + 1 :]] for step in (1e-5, -1e-5)]
            numeric = (loss(moved[0]) - loss(moved[1])) / 2e-5
            assert abs(numeric - (gradients[i] * direction).sum()) < 1e-7


def test_block_sizes_do_not_change_the_mask():
    query, key, value = qkv(2, 50, 70, 2, 1, 8)
    rng = jax.random.key(0)

    def output(**blocks):
        call = functools.partial(flash_attention, dropout_rate=0.5, dropout_rng=rng, **blocks)
        return jax.jit(call, compiler_options=FAST)(query, key, value)

    outs = [
        output(block_q=block_q, block_kv=block_kv)
        for block_q, block_kv in [(None, None), *itertools.product((16, 48), (32, 128))]
    ]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-5, atol=1e-6)


def test_rate_one_gives_zeros_and_zero_gradients():
    query, key, value = qkv(1, 6, 8, 2, 2, 4)
    options = {"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)}
    out, vjp = jax.vjp(lambda *x: flash_attention(*x, **options), query, key, value)
    assert not np.asarray(out).any()
    assert not any(np.asarray(g).any() for g in vjp(jnp.ones_like(out)))


@pytest.mark.parametrize("rng", [None, 0])
def test_rate_zero_is_no_dropout(rng: int | None):
    query, key, value = qkv(1, 6, 8, 2, 2, 4)
    rng_key = None if rng is None else jax.random.key(rng)
    out = flash_attention(query, key, value, dropout_rate=0.0, dropout_rng=rng_key)
    np.testing.assert_array_equal(out, flash_attention(query, key, value))


def test_lse_does_not_see_dropout():
    query, key, value = qkv(1, 6, 8, 2, 2, 4)
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    _, dropped = flash_attention(query, key, value, return_residual=True, **options)
    _, plain = flash_attention(query, key, value, return_residual=True)
    np.testing.assert_allclose(dropped, plain, rtol=1e-6)


def test_vmap_over_keys_gives_each_its_own_mask():
    query, key, value = qkv(1, 10, 12, 2, 2, 4)
    keys = jax.random.split(jax.random.key(0), 3)

    def loss_and_gradient(query, rng):
        def out(query):
            return flash_attention(query, key, value, dropout_rate=0.5, dropout_rng=rng)

        result, vjp = jax.vjp(out, query)
        return result, vjp(jnp.ones_like(result))[0]

    mapped = jax.jit(jax.vmap(loss_and_gradient, in_axes=(None, 0)), compiler_options=FAST)(query, keys)
    for i in range(3):
        for ours, one in zip(mapped, loss_and_gradient(query, keys[i]), strict=True):
            np.testing.assert_allclose(ours[i], one, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(mapped[0][0] - mapped[0][1])).max() > 1e-2


def test_traced_key_under_jit():
    query, key, value = qkv(1, 10, 12, 2, 2, 4)
    attention = jax.jit(lambda rng: flash_attention(query, key, value, dropout_rate=0.5, dropout_rng=rng))
    for seed in (0, 1):
        eager = flash_attention(query, key, value, dropout_rate=0.5, dropout_rng=jax.random.key(seed))
        np.testing.assert_allclose(attention(jax.random.key(seed)), eager, rtol=1e-5, atol=1e-6)


def _threefry(key: tuple[int, int], index: int) -> tuple[int, int]:
    """Threefry-2x32 of a 64-bit index, in Python's integers."""
    words = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (index >> 32) + words[0] & 0xFFFFFFFF, (index & 0xFFFFFFFF) + words[1] & 0xFFFFFFFF
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y & 0xFFFFFFFF
            y = (y << rotation | y >> 32 - rotation) & 0xFFFFFFFF ^ x
        x, y = x + words[(group + 1) % 3] & 0xFFFFFFFF, y + words[(group + 2) % 3] + group + 1 & 0xFFFFFFFF
    return x, y


@pytest.mark.parametrize("x64", [False, True])
def test_bits_at_indices_beyond_32_bits(x64: bool):
    key = (0x12345678, 0x9ABCDEF0)
    with enable_x64(x64):
        # `jax.random` agrees with Python's integers, where it can.
        small = jax.random.bits(jax.random.wrap_key_data(jnp.array(key, jnp.uint32)), (5,), jnp.uint32)
        assert [int(x) for x in small] == [a ^ b for a, b in (_threefry(key, i) for i in range(5))]
        dropout = make_dropout(0.4)
        keep_tile = jax.jit(dropout.keep_tile, static_argnums=(4, 5), compiler_options=FAST)
        for T, S in (
            (2**15, 2**16),
            (2**16, 2**16),
            (2**20 + 7, 3),
            (3, 2**31 - 1),
            (2**31 - 1, 2**31 - 1),
            (65537, 65539),
        ):
            targets = [power + d for power in (2**31, 2**32, 2**33, 2**40) for d in (-1, 0, 1)]
            # Indices that lie at the targets, and the corners of the last head.
            places = [(i // (T * S), i // S % T, i % S) for i in targets]
            places += [(h, t, s) for h in (0, 2**16, 2**31, 2**32 - 1) for t in (0, T - 1) for s in (0, S - 1)]
            for head, t, s in places:
                first, second = _threefry(key, ((head * T + t) * S + s) % 2**64)
                if dropout.uniform_bits == 23:
                    expected = ((first ^ second) >> 9) / 2**23 < np.float32(0.6)
                else:
                    expected = ((first << 32 | second) >> 12) / 2**52 < 0.6
                words, heads = np.array(key, np.uint32), np.uint32(head)
                keep = keep_tile(words, heads, np.array([t], np.int32), np.array([s], np.int32), T, S)
                assert bool(keep) == expected, (T, S, head, t, s)
