"""The forms that the kernels take on a CPU by size and processor, each against the float64 oracle."""

import pytest

from jax_native_flash_attn import _numerics
from tests.cases import FAST_COMPILATION, Case, check_case

# (B, T, S, K, G, H): of many and of few scores for their size, and one that several tiles cover.
SHAPES = {
    "many scores": (2, 96, 96, 2, 2, 16),
    "few scores": (2, 31, 33, 2, 3, 64),
    "one key": (3, 61, 1, 1, 2, 8),
    "several tiles": (3, 139, 139, 1, 1, 8),
}
OPTIONS = {
    "plain": Case(SHAPES["many scores"]),
    "causal": Case(SHAPES["many scores"], is_causal=True),
    "bias, mask and lengths": Case(
        SHAPES["many scores"],
        bias=(False, True, True, True),
        mask=(True, False, True, True),
        mask_density=0.9,
        key_value_seq_lengths=(20, 3, 1),
        poison=True,
    ),
    "lengths": Case(SHAPES["many scores"], key_value_seq_lengths=(20, 3, 1)),
    "dropout": Case(SHAPES["many scores"], dropout_rate=0.3),
}


@pytest.mark.parametrize("has_hardware", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_products_and_shapes(
    options: str, shape: str, has_hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numerics, "_cpu_multiplies_bfloat16", lambda: has_hardware)
    case = OPTIONS[options]
    B = SHAPES[shape][0]
    lengths = case.key_value_seq_lengths and case.key_value_seq_lengths[:B]
    blocks = {"block_q": 48, "block_kv": 48} if shape == "several tiles" else {}
    changes = {"shape": SHAPES[shape], "dtype": "bfloat16", "key_value_seq_lengths": lengths, **blocks}
    check_case(Case(**{**case.__dict__, **changes}), compiler_options=FAST_COMPILATION)
