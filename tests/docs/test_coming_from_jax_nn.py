"""The table of differences from jax.nn in docs/guides/coming_from_jax_nn.md: both columns are run."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention
from tests.docs.pages import ROOT
from tests.docs.recipes import assert_close
from tests.support.environment import enable_x64, lenient_promotion
from tests.support.grids import thinned

B, T, N, H = 2, 8, 4, 16
QUERY, KEY, VALUE = np.random.default_rng(0).normal(size=(3, B, T, N, H)).astype(np.float32)
LENGTHS = np.array([6, 6], np.int32)
WITHIN = np.arange(T) < 6
Attention = Callable[..., jax.Array]


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    with lenient_promotion():
        yield


def dense(mask: Any = True) -> np.ndarray:
    logits = np.einsum("btnh,bsnh->bnts", QUERY.astype(np.float64), KEY) / np.sqrt(H)
    weights = np.exp(np.where(mask, logits, -np.inf))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), VALUE)


def call(attention: Attention, *arrays: Any, **options: Any) -> Any:
    f = jax.jit(lambda *arrays: attention(*arrays, **options))
    return jax.tree.map(np.asarray, f(*(arrays or (QUERY, KEY, VALUE))))


def outcome(f: Callable[[], str]) -> str:
    """What `f` says of a result, or the class of its error."""
    try:
        return f()
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        return type(error).__name__


def closest(out: np.ndarray, *, atol: float = 1e-5, **named: Any) -> str:
    """The name of what `out` is."""
    found = (name for name, x in named.items() if np.allclose(out, x, rtol=0, atol=atol, equal_nan=True))
    return next(found, "other")


def float64(attention: Attention) -> str:
    with enable_x64():
        out = call(attention, *(x.astype(np.float64) for x in (QUERY, KEY, VALUE)))
    return "float32" if closest(out, atol=1e-14, dense=dense()) == "other" else "float64"


def float16(attention: Attention) -> str:
    return str(call(attention, *(x.astype(np.float16) for x in (QUERY, KEY, VALUE))).dtype)


def padding(attention: Attention) -> str:
    key, value = (np.where(WITHIN[:, None, None], x, np.nan) for x in (KEY, VALUE))
    out = call(attention, QUERY, key, value, key_value_seq_lengths=LENGTHS)
    return closest(out, all_nan=np.nan, no_effect=dense(WITHIN))


def infinite_bias(attention: Attention, left: np.ndarray, **options: Any) -> str:
    out = call(attention, bias=np.full((1, 1, T, T), -np.inf, np.float32), **options)
    weights = {"equal": left, "masked": ~left if options else left}
    return closest(
        out, all_nan=np.nan, **{name: VALUE[:, keys].mean(1, keepdims=True) for name, keys in weights.items()}
    )


def window(attention: Attention) -> str:
    out = call(attention, local_window_size=(2**31 - 1, 0))
    return closest(out, unbounded=dense(np.tri(T, dtype=bool)), first_key=VALUE[:, :1])


def bool_bias(attention: Attention) -> str:
    tri = jnp.tri(T, dtype=bool)[None, None]
    return closest(call(attention, bias=tri), added=call(attention, bias=tri.astype(jnp.float32)))


# The first words of a row, what is run, and what jax.nn and this library give.
ROWS: dict[str, tuple[Callable[[Attention], str], str, str]] = {
    "float64 inputs": (float64, "float32", "float64"),
    "float16 on a CPU": (float16, "ValueError", "float16"),
    "NaN in keys": (padding, "all_nan", "no_effect"),
    "a bias of `-inf` on every key that": (
        lambda f: infinite_bias(f, WITHIN, key_value_seq_lengths=LENGTHS),
        "masked",
        "equal",
    ),
    "a bias of `-inf` on every key, no mask": (lambda f: infinite_bias(f, WITHIN | True), "all_nan", "equal"),
    "value with another": (lambda f: str(call(f, QUERY, KEY, VALUE[..., :8]).shape), "ValueError", str((B, T, N, 8))),
    "lengths of int8": (
        lambda f: str(call(f, key_value_seq_lengths=LENGTHS.astype(np.int8)).dtype),
        "ValueError",
        "float32",
    ),
    "a bias or mask with": (lambda f: str(call(f, mask=np.ones((1, 3, T, T), bool))), "AssertionError", "ValueError"),
    "a key without heads": (lambda f: str(f(QUERY, KEY[:, :, :0], VALUE[:, :, :0])), "ZeroDivisionError", "ValueError"),
    "an integer query": (
        lambda f: str(call(f, *(x.astype(np.int32) for x in (QUERY, KEY, VALUE))).dtype),
        "int32",
        "ValueError",
    ),
    "a bool bias": (bool_bias, "added", "ValueError"),
    "a scale for each head": (lambda f: str(call(f, scale=jnp.ones((N, 1, 1))).dtype), "float32", "ValueError"),
    "a left window": (window, "first_key", "unbounded"),
}


@pytest.mark.parametrize("row", thinned(ROWS, 2))
def test_row(row: str):
    run, theirs, ours = ROWS[row]
    assert outcome(lambda: run(jax.nn.dot_product_attention)) == theirs
    assert outcome(lambda: run(flash_attention)) == ours


@pytest.mark.filterwarnings("ignore:is_causal=True with T = 1")
@pytest.mark.parametrize("attention", [jax.nn.dot_product_attention, flash_attention])
def test_what_is_the_same(attention: Attention):
    assert_close(call(attention, QUERY[:, :1], KEY, VALUE, is_causal=True), VALUE[:, :1])
    dead = call(attention, mask=np.zeros((1, 1, T, T), bool))
    assert_close(dead, np.broadcast_to(VALUE.mean(1, keepdims=True), dead.shape))
    assert not call(attention, query_seq_lengths=LENGTHS)[:, ~WITHIN].any()
    distance = np.arange(T)[:, None] - np.arange(T)
    out, lse = call(attention, local_window_size=3, return_residual=True)
    assert_close(out, dense(abs(distance) <= 3))
    assert lse.shape == (B, T, N)


def test_every_row_is_in_the_table():
    page = (ROOT / "docs" / "guides" / "coming_from_jax_nn.md").read_text()
    assert all(page.count(f"| {row}") == 1 for row in ROWS)
