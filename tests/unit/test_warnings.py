"""Calls that are legal but hardly meant so: each warns, at the line that calls, and can say that it is meant."""

import functools
import linecache
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jax_native_flash_attn import AttentionWarning, context_parallel_attention, explain, flash_attention

FLAG = "JAX_NATIVE_FLASH_ATTN_WARNINGS"
PAGE = Path(__file__).parents[2] / "docs/guides/warnings.md"
B, T, S, N, H = 2, 3, 5, 2, 8
QUERY, KEY, VALUE = (
    jnp.asarray(np.random.default_rng(i).standard_normal((B, n, N, H)), "float32") for i, n in enumerate((T, S, S))
)
MASK = np.random.default_rng(3).random((B, T, S)) < 0.7
RNG = jax.random.key(0)
INDICES = np.tile(np.arange(S), (B, 1))

# The rows of the table in PAGE, by what the first cell says: a call, what the message says, and how to say that it is
# meant.
WARNS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "`is_causal=True` with T < S": (
        {"is_causal": True},
        r"is_causal=True with T = 3 < S = 5 .* the first keys alone\. .* pass query_offset=S - T.*; query_offset=0 if",
        {"is_causal": True, "query_offset": 0},
    ),
    "a window without keys": (
        {"local_window_size": (-1, -1)},
        r"local_window_size=\(-1, -1\) leaves all queries without keys: .* A side without a limit is S, not -1",
        {"mask": np.zeros((1, 1, 1, 1), bool)},
    ),
    "a mask (B, T, S) where B = N": (
        {"mask": MASK},
        r"mask of shape \(2, 3, 5\) is read as \(N, T, S\), .* as B = N = 2\. .* mask\[:, None\]; mask\[None\] if",
        {"mask": MASK[None]},
    ),
    "a mask (B, S) where B = T": (
        {"query": QUERY[:, :B], "mask": MASK[:, 0]},
        r"mask of shape \(2, 5\) is read as \(T, S\), .* as B = T = 2\. .* mask\[:, None, None, :\]; ",
        {"query": QUERY[:, :B], "mask": MASK[:, 0][None, None]},
    ),
    "lengths below 0 or above the length": (
        {"key_value_seq_lengths": np.array([S + 2, 1])},
        r"key_value_seq_lengths has lengths outside of 0 to 5, got 7, which is taken for 5: ",
        {"key_value_seq_lengths": np.array([S, 1])},
    ),
    "positions or an offset, without `is_causal`, a window or a function of indices": (
        {"query_offset": 2},
        "query_offset without is_causal=True, local_window_size, .* changes nothing, .*: add the one that is meant",
        {},
    ),
    "`dropout_rng` without `dropout_rate`": (
        {"dropout_rng": RNG},
        "dropout_rng without dropout_rate drops nothing: pass dropout_rate, .*; dropout_rate=0.0 or deterministic=True",
        {"dropout_rng": RNG, "dropout_rate": 0.0},
    ),
}
ALSO: dict[str, tuple[dict[str, Any], str]] = {
    "beside causality": (
        {"is_causal": True, "query_offset": 2, "local_window_size": (-1, 5)},
        r"\(-1, 5\) beside is_causal",
    ),
    "one number": ({"local_window_size": -1}, r"local_window_size=\(-1, -1\)"),
    "one decoded token with lengths": (
        {"is_causal": True, "query": QUERY[:, :1], "key_value_seq_lengths": np.array([3, 4])},
        "T = 1 < S = 5",
    ),
    "a query of rank 2": (
        {"query": QUERY[0, 0], "key": KEY[0, :1], "value": VALUE[0, :1]},
        r"query of shape \(2, 8\) is read as heads at one position, .* x\[:, None, :\]; query\[None, None\] if",
    ),
    "negative query lengths": ({"query_seq_lengths": [1, -3]}, "query_seq_lengths .* 0 to 3, got -3, .* for 0"),
    "an array offset and no window": ({"query_offset": jnp.zeros(B, int)}, "^query_offset without"),
    "positions and no window": (
        {"query_positions": INDICES[:, :T], "key_value_positions": INDICES},
        "^query_positions and key_value_positions without",
    ),
    "a padding mask": ({"mask": MASK[:, :1]}, r"mask of shape \(2, 1, 5\)"),
}
# What is said to be meant, and what looks alike.
SILENT: dict[str, dict[str, Any]] = {
    "offset": {"is_causal": True, "query_offset": S - T},
    "array offset": {"is_causal": True, "query_offset": jnp.zeros(B, int)},
    "positions": {"is_causal": True, "query_positions": INDICES[:, :T]},
    "key positions": {"is_causal": True, "key_value_positions": INDICES},
    "T = S": {"is_causal": True, "key": QUERY, "value": QUERY},
    "T > S": {"is_causal": True, "key": KEY[:, :2], "value": KEY[:, :2]},
    "not causal": {},
    "window behind": {"local_window_size": (3, -3)},
    "array window": {"local_window_size": jnp.array([-1, -1])},
    "mask of batch rows": {"mask": MASK[:, None]},
    "mask of all": {"mask": MASK[:1]},
    "mask of rows": {"mask": MASK[0]},
    "lengths on a device": {"key_value_seq_lengths": jnp.array([S + 2, 1])},
    "offset 0": {"query_offset": 0},
    "offset of a window": {"query_offset": 2, "local_window_size": (S, S)},
    "offset of a function": {"query_offset": 2, "mask_mod": lambda b, n, t, s: t >= s},
    "rate 0": {"dropout_rng": RNG, "dropout_rate": 0},
    "no key": {"dropout_rate": None},
    "evaluation": {"dropout_rng": RNG, "deterministic": True},
    "training": {"dropout_rng": RNG, "dropout_rate": 0.1},
    "unbatched": {"mask": MASK, "query": QUERY[0], "key": KEY[0], "value": VALUE[0]},
}


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FLAG)


