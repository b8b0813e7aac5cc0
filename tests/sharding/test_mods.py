"""`score_mod` and `mask_mod` over several devices: indices are those of whole arrays, and nothing is gathered."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_native_flash_attn import context_parallel_attention, flash_attention, mods
from tests.support.environment import fast_compilation

B, T, S, N, K, H = 2, 8, 12, 4, 2, 4
_HEADS = PartitionSpec("batch", None, "heads")


def _mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(kind, kind), devices=jax.devices()[:4])


def _arrays(S: int = S) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (N,), (B, N))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def _functions(slopes: jax.Array, gate: jax.Array, first: tuple[Any, Any] = (0, 0)) -> dict[str, Callable]:
    """They read the batch row, the head and both places; `slopes` and `gate` are captured."""

    def score_mod(score, b, h, q, k):
        return mods.alibi(score * gate[b + first[0], h + first[1]], b, h + first[1], q, k, slopes)

    return {"score_mod": score_mod, "mask_mod": lambda b, h, q, k: k <= q + h + first[1] + 2 * (b + first[0])}


def _loss(query: Any, key: Any, value: Any, slopes: Any, gate: Any, first: tuple[Any, Any] = (0, 0)) -> jax.Array:
    return (flash_attention(query, key, value, **_functions(slopes, gate, first)) ** 2).sum()


def _gradients(loss: Callable) -> Any:
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)), compiler_options=fast_compilation())


def _assert_close(got: Any, expected: Any) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        y = np.asarray(y)
        np.testing.assert_allclose(np.asarray(x), y, atol=2e-5 * max(1, np.abs(y).max()))


@pytest.fixture(scope="module")
def expected() -> Any:
    return _gradients(_loss)(*_arrays())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(kind: AxisType, expected: Any):
    mesh = _mesh(kind)
    specs = (_HEADS,) * 3 + (PartitionSpec(),) * 2
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(_arrays(), specs, strict=True)]
        compiled = _gradients(_loss).lower(*placed).compile()
        _assert_close(compiled(*placed), expected)
    assert "all-gather" not in compiled.as_text()


def test_inside_shard_map(expected: Any):
    """There a call knows its shard alone; a function may capture what says where that is."""

    def of_shard(query: jax.Array, *others: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("batch") * query.shape[0], jax.lax.axis_index("heads") * query.shape[2]
        return jax.lax.psum(_loss(query, *others, first=first), ("batch", "heads"))

    specs = (_HEADS,) * 3 + (PartitionSpec(),) * 2
    loss = jax.shard_map(of_shard, mesh=_mesh(), in_specs=specs, out_specs=PartitionSpec())
    _assert_close(_gradients(loss)(*_arrays()), expected)


@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all", "ring"])
def test_split_sequence(strategy: Any):
    *arrays, slopes, gate = _arrays(T)
    functions, spec = _functions(slopes, gate), PartitionSpec(None, "batch")

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return context_parallel_attention(query, key, value, **functions, axis_name="batch", strategy=strategy)  # pyright: ignore

    attention = jax.jit(jax.shard_map(attend, mesh=_mesh(), in_specs=spec, out_specs=spec, axis_names={"batch"}))
    if strategy == "ring":
        with pytest.raises(NotImplementedError, match="score_mod is not evaluated around a ring"):
            attention(*arrays)
    else:
        _assert_close(attention(*arrays), flash_attention(*arrays, **functions))
