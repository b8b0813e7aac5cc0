"""Whole calls by each kernel family against the float64 oracle: value, log-sum-exp, and the gradient of every operand.

What a family does not support on this machine is skipped, with its reason (`pytest -rs`). On a GPU: `pytest -m gpu`.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from tests.support.cases import (
    IDS,
    NEW_FEATURES,
    POSITIONS,
    SHAPES,
    Case,
    feature_pairs,
    features,
    named_case,
    with_lengths,
)
from tests.support.families import EVERYWHERE, by_family, check_family


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


@by_family(CASES, every=5)
def test_calls(case: Case, family: str) -> None:
    check_family(case, family)


_DIMENSIONS = (
    ("odd", "causal", 192, 128),
    ("odd", "bias and mask", 192, 128),
    ("short", "plain", 192, 128),
    ("one head", "plain", 192, 128),
    ("odd", "dropout", 64, 128),
    ("one row, keys split", "plain", 64, 128),
    ("odd", "scale", 128, 64),
    ("many items", "causal", 16, 256),
    ("odd", "bias", 256, 16),
    ("odd", "bias", 72, 72),
    ("short", "causal", 40, 20),
    ("many items", "dropout", 8, 8),
    ("odd", "scale", 1, 250),
)


@by_family(
    {
        f"{shape}, {options}, {H}, {D}": dataclasses.replace(
            named_case(shape, options, value_dim=D), shape=(*SHAPES[shape][:-1], H)
        )
        for shape, options, H, D in _DIMENSIONS
    },
    every=2,
)
def test_values_of_another_dimension(case: Case, family: str) -> None:
    check_family(case, family)


_BIASES = {str(full): full for full in itertools.product((False, True), repeat=4)}


@by_family(
    {name: named_case("odd", "plain", bias=full, mask=(True, False, False, True)) for name, full in _BIASES.items()},
    every=3,
)
def test_gradient_of_bias_in_each_shape(case: Case, family: str) -> None:
    check_family(case, family)


@by_family(
    {
        f"{scale}, {mask}": named_case("odd", mask, bias=(False, True, True, True), scale=scale)
        for scale in (-0.125, 0.3, 3.7, -1e-13, 1e-20)
        for mask in ("plain", "bias and mask")
    },
    every=3,
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
    },
    every=3,
)
def test_decoding(case: Case, family: str) -> None:
    check_family(case, family)


# ---- segments, positions, offsets, soft cap, sinks, value dimension, shared dropout, largest logits


def _with(shape: str, dtype: str, *names: str, **changes: Any) -> Case:
    return Case(SHAPES[shape], **{"dtype": dtype, **features(*names), **changes})


def _in_dtype_of(family: str, case: Case) -> Case:
    """A float32 case, in bfloat16 for kernels of GPUs, which have gradients of 16 bits alone."""
    return case if family == EVERYWHERE else dataclasses.replace(case, dtype="bfloat16")


_BESIDE = ("window", "lengths", "bias", "mask")


# What a GPU runs is large; a CPU has the small ones.
@by_family(
    {
        f"{name}, {shape}, {dtype}": _with(shape, dtype, name)
        for name in NEW_FEATURES
        for shape, dtype in (("odd", "bfloat16"), ("odd", "float16"), ("small", "bfloat16"))
    }
    | {f"{name} and much else": _with("small", "float32", name, *_BESIDE) for name in NEW_FEATURES},
    every=2,
)
def test_each_feature(case: Case, family: str) -> None:
    check_family(_in_dtype_of(family, case) if case.dtype == "float32" else case, family)


@by_family(
    {
        f"{first}, {second}, {shape}": _with(shape, dtype, first, second)
        for first, second in feature_pairs()
        for shape, dtype in (("odd", "bfloat16"), ("small", "float32"))
        # `run_generated --pairs` has those of one feature and what `jax.nn` has too.
        if shape == "odd" or second in (*NEW_FEATURES, "vmap")
    },
    every=7,
)
def test_each_pair_of_features(case: Case, family: str) -> None:
    check_family(case, family)


_TRACED = frozenset({"ids", "positions", "offset", "lengths", "window"})
_SELF = Case((2, 67, 67, 2, 2, 16), is_causal=True)
_ORDERS = {
    **{f"{kind} ids": {"segment_ids": kind} for kind in IDS},
    **{f"{kind} positions": {"query_positions": kind, "key_value_positions": kind} for kind in POSITIONS},
    "restarting positions of sorted ids": {
        "segment_ids": "padding behind",
        "query_positions": "restarting",
        "key_value_positions": "restarting",
    },
    "permuted queries": {"query_positions": "permuted"},
    "permuted keys": {"key_value_positions": "permuted"},
    "window of positions": {
        "query_positions": "zig-zag",
        "key_value_positions": "zig-zag",
        "local_window_size": (9, 4),
    },
    "traced window, ends": {
        "query_positions": "ends",
        "local_window_size": (2**31 - 1, 5),
        "key_value_positions": "ends",
    },
    **{f"offset {x}": {"query_offset": x} for x in (-9, 200, 2**31 - 1, -(2**31) + 1, (7, -20), (2**31 - 1, -(2**31)))},
    "window and offset": {"local_window_size": (7, 3), "query_offset": 30},
    "keys behind an offset": {"query_offset": 5, "key_value_positions": "sorted"},
}
_INTEGERS = {
    "ids, int8": {"segment_ids": "largest", "integer_dtype": "int8"},
    "ids, int64": {"segment_ids": "largest", "integer_dtype": "int64", "x64": True},
    "ids, uint32": {"segment_ids": "shuffled", "integer_dtype": "uint32"},
    "positions, uint64": {"query_positions": "sorted", "integer_dtype": "uint64", "x64": True},
    "offset, int16": {"query_offset": (5, -3), "integer_dtype": "int16"},
    "lengths, uint8": {"query_seq_lengths": (60, 70), "key_value_seq_lengths": (3, 200), "integer_dtype": "uint8"},
}


@by_family(
    {
        f"{name}, {'traced' if is_traced else 'static'}": dataclasses.replace(
            _SELF, traced=_TRACED if is_traced else frozenset(), **changes
        )
        for i, (name, changes) in enumerate((_ORDERS | _INTEGERS).items())
        for is_traced in ((True, False) if name in ("offset -9", "offset (7, -20)") else (i % 2 > 0,))
    },
    every=3,
)
def test_orders_of_tokens(case: Case, family: str) -> None:
    """Which tiles are skipped is decided by ids and positions: pure JAX has several here."""
    case = dataclasses.replace(case, block_q=16, block_kv=16) if family == EVERYWHERE else case
    check_family(_in_dtype_of(family, case), family)


_EDGE = features("soft cap", "sinks", "value dimension", "largest logits")


@by_family(
    {
        f"{shape}, {name}": Case(shape, **{**_EDGE, **features(name), **changes})
        for shape in ((2, 1, 1, 1, 2, 16), (2, 1, 40, 1, 2, 16), (2, 40, 1, 1, 2, 16))
        for name, changes in (
            ("shuffled segments", {"with_lse": True}),
            ("positions", {"with_lse": True}),
            ("offset", {"query_offset": -1}),
        )
    },
    every=2,
)
def test_one_row_or_key(case: Case, family: str) -> None:
    check_family(_in_dtype_of(family, case), family)
