"""Attention of a sequence that is split over devices, against the float64 oracle of the whole sequence.

Each case is run by each strategy: the value; and, in one program, first derivatives in both modes and forward over
reverse, in every argument that is a float. Programs are in `test_context_parallel_programs.py`.
"""

import dataclasses
import functools
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_native_flash_attn._kernels.xla.family import XlaKernels
from tests.support.context_parallel import (
    BY_KEYS,
    BY_ROWS,
    CASES,
    CAUSAL,
    IDS,
    PLACES,
    SHUFFLED,
    STRATEGIES,
    B,
    Case,
    Numbers,
    Split,
    T,
    assert_close,
    dense_results,
    derivatives,
    expected,
    largest_logits,
    make_mesh,
    numbers,
    others,
    random_mask,
    run,
)
from tests.support.environment import DEVICE_COUNT, enable_x64, full_optimization
from tests.support.grids import rotated, thinned
from tests.support.oracle import assert_as_accurate_as_dense, dense_in_both_modes

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

GRID = [(name, *place) for name, place in itertools.product(CASES, PLACES)]
_EVERYTHING = GRID[-len(PLACES) :]  # of all features at once


# ---- the matrix


@pytest.mark.parametrize(("name", "strategy", "devices"), thinned(GRID, 19, 8))
def test_value_and_largest_logits(name: str, strategy: str, devices: int) -> None:
    case, x = CASES[name], numbers(CASES[name])
    attention = functools.partial(Split(case, strategy, make_mesh((devices,))), results="all")
    out, lse, largest = run(attention, x.floats, others(case))
    assert_close((out, np.where(lse > -1e30, lse, 0)), expected(name, devices)["value"])
    np.testing.assert_allclose(largest, largest_logits(case, x.floats, devices), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "strategy", "devices"), [*thinned(GRID[: -len(_EVERYTHING)], 97, 1), *thinned(_EVERYTHING, 4, 3)]
)
def test_derivatives(name: str, strategy: str, devices: int) -> None:
    case = CASES[name]
    actual = run(derivatives(Split(case, strategy, make_mesh((devices,)))), numbers(case), others(case))
    assert_close(actual, expected(name, devices))


APART = (("bias by keys", 4), ("window, bias of keys", 4), ("everything", 8))


