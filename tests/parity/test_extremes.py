"""Integer arguments at the edges of their types, and axes of length 0."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from jax_native_flash_attn import flash_attention, flash_attention_with_lse
from tests.support.environment import enable_x64, fast_compilation, lenient_promotion
from tests.support.grids import in_part, rotated, thinned
from tests.support.oracle import float64_oracle
from tests.support.reference import reference_attention

FAST = fast_compilation()
SHAPES = [(1, 10, 10, 2, 8), (2, 3, 7, 2, 8), (2, 7, 3, 2, 8), (1, 1, 1, 1, 4)]  # B, T, S, N, H
INT32 = np.iinfo(np.int32)
SIDES = (INT32.min, INT32.min + 1, -129, -7, -1, 0, 1, 2, 127, 128, INT32.max - 1, INT32.max)
WIDE_SIDES = (*SIDES, 2**31, 2**32, 2**40, 2**63 - 1, 2**64, -(2**31) - 1, -(2**40), -(2**63))


def qkv(shape: tuple[int, ...]) -> list[np.ndarray]:
    B, T, S, N, H = shape
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in ((B, T, N, H), (B, S, N, H), (B, S, N, H))]


def window_mask(T: int, S: int, left: int, right: int) -> np.ndarray:
    """In Python's integers, which have no edges."""
    return np.array([[t - left <= s <= t + right for s in range(S)] for t in range(T)]).reshape(1, 1, T, S)


def check_window(attention: Any, shape: tuple[int, ...], left: int, right: int, is_causal: bool) -> None:
    arrays = qkv(shape)
    mask = window_mask(*shape[1:3], left, right)
    with enable_x64():
        expected, _ = float64_oracle(*arrays, mask=mask, is_causal=is_causal)
    np.testing.assert_allclose(attention(*arrays), expected, atol=2e-6, err_msg=f"{left}, {right}")


@pytest.mark.parametrize(
    ("shape", "is_causal"), thinned([(SHAPES[0], False), (SHAPES[1], True), (SHAPES[2], False)], 2), ids=str
)
def test_static_windows(shape: tuple[int, ...], is_causal: bool):
    for left, right in itertools.product((INT32.min, -1, 2, INT32.max, 2**31, 2**64), repeat=2):
        attention = functools.partial(flash_attention, local_window_size=(left, right), is_causal=is_causal)
        check_window(attention, shape, left, right, is_causal)
    for side in WIDE_SIDES[::2]:
        attention = functools.partial(flash_attention, local_window_size=side, is_causal=is_causal)
        check_window(attention, shape, side, side, is_causal)


@pytest.mark.parametrize(
    ("dtypes", "is_causal"),
    thinned(rotated(["int32 int32", "int8 uint8", "uint32 int16", "int64 uint64", "static int32"], [False, True]), 2),
)
def test_traced_windows(dtypes: str, is_causal: bool):
    kinds = [None if name == "static" else np.dtype(name) for name in dtypes.split()]

    def sides(dtype: np.dtype | None) -> list[int]:
        edges = [] if dtype is None else [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)]
        inside = lambda x: dtype is None or edges[0] <= x <= edges[1]  # noqa: E731
        return [x for x in {*WIDE_SIDES, *edges} if inside(x)]

    for shape in SHAPES[:3]:
        with enable_x64("64" in dtypes):
            statics = () if kinds[0] is not None else (3,)
            run = jax.jit(
                lambda left, right, *x: flash_attention(*x, local_window_size=(left, right), is_causal=is_causal),
                static_argnums=statics and 0,
                compiler_options=FAST,
            )
            for left, right in itertools.product([2, 2**40] if statics else sides(kinds[0]), sides(kinds[1])):
                window = [x if kind is None else kind.type(x) for x, kind in zip((left, right), kinds, strict=True)]
                check_window(functools.partial(run, *window), shape, left, right, is_causal)


