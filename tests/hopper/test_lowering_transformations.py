"""Every program lowers for CUDA as on a Hopper GPU, without one: transformations, dtypes, masks and 64-bit types.

Full: every transformation of `lowering.Programs` x mask x {bfloat16, float32} x 64-bit types {off, on}; and every mask
x what else a call may have (`lowering.OPTIONS`), with value, gradient and second order of two kinds.
So is the former for float16, but for the kernels that Mosaic GPU has, which are lowered with the latter alone.
Sampled: of the former's kernels that Mosaic GPU has, those of value and gradient and of every fourth other program,
which rotates with mask and 64-bit types, as head dimension and option do. Beside the latter, dtype, head dimension and
64-bit types rotate such that every option, and every mask, meets each dtype with and without 64-bit types. Every second
of those calls has the gradient alone; the others value and second order too, and every other of them pure JAX in tiles.

Tracing is quick, and lowering a Mosaic kernel takes up to a second: a kernel is lowered once in each process.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import pytest

from tests.support.environment import enable_x64
from tests.support.lowering import DTYPES, HEAD_DIMS, MASKS, OPTIONS, Bind, Point, Programs, binds
from tests.support.targets import pretend_gpu, why_no_backend

HAS_BACKEND = jax.__version_info__ >= (0, 10)
without_backend = pytest.mark.skipif(not HAS_BACKEND, reason=f"JAX {jax.__version__} has no Mosaic GPU backend we use")

# Whose kernels are all Mosaic's for 16-bit types.
FIRST_ORDER = ("value", "gradient", "gradient of all", "vmap", "gradient of vmap", "vmap of gradient", "lse")
FIRST = ("value", "gradient of all")
SOME = (*FIRST, "forward over reverse", "reverse over forward")

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


def _faults(
    point: Point,
    names: Iterable[str] | None = None,
    *,
    higher_order: bool = False,
    is_sampled: bool = False,
    **options: Any,
) -> dict[str, str]:
    """What each program of a case does wrong, by its name.

    `higher_order` leaves out first-order kernels, `is_sampled` those of programs whose turn it is not.
    """
    faults = {}
    case = point.case
    programs = Programs(case, **options).all()
    turn = list(MASKS).index(point.mask) + case.x64
    unsampled = {name for i, name in enumerate(programs) if is_sampled and name not in FIRST and (i + turn) % 4}
    with enable_x64(case.x64):
        for name in programs if names is None else names:
            try:
                skips = higher_order or name in unsampled
                found = [bind for bind in binds(programs[name], case) if not (skips and bind.is_first_order)]
                texts = {bind: _lower(bind, case.x64) for bind in found}
            except Exception as error:  # any is a fault
                faults[name] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            if not (texts or skips):
                faults[name] = "binds no kernel of ours"
            for bind, text in texts.items():
                takes_mosaic = "mosaic_gpu" in text
                is_first = name in FIRST_ORDER and not options
                if (
                    is_first
                    and not takes_mosaic
                    and (case.dtype != "float32" or bind.primitive.name == "flash_attention")
                ):
                    faults[name] = f"{bind.primitive.name} takes pure JAX"
                # Of float64 operands alone may there be arrays of float64; scalars cost nothing.
                if case.dtype != "float64" and not bind.has_float64 and re.search(r"\dxf64>", text):
                    faults[name] = "computes arrays in float64"
    return faults


def _all_transformations() -> list[Point]:
    points = []
    for i, mask in enumerate(MASKS):
        for k, dtype in enumerate(DTYPES):
            for x64 in (False, True):
                option = list(OPTIONS)[(i + 3 * k + 4 * x64) % len(OPTIONS)]
                points.append(Point(dtype, HEAD_DIMS[(i + k + x64) % 2], mask, option, x64))
    return points


def _all_options() -> list[Point]:
    return [
        Point(DTYPES[(i + j) % 3], HEAD_DIMS[(i + j // 2) % 2], mask, option, bool((i // 3 + j) % 2))
        for i, mask in enumerate(MASKS)
        for j, option in enumerate(OPTIONS)
    ]


def _is_second(point: Point) -> bool:
    return (list(MASKS).index(point.mask) + list(OPTIONS).index(point.option)) % 2 == 1


@without_backend
@pytest.mark.parametrize("point", _all_transformations(), ids=str)
def test_every_transformation(point: Point):
    assert not _faults(point, higher_order=point.dtype == "float16", is_sampled=True)


@without_backend
@pytest.mark.parametrize("point", _all_options(), ids=str)
def test_every_mask_beside_every_option(point: Point):
    assert not _faults(point, SOME if _is_second(point) else FIRST[1:])


@pytest.mark.parametrize("point", [point for point in _all_options() if _is_second(point)][::2], ids=str)
def test_pure_jax_in_several_tiles(point: Point):
    """Loops with run-time trip counts, and their derivatives."""
    assert not _faults(point, SOME, implementation="pure_jax", block_q=64, block_kv=64)
