"""Grids of tests too large for every run: an even part of the points is run, all with `--whole-grid`.

`--grid-part` chooses another part: CI has one on the Python and JAX of the README's command, and another on the newest
JAX, where grids of lowered programs and of transformations run whole as well. What is left is not skipped but
deselected (`conftest.py`), which takes no time.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

_part = 0


def choose_part(part: int) -> None:
    """Have the points that follow by so many the usual ones be run; before tests are collected."""
    global _part
    _part = part


def is_chosen(i: int, every: int, first: int = 0) -> bool:
    """Whether point i is run without `--whole-grid`: one of each `every`."""
    return i % every == (first + _part) % every


def thinned(points: Iterable[Any], every: int, first: int = 0) -> list[Any]:
    """Parameters of `pytest.mark.parametrize`: of each `every` points, one is run.

    `every` should have no factor in common with the length of the inner axes of a product, so that all are met.
    """
    return [
        _marked(point, "grid_point" if is_chosen(i, every, first) else "whole_grid") for i, point in enumerate(points)
    ]


def rotated(outer: Iterable[Any], inner: Sequence[Any]) -> list[tuple[Any, Any]]:
    """All pairs. `thinned(..., len(inner))` leaves one for each of `outer`, and takes those of `inner` in turns."""
    return [(x, inner[(i + j) % len(inner)]) for i, x in enumerate(outer) for j in range(len(inner))]


def in_part(part: int) -> pytest.MarkDecorator:
    """The marker of a test, or of a file's `pytestmark`, that takes long beside what may differ between JAX versions.

    It runs in part 0, or in part 1, alone.
    """
    return pytest.mark.one_part if _part % 2 == part else pytest.mark.whole_grid


def rest(point: Any) -> Any:
    """A parameter that is left to the whole grid."""
    return _marked(point, "whole_grid")


def _marked(point: Any, marker: str) -> Any:
    values = point if isinstance(point, tuple) and not hasattr(point, "_fields") else (point,)
    return pytest.param(*values, marks=getattr(pytest.mark, marker))
