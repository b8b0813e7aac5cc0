"""Every program lowers for CUDA as on a Hopper GPU, without one: transformations, dtypes, masks and 64-bit types.

The grid has every mask x what else a call may have (`lowering.OPTIONS`). There dtype, head dimension and 64-bit types
rotate such that every option, and every mask, meets each dtype with and without 64-bit types. All of it lowers the
gradient in full, which runs the forward pass too, and every second point derivatives of second order, of two kinds in
turns.
A part of the grid has every mask x dtype x {64-bit types off, on}, and traces every transformation of
`lowering.Programs` there. All kernels are lowered but those that Mosaic GPU has: of these each program's in one case of
bfloat16 or float32, which rotates. Every fourth point of the grid has pure JAX in tiles, too.
A few points are always run, all of them with `--whole-grid`, as CI does on the newest JAX.

Tracing is quick, and lowering a Mosaic kernel takes up to a second: a kernel is lowered once in each process.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from tests.support.environment import enable_x64
from tests.support.grids import thinned
from tests.support.lowering import DTYPES, HEAD_DIMS, MASKS, OPTIONS, Bind, Point, Programs, binds
from tests.support.targets import pretend_gpu, why_no_backend

HAS_BACKEND = jax.__version_info__ >= (0, 10)
without_backend = pytest.mark.skipif(not HAS_BACKEND, reason=f"JAX {jax.__version__} has no Mosaic GPU backend we use")

# Whose kernels are all Mosaic's, and those that also are for 16 bits.
FIRST_ORDER = ("value", "gradient", "gradient of all", "vmap", "gradient of vmap", "vmap of gradient", "lse")
FORWARD_MODE = ("jvp", "linearize", "jacfwd")
FIRST = ("gradient of all",)
SECOND = ("forward over reverse", "reverse over forward")

_lowered: dict[tuple[Bind, bool], str] = {}


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "9.0")


@without_backend
def test_the_mosaic_gpu_backend_can_be_imported():
    """Where JAX has it, tests must not pass for lack of it."""
    assert why_no_backend() is None


def _lower(bind: Bind, x64: bool) -> str:
    if (bind, x64) not in _lowered:
        _lowered[bind, x64] = bind.lowered()
    return _lowered[bind, x64]


def _faults(point: Point, full: Sequence[str], sampled: Sequence[str] = (), **options: Any) -> dict[str, str]:
    """What each program of a case does wrong, by its name.

    Of `sampled`, first-order kernels are lowered for programs whose turn it is alone, and not for float16.
    """
    faults = {}
    case = point.case
    programs = Programs(case, **options).all()
    turn = 4 * list(MASKS).index(point.mask) + 2 * case.x64 + (case.dtype == "float32")
    with enable_x64(case.x64):
        for i, name in enumerate(programs):
            if name not in full and name not in sampled:
                continue
            skips = name not in full and (case.dtype == "float16" or (i + turn) % (4 * len(MASKS)) > 0)
            try:
                found = [bind for bind in binds(programs[name], case) if not (skips and bind.is_first_order)]
                texts = {bind: _lower(bind, case.x64) for bind in found}
            except Exception as error:  # any is a fault
                faults[name] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            if not (texts or skips):
                faults[name] = "binds no kernel of ours"
            for bind, text in texts.items():
                takes_mosaic = "mosaic_gpu" in text
                is_first = name in FIRST_ORDER or (name in FORWARD_MODE and case.dtype in ("bfloat16", "float16"))
                if is_first and not options and not takes_mosaic:
                    faults[name] = f"{bind.primitive.name} takes pure JAX"
                # Of float64 operands alone may there be arrays of float64; scalars cost nothing.
                if case.dtype != "float64" and not bind.has_float64 and re.search(r"\dxf64>", text):
                    faults[name] = "computes arrays in float64"
    return faults


def _grid() -> dict[Point, bool]:
    """The points, and whether all transformations are traced there."""
    points = {}
    for i, mask in enumerate(MASKS):
        for j, option in enumerate(OPTIONS):
            x64 = bool((i // 3 + j) % 2)
            point = Point(DTYPES[(i + j) % 3], HEAD_DIMS[(i + j // 2) % 2], mask, option, x64)
            # Any six in a row that start with an even one have each dtype with and without 64-bit types.
            points[point] = 2 * (i % 2) <= j < 6 + 2 * (i % 2)
    assert {(p.mask, p.dtype, p.x64) for p, is_traced in points.items() if is_traced} == {
        *itertools.product(MASKS, DTYPES, (False, True))
    }
    return points


def _second(point: Point) -> tuple[str, ...]:
    """The derivative of second order of a point. Every mask, and every option, meets both kinds."""
    number = list(MASKS).index(point.mask) + list(OPTIONS).index(point.option)
    return (SECOND[number // 2 % 2],) if number % 2 else ()


@without_backend
@pytest.mark.parametrize("point", thinned(_grid(), 29), ids=str)
def test_every_mask_beside_every_option(point: Point):
    assert not _faults(point, (*FIRST, *_second(point)), tuple(Programs(point.case).all()) if _grid()[point] else ())


@pytest.mark.parametrize("point", thinned([p for p in _grid() if _second(p)][::2], 7), ids=str)
def test_pure_jax_in_several_tiles(point: Point):
    """Loops with run-time trip counts, and their derivatives."""
    assert not _faults(point, (*FIRST, *SECOND), implementation="pure_jax", block_q=64, block_kv=64)
