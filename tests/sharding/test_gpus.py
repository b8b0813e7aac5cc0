"""The Mosaic GPU kernels on several GPUs: a fused projection sharded over two, in every kind of mesh, in bfloat16."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import flash_attention
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
    assert "mosaic_gpu" in (compiled.as_text())
    _close(compiled(placed[0], placed[1:]), jax.jit(_transformed(whole)[transformation])(arrays[0], arrays[1:]))
