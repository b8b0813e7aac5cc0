"""Segments, positions, offsets, sinks, soft cap, another value dimension and largest logits on eight devices.

No collective but the gradient of sinks, a sum over the batch, and the largest logits, a maximum over it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import flash_attention_with_lse
from tests.sharding.test_meshes import (
    BLOCKS,
    BOTH,
    FAST,
    KINDS,
    arrays,
    assert_close,
    assert_sharded_as,
    make_mesh,
    over_kinds_and,
    partitioned,  # noqa: F401  # pyright: ignore[reportUnusedImport]
)
from tests.support.cases import Case, integers
from tests.support.environment import DEVICE_COUNT
from tests.support.grids import rotated
from tests.support.programs import collective_counts

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

_B, _T, _N, _K, _D = 4, 24, 4, 2, 6
_FLOATS = ("query", "key", "value", "sinks")
_SPECS = {
    **dict.fromkeys(("query", "key", "value"), BOTH),
    "sinks": P("model"),
    **dict.fromkeys(
        ("query_segment_ids", "key_value_segment_ids", "query_positions", "key_value_positions"), P("data")
    ),
    "query_offset": P("data"),
}
_ORDERS = {
    "sorted": {"segment_ids": "padding behind", "query_positions": "restarting", "key_value_positions": "restarting"},
    "shuffled": {"segment_ids": "shuffled", "query_offset": (3, -2, 0, 24)},
    "moved": {"query_offset": (3, -2, 0, 24)},
}
_OPTIONS: dict[str, Any] = {"is_causal": True, "logits_soft_cap": 2.0, "dropout_rate": 0.2, "broadcast_dropout": True}


def _arrays(order: str) -> dict[str, np.ndarray]:
    case = Case((_B, _T, _T, _K, _N // _K, 8), traced=frozenset({"ids", "positions", "offset"}), **_ORDERS[order])
    rng = np.random.default_rng(1)
    query, key, *_ = arrays()
    value, sinks = rng.standard_normal((_B, _T, _K, _D)), rng.standard_normal(_N)
    floats = {"query": query, "key": key, "value": value.astype(np.float32), "sinks": sinks.astype(np.float32)}
    return floats | integers(case)


def _attention(arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = jax.random.key(2)
    return flash_attention_with_lse(**arrays, **_OPTIONS, **BLOCKS, dropout_rng=rng, return_max_logits=True)


def _with_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """Results, and the gradient of a loss of out and lse. A new function: JAX does not lower a known one again."""

    def loss(floats: dict[str, Any], others: dict[str, Any]) -> tuple[jax.Array, Any]:
        results = out, lse, _ = f(floats | others)
        return jnp.sin(out).sum() + jnp.where(lse > -1e30, lse, 0).sum(), results

    def run(arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        others = {name: x for name, x in arrays.items() if name not in _FLOATS}
        gradient, results = jax.grad(loss, has_aux=True)({name: arrays[name] for name in _FLOATS}, others)
        return results, gradient

    return run


@functools.cache
def _unsharded(order: str) -> Any:
    return jax.jit(_with_gradient(_attention), compiler_options=FAST)(_arrays(order))


@over_kinds_and("order", rotated(KINDS, list(_ORDERS)), 3)
def test_collectives_and_results(partitioned: str, order: str) -> None:  # noqa: F811
    mesh, inputs = make_mesh(partitioned), _arrays(order)
    specs = {name: _SPECS[name] for name in inputs}
    out_specs = BOTH, P("data", None, "model"), P("model")

    def local(x: dict[str, Any]) -> Any:
        out, lse, max_logits = _attention(x)
        return out, lse, jax.lax.pmax(jax.lax.stop_gradient(max_logits), "data")

    f = _attention
    if partitioned == "shard_map":
        f = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in inputs.items()}
    with jax.set_mesh(mesh):
        compiled = jax.jit(_with_gradient(f), compiler_options=FAST).lower(placed).compile()
    found, results = collective_counts(compiled.as_text()), compiled(placed)
    assert set(found) == {"all-reduce"}
    assert partitioned == "auto" or found == {"all-reduce": 2}
    assert_close(results, _unsharded(order))
    for x, spec in zip(jax.tree.leaves(results), (*out_specs, *(specs[x] for x in sorted(_FLOATS))), strict=True):
        assert_sharded_as(x, mesh, spec)
