"""Derivatives of 16-bit calls where products round their operands, as on a GPU: emulated on the CPU.

Operands of 16 bits are multiplied as such, and float32 in TensorFloat-32 unless more is asked for.
"""

from collections.abc import Iterator

import pytest

from tests.support.accelerator import accelerator_kernels
from tests.support.grids import thinned
from tests.support.lowering import Point
from tests.support.transformations import check_transformation


@pytest.fixture(autouse=True, scope="module")
def _accelerator() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    with accelerator_kernels(rounds_float32=True):
        yield


@pytest.mark.parametrize(
    ("dtype", "name", "mask", "option"),
    thinned(
        [
            ("bfloat16", "jvp", "none", "nothing"),
            ("float16", "jacfwd", "traced window", "dropout"),
            ("bfloat16", "forward over reverse", "causal", "nothing"),
            ("float16", "reverse over forward", "none", "nothing"),
            ("bfloat16", "reverse over forward", "mask of rows", "bias of rows"),
            ("float16", "reverse over reverse", "mask of keys", "lengths of keys"),
            ("bfloat16", "third order", "none", "nothing"),
        ],
        every=3,
    ),
)
def test_derivatives_are_as_accurate_as_dense_attention(name: str, mask: str, option: str, dtype: str):
    check_transformation(name, Point(dtype, 64, mask, option, False).case)
