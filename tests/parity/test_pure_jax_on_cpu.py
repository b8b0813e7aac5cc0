"""The forms that the kernels take on a CPU by size and processor, each against the float64 oracle."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from jax_native_flash_attn._kernels.select import replacing
from jax_native_flash_attn._kernels.xla.family import XlaKernels
from jax_native_flash_attn._kernels.xla.limits import Limits
from tests.support.cases import FAST_COMPILATION, Case, check_case
from tests.support.environment import full_optimization
from tests.support.grids import thinned
from tests.support.oracle import (
    assert_as_accurate_as_dense,
    check_out,
    dense_same_dtype,
    enable_x64,
    float64_oracle,
    masking,
)
from tests.support.targets import pretend_bfloat16_unit

# (B, T, S, K, G, H): of many and of few scores for their size, and one that several tiles cover.
SHAPES = {
    "many scores": (2, 96, 96, 2, 2, 16),
    "few scores": (2, 31, 33, 2, 3, 64),
    "one key": (3, 61, 1, 1, 2, 8),
    "several tiles": (3, 139, 139, 1, 1, 8),
}
OPTIONS = {
    "plain": Case(SHAPES["many scores"]),
    "causal": Case(SHAPES["many scores"], is_causal=True),
    "bias, mask and lengths": Case(
        SHAPES["many scores"],
        bias=(False, True, True, True),
        mask=(True, False, True, True),
        mask_density=0.9,
        key_value_seq_lengths=(20, 3, 1),
        poison=True,
    ),
    "lengths": Case(SHAPES["many scores"], key_value_seq_lengths=(20, 3, 1)),
    "dropout": Case(SHAPES["many scores"], dropout_rate=0.3),
    "scale": Case(SHAPES["many scores"], scale=-0.5, magnitude=6.0, is_causal=True, traced=frozenset({"scale"})),
}


@pytest.mark.parametrize(
    ("shape", "has_hardware", "options"),
    thinned(
        [
            *(("many scores", has_hardware, options) for options in OPTIONS for has_hardware in (True, False)),
            *((shape, True, options) for shape in list(SHAPES)[1:] for options in ("causal", "bias, mask and lengths")),
        ],
        3,
    ),
)
def test_bfloat16_products_and_shapes(
    shape: str, has_hardware: bool, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_bfloat16_unit(monkeypatch, exists=has_hardware)
    case = OPTIONS[options]
    B = SHAPES[shape][0]
    lengths = case.key_value_seq_lengths and case.key_value_seq_lengths[:B]
    blocks = {"block_q": 48, "block_kv": 48} if shape == "several tiles" else {}
    changes = {"shape": SHAPES[shape], "dtype": "bfloat16", "key_value_seq_lengths": lengths, **blocks}
    check_case(Case(**{**case.__dict__, **changes}), compiler_options=FAST_COMPILATION)


@pytest.mark.parametrize(
    ("mapped", "B", "K", "has_lengths"),
    thinned(
        [
            (mapped, B, K, has_lengths)
            for mapped in ("query", "key", "value", "key and value", "all")
            for B, K in ((1, 2), (2, 1))
            for has_lengths in (False, True)
        ],
        3,
    ),
)
def test_decoding_under_vmap(mapped: str, B: int, K: int, has_lengths: bool) -> None:
    rng = np.random.default_rng(0)
    lengths = jnp.full(B, 900, jnp.int32) if has_lengths else None
    axes = tuple(0 if name in mapped or mapped == "all" else None for name in ("query", "key", "value"))
    operands = [
        jnp.asarray(rng.standard_normal((*([3] if axis == 0 else []), *shape)), jnp.float32)
        for axis, shape in zip(axes, ((B, 1, 4, 32), (B, 1100, K, 32), (B, 1100, K, 32)), strict=True)
    ]

    def run(f: Callable[..., Any]) -> Any:
        mapped = jax.vmap(lambda *x: f(*x, key_value_seq_lengths=lengths), axes)
        return jax.jit(mapped, compiler_options=FAST_COMPILATION)(*operands)

    out, dense = run(flash_attention), run(jax.nn.dot_product_attention)
    rows = [jnp.broadcast_to(x, (3, *x.shape[-4:])) for x in operands]
    out, dense, *rows = (x.reshape(3 * B, *x.shape[2:]) for x in (out, dense, *rows))
    lengths = None if lengths is None else jnp.tile(lengths, 3)
    check_out("out", out, dense, *rows, key_value_seq_lengths=lengths)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_decoding_keeps_heads_apart(bad: float) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, 4, 4, 32), (1, 1100, 4, 32), (1, 1100, 4, 32))
    )
    others = np.s_[:, :, np.array([0, 2, 3])]
    for name, x in (("key", key), ("value", value)):
        operands = {"query": query, "key": key, "value": value, name: x.at[0, 50, 1, 2].set(bad)}
        attentions = flash_attention, jax.nn.dot_product_attention
        out, dense = (jax.jit(f, compiler_options=full_optimization())(*operands.values()) for f in attentions)
        np.testing.assert_array_equal(np.isfinite(out), np.isfinite(dense))
        check_out(name, out, dense, query, key, value, at=others)


@pytest.mark.parametrize("masks", thinned(["causal", "window", "lengths", "mask", "mask and causal"], 2))
def test_masked_keys_may_be_anything(masks: str) -> None:
    """A short masked call is one kernel of XLA's, unless that makes something that is not finite."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 96, 2, 8)).astype(np.float32)
    options = {
        "causal": {"is_causal": True},
        "window": {"local_window_size": (20, 3)},
        "lengths": {"key_value_seq_lengths": np.array([90, 70])},
        "mask": {"mask": rng.random((2, 1, 96, 96)) < 0.5},
        "mask and causal": {"mask": rng.random((2, 1, 96, 96)) < 0.5, "is_causal": True},
    }[masks]
    allowed = np.broadcast_to(masking(query, key, **options).allowed, (2, 2, 96, 96))[:, 0, :, 92]
    ours, reference = (
        jax.jit(functools.partial(f, **options), compiler_options=full_optimization())
        for f in (flash_attention, jax.nn.dot_product_attention)
    )
    dense = reference(query, key, value)
    for bad in (np.inf, -np.inf, np.nan):
        out = ours(query, np.where((np.arange(96) == 92)[:, None, None], np.float32(bad), key), value)
        check_out(f"out, {bad}", out, dense, query, key, value, at=~allowed, **options)
    assert np.isnan(out[allowed]).all()


