"""Sharding on eight devices: no collective but the sums that the mathematics needs, and results sharded as query.

Meshes of three kinds: auto (plain jit), explicit (sharding in types), and manual (shard_map). Auto axes go two ways:
XLA splits the pure JAX kernels, and takes Mosaic GPU's as units. Here "unit" does that with pure JAX kernels.
"""

import functools
import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import (
    balanced_order,
    context_parallel_attention,
    flash_attention,
    flash_attention_with_lse,
    merge_attention,
)
from tests.support.environment import DEVICE_COUNT, fast_compilation, of_process
from tests.support.grids import rotated, thinned
from tests.support.programs import collective_counts
from tests.support.targets import pretend_gpu, pretend_whole_kernels

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

B, T, N, K, H = 4, 24, 4, 2, 8
BLOCKS: dict[str, Any] = {"block_q": 8, "block_kv": 8}
BOTH = P("data", None, "model", None)
OLD_JAX = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10)
FAST = fast_compilation()


def arrays(N: int = N, K: int = K) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (1, N, T, T)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def make_mesh(kind: str, shape: tuple[int, int] = (4, 2)) -> Mesh:
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)


@pytest.fixture
def partitioned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of a mesh; "unit" is auto axes with kernels that XLA is not to split."""
    if request.param != "unit":
        return request.param
    pretend_whole_kernels(monkeypatch)
    return "auto"


KINDS = ("auto", "unit", "explicit", "shard_map")


def over_kinds(*kinds: str) -> Any:
    return pytest.mark.parametrize("partitioned", kinds, indirect=True)


def over_kinds_and(names: str, points: Iterable[Any], every: int, first: int = 0) -> Any:
    """Of points whose first element is a kind, and whose others have these names."""
    names = f"partitioned, {names}"
    return pytest.mark.parametrize(names, thinned(points, every, first), indirect=["partitioned"])


def test_collectives_are_found():
    mesh = make_mesh("auto")
    x = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P("data")))
    gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    assert collective_counts(gathered.lower(x).compile().as_text()) == {"all-gather": 1}
    assert collective_counts(jax.jit(jnp.sum).lower(x).compile().as_text()) == {"all-reduce": 1}


def specs(query_spec: P) -> tuple[P, ...]:
    """Of query, key, value and a bias that the batch shares."""
    return query_spec, query_spec, query_spec, P(None, query_spec[2], None, None)


def transformed(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    gradient = jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2, 3))
    return {
        "value": f,
        "grad": gradient,
        "jvp": lambda *x: jax.jvp(f, x, x)[1],
        "hvp": lambda *x: jax.jvp(gradient, x, x)[1],
        "gradient of gradient": jax.grad(lambda *x: sum(jnp.sin(g).sum() for g in gradient(*x)), (0, 1, 2, 3)),
    }


LENGTHS = np.array([24, 10, 17, 5], np.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "lengths": {"key_value_seq_lengths": LENGTHS, "query_seq_lengths": LENGTHS[::-1].copy()},
    "dropout": {"dropout_rate": 0.2, "seed": 3},
}


def attention(*x: Any, lengths: Any = None, options: str = "causal") -> jax.Array:
    static = dict(OPTIONS[options])
    if (seed := static.pop("seed", None)) is not None:
        static["dropout_rng"] = jax.random.key(seed)
    if lengths is not None:
        static |= {"key_value_seq_lengths": lengths, "query_seq_lengths": lengths}
    return flash_attention(*x, **static, **BLOCKS)


@functools.cache
def unsharded(transformation: str, options: str = "causal", N: int = N, K: int = K) -> list[np.ndarray]:
    f = transformed(functools.partial(attention, options=options))[transformation]
    return [np.asarray(x) for x in jax.tree.leaves(jax.jit(f, compiler_options=FAST)(*arrays(N, K)))]


def run_sharded(
    kind: str, f: Callable[..., Any], inputs: list[np.ndarray], spec: P, mesh: Mesh | None = None
) -> tuple[list[jax.Array], dict[str, int]]:
    """Results, and the collectives of the compiled program. `f` is transformed outside of any shard_map."""
    f = functools.partial(f)  # a new function: JAX would not lower a known one again, for kernels that are units
    mesh = mesh or make_mesh(kind)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs(spec), strict=False)]
    if kind == "explicit":
        with jax.set_mesh(mesh):
            compiled = jax.jit(f, compiler_options=FAST).lower(*placed).compile()
    else:
        compiled = jax.jit(f, compiler_options=FAST).lower(*placed).compile()
    return jax.tree.leaves(compiled(*placed)), collective_counts(compiled.as_text())


def in_shard_map(f: Callable[..., Any], spec: P, mesh: Mesh) -> Callable[..., Any]:
    return lambda *x: jax.shard_map(f, mesh=mesh, in_specs=specs(spec)[: len(x)], out_specs=spec)(*x)


def assert_close(actual: Any, expected: Any) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * max(1.0, float(np.abs(e).max())))


def assert_sharded_as(x: jax.Array, mesh: Mesh, spec: P) -> None:
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x.sharding, spec)


# ---- the matrix


@over_kinds_and("transformation", rotated(KINDS, ["value", "grad", "jvp", "hvp"]), 4)
def test_collectives_and_output_sharding(partitioned: str, transformation: str):
    mesh = make_mesh(partitioned)
    f = in_shard_map(attention, BOTH, mesh) if partitioned == "shard_map" else attention
    results, found = run_sharded(partitioned, transformed(f)[transformation], arrays(), BOTH, mesh)
    # The bias is shared by the batch: its gradient is a sum over 'data' (where XLA splits the kernel, tile by tile).
    assert set(found) == ({"all-reduce"} if transformation in ("grad", "hvp") else set())
    assert partitioned == "auto" or sum(found.values()) <= 1
    assert_close(results, unsharded(transformation))
    for x, spec in zip(results, specs(BOTH), strict=False):
        assert_sharded_as(x, mesh, spec)


@over_kinds(*thinned(("auto", "explicit", "shard_map"), 3, 1))
def test_reverse_over_reverse(partitioned: str):
    mesh = make_mesh(partitioned)
    f = in_shard_map(attention, BOTH, mesh) if partitioned == "shard_map" else attention
    results, found = run_sharded(partitioned, transformed(f)["gradient of gradient"], arrays(), BOTH, mesh)
    assert set(found) <= {"all-reduce"}
    assert_close(results, unsharded("gradient of gradient"))


@over_kinds_and("axis", rotated(KINDS, ["batch", "heads"]), 2)
def test_batch_or_heads_alone(partitioned: str, axis: str):
    spec = {"batch": P("data", None, None, None), "heads": P(None, None, "model", None)}[axis]
    mesh = make_mesh(partitioned)
    f = in_shard_map(attention, spec, mesh) if partitioned == "shard_map" else attention
    results, found = run_sharded(partitioned, transformed(f)["grad"], arrays(), spec, mesh)
    assert set(found) == ({"all-reduce"} if spec[0] else set())
    assert_close(results, unsharded("grad"))
    for x, expected in zip(results, specs(spec), strict=True):
        assert_sharded_as(x, mesh, expected)


@over_kinds_and(
    "options, transformation", itertools.product(KINDS[:3], ("lengths", "dropout"), ("value", "grad")), 5, 1
)
def test_lengths_and_dropout_do_not_see_the_sharding(partitioned: str, options: str, transformation: str):
    f = transformed(functools.partial(attention, options=options))[transformation]
    results, found = run_sharded(partitioned, f, arrays(), BOTH)
    assert set(found) == ({"all-reduce"} if transformation == "grad" else set())
    assert_close(results, unsharded(transformation, options))


def test_lengths_inside_shard_map():
    mesh = make_mesh("shard_map")

    def sharded(*x: Any) -> Any:
        in_specs = (*specs(BOTH), P("data"))
        local = jax.shard_map(
            lambda *x: attention(*x[:-1], lengths=x[-1]), mesh=mesh, in_specs=in_specs, out_specs=BOTH
        )
        return local(*x, LENGTHS)

    results, found = run_sharded("shard_map", transformed(sharded)["grad"], arrays(), BOTH, mesh)
    assert found == {"all-reduce": 1}
    whole = transformed(functools.partial(attention, lengths=LENGTHS))["grad"]
    assert_close(results, jax.jit(whole, compiler_options=FAST)(*arrays()))


@over_kinds(*thinned(("auto", "unit", "explicit"), 2))
def test_masks_are_sharded_too(partitioned: str):
    mesh = make_mesh(partitioned)
    mask = np.random.default_rng(1).random((B, 1, T, T)) < 0.7
    mask[1, :, 3] = False
    x = arrays()[:3]

    def masked(query: Any, key: Any, value: Any, mask: Any) -> jax.Array:
        return flash_attention(query, key, value, mask=mask, **BLOCKS)

    def gradient(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return jax.grad(lambda *a: jnp.sin(masked(*a)).sum(), (0, 1, 2))(query, key, value, mask)

    placed = [jax.device_put(a, NamedSharding(mesh, BOTH)) for a in x]
    placed.append(jax.device_put(mask, NamedSharding(mesh, P("data"))))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient, compiler_options=FAST).lower(*placed).compile()
    assert collective_counts(compiled.as_text()) == {}
    assert_close(compiled(*placed), jax.jit(gradient, compiler_options=FAST)(*x, mask))


# ---- fewer key/value heads than shards, and sharded sequences


@over_kinds_and("transformation", rotated(KINDS[:3], ["value", "grad"]), 2)
def test_one_key_head_and_sharded_query_heads(partitioned: str, transformation: str):
    mesh = make_mesh(partitioned)
    key_spec = P("data", None, None, None)
    placed_specs = BOTH, key_spec, key_spec, P(None, "model", None, None)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays(K=1), placed_specs, strict=True)]
    f = transformed(attention)[transformation]
    with jax.set_mesh(mesh):
        compiled = jax.jit(f, compiler_options=FAST).lower(*placed).compile()
    # Each device has all of the one head: only its gradient is a sum over 'model', next to that of the bias.
    found = collective_counts(compiled.as_text())
    assert set(found) <= ({"all-reduce"} if transformation == "grad" else set())
    results = compiled(*placed)
    assert_close(results, unsharded(transformation, K=1))
    for x, spec in zip(jax.tree.leaves(results), placed_specs, strict=False):
        assert_sharded_as(x, mesh, spec)


@over_kinds_and("transformation", itertools.product(("auto", "unit"), ("value", "grad", "hvp")), 2, 1)
def test_fewer_key_heads_than_shards_under_auto_axes(partitioned: str, transformation: str):
    # Two key/value heads, query heads over four devices: a shard reads the one head that it needs, and the gradients
    # of key and value, like that of the bias which the batch shares, are sums over shards. XLA, which splits the former
    # by shards of heads, then gathers those.
    mesh = make_mesh(partitioned, (2, 4))
    spec = P("data", None, "model", None)
    key_spec = P("data", None, None, None)
    placed_specs = spec, key_spec, key_spec, P(None, "model", None, None)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays(), placed_specs, strict=True)]
    compiled = jax.jit(transformed(attention)[transformation], compiler_options=FAST).lower(*placed).compile()
    allowed = {"all-reduce", "all-gather"} if transformation != "value" else set()
    assert set(collective_counts(compiled.as_text())) <= allowed
    assert_close(compiled(*placed), unsharded(transformation))


_DISAGREEING = [(P(("data", "model")), BOTH), (BOTH, P(("data", "model"))), (P("model"), BOTH)]


@over_kinds_and("query_spec, key_spec", ((kind, *x) for kind in ("auto", "unit") for x in _DISAGREEING), 2)
def test_operands_that_disagree_about_a_mesh_axis(partitioned: str, query_spec: P, key_spec: P):
    mesh = make_mesh(partitioned, (2, 2))
    placed_specs = query_spec, key_spec, key_spec, P()
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays(), placed_specs, strict=True)]
    assert_close(jax.jit(transformed(attention)["grad"], compiler_options=FAST)(*placed), unsharded("grad"))


@over_kinds(*thinned(("auto", "unit"), 2))
def test_heads_of_a_shard_that_span_key_heads(partitioned: str):
    # Twelve query heads over four devices, six key/value heads: three query heads read one and a half.
    mesh = make_mesh(partitioned, (2, 4))
    key_spec = P("data", None, None, None)
    placed_specs = BOTH, key_spec, key_spec, P(None, "model", None, None)
    inputs = arrays(12, 6)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(inputs, placed_specs, strict=True)]
    results = jax.jit(transformed(attention)["grad"], compiler_options=FAST)(*placed)
    assert_close(results, unsharded("grad", "causal", 12, 6))


def test_fewer_key_heads_than_shards_under_explicit_axes():
    mesh = make_mesh("explicit", (2, 4))
    key_spec = P("data", None, None, None)
    query, key, value = (
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays()[:3], (BOTH, key_spec, key_spec), strict=True)
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"key has 2 heads.*4 shards.*repeat key and value heads"):
        jax.jit(attention)(query, key, value)


@over_kinds_and("transformation", rotated(("auto", "unit"), ["grad", "value"]), 2)
def test_sharded_sequence_under_auto_axes(partitioned: str, transformation: str):
    mesh = make_mesh(partitioned)
    spec = P("data", "model", None, None)
    f = transformed(attention)[transformation]
    placed_specs = spec, spec, spec, P(None, None, "model", None)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays(), placed_specs, strict=True)]
    compiled = jax.jit(f, compiler_options=FAST).lower(*placed).compile()
    results = compiled(*placed)
    assert_close(results, unsharded(transformation))
    if partitioned == "unit":
        # Key and value travel, and XLA sums the gradient of bias; it would gather what it splits itself.
        assert set(collective_counts(compiled.as_text())) <= {"collective-permute", "all-reduce"}
        assert "collective-permute" in collective_counts(compiled.as_text())
        assert all(x.sharding.spec[:2] == spec[:2] for x in jax.tree.leaves(results)[:3])


@pytest.mark.parametrize("transformation", ["value", "grad"])
def test_sharded_sequence_under_explicit_axes(transformation: str):
    """Key and value travel; nothing is gathered, and the result is sharded as query is."""
    mesh = make_mesh("explicit")
    spec = P("data", "model", None, None)
    placed_specs = spec, spec, spec, P(None, None, "model", None)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays(), placed_specs, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(transformed(attention)[transformation], compiler_options=FAST).lower(*placed).compile()
        results = compiled(*placed)
        if transformation == "value":
            assert set(collective_counts(compiled.as_text())) == {"collective-permute"}
            assert jax.typeof(jax.jit(attention)(*placed)).sharding.spec == spec
    assert_close(results, unsharded(transformation))


@pytest.mark.parametrize(("kind", "axes"), thinned(rotated(KINDS, [("data", "model"), ("model", "data")]), 2))
def test_sequence_over_two_axes_in_either_order(kind: str, axes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """`lax.ppermute` counts in the order of the mesh, shardings in that of the tuple."""
    if kind == "unit":
        pretend_whole_kernels(monkeypatch)
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2, devices=jax.devices()[:4])
    spec = P(None, axes)
    f = functools.partial(flash_attention, is_causal=True, **BLOCKS)

    def gradient(attention: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda *x: jnp.sin(attention(*x)).sum(), (0, 1, 2))

    ring = functools.partial(context_parallel_attention, is_causal=True, axis_name=axes, **BLOCKS)
    split = jax.shard_map(ring, mesh=mesh, in_specs=spec, out_specs=spec) if kind == "shard_map" else f
    inputs = arrays()[:3]
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in inputs]
    with jax.set_mesh(mesh):
        results = jax.jit(gradient(split), compiler_options=FAST)(*placed)
    assert_close(results, jax.jit(gradient(f), compiler_options=FAST)(*inputs))


@pytest.mark.parametrize("spec", thinned([P("x"), P(None, "x"), P(None, None, "x")], 2, 1), ids=str)
def test_explicit_axes_without_a_mesh_in_force(spec: P):
    """The types say it all."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    arrays = list(np.random.default_rng(0).standard_normal((3, 2, 8, 2, 4)).astype(np.float32))
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    attention = functools.partial(flash_attention, is_causal=True)
    gradient = jax.grad(lambda *x: jnp.sin(attention(*x)).sum(), (0, 1, 2))
    for f in (attention, jax.jit(attention), jax.jit(gradient)):
        results, expected = jax.tree.leaves(f(*placed)), jax.tree.leaves(jax.jit(f)(*arrays))
        for a, e in zip(results, expected, strict=True):
            assert tuple(a.sharding.spec)[: len(spec)] == tuple(spec)
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-5)