@pytest.mark.parametrize(("name", "devices"), thinned(APART, 3, 1))
def test_gradients_of_key_and_value_first(name: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a family with a kernel for each: they travel home while the others are made."""
    monkeypatch.setattr(XlaKernels, "makes_gradients_together", lambda *_: False)
    case = CASES[name]
    actual = run(derivatives(Split(case, "ring", make_mesh((devices,)))), numbers(case), others(case))
    assert_close(actual, expected(name, devices))


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of a family whose kernels make all gradients together without masks alone, and so take halves."""
    calls: list[Any] = []

    def makes_together(_: Any, call: Any, *__: Any) -> bool:
        calls.append(call)
        return call.inputs.mask.key_start is None

    monkeypatch.setattr(XlaKernels, "makes_gradients_together", makes_together)
    return calls


@pytest.mark.parametrize("devices", thinned([2, 4, 8], 3, 1))
def test_halves(devices: int, halved: list[Any]) -> None:
    """Of other blocks, where kernels without masks make all gradients together."""
    name = "balanced, causal"
    case = CASES[name]
    actual = run(derivatives(Split(case, "ring", make_mesh((devices,)))), numbers(case), others(case))
    assert any(len(call.sizes.batch) == 2 for call in halved)
    assert_close(actual, expected(name, devices))


@pytest.mark.parametrize("name", ["balanced, window", "balanced, bias"])
def test_no_halves(name: str, halved: list[Any]) -> None:
    """Where there is more than causality."""
    case = CASES[name]
    actual = run(derivatives(Split(case, "ring", make_mesh((2,)))), numbers(case), others(case))
    assert all(len(call.sizes.batch) == 1 for call in halved)
    assert_close(actual, expected(name, 2))


OUT_ALONE = ("causal", "no key", "balanced, ids", "bias by keys", "sinks and mask", "cross, dropout")


@pytest.mark.parametrize(("name", "strategy"), thinned(itertools.product(OUT_ALONE, STRATEGIES), 7))
def test_out_alone(name: str, strategy: str) -> None:
    case, x = CASES[name], numbers(CASES[name])
    x = dataclasses.replace(x, cotangents=(x.cotangents[0], 0 * x.cotangents[1]))
    attention = Split(case, strategy, make_mesh())

    def without_lse(*x: Any) -> Any:
        out = attention(*x, results="out")
        return out, jnp.zeros(out.shape[:-1])

    actual = run(derivatives(without_lse), x, others(case))
    with enable_x64():
        exact = dense_results(case, x, 4)
    for results in (actual, exact):
        results |= {name: results[name][0] for name in ("value", "jvp")}
    assert_close(actual, exact)


ROUNDED = ("causal", "lengths", "bias of keys", "sinks and mask", "balanced, window", "shared dropout", "soft cap")
_ROUNDED = itertools.product(ROUNDED, STRATEGIES, ("float32", "bfloat16", "float16"))


@pytest.mark.parametrize(("name", "strategy", "dtype"), thinned(_ROUNDED, 63, 31))
def test_rounding(name: str, strategy: str, dtype: str) -> None:
    """The error is at most twice that of dense attention in the same dtype.

    Over some sets of numbers: the error of one number, such as the gradient of scale, is a matter of luck.
    """
    case = CASES[name]

    def rounded(x: Numbers) -> Numbers:
        of = {"scale": np.float32, "sinks": np.float32}
        floats, tangents = (
            {name: y.astype(of.get(name, jnp.dtype(dtype))) for name, y in some.items()}
            for some in (x.floats, x.tangents)
        )
        out, lse = x.cotangents
        return Numbers(floats, tangents, (out.astype(jnp.dtype(dtype)), lse.astype(np.float32)))

    split = jax.jit(derivatives(Split(case, strategy, make_mesh())), compiler_options=full_optimization())
    found = []
    for x in (rounded(numbers(case, seed)) for seed in range(4)):
        actual = split(x, others(case))
        dense = dense_results(case, x, 4, dense_in_both_modes, x64=False)
        with enable_x64():
            exact = dense_results(case, x.map(lambda y: np.asarray(y, np.float64)), 4, x64=False)
        found.append((actual, dense, exact))
    actual, dense, exact = jax.tree.map(lambda *sets: np.stack(sets), *found)
    for group, results in exact.items():
        floor = 2 * float(jnp.finfo(dtype).eps) * max(float(np.abs(y).max()) for y in jax.tree.leaves(results))
        for (path, a), d, e in zip(
            jax.tree_util.tree_leaves_with_path(actual[group]),
            jax.tree.leaves(dense[group]),
            jax.tree.leaves(results),
            strict=True,
        ):
            assert_as_accurate_as_dense(f"{group} {jax.tree_util.keystr(path)}", a, d, e, floor)


# ---- vmap

_MAPPED = ("ids, causal", "mask by rows", "balanced, bias", "lengths", "offsets")


def _mapped(case: Case) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, int | None]]:
    """Ids of queries and lengths of two elements that share all else; stacked along an axis in the middle; the axes."""
    names = {"query_segment_ids", "key_value_seq_lengths"}
    each = [{name: np.roll(x, i, 0) if name in names else x for name, x in others(case).items()} for i in range(2)]
    axes = {name: 1 if name in names else None for name in others(case)}
    stacked = {name: x if axes[name] is None else np.stack([y[name] for y in each], 1) for name, x in each[0].items()}
    return each, stacked, axes


def _assert_each(actual: Any, case: Case, points: list[Numbers], integers: list[dict[str, Any]]) -> None:
    for i, (x, arrays) in enumerate(zip(points, integers, strict=True)):
        with enable_x64():
            exact = dense_results(dataclasses.replace(case, arrays=case.arrays | arrays), x, 4)
        assert_close(jax.tree.map(operator.itemgetter(i), actual), exact)


@pytest.mark.parametrize(("name", "strategy"), thinned(itertools.product(_MAPPED, STRATEGIES), 7))
def test_vmap_of_shard_map(name: str, strategy: str) -> None:
    """Elements share the key."""
    case, points = CASES[name], [numbers(CASES[name], seed) for seed in range(2)]
    points[1].floats["key"] = points[0].floats["key"]
    x: Numbers = jax.tree.map(lambda *y: np.stack(y), *points)
    x.floats["key"] = points[0].floats["key"]
    each, stacked, axes = _mapped(case)
    in_axes = Numbers({name: None if name == "key" else 0 for name in x.floats}, dict.fromkeys(x.floats, 0), (0, 0))
    attention = Split(case, strategy, make_mesh())
    actual = run(jax.vmap(derivatives(attention), (in_axes, axes)), x, stacked)
    _assert_each(actual, case, points, each)


