"""Calls whose sequence is split over devices: their cases, the programs of them, and the float64 oracle's results."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import (
    balanced_order,
    context_parallel_attention,
    context_parallel_attention_with_lse,
    mods,
)
from tests.support.environment import bernoulli, enable_x64, fast_compilation, lenient_promotion
from tests.support.oracle import (
    Masking,
    dense_float64,
    dense_numpy,
    masking,
)

STRATEGIES = ("ring", "all_to_all", "all_gather")
# With how many devices. Up to four devices of a ring each have their own text in the program, more are in a loop.
PLACES = (*((strategy, 4) for strategy in STRATEGIES), ("ring", 8))
FAST = fast_compilation()
FLOATS = ("query", "key", "value", "scale", "bias", "sinks", "score_mod_args")
B, T, S = 2, 32, 16  # S: of the keys of cross attention
HEADS = (4, 2, 8, 5)  # N, K, H, D
TILES = {"block_q": 4, "block_kv": 3}  # several on each device; elsewhere one, which compiles in a quarter of the time


def make_mesh(shape: tuple[int, ...] = (4,), axes: tuple[str, ...] = ("s",)) -> Mesh:
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))


# ---- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the whole sequence: everything but the numbers of its floats.

    `options` are what is not traced; `arrays` what is, beside query, key, value and scale, with a shape for a float,
    and a list of them for `score_mod_args`.
    `specs` says how a bias or a mask is sharded; ids and positions are sharded as the tokens are.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    specs: dict[str, P] = dataclasses.field(default_factory=dict)
    heads: tuple[int, int, int, int] = HEADS
    keys: int = T
    is_balanced: bool = False

    def positions(self, devices: int) -> dict[str, np.ndarray]:
        """What the balanced order means, with the offset."""
        query, key = (np.tile(balanced_order(n, devices), (B, 1)) for n in (T, self.keys))
        offset = np.asarray((self.options | self.arrays).get("query_offset", 0))
        return {"query_positions": query + offset.reshape(-1, 1), "key_value_positions": key}

    def indices(self, devices: int) -> list[np.ndarray]:
        """What `score_mod` and `mask_mod` get, as arrays that broadcast to (B, N, T, S)."""
        given = self.options | self.arrays
        if self.is_balanced:
            given = given | self.positions(devices)
        rows = np.arange(T, dtype=np.int32) + np.asarray(given.get("query_offset", 0)).reshape(-1, 1)
        rows, keys = given.get("query_positions", rows), given.get("key_value_positions", np.arange(self.keys)[None])
        batch, heads = np.arange(B), np.arange(self.heads[0])
        shaped = (batch[:, None, None, None], heads[:, None, None], rows[:, None, :, None], keys[:, None, None])
        return [np.asarray(x, np.int32) for x in shaped]


def _ids(length: int, seed: int) -> np.ndarray:
    """Of three documents, and padding in front of the first row's and behind the second's."""
    x = np.sort(np.random.default_rng(seed).integers(0, 3, (B, length)), axis=1).astype(np.int32)
    x[0, :2] = x[1, -3:] = -1
    return x


def random_mask(*shape: int) -> np.ndarray:
    x = np.random.default_rng(1).random(shape) < 0.6
    x[0, :, 3 % shape[2]] = False  # a row without keys
    return x


def _permuted(seed: int, length: int = T) -> np.ndarray:
    x = np.tile(np.arange(length, dtype=np.int32), (B, 1))
    return np.random.default_rng(seed).permuted(x, axis=1)


def integers(*x: int) -> np.ndarray:
    return np.array(x, np.int32)


N = HEADS[0]
CAUSAL: dict[str, Any] = {"is_causal": True}
IDS = {"query_segment_ids": _ids(T, 0), "key_value_segment_ids": _ids(T, 0)}
SHUFFLED = {name: np.random.default_rng(2).permuted(x, axis=1) for name, x in IDS.items()}
CROSS_IDS = {"query_segment_ids": _ids(T, 0), "key_value_segment_ids": _ids(S, 1)}
LENGTHS = {"query_seq_lengths": integers(29, 0), "key_value_seq_lengths": integers(11, T)}
POSITIONS = {"query_positions": _permuted(3), "key_value_positions": _permuted(4)}
DROPOUT: dict[str, Any] = {"dropout_rate": 0.3}
SHARED_DROPOUT: dict[str, Any] = {"dropout_rate": 0.3, "broadcast_dropout": True}
# How an array with T, with S or with both of them is sharded.
BY_ROWS, BY_KEYS = P(None, None, "s", None), P(None, None, None, "s")
EVERYTHING: dict[str, Any] = {
    "query_seq_lengths": integers(T, 30),
    "key_value_seq_lengths": integers(T, 17),
    "mask": random_mask(B, 1, T, T),
    "bias": (B, N, T, T),
    "sinks": (N,),
    **IDS,
}

MASKS: dict[str, Case] = {
    "none": Case(),
    "causal": Case(CAUSAL),
    "window": Case({"local_window_size": (3, 1)}),
    "causal window": Case(CAUSAL | {"local_window_size": (7, 0)}),
    "causal window past a block": Case(CAUSAL | TILES | {"local_window_size": (9, 0)}),
    "window without itself": Case({"local_window_size": (9, -2)}),
    "traced window": Case({}, {"local_window_size": integers(4, 2)}),
    "lengths": Case({}, LENGTHS),
    "lengths, causal": Case(CAUSAL, LENGTHS),
    "no key": Case(CAUSAL, {"key_value_seq_lengths": integers(T, 0)}),
    "mask by rows": Case({}, {"mask": random_mask(B, 1, T, T)}, {"mask": BY_ROWS}),
    "mask by keys": Case(CAUSAL | TILES, {"mask": random_mask(1, N, T, T)}, {"mask": BY_KEYS}),
    "mask of keys": Case({}, {"mask": random_mask(B, 1, 1, T)}, {"mask": BY_KEYS}),
    "mask of keys, whole": Case(CAUSAL, {"mask": random_mask(B, 1, 1, T)}, {"mask": P()}),
    "mask of rows": Case(CAUSAL, {"mask": random_mask(B, 1, T, 1)}, {"mask": BY_ROWS}),
    "mask, whole": Case({}, {"mask": random_mask(1, 1, T, T)}, {"mask": P()}),
    "ids": Case({}, IDS),
    "ids, causal": Case(CAUSAL, IDS),
    "shuffled ids, window": Case({"local_window_size": (9, 4)}, SHUFFLED),
    "positions": Case(CAUSAL, POSITIONS),
    "positions, window": Case(CAUSAL | TILES | {"local_window_size": (6, 0)}, POSITIONS),
    "positions of keys": Case(CAUSAL, {"key_value_positions": _permuted(5)}),
    "offset": Case(CAUSAL | {"query_offset": 2}),
    "offsets": Case(CAUSAL, {"query_offset": integers(-3, 4)}),
}
BALANCED: dict[str, Case] = {
    f"balanced, {name}": dataclasses.replace(case, is_balanced=True)
    for name, case in {
        "causal": Case(CAUSAL),
        "none": Case(),
        "window": Case(CAUSAL | {"local_window_size": (5, 0)}),
        "both sides": Case({"local_window_size": (5, 3)}),
        "window without itself": Case({"local_window_size": (-2, 9)}),
        "traced window": Case({}, {"local_window_size": integers(4, 2)}),
        "ids": Case(CAUSAL, IDS),
        "dropout": Case(CAUSAL | DROPOUT),
        "offset": Case(CAUSAL | {"query_offset": -2}),
        "offsets": Case(CAUSAL, {"query_offset": integers(1, -4)}),
        "mask and sinks": Case(CAUSAL | TILES, {"mask": random_mask(B, 1, T, T), "sinks": (N,)}, {"mask": BY_ROWS}),
        "bias": Case(CAUSAL, {"bias": (1, N, T, T)}, {"bias": BY_ROWS}),
        "cross": Case(CAUSAL, keys=S),
    }.items()
}
FEATURES: dict[str, Case] = {
    "bias by rows": Case({}, {"bias": (1, N, T, T)}, {"bias": BY_ROWS}),
    "bias by keys": Case(CAUSAL, {"bias": (B, 1, T, T)}, {"bias": BY_KEYS}),
    "bias of keys": Case({}, {"bias": (1, N, 1, T)}, {"bias": BY_KEYS}),
    "bias of keys, whole": Case({}, {"bias": (B, 1, 1, T)}, {"bias": P()}),
    "bias of rows": Case(CAUSAL, {"bias": (B, 1, T, 1), "sinks": (N,)}, {"bias": BY_ROWS}),
    "bias of rows, cap": Case(CAUSAL | TILES | {"logits_soft_cap": 1.5}, {"bias": (B, 1, T, 1)}, {"bias": BY_ROWS}),
    "bias of rows, whole": Case({}, {"bias": (1, N, T, 1)}, {"bias": P()}),
    "bias of one": Case({}, {"bias": (B, N, 1, 1)}, {"bias": P()}),
    "bias, whole": Case({}, {"bias": (B, N, T, T)}, {"bias": P()}),
    "soft cap": Case({"logits_soft_cap": 1.5}),
    "sinks": Case(CAUSAL, {"sinks": (N,)}),
    "sinks and mask": Case({}, {"mask": random_mask(B, 1, T, T), "sinks": (N,)}, {"mask": BY_ROWS}),
    "sinks and ids": Case(CAUSAL, IDS | {"sinks": (N,)}),
    "dropout": Case(DROPOUT),
    "dropout, window": Case(DROPOUT | {"local_window_size": (5, 2)}),
    "window with terms": Case(
        DROPOUT | {"local_window_size": (10, 0), "logits_soft_cap": 3.0},
        {"bias": (1, N, T, T), "sinks": (N,)},
        {"bias": BY_ROWS},
    ),
    "window, bias of keys": Case(CAUSAL | {"local_window_size": (5, 0)}, {"bias": (B, 1, 1, T)}, {"bias": BY_KEYS}),
    "shared dropout": Case(CAUSAL | SHARED_DROPOUT),
    "one key head": Case(CAUSAL, heads=(4, 1, 4, 4)),
    "a key head for each": Case(CAUSAL, {"bias": (B, 4, T, T)}, {"bias": BY_ROWS}, (4, 4, 2, 3)),
    "eight heads": Case(CAUSAL | DROPOUT, heads=(8, 4, 3, 2)),
    "cross": Case(keys=S),
    "cross, causal": Case(CAUSAL, keys=S),
    "cross, window": Case({"local_window_size": (2, 3)}, keys=S),
    "cross, ids": Case({}, CROSS_IDS, keys=S),
    "cross, dropout": Case(DROPOUT, {"key_value_seq_lengths": integers(16, 5)}, keys=S),
    "cross, bias": Case({}, {"bias": (1, N, T, S)}, {"bias": BY_KEYS}, keys=S),
    "everything": Case(
        CAUSAL | TILES | SHARED_DROPOUT | {"local_window_size": (13, 2), "logits_soft_cap": 3.0},
        EVERYTHING | POSITIONS,
        {"mask": BY_ROWS, "bias": BY_KEYS},
    ),
    "everything, balanced": Case(
        CAUSAL | DROPOUT | {"local_window_size": (13, 2), "logits_soft_cap": 3.0},
        {name: x for name, x in EVERYTHING.items() if not name.endswith("_lengths")},
        {"mask": BY_ROWS, "bias": BY_ROWS},
        is_balanced=True,
    ),
}
CASES = MASKS | BALANCED | FEATURES


def _gated(score: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any, more: Any) -> Any:
    """Not linear in score and arguments, which are read by head, by distance, by batch row and key; and -inf."""
    distance = (q - k).astype(score.dtype)
    x = score * (1 + 0.1 * jnp.tanh(score)) + slopes[h] ** 2 * distance * 0.05 + more[0][h, q - k + T]
    return jnp.where((k > q + 9) & (k % 5 > 0), -jnp.inf, x * more[1][b, k])


def _sparse(b: Any, h: Any, q: Any, k: Any, flags: Any) -> Any:
    """Some rows have no key, others none of most devices."""
    return (flags[b, q] > 0) & ((k // 4 + q // 8 + h) % 3 == 0)


_PREFIX = {"mask_mod_args": (integers(11, 3),)}
_DOCUMENT = {"mask_mod_args": (SHUFFLED["query_segment_ids"], SHUFFLED["key_value_segment_ids"])}
ALIBI: dict[str, Any] = {"score_mod": mods.alibi}
SLOPES: dict[str, Any] = {"score_mod_args": [(N,)]}
# Calls with functions of scores and indices, which get the places, or the positions, of the whole sequence.
MODS: dict[str, Case] = {
    "alibi": Case(ALIBI | CAUSAL, SLOPES),
    "alibi, window": Case(ALIBI | CAUSAL | {"local_window_size": (5, 0)}, SLOPES),
    "T5, balanced": Case(
        CAUSAL | {"score_mod": mods.T5RelativeBias(8, 12, is_bidirectional=False)},
        {"score_mod_args": [(8, N)]},
        is_balanced=True,
    ),
    "T5, cross": Case({"score_mod": mods.T5RelativeBias(8, 12)}, {"score_mod_args": [(8, N)]}, keys=S),
    "gated": Case(
        DROPOUT | {"score_mod": _gated, "logits_soft_cap": 3.0, "query_offset": 2},
        {"score_mod_args": [(N,), [(N, 2 * T + 8), (B, T)]], "bias": (B, N, T, 1), **IDS},
        {"bias": BY_ROWS},
    ),
    "document, window": Case(
        CAUSAL | DROPOUT | {"local_window_size": (9, 0), "mask_mod": mods.document}, {"sinks": (N,), **_DOCUMENT}
    ),
    "document, balanced": Case(CAUSAL | {"mask_mod": mods.document}, _DOCUMENT, is_balanced=True),
    "prefix and alibi, positions": Case(ALIBI | {"mask_mod": mods.prefix_lm}, SLOPES | POSITIONS | _PREFIX),
    "sliding window": Case(TILES | {"mask_mod": mods.SlidingWindow(4, 2)}, {"bias": (1, N, T, T)}, {"bias": BY_ROWS}),
    "rows without keys": Case(
        CAUSAL | {"mask_mod": _sparse, "local_window_size": (9, 0)},
        {"mask_mod_args": (_ids(T, 0),)},
        heads=(4, 2, 3, 2),
    ),
    "rows without keys, sinks": Case(
        CAUSAL | {"mask_mod": _sparse}, {"mask_mod_args": (_ids(T, 0),), "sinks": (N,), **LENGTHS}
    ),
}
# ---- numbers


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Floats of a call by name; tangents of them; cotangents of out and of lse."""

    floats: dict[str, Any]
    tangents: dict[str, Any]
    cotangents: tuple[Any, Any]

    def map(self, f: Callable[[Any], Any]) -> "Numbers":
        return jax.tree.map(f, self)