def test_keys_that_do_not_divide_over_the_devices_of_the_rows_are_an_error():
    mesh = make_mesh("explicit")
    query, key, value = arrays()[:3]
    query = jax.device_put(query, NamedSharding(mesh, P(None, "model")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"key and value are sharded.*got \d+ keys: pad them"):
        jax.jit(flash_attention)(query, key[:, :-1], value[:, :-1])


def test_ring_of_parts_inside_shard_map():
    # A sharded sequence: keys travel around the ring, partial attentions are merged.
    shards = 4
    mesh = make_mesh("auto", (shards, 2))
    spec = P(None, "data", "model", None)

    def local(query: Any, key: Any, value: Any) -> jax.Array:
        outs, lses = [], []
        for _ in range(shards):
            out, lse = flash_attention_with_lse(query, key, value, **BLOCKS)
            outs.append(out)
            lses.append(lse)
            neighbours = [(i, (i + 1) % shards) for i in range(shards)]
            key, value = (jax.lax.ppermute(x, "data", neighbours) for x in (key, value))
        return merge_attention(outs, lses)[0]

    def gradient(f: Callable[..., Any]) -> Any:
        return jax.jit(jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2)), compiler_options=FAST)

    ring = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays()[:3]]
    whole = functools.partial(flash_attention, **BLOCKS)
    assert_close(gradient(ring)(*placed), gradient(whole)(*arrays()[:3]))