def arguments(changes: dict[str, Any]) -> dict[str, Any]:
    return {"query": QUERY, "key": KEY, "value": VALUE, **changes}


def traced(function: Callable[..., Any], changes: dict[str, Any]) -> Any:
    """Without running what is called."""
    return jax.eval_shape(lambda: function(**arguments(changes)))


CALLS = {**{name: row[:2] for name, row in WARNS.items()}, **ALSO}


@pytest.mark.parametrize("name", CALLS)
def test_warns_at_the_line_that_calls(name: str):
    changes, message = CALLS[name]
    with pytest.warns(AttentionWarning, match=message) as found:
        traced(flash_attention, changes)
    assert [x.filename for x in found] == [__file__]


@pytest.mark.parametrize("name", SILENT)
def test_silent(name: str):
    with warnings.catch_warnings(action="error"):
        traced(flash_attention, SILENT[name])


@pytest.mark.parametrize("name", WARNS)
def test_results_are_those_of_a_call_that_says_that_it_is_meant(name: str):
    changes, _, meant = WARNS[name]
    with pytest.warns(AttentionWarning):
        actual = flash_attention(**arguments(changes))
    with warnings.catch_warnings(action="error"):
        expected = flash_attention(**arguments(meant))
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_page_has_a_row_for_each():
    rows = re.findall(r"^\| (.+?) \|", PAGE.read_text(), re.MULTILINE)
    assert set(WARNS) <= set(rows)
    assert FLAG in PAGE.read_text()


def test_pythons_filter_shows_one_for_each_line():
    call = functools.partial(flash_attention, QUERY, KEY, VALUE, is_causal=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            jax.eval_shape(call)
        gradient = jax.grad(lambda q: flash_attention(q, KEY[:1], VALUE[:1], is_causal=True).sum())
        jax.eval_shape(jax.vmap(gradient), QUERY[:, None])
    lines = [linecache.getline(x.filename, x.lineno).strip() for x in found]
    assert [line.split("(")[0] for line in lines] == ["jax.eval_shape", "gradient = jax.grad"]


@pytest.mark.parametrize("off", ["variable", "filter"])
def test_off(off: str, monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings(action="error"):
        if off == "variable":
            monkeypatch.setenv(FLAG, "0")
        else:
            warnings.filterwarnings("ignore", category=AttentionWarning)
        traced(flash_attention, {"is_causal": True})


def test_a_wrong_flag_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FLAG, "off")
    with pytest.raises(ValueError, match=rf"{FLAG} must be 0 or 1, got 'off': 0 is for no warnings"):
        traced(flash_attention, {"is_causal": True})


def test_explain_warns_too():
    types = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arguments({}).items()}
    with pytest.warns(AttentionWarning, match="T = 3 < S = 5") as found:
        explain(**types, is_causal=True)
    assert {x.filename for x in found} == {__file__}


def test_lengths_are_those_of_a_whole_sequence():
    def trace(query: jax.Array, key: jax.Array, **options: Any) -> Any:
        call = functools.partial(context_parallel_attention, axis_name="s", **options)
        specs: Any = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec("s")}
        mapped = jax.shard_map(call, mesh=AbstractMesh((2,), ("s",)), **specs, check_vma=False)
        return jax.eval_shape(mapped, query, key, key)

    with warnings.catch_warnings(action="error"):
        trace(QUERY, QUERY, is_causal=True)
    with pytest.warns(AttentionWarning, match="T = 6 < S = 10"):
        trace(QUERY, KEY, is_causal=True)
    with pytest.warns(AttentionWarning, match=r"mask of shape \(2, 6, 10\)") as found:
        trace(QUERY, KEY, mask=jnp.ones((B, 2 * T, 2 * S), bool))
    assert len(found) == 1
