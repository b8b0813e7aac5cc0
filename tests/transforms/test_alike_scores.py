"""First derivatives of float32 calls where the scores of a row have much in common.

No result depends on that, but sums over the keys cancel.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention_with_lse, flash_attention_with_lse
from tests.support.environment import DEVICE_COUNT, enable_x64, full_optimization
from tests.support.oracle import Masking, dense_float64, dense_in_both_modes, masking

B, T, N, H = 4, 64, 2, 8
DEVICES = 4
CASES: dict[str, dict[str, Any]] = {
    "one tile": {},
    "lengths": {"key_value_seq_lengths": np.array([T, 50, 35, 15], np.int32)},
    "sinks": {"sinks": np.array([1.0, 5.0], np.float32)},
    "several tiles": {"block_q": 16, "block_kv": 16},
    "ring": {},
    "ring, sinks": {"sinks": np.array([1.0, 5.0], np.float32)},
}


def _arrays() -> tuple[Any, ...]:
    """Query, key, value, scale, and tangents of query and of scale; keys have a part in common."""
    rng = np.random.default_rng(0)
    query, key, value, dquery = (rng.standard_normal((B, T, N, H)).astype(np.float32) for _ in range(4))
    key += 2 * rng.standard_normal((1, 1, N, H)).astype(np.float32)
    return query, key, value, np.float32(0.7), dquery, np.float32(0.1)


def _attention(name: str) -> Callable[..., Any]:
    options = CASES[name]
    if not name.startswith("ring"):
        return lambda query, key, value, scale: flash_attention_with_lse(query, key, value, scale=scale, **options)

    def local(query: Any, key: Any, value: Any, scale: Any) -> Any:
        return context_parallel_attention_with_lse(
            query, key, value, scale=scale, axis_name="s", strategy="ring", **options
        )

    mesh, tokens = jax.make_mesh((DEVICES,), ("s",), axis_types=(jax.sharding.AxisType.Auto,)), P(None, "s")
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, tokens, tokens, P()), out_specs=(tokens, tokens))


@functools.cache
def _dense(run: Callable[..., Any], core: Callable[..., Any]) -> Callable[..., Any]:
    """Of arrays, masks and sinks, so that it compiles once for all cases."""

    def of_arrays(x: tuple[Any, ...], masks: Masking, sinks: Any) -> Any:
        def attention(query: Any, key: Any, value: Any, scale: Any) -> Any:
            return core(query, key, value, jnp.zeros((1, 1, 1, 1), query.dtype), scale, masks, sinks)

        return run(attention, *x)

    return jax.jit(of_arrays, compiler_options=full_optimization() if core is dense_in_both_modes else {})


def _rms(x: Any, exact: Any) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(exact)) ** 2)))


def _assert_as_accurate(run: Callable[..., Any], name: str, limit: float) -> None:
    """`run` returns tuples, of out and of lse; the root mean square of errors is compared."""
    if name.startswith("ring") and jax.device_count() < DEVICE_COUNT:
        pytest.skip("needs eight devices")
    x = _arrays()
    options = {name: x for name, x in CASES[name].items() if not name.startswith("block")}
    sinks = options.pop("sinks", np.full(N, -np.inf, np.float32))
    masks = masking(*x[:2], **options)
    actual = jax.jit(run, static_argnums=0, compiler_options=full_optimization())(_attention(name), *x)
    dense = _dense(run, dense_in_both_modes)(x, masks, sinks)
    with enable_x64():
        exact = _dense(run, dense_float64)(tuple(map(np.float64, x)), masks, sinks.astype(np.float64))
    # Around a ring, out has errors of each block, and its tangents about twice those of dense attention.
    actual, dense, exact = (y[1 if name.startswith("ring") else 0 :] for y in (actual, dense, exact))
    for i, (a, d, e) in enumerate(zip(*map(jax.tree.leaves, (actual, dense, exact)), strict=True)):
        error, dense_error = _rms(a, e), _rms(d, e)
        assert error <= limit * dense_error, f"{i}: {error / dense_error:.2f} times the error of dense attention"


def _tangents(attention: Callable[..., Any], *x: Any) -> Any:
    """Of out, along query and along scale, and then of lse."""
    query, key, value, scale, dquery, dscale = x
    along_query = jax.jvp(lambda query: attention(query, key, value, scale), (query,), (dquery,))[1]
    along_scale = jax.jvp(lambda scale: attention(query, key, value, scale), (scale,), (dscale,))[1]
    return tuple(zip(along_query, along_scale, strict=True))


def _gradients_of_scale(attention: Callable[..., Any], *x: Any) -> Any:
    """Of each row alone."""
    query, key, value, scale, weights, _ = x
    row = jnp.eye(T, dtype=query.dtype)[:, None, :, None]

    def loss(scale: Any, of_out: Any, of_lse: Any) -> Any:
        out, lse = attention(query, key, value, scale)
        return (out * of_out).sum() + (lse * of_lse).sum()

    of_rows = row[..., None] * weights[None], row * weights[None, ..., 0]
    return ((jax.vmap(jax.grad(loss), (None, 0, 0))(scale, *of_rows),),)


@pytest.mark.parametrize("name", CASES)
def test_tangents(name: str) -> None:
    _assert_as_accurate(_tangents, name, 2.0)


@pytest.mark.parametrize("name", ["one tile", "lengths", "sinks", "several tiles"])
def test_gradients_of_scale(name: str) -> None:
    _assert_as_accurate(_gradients_of_scale, name, 1.0)
