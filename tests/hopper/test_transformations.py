"""Every transformation on a Hopper GPU in 16-bit types, against the float64 oracle: the programs of `lowering.py`, run.

Each transformation meets each 16-bit type, head dimension and setting of 64-bit types; masks and options rotate.
"""

from typing import Any

import pytest

from tests.support.lowering import HEAD_DIMS, MASKS, OPTIONS, Call, Programs
from tests.support.targets import why_no_hopper
from tests.support.transformations import check_transformation

_TRANSFORMATIONS = tuple(Programs(Call("bfloat16", 64, "none", "bias of scores", False)).all())


def _calls() -> list[tuple[str, Call]]:
    calls = []
    for i, name in enumerate(_TRANSFORMATIONS):
        for j, (dtype, head_dim, x64) in enumerate(
            (d, h, x) for d in ("bfloat16", "float16") for h in HEAD_DIMS for x in (False, True)
        ):
            options = OPTIONS[1:4] if name == "gradient of bias" else OPTIONS
            calls.append(
                (name, Call(dtype, head_dim, MASKS[(i + j) % len(MASKS)], options[(i + 3 * j) % len(options)], x64))
            )
    return calls


def _id(x: Any) -> str:
    return str(x) if not isinstance(x, Call) else f"{x.dtype}, {x.head_dim}, {x.mask}, {x.option}{', x64' * x.x64}"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "call"), _calls(), ids=_id)
def test_transformations_on_a_gpu(name: str, call: Call):
    if reason := why_no_hopper():
        pytest.skip(reason)
    check_transformation(name, call)


@pytest.mark.parametrize(
    ("name", "mask", "option"),
    [("forward over reverse", "causal", "bias of keys"), ("gradient of lse", "mask of scores", "lengths of both")],
)
def test_the_check_itself(name: str, mask: str, option: str):
    """Anywhere, of the pure JAX kernels."""
    check_transformation(name, Call("bfloat16", 64, mask, option, False))
