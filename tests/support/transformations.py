"""A transformation of `lowering.Programs`, run, beside the float64 oracle and dense attention in the case's dtype."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.cases import TRACEABLE, Case, integers
from tests.support.environment import bernoulli, enable_x64
from tests.support.lowering import Programs, operand_types
from tests.support.oracle import assert_as_accurate_as_dense, dense_float64, dense_in_both_modes, masking

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
        sinks: Any = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        for name in ("dropout_rng", "broadcast_dropout", "block_q", "block_kv"):  # `keep` is drawn from the first two
            options.pop(name, None)
        wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
        masks = masking(query, key, mask, keep=keep if "dropout_rate" in options else None, xp=jnp, **options)
        masks = dataclasses.replace(masks, factor=jnp.asarray(masks.factor, wide))
        bias = jnp.zeros((1, 1, 1, 1), wide) if bias is None else bias
        full_bias = jnp.broadcast_to(bias, masks.allowed.shape)
        return core(query, key, value, full_bias, jnp.asarray(scale, wide), masks, sinks)

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
        return jax.tree.map(lambda value, x: np.broadcast_to(value, x.shape), whole_numbers[name], types)

    whole_numbers = integers(case)
    return numbers, {name: given(name, x) for name, x in others.items()}


def in_float64(case: Case) -> Case:
    """The case with all numbers float64 and all that can be traced; positions are not near the ends of int32."""
    ends = {
        f"{side}_positions": "permuted"
        for side in ("query", "key_value")
        if getattr(case, f"{side}_positions") == "ends"
    }
    sinks = None if case.sinks is None else "float64"
    traced = frozenset(TRACEABLE)
    return dataclasses.replace(
        case,
        dtype="float64",
        bias_dtype=None,
        sinks=sinks,
        scale=case.scale or 0.3,
        magnitude=1.0,
        traced=traced,
        **ends,
    )


def check_transformation(name: str, case: Case, limit: float = 2.0, **options: Any) -> None:
    """Results are at most `limit` times as far from float64 attention as dense attention in the case's dtype.

    Those of a float64 case are within 1e-11 of it, relative to the largest number.
    Not with positions near the ends of int32. `options`: further ones of `flash_attention`.
    """
    B, T, S, K, G, _ = case.shape
    x64 = case.x64 or case.dtype == "float64"
    with enable_x64(x64):
        rows = 1 if case.vmapped else B  # of a call
        lead = (1, 1) if case.broadcast_dropout else (rows, K * G)
        keep = np.asarray(bernoulli(jax.random.key(case.seed), 1 - case.dropout_rate, (*lead, T, S)))
        keep = np.broadcast_to(keep, (rows, K * G, T, S))

    def results(x64: bool, dtype: Any, core: Any = None) -> list[list[np.ndarray]]:
        dense = None if core is None else _dense(core, keep)
        program = Programs(case, dense, **(options if core is None else {})).all()[name]
        with enable_x64(x64):
            run = jax.jit(program)
            found = []
            for seed in range(_DRAWS):
                floats, others = _numbers(case, seed)
                floats = {n: x if dtype is None else x.astype(dtype) for n, x in floats.items()}
                found.append([np.asarray(x) for x in jax.tree.leaves(run(floats, others))])
        return found

    actual = results(x64, None)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = results(True, np.float64, dense_float64)
        if case.dtype == "float64":
            return _assert_close(name, actual, expected)
        dense = results(case.x64, None, dense_in_both_modes)
    for i in range(len(expected[0])):
        stacked = (np.stack([draw[i] for draw in some]) for some in (actual, dense, expected))
        floor = _floor(case, [draw[i] for draw in expected])
        assert_as_accurate_as_dense(f"{name} {i}", *stacked, floor=floor, limit=limit)
    return None


def _assert_close(name: str, actual: Any, expected: Any) -> None:
    for found, exact in zip(actual, expected, strict=True):
        largest = max(np.abs(x).max(initial=0.0) for x in exact)
        assert np.isfinite(largest)
        for i, (a, e) in enumerate(zip(found, exact, strict=True)):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-11 * largest, err_msg=f"{name} {i}")


def _floor(case: Case, expected: Any) -> float:
    """Two units in the last place of the case's dtype, whatever the dtype of the result."""
    return 2 * float(jnp.finfo(case.dtype).eps) * max(float(np.abs(x).max(initial=0.0)) for x in expected)
