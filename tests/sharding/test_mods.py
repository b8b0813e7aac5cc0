"""`score_mod` and `mask_mod` over several devices: indices are those of whole arrays, and nothing is gathered.

Around a ring, `test_mods_in_rings.py` has all derivatives.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_native_flash_attn import context_parallel_attention, flash_attention, mods
from tests.support.environment import fast_compilation
from tests.support.grids import rest, thinned
from tests.support.targets import pretend_whole_kernels

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

    split = jax.shard_map(attend, mesh=_mesh(), in_specs=spec, out_specs=spec, axis_names={"batch"})
    attention = jax.jit(split, compiler_options=fast_compilation())
    _assert_close(attention(*arrays), flash_attention(*arrays, **functions))


@pytest.fixture(scope="module")
def of_a_sequence() -> Any:
    """Arrays, a loss with tiles of a mask, and its gradients."""
    shapes, slopes = ((B, 24, n, H) for n in (N, K, K)), jnp.asarray(mods.alibi_slopes(N))
    rng = np.random.default_rng(0)
    arrays = [*(jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes), slopes]
    ids = jnp.asarray(rng.integers(0, 2, (B, 24)), jnp.int32)
    tiled = mods.make_tile_mask(_by_block, 24, 24, mask_mod_args=(ids,), batch=B, block=4)

    def loss(query: Any, key: Any, value: Any, slopes: Any, **tiles: int) -> jax.Array:
        functions = {"score_mod": mods.alibi, "score_mod_args": (slopes,), "mask_mod": tiled}
        return (flash_attention(query, key, value, **functions, **tiles) ** 2).sum()

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), compiler_options=fast_compilation())
    return arrays, loss, gradients(*arrays)


@pytest.mark.parametrize(
    ("kind", "tiles"), thinned([(AxisType.Auto, {"block_kv": 3}), (AxisType.Explicit, {})], 2), ids=str
)
def test_a_sequence_without_shard_map(
    kind: AxisType, tiles: dict[str, int], of_a_sequence: Any, monkeypatch: pytest.MonkeyPatch
):
    """A ring, over auto axes of kernels that XLA cannot split; tiles of the mask lie across devices."""
    arrays, loss, expected = of_a_sequence
    gradients = jax.value_and_grad(functools.partial(loss, **tiles), (0, 1, 2, 3))
    mesh = jax.make_mesh((4,), ("s",), axis_types=(kind,), devices=jax.devices()[:4])
    pretend_whole_kernels(monkeypatch)
    with jax.set_mesh(mesh):
        specs = [NamedSharding(mesh, PartitionSpec(None, "s"))] * 3 + [NamedSharding(mesh, PartitionSpec())]
        placed = [jax.device_put(x, spec) for x, spec in zip(arrays, specs, strict=True)]
        compiled = jax.jit(gradients, compiler_options=fast_compilation()).lower(*placed).compile()
        _assert_close(compiled(*placed), expected)
    assert "collective-permute" in compiled.as_text()


def _by_block(b: Any, h: Any, q: Any, k: Any, ids: Any) -> Any:
    """A row has the keys of its own device, and some of the first; but for one, which has none."""
    return ((q // 6 == k // 6) | ((k < 6) & (ids[b, k] == 1))) & (q != 7)


@pytest.mark.parametrize("strategy", ["ring", rest("all_gather"), rest("all_to_all")])
def test_tiles_of_a_split_mask(strategy: Any):
    """Tiles that it leaves empty are not visited: the values there are NaN. It may have been made for the whole."""
    *arrays, _, _ = _arrays(32)
    arrays[0] = jnp.tile(arrays[0], (1, 4, 1, 1))
    arrays[2] = arrays[2].at[:, 20:24].set(jnp.nan)
    tiled = mods.make_tile_mask(lambda b, h, q, k: k // 4 != 5, 32, 32, block=4)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any = tiled, **tiles: int) -> jax.Array:
        return context_parallel_attention(query, key, value, mask_mod=mask, **tiles, axis_name="s", strategy=strategy)

    mesh, spec = (
        jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]),
        PartitionSpec(None, "s"),
    )

    def split(**options: Any) -> Any:
        attention = functools.partial(attend, **options)
        over_all = jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.jit(over_all, compiler_options=fast_compilation())(*arrays)

    without = [arrays[0], *(jnp.delete(x, jnp.arange(20, 24), 1) for x in arrays[1:])]
    _assert_close(split(block_q=4, block_kv=4), flash_attention(*without))
    other = mods.make_tile_mask(mods.causal, 8, 32, block=4)
    with pytest.raises(ValueError, match=r"for T, S = \(8, 32\), got arrays of T, S = \(32, 32\)"):
        split(mask=other)
