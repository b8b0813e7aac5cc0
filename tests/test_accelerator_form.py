"""What the pure JAX kernels compute for an accelerator, run on the CPU: generated calls against the float64 oracle."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from hypothesis import given, settings

from jax_native_flash_attn import _tiles
from jax_native_flash_attn._logits import Tiles
from tests.cases import Case, cases, check_case


@pytest.fixture(autouse=True, scope="module")
def _accelerator() -> Iterator[None]:
    """Every kernel is made for an accelerator, with tiles small enough that these calls take several."""
    make = Tiles.__init__

    def init(self: Tiles, config: Any, inputs: Any, target: Any, **options: Any) -> None:
        make(self, config, inputs, target._replace(platform="accelerator"), **options)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "__init__", init)
        patch.setattr(_tiles, "_ACCELERATOR", 1 << 14)
        patch.setattr(_tiles, "_ACCELERATOR_LEAST", 1 << 11)
        patch.setattr(_tiles, "_ACCELERATOR_KEYS", 1 << 10)
        yield
    jax.clear_caches()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_generated_calls_are_as_accurate_as_dense_attention(dtype: str):
    @settings(max_examples=6)
    @given(cases((dtype,)))
    def check(case: Case):
        check_case(case)

    check()


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 1, 130, 1, 3, 8), dtype="bfloat16", key_value_seq_lengths=(77, 130), poison=True),
        Case((2, 101, 131, 1, 2, 16), dtype="bfloat16", key_value_seq_lengths=(50, 131), poison=True),
        Case((2, 96, 96, 1, 2, 16), dtype="bfloat16", bias=(False, True, True, True), mask=(True, False, False, True)),
        Case((2, 96, 96, 1, 2, 16), dtype="bfloat16", magnitude=6.0),
        Case((1, 128, 128, 2, 2, 32), is_causal=True),
    ],
    ids=["decoding", "lengths", "bias and mask", "plain", "causal"],
)
def test_forms(case: Case):
    check_case(case)
