"""What the new arguments mean beside what says the same, and where an axis has no elements."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse, merge_attention
from tests.support.environment import enable_x64, fast_compilation
from tests.support.oracle import NOTHING_ALLOWED, allowed_pairs, float64_oracle

FAST = fast_compilation()
B, T, N, K, H = 2, 40, 4, 2, 8
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
BLOCKS: dict[str, Any] = {"block_q": 16, "block_kv": 16}
IDS = np.sort(RNG.integers(-1, 3, (B, T)), axis=1).astype(np.int32)
ORDERS: dict[str, dict[str, Any]] = {
    "sorted ids": {"query_segment_ids": IDS, "key_value_segment_ids": IDS},
    "shuffled ids": {name: RNG.permuted(IDS, axis=1) for name in ("query_segment_ids", "key_value_segment_ids")},
    "positions": {
        "query_positions": RNG.permuted(np.tile(np.arange(T, dtype=np.int32), (B, 1)), axis=1),
        "key_value_positions": RNG.integers(-9, T, (B, T)).astype(np.int32),
        "is_causal": True,
        "local_window_size": (11, 30),
    },
    "offset": {"query_offset": np.array([5, -7], np.int32), "local_window_size": 9},
}


def value_and_gradients(f: Callable[..., Any], *arrays: Any) -> Any:
    def loss(*x: Any) -> tuple[jax.Array, Any]:
        out, lse = f(*x)
        return jnp.sin(out).sum() + jnp.where(lse > -1e30, lse, 0).sum(), (out, lse)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=FAST)(*arrays)


@pytest.mark.parametrize("order", ORDERS)
def test_a_call_equals_that_with_the_boolean_mask(order: str) -> None:
    """Rows of negative ids excepted: with a mask they are dead, and give the mean of all values."""
    options = ORDERS[order]
    mask = allowed_pairs((B, 1, T, T), **options)
    if "ids" in order:
        is_row = (options["query_segment_ids"] >= 0)[:, :, None]

        def masked(*x: Any) -> Any:
            out, lse = flash_attention_with_lse(*x, mask=mask, **BLOCKS)
            return jnp.where(is_row[..., None], out, 0), jnp.where(is_row, lse, NOTHING_ALLOWED)
    else:
        masked = functools.partial(flash_attention_with_lse, mask=mask, **BLOCKS)
    ordered = functools.partial(flash_attention_with_lse, **options, **BLOCKS)
    actual, expected = (value_and_gradients(f, QUERY, KEY, VALUE) for f in (ordered, masked))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_chunks_of_a_prompt_are_rows_of_the_whole() -> None:
    whole = flash_attention(QUERY, KEY, VALUE, is_causal=True, local_window_size=(25, 0))
    chunk = jax.jit(
        lambda rows, offset: flash_attention(
            rows, KEY, VALUE, is_causal=True, local_window_size=(25, 0), query_offset=offset
        )
    )
    for start in range(0, T, 8):
        rows = chunk(QUERY[:, start : start + 8], jnp.int32(start))
        np.testing.assert_allclose(rows, whole[:, start : start + 8], rtol=1e-5, atol=1e-6)


def test_a_sink_is_counted_once_in_parts_that_are_merged() -> None:
    sinks = RNG.standard_normal(N).astype(np.float32)
    with enable_x64():
        expected, _ = float64_oracle(QUERY, KEY, VALUE, sinks=sinks)
    first = flash_attention_with_lse(QUERY, KEY[:, :24], VALUE[:, :24], sinks=sinks)
    second = flash_attention_with_lse(QUERY, KEY[:, 24:], VALUE[:, 24:])
    out, _ = merge_attention([first[0], second[0]], [first[1], second[1]])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_beside_a_window_that_skips_tiles() -> None:
    mask = RNG.random((B, 1, T, T)) < 0.5
    options: dict[str, Any] = {"mask": mask, "local_window_size": (17, 0), "is_causal": True}
    with enable_x64():
        expected, _ = float64_oracle(QUERY, KEY, VALUE, **options)
    out = flash_attention(QUERY, KEY, VALUE, block_q=4, block_kv=3, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sink", [-np.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("implementation", [None, "dense"])
def test_the_lowest_sinks_count_for_nothing(implementation: Any, sink: float) -> None:
    """But in a row without keys, which gives 0 with any sink."""
    attention = functools.partial(flash_attention, implementation=implementation, is_causal=True)
    sinks, lengths = np.full(N, sink, np.float32), np.array([0, T])
    out = attention(QUERY, KEY, VALUE, sinks=sinks, key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_allclose(out[1], attention(QUERY, KEY, VALUE)[1], rtol=1e-5, atol=1e-6)


def test_largest_logits_have_no_gradient_and_a_row_under_vmap() -> None:
    def largest(query: Any, sinks: Any) -> jax.Array:
        return flash_attention_with_lse(query, KEY, VALUE, sinks=sinks, return_max_logits=True)[2]

    sinks = np.full(N, 100.0, np.float32)  # which no largest logit is
    gradients = jax.grad(lambda *x: largest(*x).sum(), (0, 1))(QUERY, sinks)
    assert not any(np.asarray(x).any() for x in gradients)
    _, tangent = jax.jvp(largest, (QUERY, sinks), (QUERY, sinks))
    assert not np.asarray(tangent).any()
    assert largest(QUERY, sinks).dtype == jnp.float32
    mapped = jax.vmap(largest, (0, None))(np.stack([QUERY, -2 * QUERY]), sinks)
    np.testing.assert_allclose(mapped[0], largest(QUERY, sinks), rtol=1e-6)
    np.testing.assert_allclose(mapped[1], largest(-2 * QUERY, sinks), rtol=1e-6)


EVERYTHING = {"is_causal": True, "logits_soft_cap": 2.0}


def _order(kind: str, length: int, side: str) -> dict[str, Any]:
    x = np.zeros((B, length), np.int32)
    return {f"{side}_segment_ids": x, f"{side}_positions": x} if kind == "ids" else {f"{side}_positions": x}


@pytest.mark.parametrize("kind", ["ids", "positions"])
@pytest.mark.parametrize(("rows", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(rows: int, keys: int, kind: str) -> None:
    sinks = RNG.standard_normal(N).astype(np.float32)
    order = _order(kind, rows, "query") | _order(kind, keys, "key_value")

    def attention(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return flash_attention_with_lse(query, key, value, sinks=sinks, return_max_logits=True, **order, **EVERYTHING)

    arrays = QUERY[:, :rows], KEY[:, :keys], VALUE[:, :keys, :, :3], sinks
    (out, lse, max_logits), vjp = jax.vjp(attention, *arrays)
    assert out.shape == (B, rows, N, 3)
    assert not np.asarray(out).any()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, (B, rows, N)))
    np.testing.assert_array_equal(max_logits, np.full(N, -np.inf))
    *gradients, dsinks = vjp((out, jnp.ones_like(lse), max_logits))
    assert [x.shape for x in gradients] == [x.shape for x in arrays[:3]]
    np.testing.assert_array_equal(dsinks, np.full(N, B * rows))  # lse is the sink


@pytest.mark.parametrize(("head", "value"), [(0, 3), (8, 0), (0, 0)])
def test_no_head_dimension_or_no_value_dimension(head: int, value: int) -> None:
    sinks = RNG.standard_normal(N).astype(np.float32)
    arrays = QUERY[..., :head], KEY[..., :head], np.concatenate([VALUE] * 2, -1)[..., :value]
    options = {"sinks": sinks, "query_segment_ids": IDS, "key_value_segment_ids": IDS}
    out, lse, max_logits = flash_attention_with_lse(*arrays, **options, return_max_logits=True)
    with enable_x64():
        expected, expected_lse = float64_oracle(*arrays, **options, scale=1 / np.sqrt(max(head, 1)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    assert max_logits.shape == (N,)
    assert head or not np.asarray(max_logits).any()
