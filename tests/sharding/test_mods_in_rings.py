"""`score_mod` and `mask_mod` of a split sequence, against the float64 oracle of the whole one, with all derivatives."""

import dataclasses
import functools
import itertools
import operator

import jax
import numpy as np
import pytest

from tests.support.context_parallel import (
    MODS,
    PLACES,
    STRATEGIES,
    Split,
    assert_close,
    dense_results,
    dense_with_mods,
    derivatives,
    largest_logits,
    make_mesh,
    numbers,
    others,
    run,
)
from tests.support.environment import DEVICE_COUNT, enable_x64
from tests.support.grids import rest

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

_ALWAYS = (("prefix and alibi, positions", "ring", 4),)
_GRID = [(name, *place) for name, place in itertools.product(MODS, PLACES)]


@pytest.mark.parametrize(("name", "strategy", "devices"), [x if x in _ALWAYS else rest(x) for x in _GRID])
def test_derivatives(name: str, strategy: str, devices: int) -> None:
    case, x = MODS[name], numbers(MODS[name])
    actual = run(derivatives(Split(case, strategy, make_mesh((devices,)))), x, others(case))
    with enable_x64():
        exact = dense_results(case, x, devices, dense_with_mods(case, devices))
    assert_close(actual, exact)


@pytest.mark.parametrize("strategy", ["ring", rest("all_gather"), rest("all_to_all")])
def test_rows_without_keys(strategy: str) -> None:
    """By values alone: a row attends all keys if none of any block is left to it. It has no largest logit."""
    case, x = MODS["rows without keys"], numbers(MODS["rows without keys"])
    attention = functools.partial(Split(case, strategy, make_mesh()), results="all")
    out, lse, largest = run(attention, x.floats, others(case))
    with enable_x64():
        exact = dense_results(case, x, 4, dense_with_mods(case, 4))["value"]
    assert (lse < -1e30).any()
    assert_close((out, np.where(lse > -1e30, lse, 0)), exact)
    np.testing.assert_allclose(largest, largest_logits(case, x.floats, 4), rtol=1e-6)


@pytest.mark.whole_grid
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vmap(strategy: str) -> None:
    """Elements have arguments of their own."""
    case = MODS["prefix and alibi, positions"]
    points, prefixes = [numbers(case, seed) for seed in range(2)], np.array([[11, 3], [0, 20]], np.int32)
    arrays, axes = others(case), dict.fromkeys(others(case), None) | {"mask_mod_args": 0}
    mapped = jax.vmap(derivatives(Split(case, strategy, make_mesh())), (0, axes))
    x = jax.tree.map(lambda *y: np.stack(y), *points)
    actual = run(mapped, x, arrays | {"mask_mod_args": (prefixes,)})
    for i, point in enumerate(points):
        one = dataclasses.replace(case, arrays=case.arrays | {"mask_mod_args": (prefixes[i],)})
        with enable_x64():
            exact = dense_results(one, point, 4, dense_with_mods(one, 4))
        assert_close(jax.tree.map(operator.itemgetter(i), actual), exact)
