"""The Mosaic GPU kernels on several GPUs, in bfloat16: a fused projection in every kind of mesh, a sequence split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import (
    balanced_order,
    context_parallel_attention,
    context_parallel_attention_with_lse,
    flash_attention,
    flash_attention_with_lse,
    mods,
)
from tests.support.programs import collective_elements

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(jax.devices()) < 2, reason=f"needs two GPUs, there is {len(jax.devices())} device"),
]

B, T, FEATURES = 2, 300, 128
# N, K, H: as many heads as GPUs, more, fewer (a head is cut), grouped, a key/value head that both need.
PROJECTIONS = {
    "2 heads": (2, 2, 64),
    "6 heads": (6, 6, 64),
    "1 head": (1, 1, 128),
    "8/2": (8, 2, 64),
    "4/1": (4, 1, 128),
}


def _transformed(f: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    gradient = jax.grad(lambda w, x: jnp.sin(f(w, x).astype(jnp.float32)).sum())
    return {
        "value": f,
        "grad": gradient,
        "jvp": lambda w, x: jax.jvp(lambda w: f(w, x), (w,), (w,))[1],
        "hvp": lambda w, x: jax.jvp(lambda w: gradient(w, x), (w,), (w,))[1],
    }


def _inputs(N: int, K: int, H: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((FEATURES, N + 2 * K, H)) / np.sqrt(FEATURES)
    return jnp.asarray(w, jnp.bfloat16), jnp.asarray(rng.standard_normal((B, T, FEATURES)), jnp.bfloat16)


def _close(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x).astype(np.float32) for x in (a, e))
        # Sums over shards are rounded to bfloat16 in another order.
        np.testing.assert_allclose(a, e, rtol=0, atol=4 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(e).max())


@pytest.mark.parametrize("transformation", ["value", "grad", "jvp", "hvp"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("implementation", [None, "pure_jax"])
def test_auto_axes(projection: str, transformation: str, implementation: str | None) -> None:
    N, K, H = PROJECTIONS[projection]

    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        parts = jnp.split(x @ w.reshape(FEATURES, -1), [N * H, (N + K) * H], -1)
        heads = (z.reshape(B, T, -1, H) for z in parts)
        return flash_attention(*heads, is_causal=True, implementation=implementation)  # pyright: ignore[reportArgumentType]

    w, x = _inputs(N, K, H)
    g = _transformed(f)[transformation]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    flat = w.reshape(FEATURES, -1)
    shardings = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())
    compiled = jax.jit(g, in_shardings=shardings).lower(flat, x).compile()
    text = compiled.as_text() or ""
    assert "loop" not in collective_elements(text)
    assert ("mosaic_gpu" in text) == (implementation is None)
    placed = jax.device_put(flat, shardings[0]), jax.device_put(x, shardings[1])
    _close(compiled(*placed), jax.jit(g)(flat, x))


@pytest.mark.parametrize("transformation", ["value", "grad", "jvp", "hvp"])
@pytest.mark.parametrize("kind", ["explicit", "shard_map"])
@pytest.mark.parametrize("projection", ["2 heads", "6 heads", "8/2"])
def test_heads_of_each_gpu(projection: str, kind: str, transformation: str) -> None:
    N, K, H = PROJECTIONS[projection]
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    arrays = tuple(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    spec = P(None, None, "model")
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:2])

    def whole(w: Any, x: Any) -> jax.Array:
        return flash_attention(w, *x, is_causal=True)

    def sharded(w: Any, x: Any) -> jax.Array:
        mapped = jax.shard_map(whole, mesh=mesh, in_specs=(spec, (spec, spec)), out_specs=spec)
        return mapped(w, x) if kind == "shard_map" else whole(w, x)

    placed = tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays)
    with jax.set_mesh(mesh):
        compiled = jax.jit(_transformed(sharded)[transformation]).lower(placed[0], placed[1:]).compile()
    assert collective_elements(compiled.as_text()) == {}
    assert "mosaic_gpu" in (compiled.as_text() or "")
    _close(compiled(placed[0], placed[1:]), jax.jit(_transformed(whole)[transformation])(arrays[0], arrays[1:]))


LENGTH, HEADS, KV_HEADS, HEAD_DIM = 1200, 4, 2, 64  # a block of 600 is no multiple of a tile


def _random(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _split_calls() -> dict[str, tuple[dict[str, Any], dict[str, jax.Array]]]:
    """Static options, and arrays; of the last, those with T rows are split along them."""
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (B, LENGTH)), 1), jnp.int32)
    order = jnp.asarray(np.tile(balanced_order(LENGTH, 2), (B, 1)))
    lengths = {
        "query_seq_lengths": jnp.array([LENGTH - 30, LENGTH], jnp.int32),
        "key_value_seq_lengths": jnp.array([LENGTH, LENGTH // 2 - 70], jnp.int32),
    }
    causal = {"is_causal": True}
    functions: dict[str, Any] = {
        "score_mod": mods.alibi,
        "score_mod_args": (mods.alibi_slopes(HEADS),),
        "mask_mod": mods.prefix_lm,
        "mask_mod_args": (np.array([700, 90], np.int32),),
    }
    return {
        "full": ({}, {}),
        "causal": (causal, {}),
        "window": (causal | {"local_window_size": (200, 0)}, {}),
        "balanced": (causal | {"order": "balanced"}, {"query_positions": order, "key_value_positions": order}),
        "positions": (causal, {"query_positions": order, "key_value_positions": order}),
        "ids": (causal, {"query_segment_ids": ids, "key_value_segment_ids": ids}),
        "lengths": ({}, lengths),
        "offset": (causal, {"query_offset": jnp.array([-100, 70], jnp.int32)}),
        "mask": ({}, {"mask": jnp.asarray(np.random.default_rng(2).random((B, 1, LENGTH, LENGTH)) < 0.5)}),
        "bias": ({}, {"bias": _random(3, (1, HEADS, LENGTH, LENGTH))}),
        "cap and sinks": (causal | {"logits_soft_cap": 5.0}, {"sinks": _random(4, (HEADS,), jnp.float32)}),
        "dropout": ({"dropout_rate": 0.2, "dropout_rng": jax.random.key(0)}, {}),
        "functions": (functions, {}),
        "functions, positions": (functions, {"query_positions": order, "key_value_positions": order}),
    }


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("name", _split_calls())
def test_split_sequence(name: str, strategy: str) -> None:
    """As the call on one GPU, but for the order of rounded sums."""
    static, arrays = _split_calls()[name]
    order = static.pop("order", None)
    hidden = ("query_positions", "key_value_positions") if order else ()
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = P(None, "sequence")
    specs = {
        key: P(None, None, "sequence") if key in ("mask", "bias") else split if x.ndim == 2 else P()
        for key, x in arrays.items()
    }
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    *x, dout = (_random(10 + i, (B, LENGTH, n, HEAD_DIM)) for i, n in enumerate(heads))
    dlse = _random(20, (B, LENGTH, HEADS), jnp.float32)

    def parallel(query: jax.Array, key: jax.Array, value: jax.Array, given: dict[str, jax.Array]) -> Any:
        given = {name: x for name, x in given.items() if name not in hidden}
        asked: dict[str, Any] = {"axis_name": "sequence", "strategy": strategy, "order": order}
        return context_parallel_attention_with_lse(query, key, value, **given, **static, **asked)

    over_two = jax.shard_map(parallel, mesh=mesh, in_specs=(split,) * 3 + (specs,), out_specs=(split, split))

    def on_one(query: jax.Array, key: jax.Array, value: jax.Array, given: dict[str, jax.Array]) -> Any:
        return flash_attention_with_lse(query, key, value, **given, **static)

    def results(attention: Callable[..., Any]) -> Any:
        floats = {key: x for key, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

        def run(x: list[jax.Array], floats: dict[str, jax.Array], others: dict[str, jax.Array]) -> Any:
            (out, lse), pullback = jax.vjp(lambda x, floats: attention(*x, {**floats, **others}), x, floats)
            return out, jnp.where(lse > -1e30, lse, 0), pullback((dout, dlse))

        others = {key: x for key, x in arrays.items() if key not in floats}
        compiled = jax.jit(run).lower(x, floats, others).compile()
        assert "mosaic_gpu" in (compiled.as_text() or "")
        return compiled(x, floats, others)

    _close(results(over_two), results(on_one))


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_blocks_of_a_ring(is_causal: bool) -> None:
    """One kernel makes all gradients of those that are whole, in launch order: transfers hold multiprocessors."""
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    arrays = [_random(i, (1, 8192, 64, 128)) for i in range(4)]
    split = P(None, "sequence")

    def over_two(*x: jax.Array) -> jax.Array:
        return context_parallel_attention(*x, axis_name="sequence", strategy="ring", is_causal=is_causal)

    def on_one(*x: jax.Array) -> jax.Array:
        return flash_attention(*x, is_causal=is_causal)

    ring = jax.shard_map(over_two, mesh=mesh, in_specs=(split,) * 3, out_specs=split)
    found, again, expected = (
        jax.jit(lambda *x, f=f: jax.vjp(f, *x[:3])[1](x[3]))(*arrays) for f in (ring, ring, on_one)
    )
    _close(found, expected)
    assert all(bool((x == y).all()) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("transformation", ["value", "grad"])
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_sequence_sharded_outside_of_shard_map(kind: str, transformation: str) -> None:
    shapes = [(B, LENGTH, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [_random(i, shape) for i, shape in enumerate(shapes)]
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(axis_type,), devices=jax.devices()[:2])
    placed = [jax.device_put(x, NamedSharding(mesh, P(None, "sequence"))) for x in arrays]
    f = _transformed(lambda w, x: flash_attention(w, *x, is_causal=True))[transformation]
    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(placed[0], placed[1:]).compile()
        results = compiled(placed[0], placed[1:])
    assert "mosaic_gpu" in (compiled.as_text() or "")
    assert set(collective_elements(compiled.as_text())) == {"collective-permute"}
    _close(results, jax.jit(f)(arrays[0], arrays[1:]))
