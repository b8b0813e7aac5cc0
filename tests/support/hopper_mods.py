"""Calls with functions of scores and indices that the Hopper kernels evaluate, and dense attention with them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_native_flash_attn import explain, flash_attention, mods
from tests.support.environment import enable_x64
from tests.support.oracle import assert_as_accurate_as_dense

B, T, S, K, G = 2, 520, 700, 2, 2
N = K * G
_RNG = np.random.default_rng(0)
_IDS = np.sort(_RNG.integers(0, 5, (B, S)), -1).astype(np.int32)
_GATE, _ROWS = (_RNG.standard_normal(shape).astype(np.float32) for shape in ((B, S), (T,)))
_FLAGS = _RNG.random(T) < 0.9
_ALIBI: dict[str, Any] = {"score_mod": mods.alibi, "score_mod_args": (mods.alibi_slopes(N),)}
_PREFIX: dict[str, Any] = {"mask_mod": mods.prefix_lm, "mask_mod_args": (np.array([3, 199], np.int32),)}


def _gated(score: Any, b: Any, h: Any, q: Any, k: Any, gate: Any, rows: Any) -> Any:
    return score * jnp.tanh(gate[b, k] + score) + rows[q] * (1 + h).astype(score.dtype)


def _windowed(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return jnp.where((k > q + 100) | (k < q - 300), -jnp.inf, jax.nn.relu(score))


def _slanted(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score + 0.03 * (k - q).astype(score.dtype)


def _by_batch_row(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """Chooses by a number, for a tile, between numbers, rows and scores."""
    return score + jnp.where(b == 0, 0.7, jnp.where(h < 2, 0.01 * q.astype(score.dtype), jnp.tanh(score)))


def _flagged(b: Any, h: Any, q: Any, k: Any, flags: Any) -> Any:
    """Some rows have no key."""
    return flags[q] & ((k // 64 + q // 64 + h) % 3 == 0)


class ModCall(NamedTuple):
    """Options of `flash_attention`, and what else decides: dtype, head dimension, what is differentiated, scale."""

    options: dict[str, Any]
    dtype: str = "bfloat16"
    H: int = 64
    wanted: tuple[str, ...] = ("query", "key", "value")
    scale: float = 0.3


CALLS: dict[str, ModCall] = {
    "alibi": ModCall({**_ALIBI, "is_causal": True, "query_offset": 0}),
    "alibi, 128": ModCall(_ALIBI, H=128),
    "alibi, 256": ModCall(_ALIBI, H=256),
    "alibi, float32": ModCall(_ALIBI, "float32"),
    "alibi, float16, offset": ModCall({**_ALIBI, "is_causal": True, "query_offset": np.int32(7)}, "float16"),
    "alibi, positions": ModCall(
        {**_ALIBI, "query_positions": np.arange(T, dtype=np.int32)[None] * 2 + np.int32([[0], [5]])}
    ),
    "alibi, steep": ModCall({"score_mod": mods.alibi, "score_mod_args": (np.float32([0.25, 3, 1e30, 1e38]),)}, H=128),
    "slanted, large scale": ModCall({"score_mod": _slanted}, wanted=("query", "key", "value", "scale"), scale=-2.5),
    "slanted, bias": ModCall({"score_mod": _slanted}, H=128, wanted=("query", "key", "value", "bias"), scale=-0.09),
    "soft cap": ModCall({"score_mod": mods.SoftCap(2.0)}, wanted=("query", "key", "value", "scale")),
    "gate": ModCall({"score_mod": _gated, "score_mod_args": (_GATE, _ROWS)}),
    "gate, bias, cap": ModCall(
        {"score_mod": _gated, "score_mod_args": (_GATE, _ROWS), "logits_soft_cap": 5.0},
        wanted=("query", "key", "value", "bias"),
    ),
    "-inf": ModCall({"score_mod": _windowed}),
    "by batch row": ModCall({"score_mod": _by_batch_row}, "float16"),
    "prefix": ModCall(_PREFIX),
    "prefix, 128": ModCall(_PREFIX, H=128),
    "prefix, float32": ModCall(_PREFIX, "float32", H=128),
    "prefix, alibi, bias": ModCall({**_PREFIX, **_ALIBI}, wanted=("query", "key", "value", "bias")),
    "document": ModCall({"mask_mod": mods.document, "mask_mod_args": (_IDS[:, :T], _IDS)}),
    "document, lengths": ModCall(
        {
            "mask_mod": mods.document,
            "mask_mod_args": (_IDS[:, :T], _IDS),
            "key_value_seq_lengths": np.array([S, 400], np.int32),
            "query_seq_lengths": np.array([T, 300], np.int32),
        }
    ),
    "sliding window": ModCall({"mask_mod": mods.SlidingWindow(150, 30)}),
    "dilated": ModCall({"mask_mod": mods.Dilated(3, 100)}),
    "neighbourhood": ModCall({"mask_mod": mods.Neighbourhood(26, 20, 7, 9)}),
    "rows without keys": ModCall({"mask_mod": _flagged, "mask_mod_args": (_FLAGS,)}),
    "rows without keys, sinks": ModCall(
        {"mask_mod": _flagged, "mask_mod_args": (_FLAGS,), "sinks": np.float32([0.5, -1, 0, 2])}
    ),
    "a tiled mask": ModCall({"mask_mod": mods.make_tile_mask(mods.Dilated(3, 100), T, S, block=48)}),
}
_STATIC = ("score_mod", "mask_mod", "is_causal", "logits_soft_cap")


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a program gets, and what it is made with."""
    static = {n: x for n, x in options.items() if isinstance(x, int) or (n in _STATIC and not hasattr(x, "classes"))}
    return {name: x for name, x in options.items() if name not in static}, static