# ---- mixed meshes, vmap


@pytest.mark.parametrize("transformation", thinned(["value", "grad", "hvp"], 2))
def test_explicit_batch_and_auto_heads(transformation: str):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    placed_specs = (P("data"), P("data"), P("data"), P())
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays(), placed_specs, strict=True)]

    def f(*x: Any) -> jax.Array:
        heads = NamedSharding(mesh, P(None, None, "model", None))
        return attention(*(jax.lax.with_sharding_constraint(a, heads) for a in x[:3]), x[3])

    with jax.set_mesh(mesh):
        results = jax.jit(transformed(f)[transformation], compiler_options=FAST)(*placed)
    assert_close(results, unsharded(transformation))


@pytest.mark.parametrize(
    ("constrained", "transformation"),
    thinned(rotated([P(None, None, "model", None), P("model", None, None, None)], ["value", "grad"]), 2),
    ids=str,
)
def test_auto_axis_of_a_mesh_with_an_explicit_one(constrained: P, transformation: str):
    # No explicit axis shards anything: XLA splits the call over the other.
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    sharding = NamedSharding(mesh, constrained)

    def f(*x: Any) -> jax.Array:
        x = tuple(jax.lax.with_sharding_constraint(a, sharding) for a in x)
        return jax.lax.with_sharding_constraint(flash_attention(*x, is_causal=True, **BLOCKS), sharding)

    def transform(f: Callable[..., Any]) -> Callable[..., Any]:
        return f if transformation == "value" else jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))

    inputs = arrays()[:3]
    with jax.set_mesh(mesh):
        compiled = jax.jit(transform(f), compiler_options=FAST).lower(*inputs).compile()
        results = compiled(*inputs)
    assert set(collective_counts(compiled.as_text())) <= {"all-gather"}  # of the arguments, or of the results
    expected = jax.jit(transform(functools.partial(flash_attention, is_causal=True, **BLOCKS)), compiler_options=FAST)
    assert_close(results, expected(*inputs))


