"""Every transformation by each kernel family, against the float64 oracle: the programs of `lowering.py`, run.

A family for GPUs: each transformation meets each 16-bit type, head dimension and setting of 64-bit types; masks and
options rotate. Pure JAX: two of them, as `tests/transforms` has all in float64, and its rounding.
"""

from collections.abc import Iterator

import pytest

from tests.support.cases import Case
from tests.support.families import EVERYWHERE, FAMILIES, marks, skip_unless_taken
from tests.support.lowering import FEATURE_OPTIONS, HEAD_DIMS, MASKS, OPTIONS, Point, Programs
from tests.support.transformations import check_transformation

_TRANSFORMATIONS = tuple(Programs(Point("bfloat16", 64, "none", "bias of scores", False).case).all())
_WITH_PURE_JAX = {
    "forward over reverse": Point("bfloat16", 64, "causal", "bias of keys", False),
    "gradient of lse": Point("bfloat16", 64, "mask of scores", "lengths of both", False),
    "jvp": Point("bfloat16", 64, "mask of keys", "soft cap", False),
    "gradient of all": Point("float16", 64, "causal", "sinks", False),
}


def _points() -> Iterator[tuple[str, Point, str]]:
    """Transformation, case, and family."""
    masks = list(MASKS)
    for i, name in enumerate(_TRANSFORMATIONS):
        options = list(OPTIONS)[1:4] if name == "gradient of bias" else list(OPTIONS | FEATURE_OPTIONS)
        if "scan" in name:
            options.remove("value dimension")  # out is carried on as the query
        for j, (dtype, head_dim, x64) in enumerate(
            (d, h, x) for d in ("bfloat16", "float16") for h in HEAD_DIMS for x in (False, True)
        ):
            mask, option = masks[(i + j) % len(masks)], options[(i + 3 * j) % len(options)]
            for family in FAMILIES:
                if family != EVERYWHERE:
                    yield name, Point(dtype, head_dim, mask, option, x64), family
    for name, point in _WITH_PURE_JAX.items():
        yield name, point, EVERYWHERE


@pytest.mark.parametrize(
    ("name", "case", "family"),
    [
        pytest.param(name, point.case, family, id=f"{name}, {point}, {family}", marks=marks(point.case, family))
        for name, point, family in _points()
    ],
)
def test_transformed_calls(name: str, case: Case, family: str) -> None:
    skip_unless_taken(case, family, is_asked=False)  # `flash_attention_with_lse` can ask for none
    check_transformation(name, case)
