"""Kernel families as parameters of tests: what a family does not support here is skipped, with the reason it gives."""

import functools
from collections.abc import Mapping
from typing import Any

import pytest

from jax_native_flash_attn import explain, flash_attention
from jax_native_flash_attn._kernels import select
from tests.support.cases import FAST_COMPILATION, Case, call_types, check_case, static_options
from tests.support.environment import enable_x64
from tests.support.grids import is_chosen

FAMILIES = tuple(family.name for family in select.FAMILIES)
EVERYWHERE = FAMILIES[-1]  # supports every call, on every platform

_REST = pytest.mark.whole_grid
# What takes a CPU long, or is a case because a GPU splits it: no family runs it without a GPU.
_MOST_SCORES, _MOST_KEYS = 1 << 17, 1 << 12


def by_family(cases: Mapping[str, Case], every: int = 1) -> pytest.MarkDecorator:
    """Parametrises a test by `case` and `family`: each case with each family.

    Of those that need no GPU, one of `every` is run; see `grids.py`.
    """
    parameters = [
        pytest.param(
            case,
            family,
            id=f"{name}, {family}",
            marks=(*marks(case, family), *([] if is_chosen(i, every) or family != EVERYWHERE else [_REST])),
        )
        for i, (name, case) in enumerate(cases.items())
        for family in FAMILIES
    ]
    return pytest.mark.parametrize(("case", "family"), parameters)


def marks(case: Case, family: str) -> tuple[pytest.MarkDecorator, ...]:
    """The marker of what needs a GPU."""
    if family == "mosaic_gpu":
        return (pytest.mark.gpu(says_why=True),)
    if family != EVERYWHERE:
        return (pytest.mark.gpu,)
    return (pytest.mark.gpu,) if case.scores > _MOST_SCORES or case.shape[2] > _MOST_KEYS else ()


def why_not(case: Case, family: str, *, is_asked: bool = True) -> str | None:
    """Why the forward pass of a case does not take a family's kernels on this machine; None if it does.

    Without `is_asked`, of a call that leaves the choice to the library.
    """
    options: dict[str, Any] = {**call_types(case), **static_options(case)}
    with enable_x64(case.x64 or case.dtype == "float64"):
        if not is_asked:
            return explain(**options).forward.reasons.get(family)
        try:
            explain(**options, implementation=family)
        except NotImplementedError as error:
            return str(error)
    return None


def skip_unless_taken(case: Case, family: str, *, is_asked: bool = True) -> None:
    if reason := why_not(case, family, is_asked=is_asked):
        pytest.skip(reason)


def check_family(case: Case, family: str) -> None:
    """`check_case` with the kernels of a family, where these support the case.

    `flash_attention_with_lse` can ask for none: then with those that the library takes, if they are the family's.
    """
    skip_unless_taken(case, family, is_asked=not case.with_lse)
    implementation: Any = family
    asked = functools.partial(flash_attention, implementation=implementation)
    check_case(case, None if case.with_lse else asked, FAST_COMPILATION)
