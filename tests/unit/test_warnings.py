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

from jax_native_flash_attn import (
    AttentionWarning,
    _warnings,
    context_parallel_attention,
    explain,
    flash_attention,
)

FLAG = "JAX_NATIVE_FLASH_ATTN_WARNINGS"
PAGE = Path(__file__).parents[2] / "docs/guides/warnings.md"
B, T, S, N, H = 2, 3, 5, 2, 8
QUERY, KEY, VALUE = (
    jnp.asarray(np.random.default_rng(i).standard_normal((B, n, N, H)), "float32") for i, n in enumerate((T, S, S))
)
MASK = np.random.default_rng(3).random((B, T, S)) < 0.7
WIDE = jnp.asarray(np.random.default_rng(4).standard_normal((B, 4, 256, H)), "float32")
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
    "(B, N, T, H) as (B, T, N, H): many heads of few tokens": (
        {"query": WIDE, "key": WIDE, "value": WIDE},
        r"query of shape \(2, 4, 256, 8\) and key of shape \(2, 4, 256, 8\) are read as \(B, T, N, H\) and .*, 4 "
        r"queries of 256 heads\. .*\(B, N, T, H\), .*, transpose each with x.swapaxes\(-3, -2\), .*; jax.vmap",
        {"function": jax.vmap(flash_attention), "query": WIDE, "key": WIDE, "value": WIDE},
    ),
    "a bias of 0 and 1": (
        {"bias": MASK[:, None].astype("float32")},
        r"bias of shape \(2, 1, 3, 5\) holds 0 and 1 alone, .*: pass mask=bias.astype\(bool\); bias - 1, of the same",
        {"bias": MASK[:, None].astype("float32") - 1},
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
    "query alone of another layout": (
        {
            "query": QUERY[:, :2, :1].repeat(256, 2),
            "key": WIDE[:, 0, :, None].repeat(2, 2),
            "value": WIDE[:, 0, :, None].repeat(2, 2),
        },
        r"query of shape \(2, 2, 256, 8\) beside key of shape \(2, 256, 2, 8\) is read as .* query.swapaxes\(-3, -2\)",
    ),
    "lengths on a device": (
        {"key_value_seq_lengths": jnp.array([1, S + 2])},
        "key_value_seq_lengths .* 0 to 5, got 7,",
    ),
    "query lengths on a device": (
        {"query_seq_lengths": jnp.array([1, -2])},
        "query_seq_lengths .* 0 to 3, got -2, .* 0",
    ),
    "a bias on a device": (
        {"bias": jnp.asarray(MASK[0], "bfloat16")},
        r"bias of shape \(3, 5\) holds 0 and 1 alone",
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
    "lengths on a device": {"key_value_seq_lengths": jnp.array([S, 0]), "query_seq_lengths": jnp.array([T, 0])},
    "bias of 0": {"bias": jnp.zeros((T, S))},
    "bias of 1": {"bias": np.ones((1, 1, T, S), "float32")},
    "bias of keys": {"bias": MASK[:, None, :1].astype("float32")},
    "bias of more": {"bias": MASK.astype("float32")[:, None] + np.eye(T, S, dtype="float32")},
    "bias of lower": {"bias": MASK.astype("float32")[:, None] - 1},
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
    """Of lines that have called nothing."""
    monkeypatch.delenv(FLAG)
    monkeypatch.setattr(_warnings, "_looked_at", set())


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
        function = meant.get("function", flash_attention)
        expected = function(**arguments({name: x for name, x in meant.items() if name != "function"}))
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
        trace(QUERY, QUERY, query_seq_lengths=np.full(B, 2 * T))
    with pytest.warns(AttentionWarning, match="T = 6 < S = 10"):
        trace(QUERY, KEY, is_causal=True)
    with pytest.warns(AttentionWarning, match="query_seq_lengths .* of 0 to 6, got 7"):
        trace(QUERY, QUERY, query_seq_lengths=np.full(B, 2 * T + 1))
    with pytest.warns(AttentionWarning, match=r"mask of shape \(2, 6, 10\)") as found:
        trace(QUERY, KEY, mask=jnp.ones((B, 2 * T, 2 * S), bool))
    assert len(found) == 1


# ---------------------------------------------------------------------------------------------- layouts that look alike


def layout_warnings(query: tuple[int, ...], key: tuple[int, ...], **options: Any) -> list[str]:
    x, y = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query, key))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        jax.eval_shape(functools.partial(flash_attention, **options), x, y, y)
    return [str(w.message) for w in found if "as in PyTorch" in str(w.message)]