@pytest.mark.parametrize("transformation", thinned(["value", "grad", "hvp"], 2))
def test_shard_map_over_the_batch_with_heads_auto(transformation: str):
    mesh = make_mesh("auto")
    partial_specs = P("data"), P("data"), P("data"), P()

    def f(*x: Any) -> jax.Array:
        return jax.shard_map(
            attention, mesh=mesh, in_specs=partial_specs, out_specs=P("data"), axis_names=frozenset({"data"})
        )(*x)

    results, found = run_sharded("auto", transformed(f)[transformation], arrays(), BOTH, mesh)
    assert found == ({} if transformation == "value" else {"all-reduce": 1})
    assert_close(results, unsharded(transformation))


@over_kinds_and("transformation", rotated(KINDS, ["value", "grad", "hvp"]), 3)
def test_vmap_over_a_sharded_axis(partitioned: str, transformation: str):
    if OLD_JAX and partitioned == "explicit":
        pytest.skip("older JAX loses track of the mapped axis")
    elements = 4
    kind = partitioned
    mesh = make_mesh(kind)
    spec = P("data", None, None, "model", None)
    inputs = [np.stack([(i + 1) * x for i in range(elements)]) for x in arrays()[:3]]

    def mapped(*x: Any) -> jax.Array:
        return jax.vmap(attention, spmd_axis_name="data" if kind == "auto" else None)(*x)

    def sharded(*x: Any) -> jax.Array:
        return jax.shard_map(mapped, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(*x)

    def transform(f: Callable[..., Any]) -> Callable[..., Any]:
        gradient = jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2))
        return {"value": f, "grad": gradient, "hvp": lambda *x: jax.jvp(gradient, x, x)[1]}[transformation]

    f = sharded if kind == "shard_map" else mapped
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in inputs]
    with jax.set_mesh(mesh):
        compiled = jax.jit(transform(f), compiler_options=FAST).lower(*placed).compile()
    if kind != "explicit":  # there, JAX itself gathers the mapped axis at the boundary of a shard_map over the others
        assert collective_counts(compiled.as_text()) == {}
    results = compiled(*placed)
    for x in jax.tree.leaves(results):
        assert_sharded_as(x, mesh, spec)
    assert_close(results, jax.jit(transform(jax.vmap(attention)), compiler_options=FAST)(*inputs))


