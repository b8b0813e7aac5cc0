"""Compiled for TPUs by libtpu, without any: no collective that jax.nn's program does not have, and no copy of keys."""

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import flash_attention
from tests.support.environment import lenient_promotion
from tests.support.grids import rotated, thinned
from tests.support.programs import collective_elements

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, as jax[tpu] installs it"
)

B, T, FEATURES, H = 4, 512, 256, 128


@functools.cache
def devices(topology: str = "v5e:2x2") -> Any:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no machine with a TPU is to be asked
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def transformed(f: Callable[..., jax.Array], transformation: str) -> Callable[..., Any]:
    def loss(*x: Any) -> jax.Array:
        return jnp.sin(f(*x).astype(jnp.float32)).sum()

    gradient = jax.grad(loss)
    return {
        "value": f,
        "grad": gradient,
        "hvp": lambda w, *x: jax.jvp(lambda w: gradient(w, *x), (w,), (w,))[1],
    }[transformation]


def compiled_collectives(f: Callable[..., Any], mesh: Mesh, *types: tuple[tuple[int, ...], P]) -> dict[str, int]:
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in types]
    with jax.set_mesh(mesh), lenient_promotion():
        compiled = jax.jit(f).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    return collective_elements(compiled.as_text())


_KINDS, _TRANSFORMATIONS = ("auto", "explicit", "shard_map"), ("value", "grad", "hvp")


@pytest.mark.parametrize(
    ("heads", "kind", "transformation"),
    thinned(itertools.product([(4, 4), (8, 2)], _KINDS, _TRANSFORMATIONS), 5),
    ids=str,
)
def test_batch_and_heads(heads: tuple[int, int], kind: str, transformation: str) -> None:
    N, K = heads
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = Mesh(np.array(devices()).reshape(2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    spec = P("data", None, "model")

    def whole(*x: jax.Array) -> jax.Array:
        return flash_attention(*x, is_causal=True)

    sharded = jax.shard_map(whole, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    f = transformed(sharded if kind == "shard_map" else whole, transformation)
    types = [((B, T, n, H), spec) for n in (N, K, K)]
    assert compiled_collectives(f, mesh, *types) == {}


@pytest.mark.parametrize(
    ("heads", "transformation"), thinned(rotated([(2, 2), (4, 4), (8, 8), (8, 2)], ["value", "grad"]), 2), ids=str
)
def test_a_fused_projection(heads: tuple[int, int], transformation: str) -> None:
    N, K = heads
    mesh = Mesh(np.array(devices()), ("model",), axis_types=(AxisType.Auto,))

    def projected(attention: Any) -> Callable[..., jax.Array]:
        def f(w: jax.Array, x: jax.Array) -> jax.Array:
            parts = jnp.split(x @ w, [N * H, (N + K) * H], -1)
            return attention(*(z.reshape(B, T, -1, H) for z in parts), is_causal=True)

        return f

    types = ((FEATURES, (N + 2 * K) * H), P(None, "model")), ((B, T, FEATURES), P())
    ours, reference = (
        compiled_collectives(transformed(projected(f), transformation), mesh, *types)
        for f in (flash_attention, jax.nn.dot_product_attention)
    )
    assert "loop" not in ours
    assert ours.keys() - reference.keys() <= {"all-gather"}
    if len(devices()) <= N:
        assert sum(ours.values()) <= sum(reference.values())


# Of one chip: each kernel, with each kind of operand.
CALLS: dict[str, tuple[dict[str, tuple[tuple[int, ...], Any]], dict[str, Any]]] = {
    "causal": ({}, {"is_causal": True}),
    "lengths": ({"key_value_seq_lengths": ((B,), jnp.int32)}, {"is_causal": True}),
    "segments": ({f"{x}_segment_ids": ((B, T), jnp.int32) for x in ("query", "key_value")}, {"is_causal": True}),
    "mask": ({"mask": ((B, 1, T, T), jnp.bool_)}, {}),
    "bias": ({"bias": ((1, 4, T, T), jnp.bfloat16)}, {"logits_soft_cap": 30.0}),
    "sinks": ({"sinks": ((4,), jnp.float32)}, {"local_window_size": (100, 0)}),
    "dropout": ({"dropout_rng": ((2,), jnp.uint32)}, {"dropout_rate": 0.1}),
}


@pytest.mark.parametrize(
    ("call", "topology"), thinned([(call, topology) for call in CALLS for topology in ("v5e:2x2", "v6e:2x2")], 3)
)
def test_kernels_of_one_chip(call: str, topology: str) -> None:
    """They compile; beside them, nothing has T x S elements, and projections write keys as kernels read them."""
    others, options = CALLS[call]
    N, K = 4, 2

    def attention(weights: list[jax.Array], x: jax.Array, given: dict[str, jax.Array]) -> jax.Array:
        query, key, value = (jnp.einsum("btf,fnh->btnh", x, w) for w in weights)
        return flash_attention(query, key, value, **given, **options, implementation="mosaic_tpu")

    def gradients(weights: list[jax.Array], x: jax.Array, given: dict[str, jax.Array]) -> Any:
        bias = {"bias": given["bias"]} if "bias" in given else {}
        out, pullback = jax.vjp(lambda w, bias: attention(w, x, given | bias), weights, bias)
        return out, pullback(out)

    sharding = NamedSharding(Mesh(np.array(devices(topology)).reshape(-1)[:1], ("x",)), P())

    def shape(dims: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    types = (
        [shape((FEATURES, n, H)) for n in (N, K, K)],
        shape((B, T, FEATURES)),
        {n: shape(*x) for n, x in others.items()},
    )
    compiled = jax.jit(gradients).trace(*types).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == (4 if "bias" in others else 3)
    moved = [line for line in text.splitlines() if " copy(" in line or " transpose(" in line]
    assert not [line for line in moved if f"[{B},{K},{T},{H}]" in line or f"[{B},{T},{K},{H}]" in line]
    # (Finding the interval of ids compares all with all, inside of one fusion.)
    if call not in ("segments", "mask", "bias"):
        assert f"{T},{T}]" not in text