# What may be meant: sizes of models, with few tokens, and of other layers.
MEANT: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    # (query, key, is_causal)
    "Falcon 180B, 8 tokens": ((2, 8, 232, 64), (2, 8, 8, 64), True),
    "232 heads, 8 tokens": ((2, 8, 232, 64), (2, 8, 232, 64), True),
    "Falcon 180B, one token": ((2, 1, 232, 64), (2, 2048, 8, 64), False),
    "Falcon 40B, drafted tokens": ((1, 4, 128, 64), (1, 4096, 8, 64), False),
    "Llama 3 405B, 8 tokens": ((1, 8, 128, 128), (1, 8, 8, 128), True),
    "Llama 3 405B, drafted tokens": ((1, 8, 128, 128), (1, 4096, 8, 128), False),
    "DeepSeek V3, 8 tokens": ((1, 8, 128, 192), (1, 8, 128, 192), True),
    "DeepSeek V3, one token": ((64, 1, 128, 192), (64, 1, 128, 192), False),
    "DeepSeek V3, absorbed": ((1, 2, 128, 576), (1, 4096, 1, 576), False),
    "DeepSeek V3, absorbed, first tokens": ((1, 2, 128, 576), (1, 2, 1, 576), True),
    "Gopher, 16 tokens": ((1, 16, 128, 128), (1, 16, 128, 128), True),
    "BLOOM, 2 tokens": ((1, 2, 112, 128), (1, 2, 112, 128), False),
    "GPT-3, 20 tokens": ((1, 20, 96, 128), (1, 20, 96, 128), False),
    "Falcon 7B": ((1, 8, 71, 64), (1, 8, 1, 64), False),
    "T5 11B, cross-attention": ((2, 8, 128, 128), (2, 12, 128, 128), False),
    "T5 XXL, 8 tokens": ((1, 8, 64, 64), (1, 8, 64, 64), False),
    "ALBERT xxlarge, 8 tokens": ((1, 8, 64, 64), (1, 8, 64, 64), False),
    "frames": ((256, 16, 24, 64), (256, 16, 24, 64), False),
    "many frames": ((64, 32, 48, 128), (64, 32, 48, 128), False),
    "few frames": ((4096, 8, 8, 40), (4096, 8, 8, 40), False),
    "windows of an image": ((64, 49, 32, 32), (64, 49, 32, 32), False),
    "queries of a pool": ((2, 1, 16, 72), (2, 729, 16, 72), False),
    "latents": ((2, 64, 16, 96), (2, 4096, 16, 96), False),
    "no batch, rows as heads": ((16, 512, 64), (16, 512, 64), False),
    "neither reading is likely": ((2, 128, 256, 64), (2, 128, 256, 64), False),
    "heads of another kind": ((2, 8, 256, 64), (2, 8, 8, 64), False),
    "query of other lengths": ((2, 8, 128, 64), (2, 512, 8, 64), False),
}


@pytest.mark.parametrize("name", MEANT)
def test_shapes_of_models_are_no_other_layout(name: str):
    query, key, is_causal = MEANT[name]
    assert layout_warnings(query, key, is_causal=is_causal, query_offset=0 if is_causal else None) == []


SWAPPED: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "of 12 heads": ((2, 12, 197, 64), (2, 12, 197, 64), False),
    "of 128 tokens": ((2, 8, 128, 64), (2, 8, 128, 64), False),
    "grouped heads": ((2, 32, 128, 64), (2, 8, 128, 64), False),
    "one key head": ((2, 8, 1000, 64), (2, 1, 1000, 64), True),
    "causal": ((1, 32, 4096, 128), (1, 8, 4096, 128), True),
    "of 64 heads": ((1, 64, 256, 64), (1, 64, 256, 64), True),
    "other keys": ((2, 16, 512, 64), (2, 16, 256, 64), False),
    "query alone": ((2, 8, 128, 64), (2, 128, 8, 64), False),
    "query alone, causal": ((2, 8, 1024, 64), (2, 1024, 8, 64), True),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_shapes_of_another_layout(name: str):
    query, key, is_causal = SWAPPED[name]
    assert len(layout_warnings(query, key, is_causal=is_causal)) == 1


SAYS_WHO = {
    "mask": jnp.ones((1, 1, 1, 1), bool),
    "bias": jnp.zeros((1, 1, 1, 1)),
    "is_causal": True,
    "local_window_size": 8,
    "query_seq_lengths": np.full(2, 8),
    "key_value_seq_lengths": np.full(2, 8),
    "query_segment_ids": np.zeros((2, 8), int),
    "query_positions": np.zeros((2, 8), int),
    "key_value_positions": np.zeros((2, 8), int),
    "query_offset": 0,
    "mask_mod": lambda b, n, t, s: t >= s,
    "score_mod": lambda score, b, n, t, s: score,
}


@pytest.mark.parametrize("name", SAYS_WHO)
def test_models_of_128_heads_say_who_attends_whom(name: str):
    shape = (2, 8, 128, 64)
    options = {name: SAYS_WHO[name]}
    if name == "query_segment_ids":
        options["key_value_segment_ids"] = SAYS_WHO[name]
    assert layout_warnings(shape, shape, **options) == []
    assert len(layout_warnings(shape, shape)) == 1


# ------------------------------------------------------------------------------------------ values, which are read once