@pytest.mark.skipif(OLD_JAX, reason="older JAX has no Mosaic GPU backend that we use")
@pytest.mark.parametrize("transformation", ["value", "grad"])
@pytest.mark.parametrize("kinds", [(AxisType.Explicit,) * 2, (AxisType.Explicit, AxisType.Auto)], ids=str)
def test_hopper_kernels_beside_a_mesh_that_shards_nothing(
    kinds: Any, transformation: str, monkeypatch: pytest.MonkeyPatch
):
    pretend_gpu(monkeypatch, "9.0")
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    x = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

    def value(*x: Any) -> jax.Array:
        return flash_attention(*x, is_causal=True)

    f = value if transformation == "value" else jax.grad(lambda *x: value(*x).astype(jnp.float32).sum(), (0, 1, 2))
    with jax.set_mesh(mesh):
        text = jax.jit(f).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    # An auto axis may shard the call, and XLA then splits the pure JAX kernels.
    assert ("mosaic_gpu" in text) == (AxisType.Auto not in kinds)


# ---- two processes

WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, num_processes=2, process_id=process)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_native_flash_attn import flash_attention

kind = AxisType.Explicit if sys.argv[3] == "explicit" else AxisType.Auto
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
rng = np.random.default_rng(0)
shapes = (4, 24, 4, 8), (4, 24, 2, 8), (4, 24, 2, 8), (1, 4, 24, 24)
inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
specs = [P("data", None, "model", None)] * 3 + [P(None, "model", None, None)]

