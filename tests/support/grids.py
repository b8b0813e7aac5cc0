"""Grids of tests too large for every run: an even part is always run, the rest with `--whole-grid`.

CI does so on the newest JAX, but for the tests in `sharding`: those of context parallelism alone take 11 minutes.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(points: Iterable[Any], every: int, first: int = 0) -> list[Any]:
    """Parameters of `pytest.mark.parametrize`: of each `every` points, one is always run.

    `every` should have no factor in common with the length of the inner axes of a product, so that all are met.
    """
    return [point if i % every == first else rest(point) for i, point in enumerate(points)]


def rest(point: Any) -> Any:
    """A parameter that is left to the whole grid."""
    values = point if isinstance(point, tuple) and not hasattr(point, "_fields") else (point,)
    return pytest.param(*values, marks=pytest.mark.whole_grid)