jax.tree_util.register_dataclass(Numbers, ["floats", "tangents", "cotangents"], [])


def numbers(case: Case, seed: int = 0) -> Numbers:
    heads, K, H, D = case.heads
    shapes = {"query": (B, T, heads, H), "key": (B, case.keys, K, H), "value": (B, case.keys, K, D), "scale": ()}
    shapes |= {name: case.arrays[name] for name in ("bias", "sinks", "score_mod_args") if name in case.arrays}
    rng = np.random.default_rng(seed)

    def draw(shape: Any) -> Any:
        return tuple(map(draw, shape)) if isinstance(shape, list) else np.asarray(rng.standard_normal(shape))

    floats, tangents = ({name: draw(x) for name, x in shapes.items()} for _ in range(2))
    floats["scale"] = np.asarray(0.7)
    return Numbers(floats, tangents, (rng.standard_normal((B, T, heads, D)), rng.standard_normal((B, T, heads))))


def others(case: Case) -> dict[str, Any]:
    """Of the traced arrays those that are no floats."""
    return {name: x for name, x in case.arrays.items() if name not in FLOATS}


# ---- programs


@dataclasses.dataclass(frozen=True)
class Split:
    """A case over the devices of `mesh`, by mesh axes of which each may be several as one."""

    case: Case
    strategy: Any
    mesh: Mesh
    tokens: Any = "s"
    batch: Any = None
    heads: Any = None
    check_vma: bool = True

    def spec(self, name: str) -> P:
        batch, tokens, heads = self.batch, self.tokens, self.heads
        if name in ("bias", "mask"):
            shape, spec = self.case.arrays[name], (*self.case.specs[name], None, None)
            shape = shape if name == "bias" else shape.shape
            last = (tokens if x else None for x in (spec[2:4] if len(spec) > 4 else (None, None)))
            return P(batch if shape[0] > 1 else None, heads if shape[1] > 1 else None, *last)
        if name in FLOATS[:3]:
            return P(batch, tokens, heads)
        if name.endswith(("_ids", "_positions")):
            return P(batch, tokens)
        whole = dict.fromkeys(("scale", "local_window_size", "score_mod_args", "mask_mod_args"), P())
        return (whole | {"sinks": P(heads)}).get(name, P(batch))

    def specs(self, arrays: dict[str, Any]) -> dict[str, P]:
        return {name: self.spec(name) for name in arrays}

    def local(self, floats: dict[str, Any], others: dict[str, Any], results: str = "lse") -> Any:
        """On one device: out, or that with "lse", or with "all" results."""
        options: dict[str, Any] = self.case.options | {"axis_name": self.tokens, "strategy": self.strategy}
        if "dropout_rate" in options:
            options["dropout_rng"] = jax.random.key(1)
        if self.case.is_balanced:
            options["order"] = "balanced"
        if results == "out":
            return context_parallel_attention(**floats, **others, **options)
        return context_parallel_attention_with_lse(**floats, **others, **options, return_max_logits=results == "all")

    def __call__(self, floats: dict[str, Any], others: dict[str, Any], results: str = "lse") -> Any:
        """Of the whole sequence."""
        rows = P(self.batch, self.tokens, self.heads)
        return jax.shard_map(
            functools.partial(self.local, results=results),
            mesh=self.mesh,
            in_specs=(self.specs(floats), self.specs(others)),
            out_specs={"out": rows, "lse": (rows, rows), "all": (rows, rows, P())}[results],
            check_vma=self.check_vma,
        )(floats, others)