@pytest.mark.parametrize(
    ("options", "masked"),
    thinned(rotated([{}, {"is_causal": True}, {"local_window_size": (INT32.max, INT32.min)}], [False, True]), 2),
    ids=str,
)
def test_lengths(options: dict[str, Any], masked: bool):
    arrays = query, key, value = qkv((2, 5, 7, 2, 8))
    mask = np.random.default_rng(1).random((2, 1, 5, 7)) < 0.7 if masked else None
    lengths = (INT32.min, INT32.min + 1, -1, 0, 1, 5, 6, 7, 8, INT32.max - 1, INT32.max)

    @functools.partial(jax.jit, compiler_options=FAST)
    def results(mask, query_lengths, key_lengths):
        def loss(*x):
            lengths = {"query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
            out = flash_attention(*x, mask=mask, **lengths, **options)
            return (out**2).sum() / 2, out

        gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
        return out, *gradients

    for pair in itertools.product(lengths, repeat=2):
        # The batch rows have the extremes in opposite places.
        query_lengths, key_lengths = np.array(pair, np.int32), np.array(pair[::-1], np.int32)
        clipped = {
            "query_seq_lengths": np.clip(query_lengths, 0, 5), "key_value_seq_lengths": np.clip(key_lengths, 0, 7)
        }  # fmt: skip
        actual = results(mask, query_lengths, key_lengths)
        if pair[0] == pair[1]:  # the rest differs by the same arithmetic
            full = np.ones((2, 1, 5, 7), bool) if mask is None else mask
            window = {} if "local_window_size" not in options else {"mask": full & False}
            causal = {"is_causal": options.get("is_causal", False)}
            with enable_x64():
                expected, _ = float64_oracle(*arrays, **{"mask": mask, **window}, **causal, **clipped)
            np.testing.assert_allclose(actual[0], expected, atol=2e-6, err_msg=str(pair))
        for ours, theirs in zip(actual, results(mask, *clipped.values()), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=str(pair))


@in_part(0)
def test_block_sizes():
    arrays = qkv((1, 11, 13, 2, 8))
    with enable_x64():
        expected, _ = float64_oracle(*arrays, is_causal=True)

    def gradient(**options):
        run = jax.grad(lambda *x: (flash_attention(*x, is_causal=True, **options) ** 2).sum(), (0, 1, 2))
        return jax.jit(run, compiler_options=FAST)(*arrays)

    wanted = gradient()
    blocks = (1, np.int64(4), 2**31 - 1, 2**40)
    # Each beside itself and the next.
    for block_q, block_kv in [*zip(blocks, blocks, strict=True), *zip(blocks, blocks[1:] + blocks[:1], strict=True)]:
        options: dict[str, Any] = {"block_q": block_q, "block_kv": block_kv}
        attention = functools.partial(flash_attention, is_causal=True, **options)
        out = jax.jit(attention, compiler_options=FAST)(*arrays)
        np.testing.assert_allclose(out, expected, atol=2e-6, err_msg=str(options))
        if block_q == 4:
            for x, y in zip(gradient(**options), wanted, strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=str(options))


LENGTHS_OF_ZERO = [
    *itertools.chain.from_iterable(itertools.combinations("BTSH", n) for n in (1, 2, 4)), ("K",), ("N",), ("N", "K")
]  # fmt: skip
WITH_ZEROS: dict[str, Any] = {
    "plain": lambda **n: {},
    "mask and bias": lambda B, T, S, N, **_: {
        "mask": np.arange(B * T * S).reshape(B, 1, T, S) % 2 == 0, "bias": np.ones((1, N, T, S), np.float32)
    },
    "lengths": lambda B, **_: dict.fromkeys(
        ("query_seq_lengths", "key_value_seq_lengths"), np.full(B, 2, np.int32)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("zeros", "options"),
    thinned(
        [
            (zeros, options)
            for zeros in LENGTHS_OF_ZERO
            for options in WITH_ZEROS
            if options == "plain" or len(zeros) == 1
        ],
        4,
    ),
    ids=lambda x: "".join(x),
)
def test_axes_of_length_0(zeros: tuple[str, ...], options: str):
    n = {"B": 2, "T": 3, "S": 4, "N": 2, "K": 2, "H": 4} | dict.fromkeys(zeros, 0)
    query = np.ones((n["B"], n["T"], n["N"], n["H"]), np.float32)
    key, value = np.random.default_rng(0).random((2, n["B"], n["S"], n["K"], n["H"]), np.float32)
    given = {"scale": 1.0, **WITH_ZEROS[options](**n)}  # jax.nn's own scale divides by H
    if "K" in zeros:
        with pytest.raises(ValueError, match="heads"):  # jax.nn divides by zero
            flash_attention(query, key, value, **given)
        return

    def results(attention: Any) -> Any:
        call = functools.partial(attention, **given)
        gradient = jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1, 2))

        @jax.jit
        def run(*arrays: Any) -> Any:
            over_nothing = jax.vmap(call)(*(np.zeros((0, *x.shape), np.float32) for x in arrays))
            over_one = jax.vmap(call)(*(x[None] for x in arrays))
            return call(*arrays), gradient(*arrays), jax.jvp(call, arrays, arrays), over_one, over_nothing

        return run(query, key, value)

    with lenient_promotion():
        expected = results(reference_attention)
    actual = results(flash_attention)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), actual, expected)
    if zeros != ("H",):
        return
    # No dimension: what is left are bias and masks.
    out, lse = flash_attention_with_lse(query, key, value, **given, dropout_rate=0.2, dropout_rng=jax.random.key(0))
    with enable_x64():
        as_if = [np.zeros((*x.shape[:-1], 1)) for x in (query, key, value)]
        masks = {**given, "mask": given.get("mask")}
        _, expected_lse = float64_oracle(*as_if, **masks)
    assert out.shape == query.shape
    is_row = np.ones(lse.shape, bool) if options != "lengths" else np.arange(3)[None, :, None] < np.full((2, 1, 2), 2)
    np.testing.assert_allclose(np.where(is_row, lse, 0), np.where(is_row, expected_lse, 0), atol=1e-6)
