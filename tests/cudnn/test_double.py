"""What stands around cuDNN's kernels, on a CPU: parity with the oracle, on the double of `jax.nn`'s call."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cases import FAST_COMPILATION, Case, check_case
from tests.support.cudnn import cudnn_attention, cudnn_everywhere
from tests.support.transformations import check_transformation

LENGTHS = {"query_seq_lengths": (17, 0, 24), "key_value_seq_lengths": (31, 40, 0), "poison": True}
CASES: dict[str, dict[str, Any]] = {
    "lengths, window": LENGTHS | {"is_causal": True, "local_window_size": (7, 0)},
    "sparse mask, lengths": LENGTHS | {"mask": (True, False, True, True), "mask_density": 0.05},
    "bias, mask, vmap": {
        "bias": (False, True, True, True),
        "mask": (True, False, True, True),
        "mask_density": 0.1,
        "vmapped": True,
    },
}


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    with cudnn_everywhere():
        yield


@pytest.mark.parametrize("option", CASES)
def test_parity(option: str) -> None:
    check_case(Case((3, 24, 40, 2, 2, 16), "bfloat16", scale=0.3, **CASES[option]), cudnn_attention, FAST_COMPILATION)


def test_gradient_of_out_and_lse() -> None:
    """That of lse is not cuDNN's."""
    case = Case((2, 24, 40, 1, 2, 8), "bfloat16", scale=0.3, is_causal=True)
    check_transformation("gradient of out and lse", case, implementation="cudnn_gpu")