def derivatives(attention: Callable[..., Any]) -> Callable[..., Any]:
    """out and lse, their tangents, and the gradient of their sum with the cotangents as weights, and its tangent."""

    def run(x: Numbers, others: dict[str, Any]) -> dict[str, Any]:
        def with_gradient(floats: dict[str, Any]) -> Any:
            def results(floats: dict[str, Any]) -> Any:
                out, lse = attention(floats, others)
                return out, jnp.where(lse > -1e30, lse, 0)

            values, vjp = jax.vjp(results, floats)
            return values, vjp(x.cotangents)[0]

        (values, gradient), (tangents, hvp) = jax.jvp(with_gradient, (x.floats,), (x.tangents,))
        return {"value": values, "jvp": tangents, "vjp": gradient, "hvp": hvp}

    return run


# ---- the oracle


@functools.cache
def _keep(shape: tuple[int, ...], rate: float, x64: bool) -> np.ndarray:
    """The mask of dropout, which is another one where 64-bit types are on."""
    with enable_x64(x64):
        return np.asarray(bernoulli(jax.random.key(1), 1 - rate, shape))


def masks_of(case: Case, floats: dict[str, Any], devices: int, *, x64: bool = True) -> Masking:
    """Of the whole sequence."""
    heads, selection = case.heads[0], {**case.options, **others(case)}
    mask_mod, args = selection.pop("mask_mod", None), selection.pop("mask_mod_args", ())
    selection.pop("score_mod", None)
    if case.is_balanced:
        selection = {name: x for name, x in selection.items() if name != "query_offset"} | case.positions(devices)
    selection = {name: x for name, x in selection.items() if name not in TILES}
    keep = None
    if "dropout_rate" in selection:
        lead = (1, 1) if selection.pop("broadcast_dropout", False) else (B, heads)
        keep = np.broadcast_to(_keep((*lead, T, case.keys), selection["dropout_rate"], x64), (B, heads, T, case.keys))
    masks = masking(floats["query"], floats["key"], keep=keep, **selection)
    factor, cap = np.broadcast_to(masks.factor, masks.allowed.shape), np.asarray(masks.cap, np.float64)
    allowed = masks.allowed
    if mask_mod is not None:
        allowed = allowed & np.asarray(mask_mod(*case.indices(devices), *jax.tree.map(jnp.asarray, args)))
    return dataclasses.replace(masks, allowed=allowed, factor=factor, cap=cap)


