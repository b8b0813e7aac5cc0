"""`score_mod` and `mask_mod` of a split sequence, against the float64 oracle of the whole one."""

import itertools

import jax
import pytest

from tests.support.context_parallel import (
    MODS,
    STRATEGIES,
    Split,
    assert_close,
    dense_results,
    dense_with_mods,
    derivatives,
    make_mesh,
    numbers,
    others,
    run,
)
from tests.support.environment import DEVICE_COUNT, enable_x64

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICE_COUNT, reason="needs eight devices")

_PLACES = (("ring", 4), ("ring", 8), *((strategy, 4) for strategy in STRATEGIES[1:]))


@pytest.mark.parametrize(("name", "strategy", "devices"), [(name, *place) for name, place in itertools.product(MODS, _PLACES)])
def test_derivatives(name: str, strategy: str, devices: int) -> None:
    case, x = MODS[name], numbers(MODS[name])
    actual = run(derivatives(Split(case, strategy, make_mesh((devices,)))), x, others(case))
    with enable_x64():
        exact = dense_results(case, x, devices, dense_with_mods(case, devices))
    assert_close(actual, exact)