def f(*x):
    return flash_attention(*x, is_causal=True, dropout_rate=0.2, dropout_rng=jax.random.key(3), block_q=8, block_kv=8)

def run(*x):
    return f(*x), *jax.grad(lambda *x: jnp.sin(f(*x)).sum(), (0, 1, 2, 3))(*x)

placed = [jax.make_array_from_callback(x.shape, NamedSharding(mesh, s), lambda i, x=x: x[i])
          for x, s in zip(inputs, specs)]
with jax.set_mesh(mesh):
    results = jax.jit(run)(*placed)
expected = jax.jit(run)(*(jax.device_put(x, jax.local_devices()[0]) for x in inputs))
for a, e in zip(results, expected, strict=True):
    e = np.asarray(e)
    for shard in a.addressable_shards:
        assert shard.data.size < e.size
        np.testing.assert_allclose(np.asarray(shard.data), e[shard.index], rtol=0, atol=2e-5 * max(1, abs(e).max()))
print("agrees")
"""


def assert_two_processes_agree(worker: str, argument: str) -> None:
    """Runs the program `worker` on two devices in each of two processes, with its number, an address and `argument`."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(i), address, argument],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=of_process(2),
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in workers]
    finally:
        for process in workers:
            process.kill()
    for stdout, stderr in outputs:
        assert "agrees" in stdout, stderr[-3000:]