@pytest.mark.parametrize(("name", "strategy"), thinned(itertools.product(_MAPPED, STRATEGIES), 7, 1))
def test_vmap_inside_shard_map(name: str, strategy: str) -> None:
    case, points = CASES[name], [numbers(CASES[name], seed) for seed in range(2)]
    x: Numbers = jax.tree.map(lambda *y: np.stack(y), *points)
    each, stacked, axes = _mapped(case)
    attention = Split(case, strategy, make_mesh())

    def spec(name: str, axis: int | None) -> P:
        one = attention.spec(name)
        return one if axis is None else P(*[*one, None][:axis], None, *one[axis:])

    mapped = jax.shard_map(
        jax.vmap(attention.local, (0, axes)),
        mesh=attention.mesh,
        in_specs=({name: spec(name, 0) for name in x.floats}, {name: spec(name, axis) for name, axis in axes.items()}),
        out_specs=(P(None, None, "s"),) * 2,
    )
    _assert_each(run(derivatives(mapped), x, stacked), case, points, each)


# ---- meshes

_MESHES: dict[str, dict[str, Any]] = {
    "batch and tokens": {"mesh": ((2, 4), ("b", "s")), "batch": "b"},
    "tokens and heads": {"mesh": ((4, 2), ("s", "h")), "heads": "h"},
    "tokens over two axes": {"mesh": ((2, 2), ("x", "y")), "tokens": ("x", "y")},
    "all three": {"mesh": ((2, 2, 2), ("b", "s", "h")), "batch": "b", "heads": "h"},
}
_ON_MESHES: dict[str, Case] = {
    "contiguous": Case(
        CAUSAL | {"local_window_size": (17, 0), "logits_soft_cap": 2.0},
        IDS | {"bias": (1, 8, T, T), "mask": random_mask(B, 1, 1, T), "sinks": (8,)},
        {"bias": BY_ROWS, "mask": BY_KEYS},
        (8, 8, 3, 2),
    ),
    "balanced": Case(
        CAUSAL,
        {"bias": (B, 8, 1, T), **SHUFFLED},
        {"bias": P()},
        (8, 8, 3, 2),
        is_balanced=True,
    ),
}


@pytest.mark.parametrize(
    ("check_vma", "case", "mesh", "strategy"),
    thinned(itertools.product((True, False), _ON_MESHES, _MESHES, STRATEGIES), 17),
)
def test_meshes(check_vma: bool, case: str, mesh: str, strategy: str) -> None:
    options = dict(_MESHES[mesh])
    devices = make_mesh(*options.pop("mesh"))
    size = int(np.prod([devices.shape[x] for x in options.get("tokens", "s")]))
    at, x = _ON_MESHES[case], numbers(_ON_MESHES[case])
    attention = Split(at, strategy, devices, check_vma=check_vma, **options)
    with enable_x64():
        exact = dense_results(at, x, size)
    assert_close(run(derivatives(attention), x, others(at)), exact)


@pytest.mark.parametrize(("strategy", "check_vma"), thinned(rotated(STRATEGIES, [True, False]), 2))
def test_derivatives_inside_shard_map(strategy: str, check_vma: bool) -> None:
    """The gradient of what is alike on all devices is a sum over them, which `check_vma=False` leaves to the caller."""
    case, x = CASES["bias of keys, whole"], numbers(CASES["bias of keys, whole"])
    attention = Split(case, strategy, make_mesh())
    specs, rows = attention.specs(x.floats), P(None, "s")

    def local(x: Numbers) -> Any:
        results = derivatives(attention.local)(x, {})
        if not check_vma:
            for name in ("vjp", "hvp"):
                sums = {n: jax.lax.psum(y, "s") for n, y in results[name].items() if "s" not in specs[n]}
                results[name] |= sums
        return results

    inside = jax.shard_map(
        local,
        mesh=attention.mesh,
        in_specs=(Numbers(specs, specs, (rows, rows)),),
        out_specs={"value": (rows, rows), "jvp": (rows, rows), "vjp": specs, "hvp": specs},
        check_vma=check_vma,
    )
    assert_close(run(inside, x), expected("bias of keys, whole", 4))
