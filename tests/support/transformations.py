"""A transformation of `lowering.Programs`, run, beside the float64 oracle and dense attention in the case's dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.cases import Case
from tests.support.environment import bernoulli, enable_x64
from tests.support.lowering import Programs, operand_types
from tests.support.oracle import Masking, assert_as_accurate_as_dense, dense_float64, dense_in_both_modes

_DRAWS = 3  # a result may be one number, whose error is then no statistic


def _dense(core: Any, keep: np.ndarray) -> Any:
    """`core` with the signature of `flash_attention_with_lse`."""

    def attention(
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        *,
        scale: Any,
        is_causal: bool = False,
        local_window_size: Any = None,
        query_seq_lengths: Any = None,
        key_value_seq_lengths: Any = None,
        dropout_rate: float = 0.0,
        dropout_rng: Any = None,
        **_: Any,
    ) -> tuple[jax.Array, jax.Array]:
        del dropout_rng  # `keep` is drawn from it
        (B, T, N, _), S = query.shape, key.shape[1]
        rows, columns = (x[None, None].astype(np.int32) for x in (np.arange(T)[:, None], np.arange(S)[None, :]))
        wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        allowed = jnp.ones((B, N, T, S), bool)
        if is_causal:
            allowed &= columns <= rows
        if local_window_size is not None:
            left, right = local_window_size
            allowed &= (columns >= rows - left) & (columns <= rows + right)
        if mask is not None:
            allowed &= mask
        key_valid, query_valid = jnp.ones((B, S), bool), jnp.ones((B, T), bool)
        if key_value_seq_lengths is not None:
            key_valid = np.arange(S, dtype=np.int32)[None] < key_value_seq_lengths[:, None]
        if query_seq_lengths is not None:
            query_valid = np.arange(T, dtype=np.int32)[None] < query_seq_lengths[:, None]
        allowed &= key_valid[:, None, None, :] & query_valid[:, None, :, None]
        factor = jnp.asarray(keep / (1 - dropout_rate) if dropout_rate else np.ones(allowed.shape), wide)
        bias = jnp.zeros((1, 1, 1, 1), wide) if bias is None else bias
        masks = Masking(allowed, query_valid, key_valid, factor)
        return core(query, key, value, jnp.broadcast_to(bias, allowed.shape), jnp.asarray(scale, wide), masks)

    return attention


def _numbers(case: Case, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rounded to the case's dtype first, so that all that compute with them get the same numbers."""
    rng = np.random.default_rng(seed)
    floats, others = operand_types(case)
    drawn = {
        name: np.broadcast_to(case.scale or 1.0, x.shape) if name == "scale" else rng.standard_normal(x.shape)
        for name, x in floats.items()
    }
    numbers = {name: x.astype(jnp.dtype(case.dtype)).astype(floats[name].dtype) for name, x in drawn.items()}

    def given(name: str, types: Any) -> Any:
        if name == "mask":
            return rng.random(types.shape) < case.mask_density
        values = np.asarray(getattr(case, name), np.int32)
        if name == "local_window_size":
            return tuple(np.broadcast_to(side, x.shape) for side, x in zip(values, types, strict=True))
        return values

    return numbers, {name: given(name, x) for name, x in others.items()}


def check_transformation(name: str, case: Case) -> None:
    """Results are at most twice as far from float64 attention as dense attention in the case's dtype.

    Not with dropout under vmap.
    """
    B, T, S, K, G, _ = case.shape
    with enable_x64(case.x64):
        keep = np.asarray(bernoulli(jax.random.key(case.seed), 1 - case.dropout_rate, (B, K * G, T, S)))

    def results(x64: bool, dtype: Any, core: Any = None) -> list[list[np.ndarray]]:
        program = Programs(case, None if core is None else _dense(core, keep)).all()[name]
        with enable_x64(x64):
            run = jax.jit(program)
            found = []
            for seed in range(_DRAWS):
                floats, others = _numbers(case, seed)
                floats = {n: x if dtype is None else x.astype(dtype) for n, x in floats.items()}
                found.append([np.asarray(x) for x in jax.tree.leaves(run(floats, others))])
        return found

    actual = results(case.x64, None)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = results(True, np.float64, dense_float64)
        dense = results(case.x64, None, dense_in_both_modes)
    for i in range(len(expected[0])):
        stacked = (np.stack([draw[i] for draw in some]) for some in (actual, dense, expected))
        assert_as_accurate_as_dense(f"{name} {i}", *stacked, floor=_floor(case, [draw[i] for draw in expected]))


def _floor(case: Case, expected: Any) -> float:
    """Two units in the last place of the case's dtype, whatever the dtype of the result."""
    return 2 * float(jnp.finfo(case.dtype).eps) * max(float(np.abs(x).max(initial=0.0)) for x in expected)