@pytest.mark.parametrize("kind", thinned(["auto", "explicit"], 2))
def test_two_processes_agree_with_one(kind: str):
    assert_two_processes_agree(WORKER, kind)


@pytest.mark.parametrize(
    ("window", "options"),
    thinned(
        [((sys.maxsize, 5), {}), ((sys.maxsize, 0), {"order": "balanced"}), ((2**31 - 1, 5), {"query_offset": -2})], 3
    ),
)
def test_windows_without_end_of_a_split_sequence(window: tuple[int, int], options: dict[str, Any]):
    mesh = jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    inputs = arrays()[:3]
    ring = functools.partial(context_parallel_attention, local_window_size=window, axis_name="s", **options)
    results = jax.jit(jax.shard_map(ring, mesh=mesh, in_specs=P(None, "s"), out_specs=P(None, "s")))(*inputs)
    options = dict(options)
    if options.pop("order", None):
        positions = np.tile(balanced_order(inputs[0].shape[1], 2), (len(inputs[0]), 1))
        options = {"query_positions": positions, "key_value_positions": positions}
    whole = functools.partial(flash_attention, local_window_size=window, **options)
    assert_close(results, jax.jit(whole)(*inputs))


def test_a_constant_band_beside_a_traced_window_over_explicit_axes():
    mesh = make_mesh("explicit")
    inputs = arrays()[:3]
    T, S = (x.shape[1] for x in inputs[:2])
    band = np.tril(np.ones((1, 1, T, S), bool))

    def attention(window: Any, *x: Any) -> jax.Array:
        return flash_attention(*x, mask=band, local_window_size=window)

    window = np.array([5, 3], np.int32)
    expected = jax.jit(attention)(window, *inputs)
    placed = [jax.device_put(a, NamedSharding(mesh, P(None, "model"))) for a in inputs]
    with jax.set_mesh(mesh):
        assert_close(jax.jit(attention)(window, *placed), expected)