@functools.cache
def _oracle(core: Callable[..., Any]) -> Callable[..., Any]:
    """Derivatives of dense attention with a bias and sinks; options are data, so that it compiles once for a shape."""

    def run(x: Numbers, masks: Masking) -> Any:
        wide = x.floats["scale"].dtype
        masks = dataclasses.replace(masks, factor=masks.factor.astype(wide), cap=masks.cap.astype(wide))

        def attention(floats: dict[str, Any], masks: Any) -> Any:
            return core(masks=masks, **floats)

        return derivatives(attention)(x, masks)

    return jax.jit(run, compiler_options=FAST)


def dense_results(
    case: Case, x: Numbers, devices: int, core: Callable[..., Any] = dense_float64, *, x64: bool = True
) -> Any:
    """`x64`: whether 64-bit types are on where the call is."""
    masks = masks_of(case, x.floats, devices, x64=x64)
    wide, scores = x.floats["scale"].dtype, masks.allowed.shape
    missing = {"bias": np.zeros(scores, wide), "sinks": np.full(case.heads[0], -np.inf, wide)}
    shape = np.shape(x.floats.get("bias"))

    def filled(floats: dict[str, Any], missing: dict[str, Any]) -> dict[str, Any]:
        found = missing | floats
        return found | {"bias": np.broadcast_to(found["bias"], scores)}

    tangents = filled(x.tangents, {name: np.zeros_like(y) for name, y in missing.items()})
    results = _oracle(core)(dataclasses.replace(x, floats=filled(x.floats, missing), tangents=tangents), masks)
    results = jax.tree.map(np.asarray, results)
    for name in ("vjp", "hvp"):
        gradient = results[name]
        if shape:
            axes = tuple(i for i in range(4) if shape[i] == 1)
            gradient["bias"] = gradient["bias"].sum(axis=axes, keepdims=True)
        results[name] = {name: gradient[name] for name in x.floats}
    return results