LENGTHS = jnp.array([S + 2, 1])


def caught(function: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(w.message).split(" ")[0] for w in found]


def attend(**options: Any) -> Any:
    return flash_attention(QUERY, KEY, VALUE, **options)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of arrays whose values this looks at."""
    shapes: list[tuple[int, ...]] = []

    class Counting:
        ndarray, integer = np.ndarray, np.integer

        @staticmethod
        def asarray(x: Any) -> Any:
            shapes.append(x.shape)
            return np.asarray(x)

    monkeypatch.setattr(_warnings, "np", Counting)
    return shapes


BIAS = jnp.asarray(MASK[0], "float32")


def test_a_loop_reads_an_array_once(reads: list[Any]):
    def loop():
        for _ in range(3):
            attend(key_value_seq_lengths=LENGTHS, bias=BIAS)

    assert caught(loop) == ["key_value_seq_lengths", "bias"]
    assert reads == [(B,), (T, S)]
    assert caught(loop) == []
    assert caught(lambda: attend(bias=BIAS)) == []  # as `attend` is what calls
    assert caught(lambda: flash_attention(QUERY, KEY, VALUE, bias=BIAS)) == ["bias"]


def test_all_of_a_bias_is_read():
    bias = np.eye(100, dtype="float32")
    assert caught(lambda: _warnings.warn_of_bias(bias, jnp.asarray(bias)[None, None])) == ["bias"]
    bias[-1, -1] = 2
    assert caught(lambda: _warnings.warn_of_bias(bias, jnp.asarray(bias)[None, None])) == []


def test_lists_are_read_too():
    assert caught(lambda: attend(bias=MASK[0].astype(int).tolist())) == ["bias"]
    assert caught(lambda: attend(key_value_seq_lengths=[jnp.int32(S + 1), 1])) == ["key_value_seq_lengths"]


def test_what_is_right_is_read_once_too(reads: list[Any]):
    for _ in range(3):
        attend(key_value_seq_lengths=jnp.array([S, 1]), bias=jnp.zeros((T, S)))
    assert reads == [(B,), (T, S)]


def test_nothing_is_read_where_warnings_are_off(reads: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FLAG, "0")
    attend(key_value_seq_lengths=LENGTHS, bias=BIAS)
    assert reads == []


def test_nothing_is_read_of_an_argument_of_a_program(reads: list[Any]):
    def call(lengths: jax.Array, bias: jax.Array) -> jax.Array:
        return attend(key_value_seq_lengths=lengths, bias=bias)

    def both(lengths: jax.Array) -> jax.Array:  # a list of arrays
        return attend(key_value_seq_lengths=[lengths[0], 1])

    full: Any = np.full(B, S)
    assert caught(lambda: jax.jit(call)(LENGTHS, BIAS)) == []
    assert caught(lambda: jax.vmap(call)(LENGTHS[None], BIAS[None])) == []
    assert caught(lambda: jax.grad(lambda bias: call(full, bias).sum())(BIAS)) == []
    assert caught(lambda: jax.jit(both)(LENGTHS)) == []
    assert reads == [(B,)]  # what NumPy has
    assert caught(lambda: call(LENGTHS, BIAS)) == ["key_value_seq_lengths", "bias"]  # by the line in `call`


def test_constants_of_a_program_are_read_where_it_is_traced(reads: list[Any]):
    call = jax.jit(lambda query: flash_attention(query, KEY, VALUE, key_value_seq_lengths=LENGTHS, bias=BIAS))
    assert caught(lambda: call(QUERY)) == ["key_value_seq_lengths", "bias"]
    with jax.disable_jit():
        assert caught(lambda: call(QUERY)) == []
    assert len(reads) == 2


def test_a_line_that_raised_is_read_again():
    for _ in range(2):
        with warnings.catch_warnings(action="error"), pytest.raises(AttentionWarning, match="bias of shape"):
            attend(bias=BIAS)


@pytest.mark.parametrize("why", ["deleted", "of several processes", "large"])
def test_arrays_that_cannot_be_read_are_not(why: str, reads: list[Any], monkeypatch: pytest.MonkeyPatch):
    bias = jnp.asarray(MASK[0], "float32")
    if why == "deleted":
        bias.delete()
    elif why == "large":
        monkeypatch.setattr(_warnings, "_MOST_VALUES", T * S - 1)
    else:
        monkeypatch.setattr(type(bias), "is_fully_addressable", property(lambda _: False))
    _warnings.warn_of_bias(bias, jnp.zeros((1, 1, T, S)))
    _warnings.warn_of_lengths("key_value_seq_lengths", bias, bias, S)
    assert reads == []


def test_empty_arrays_have_no_values():
    assert caught(lambda: flash_attention(QUERY[:0], KEY[:0], VALUE[:0], jnp.zeros((0, 1, T, S)))) == []
    assert caught(lambda: flash_attention(QUERY[:, :0], KEY, VALUE, jnp.zeros((B, 1, 0, S)))) == []
