"""Whole calls by each kernel family against the float64 oracle: value, log-sum-exp, and the gradient of every operand.

What a family does not support on this machine is skipped, with its reason (`pytest -rs`). On a GPU: `pytest -m gpu`.
"""

import dataclasses
import itertools
from collections.abc import Iterable

from tests.support.cases import SHAPES, Case, named_case, with_lengths
from tests.support.families import by_family, check_family


def _grid(
    shapes: Iterable[str], options: Iterable[str], lengths: Iterable[str] = ("",), dtype: str | None = None
) -> dict[str, Case]:
    cases = {}
    for shape, option, kind in itertools.product(shapes, options, lengths):
        case = named_case(shape, option) if dtype is None else named_case(shape, option, dtype=dtype)
        case = with_lengths(case, of_queries=kind != "lengths of keys") if kind else case
        cases[", ".join(filter(None, (shape, option, kind, dtype)))] = case
    return cases


_SPLIT = ["one row, keys split", "rows, keys split"]
_ITEMS = ["many items", *_SPLIT]
_LENGTHS = ["", "lengths of keys", "lengths of both"]
_OPTIONS = [
    "plain", "causal", "window", "traced window", "scale", "no scale", "bias", "bias of all", "bias of keys",
    "bias of rows", "bias of one", "bias float32", "mask", "sparse mask", "mask of keys", "mask of rows", "empty mask",
    "bias and mask", "dropout", "causal dropout", "float16", "x64", "vmap",
]  # fmt: skip

# By name, so that what two lines have in common is one case.
CASES: dict[str, Case] = {
    **_grid([name for name in SHAPES if not name.startswith("decoding")], ["plain", "causal", "window"]),
    **_grid(["odd", "wide"], _OPTIONS),
    **_grid(_ITEMS, ["bias", "bias of all", "mask", "mask of keys", "sparse mask", "traced window"]),
    **_grid(
        ["odd", "short", "wide", *_ITEMS],
        ["plain", "causal", "window", "mask", "bias", "bias of keys", "dropout", "scale"],
        ["lengths of both"],
    ),
    **_grid(
        ["odd", "eighty", "wide", *_ITEMS],
        ["plain", "causal", "bias", "dropout", "scale"],
        ["lengths of keys"],
    ),
    **_grid(["odd", "prime", "eighty", "narrow", "many items", _SPLIT[1]], ["causal"], _LENGTHS, "float32"),
    **_grid(
        ["prime"],
        ["plain", "traced window", "scale", "bias float32", "mask", "mask of keys", "dropout"],
        _LENGTHS,
        "float32",
    ),
}


@by_family(CASES)
def test_calls(case: Case, family: str) -> None:
    check_family(case, family)


_BIASES = {str(full): full for full in itertools.product((False, True), repeat=4)}


@by_family(
    {name: named_case("odd", "plain", bias=full, mask=(True, False, False, True)) for name, full in _BIASES.items()}
)
def test_gradient_of_bias_in_each_shape(case: Case, family: str) -> None:
    check_family(case, family)


@by_family(
    {
        f"{scale}, {mask}": named_case("odd", mask, bias=(False, True, True, True), scale=scale)
        for scale in (-0.125, 0.3, 3.7, -1e-13, 1e-20)
        for mask in ("plain", "bias and mask")
    }
)
def test_any_scale_beside_a_bias(case: Case, family: str) -> None:
    """Products of Hopper kernels start with the bias, divided by what is left of the scale."""
    check_family(case, family)


# One or few query rows against many keys: products for all heads at once, in one tile or (block_kv) in several.
_DECODING = Case(SHAPES["decoding"])
_DECODINGS = {
    "plain": _DECODING,
    "tiles": dataclasses.replace(_DECODING, block_kv=256),
    "lengths": dataclasses.replace(_DECODING, key_value_seq_lengths=(1100, 7), traced=frozenset({"lengths"})),
    "lengths, tiles": dataclasses.replace(_DECODING, key_value_seq_lengths=(1100, 300), block_kv=256),
    "padding": dataclasses.replace(_DECODING, key_value_seq_lengths=(900, 7), poison=True),
    "mask": dataclasses.replace(_DECODING, mask=(True, True, False, True), mask_density=0.3),
    "no keys": dataclasses.replace(_DECODING, mask=(True, True, False, True), mask_density=0.0),
    "bias": dataclasses.replace(_DECODING, bias=(False, True, True, True)),
    "dropout": dataclasses.replace(_DECODING, dropout_rate=0.3),
}


@by_family(
    {
        **{
            f"{options}, {dtype}": dataclasses.replace(case, dtype=dtype)
            for options, case in _DECODINGS.items()
            for dtype in ("float32", "bfloat16", "float16", "float64")
            if dtype in ("float32", "bfloat16") or options in ("plain", "mask")
        },
        **{
            shape: named_case(shape, "plain", dtype="float32", key_value_seq_lengths=(1100, 900, 5)[: SHAPES[shape][0]])
            for shape in ("decoding, three rows", "decoding, one head", "decoding, no groups")
        },
    }
)
def test_decoding(case: Case, family: str) -> None:
    check_family(case, family)