@functools.cache
def expected(name: str, devices: int) -> Any:
    with enable_x64():
        return dense_results(CASES[name], numbers(CASES[name]), devices)


def dense_with_mods(case: Case, devices: int) -> Callable[..., Any]:
    """`dense_float64` with the `score_mod` of a case."""
    score_mod, at = case.options.get("score_mod"), case.indices(devices)

    def core(score_mod_args: Any = (), **arrays: Any) -> Any:
        def change(logits: jax.Array) -> jax.Array:
            return logits if score_mod is None else score_mod(logits, *map(jnp.asarray, at), *score_mod_args)

        with lenient_promotion():
            return dense_float64(**arrays, change=change)

    return core


def largest_logits(case: Case, floats: dict[str, Any], devices: int) -> np.ndarray:
    masks, scores = masks_of(case, floats, devices), (B, case.heads[0], T, case.keys)
    arrays = (np.broadcast_to(floats.get("bias", 0.0), scores), floats["scale"])
    dout = np.zeros((B, T, case.heads[0], case.heads[3]))
    with np.errstate(all="ignore"):
        x = dense_numpy(floats["query"], floats["key"], floats["value"], *arrays, masks=masks, dout=dout)
    return x.max_logits.max(0)


def assert_close(actual: Any, expected: Any) -> None:
    """Within 1e-11 of the largest number of each array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name, largest = jax.tree_util.keystr(path), np.abs(e).max()
        assert np.isfinite(largest), name
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-11 * max(1.0, largest), err_msg=name)


def run(f: Callable[..., Any], *arguments: Any) -> Any:
    """Results as NumPy arrays, in float64."""
    with enable_x64():
        return jax.tree.map(np.asarray, jax.jit(f, compiler_options=FAST)(*arguments))
