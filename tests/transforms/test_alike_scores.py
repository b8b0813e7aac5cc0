"""First derivatives of float32 calls where the scores of a row have much in common.

No result depends on that, but sums over the keys cancel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn import context_parallel_attention_with_lse, flash_attention_with_lse
from tests.support.environment import DEVICE_COUNT, enable_x64, full_optimization
from tests.support.oracle import dense_float64, dense_in_both_modes, masking

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


def _dense(core: Callable[..., Any], name: str, dtype: Any) -> Callable[..., Any]:
    options = {name: x for name, x in CASES[name].items() if not name.startswith("block")}
    sinks = options.pop("sinks", None)
    masks = masking(*_arrays()[:2], **options)

    def attention(query: Any, key: Any, value: Any, scale: Any) -> Any:
        bias = jnp.zeros((1, 1, 1, 1), dtype)
        return core(query, key, value, bias, scale, masks, None if sinks is None else jnp.asarray(sinks, dtype))

    return attention


def _rms(x: Any, exact: Any) -> float:
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(exact)) ** 2)))


def _assert_as_accurate(run: Callable[..., Any], name: str, limit: float) -> None:
    """`run` returns a tuple; the root mean square of errors is compared."""
    if name.startswith("ring") and jax.device_count() < DEVICE_COUNT:
        pytest.skip("needs eight devices")
    x = _arrays()
    actual, dense = (
        jax.jit(run, static_argnums=0, compiler_options=full_optimization())(f, *x)
        for f in (_attention(name), _dense(dense_in_both_modes, name, np.float32))
    )
    with enable_x64():
        exact = jax.jit(run, static_argnums=0)(_dense(dense_float64, name, np.float64), *map(np.float64, x))
    for i, (a, d, e) in enumerate(zip(actual, dense, exact, strict=True)):
        error, dense_error = _rms(a, e), _rms(d, e)
        assert error <= limit * dense_error, f"{i}: {error / dense_error:.2f} times the error of dense attention"


@pytest.mark.parametrize("name", CASES)
def test_tangents(name: str) -> None:
    def run(attention: Callable[..., Any], *x: Any) -> Any:
        query, key, value, scale, dquery, dscale = x
        along_query = jax.jvp(lambda query: attention(query, key, value, scale), (query,), (dquery,))[1]
        along_scale = jax.jvp(lambda scale: attention(query, key, value, scale), (scale,), (dscale,))[1]
        # Around a ring, out has errors of each block, and its tangents about twice those of dense attention.
        first = 1 if name.startswith("ring") else 0
        return (*along_query[first:], *along_scale[first:])

    _assert_as_accurate(run, name, 2.0)


@pytest.mark.parametrize("name", ["one tile", "lengths", "sinks", "several tiles"])
def test_gradients_of_scale(name: str) -> None:
    """Of each row alone."""

    def run(attention: Callable[..., Any], *x: Any) -> Any:
        query, key, value, scale, weights, _ = x
        row = jnp.eye(T, dtype=query.dtype)[:, None, :, None]

        def loss(scale: Any, of_out: Any, of_lse: Any) -> Any:
            out, lse = attention(query, key, value, scale)
            return (out * of_out).sum() + (lse * of_lse).sum()

        of_rows = row[..., None] * weights[None], row * weights[None, ..., 0]
        return (jax.vmap(jax.grad(loss), (None, 0, 0))(scale, *of_rows),)

    _assert_as_accurate(run, name, 1.0)