def test_bfloat16_gradient_of_scale_through_out_and_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products round their operands it comes from sums that need the cotangent of lse apart; a row is dead."""
    pretend_bfloat16_unit(monkeypatch, exists=True)
    rng = np.random.default_rng(0)
    query, key, value, dout = (jnp.asarray(rng.standard_normal((1, 70, 2, 16)), jnp.bfloat16) for _ in range(4))
    dlse = jnp.asarray(rng.standard_normal((1, 70, 2)), jnp.bfloat16)
    mask = jnp.arange(70)[None, None, :, None] != 5
    bias = jnp.zeros((1, 2, 70, 70), jnp.float32)
    masks = masking(query, key, mask)

    def pulled_back(function: Callable[..., Any], scale: Any) -> Any:
        @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
        def run(scale: Any) -> Any:
            (out, lse), pullback = jax.vjp(function, scale)
            return pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))[0]

        return run(scale)

    scale = jnp.float32(0.7)
    for blocks in ({}, {"block_q": 32, "block_kv": 32}):
        actual = pulled_back(
            lambda s, blocks=blocks: flash_attention_with_lse(query, key, value, mask=mask, scale=s, **blocks), scale
        )
        dense = pulled_back(lambda s: dense_same_dtype(query, key, value, bias, s, masks)[:2], scale)
        with enable_x64():
            expected = pulled_back(lambda s: float64_oracle(query, key, value, mask=mask, scale=s), jnp.float64(scale))
        assert_as_accurate_as_dense("scale", actual, dense, expected)


def test_gradient_of_a_query_that_vmap_shares() -> None:
    """Each batch row has a tile of its own, and adds to one gradient."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((1, 32, 2, 16)), jnp.float32)
    key, value = (jnp.asarray(rng.standard_normal((3, 1, 32, 2, 16)), jnp.float32) for _ in range(2))

    def gradient(attention: Callable[..., jax.Array]) -> jax.Array:
        def loss(query: jax.Array) -> jax.Array:
            return jnp.square(jax.vmap(functools.partial(attention, query))(key, value)).sum()

        return jax.jit(jax.grad(loss), compiler_options=FAST_COMPILATION)(query)

    with replacing(XlaKernels(Limits(heads=1))):
        found = gradient(functools.partial(flash_attention, block_q=16, block_kv=16))
    np.testing.assert_allclose(found, gradient(jax.nn.dot_product_attention), rtol=1e-4, atol=1e-5)