def floats(call: ModCall, seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, T, N, call.H), "key": (B, S, K, call.H), "value": (B, S, K, call.H), "bias": (1, N, T, S)}
    arrays = {name: jnp.asarray(rng.standard_normal(x), call.dtype) for name, x in shapes.items()}
    if "bias" not in call.wanted:
        del arrays["bias"]
    return {**arrays, "scale": jnp.float32(call.scale)}


def attention(call: ModCall, arrays: dict[str, Any], given: dict[str, Any], **options: Any) -> jax.Array:
    return flash_attention(**arrays, **given, **split(call.options)[1], **options)


def dense(call: ModCall, arrays: dict[str, Any], options: dict[str, Any]) -> jax.Array:
    """By whole arrays: in the dtype of query, with products and softmax in float32 of 16 bits."""
    dtype = arrays["query"].dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    query = arrays["query"].astype(wide)
    key, value = (jnp.repeat(arrays[name], G, 2).astype(wide) for name in ("key", "value"))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key)
    logits = logits * arrays["scale"].astype(wide)
    if "bias" in arrays:
        logits += arrays["bias"].astype(wide)
    at = [
        jnp.arange(n, dtype=jnp.int32).reshape([-1 if i == a else 1 for i in range(4)])
        for a, n in enumerate((B, N, T, S))
    ]
    places = at[2:]
    if "query_positions" in options:
        at[2] = jnp.asarray(options["query_positions"], jnp.int32)[:, None, :, None]
    at[2] = at[2] + options.get("query_offset", 0)
    if options.get("score_mod") is not None:
        args = [jnp.asarray(x, wide) for x in options.get("score_mod_args", ())]
        logits = jnp.maximum(options["score_mod"](logits, *at, *args), float(jnp.finfo(jnp.float32).min) / 4)
    cap = options.get("logits_soft_cap")
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    allowed = jnp.ones(logits.shape, bool)
    if (mask := options.get("mask_mod")) is not None:
        args = map(jnp.asarray, options.get("mask_mod_args", ()))
        allowed &= getattr(mask, "mask_mod", mask)(*at, *args)
    if options.get("is_causal"):
        allowed &= at[3] <= at[2]
    if (lengths := options.get("key_value_seq_lengths")) is not None:
        allowed &= places[1] < lengths[:, None, None, None]
    has_key = allowed.any(-1, keepdims=True)
    logits = jnp.where(allowed, logits, jnp.finfo(wide).min)
    if (sinks := options.get("sinks")) is None:
        weights = jax.nn.softmax(jnp.where(has_key, logits, 0.0), -1)
    else:
        column = jnp.broadcast_to(jnp.asarray(sinks, wide)[None, :, None, None], (*logits.shape[:-1], 1))
        weights = jnp.where(has_key, jax.nn.softmax(jnp.concatenate([logits, column], -1), -1)[..., :-1], 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights.astype(dtype).astype(wide), value).astype(dtype)
    if (lengths := options.get("query_seq_lengths")) is not None:
        out = jnp.where(jnp.arange(T, dtype=jnp.int32)[None, :, None, None] < lengths[:, None, None, None], out, 0)
    return out


def value_and_gradients(
    function: Callable[..., jax.Array], call: ModCall, arrays: dict[str, Any]
) -> dict[str, jax.Array]:
    """out, and the gradients of what is wanted of a fixed linear function of it."""
    wanted = {name: arrays[name] for name in call.wanted}

    def loss(wanted: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        out = function({**arrays, **wanted})
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32) * 0.37).reshape(out.shape)
        return (out.astype(weights.dtype) * weights).sum(), out

    gradients, out = jax.grad(loss, has_aux=True)(wanted)
    return {"out": out, **gradients}


def _expected(call: ModCall) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of dense attention in float64, and in the dtype of the call."""

    def run(arrays: dict[str, Any]) -> dict[str, Any]:
        with jax.default_matmul_precision("highest" if arrays["query"].dtype == jnp.float64 else "default"):
            return value_and_gradients(lambda x: dense(call, x, call.options), call, arrays)

    narrow = jax.jit(run)(floats(call))
    with enable_x64():
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in floats(call).items()}
        return jax.tree.map(np.asarray, jax.jit(run)(wide)), jax.tree.map(np.asarray, narrow)


def family(call: ModCall) -> str:
    """The kernels that gradients take by default."""
    given = jax.eval_shape(lambda: (floats(call), split(call.options)[0]))
    return explain(**given[0], **given[1], **split(call.options)[1]).gradient.family


def check(call: ModCall, implementation: str) -> None:
    """Asserts that value and gradients are at most twice as far off as dense attention."""
    traced, _ = split(call.options)

    def run(arrays: dict[str, Any], traced: dict[str, Any]) -> dict[str, Any]:
        given = functools.partial(attention, call, given=traced, implementation=implementation)
        return value_and_gradients(lambda x: given(x), call, arrays)

    got = jax.jit(run)(floats(call), traced)
    expected, narrow = _expected(call)
    for result, x in got.items():
        # One number, in whose sum errors cancel, may come out exact by chance.
        floor = 0.01 * np.abs(expected[result]) if result == "scale" else None
        assert_as_accurate_as_dense(result, x, narrow[result], expected[result], floor)
