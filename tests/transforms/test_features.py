"""Derivatives with segments, positions, offsets, soft cap, sinks, in float64: transformations of `Programs`.

`python -m tests.parity.run_generated --pairs --derivatives` has each of these, and each pair.
"""

import dataclasses

import pytest

from tests.support.cases import Case, features
from tests.support.grids import thinned
from tests.support.transformations import check_transformation, in_float64

_SHAPE = (2, 13, 17, 2, 2, 4)
_CASES = {
    "jvp": ("segments", "soft cap", "sinks", "value dimension", "bias"),
    "forward over reverse": ("segments", "soft cap", "sinks", "value dimension", "bias"),
    "forward over reverse, positions": ("positions", "sinks", "shared dropout", "window"),
    "forward over reverse, offset": ("shuffled segments", "offset", "soft cap", "lengths", "mask"),
    "forward over reverse, vmap": ("padded segments", "offset", "sinks", "value dimension", "vmap"),
}


@pytest.mark.parametrize("name", thinned(_CASES, 2))
def test_derivatives(name: str) -> None:
    """Under vmap each batch row has its own ids, offset and sinks."""
    names = _CASES[name]
    case = in_float64(Case(_SHAPE, block_q=8, block_kv=8, **features(*names)))
    if "offset" in names:
        case = dataclasses.replace(case, query_offset=(5, -3))
    if "lengths" in names:
        case = dataclasses.replace(case, query_seq_lengths=(9, 13), key_value_seq_lengths=(17, 6))
    check_transformation(name.partition(",")[0], case)


@pytest.mark.parametrize("axes", thinned(["rows", "keys", "rows and keys"], 2, 1))
def test_ids_differ_under_vmap_and_a_boolean_mask_does_not(axes: str) -> None:
    mask = (False, False, "rows" in axes, "keys" in axes)
    case = Case(_SHAPE, mask=mask, is_causal=True, block_q=8, block_kv=8, **features("segments", "vmap"))
    check_transformation("gradient of all", in_float64(case))
