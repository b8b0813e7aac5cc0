"""Mask geometry against dense boolean masks: intervals of rows, dead and padded rows, classes of tiles."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._semantics import join_masks, masks
from jax_native_flash_attn._semantics.positions import Order
from tests.support.grids import in_part

pytestmark = in_part(0)

LENGTHS = [(1, 1), (1, 9), (9, 1), (5, 7), (7, 5), (6, 6)]  # T, S
SIDES = (None, -8, -6, -1, 0, 2, 7, 9)


def band_as_array(band: masks.Band, T: int, S: int) -> np.ndarray:
    """(T, S) bool, by the definition of a band."""
    offset = np.arange(S) - np.arange(T)[:, None]
    allowed = np.ones((T, S), bool)
    if band.lower is not None:
        allowed &= offset >= band.lower
    if band.upper is not None:
        allowed &= offset <= band.upper
    return allowed


def intervals_as_array(start: Any, stop: Any, S: int) -> np.ndarray:
    """(..., T, S) bool of two (..., T)."""
    columns = np.arange(S)
    return (columns >= np.asarray(start)[..., None]) & (columns < np.asarray(stop)[..., None])


@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_intervals_of_a_band_are_its_keys(T: int, S: int):
    for lower, upper in itertools.product(SIDES, repeat=2):
        band = masks.Band(lower, upper)
        start, stop = band.intervals(T, S)
        assert start.dtype == stop.dtype == np.int32
        assert min(start.min(), stop.min()) >= 0
        assert max(start.max(), stop.max()) <= S
        np.testing.assert_array_equal(intervals_as_array(start, stop, S), band_as_array(band, T, S), str(band))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_the_band_of_a_call_is_the_intersection_of_its_masks(T: int, S: int, is_causal: bool):
    huge = 2**40
    windows = [None, *itertools.product((-9, -2, 0, 3, huge), repeat=2), (-huge, -huge)]
    for window, also in itertools.product(windows, (masks.Band(), masks.Band(-2, 3), masks.Band(None, -1))):
        expected = band_as_array(also, T, S)
        if window is not None:
            expected &= band_as_array(masks.Band(-window[0], window[1]), T, S)
        if is_causal:
            expected &= band_as_array(masks.Band(None, 0), T, S)
        band = masks.make_band(T, S, is_causal=is_causal, window=window, also=also)
        np.testing.assert_array_equal(band_as_array(band, T, S), expected, str((window, also)))
        for bound, cuts in ((band.lower, masks.Band(band.lower, None)), (band.upper, masks.Band(None, band.upper))):
            # A bound that is there cuts something off, and is no further out than the lengths.
            assert bound is None or (not band_as_array(cuts, T, S).all() and -T <= bound <= S), (window, also)


# Of a boolean mask: which of its axes (B, N, T, S) are full.
ALLOWED = {
    "no mask": None,
    "mask of scores": (True, True, True, True),
    "mask of all": (False, False, True, True),
    "mask of keys": (True, False, False, True),
    "mask of rows": (False, True, True, False),
}


def combinations(rng: np.random.Generator, B: int, T: int, S: int) -> Iterator[dict[str, Any]]:
    """Arguments of `make_mask` but for `allowed`, as NumPy arrays, in all combinations."""

    def window() -> tuple[int, int]:
        left, right = (int(x) for x in rng.integers(-S // 2, S + 2, 2))
        return left, right

    for is_causal, has_window, *has_traced in itertools.product((False, True), repeat=5):
        choices = {
            "traced_window": np.array(window(), np.int32),
            "query_lengths": rng.integers(0, T + 1, B).astype(np.int32),
            "key_value_lengths": rng.integers(0, S + 1, B).astype(np.int32),
        }
        traced = {name: x if has else None for (name, x), has in zip(choices.items(), has_traced, strict=True)}
        yield {"is_causal": is_causal, "static_window": window() if has_window else None, **traced}


def dense_mask(arguments: dict[str, Any], B: int, N: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """What each row may attend, (B, N, T, S), and which rows are padding, (B, N, T)."""
    rows, columns = np.arange(T)[:, None], np.arange(S)
    allowed = np.ones((B, N, T, S), bool)
    if arguments["is_causal"]:
        allowed &= columns <= rows
    for name in ("static_window", "traced_window"):
        if arguments[name] is not None:
            left, right = arguments[name]
            allowed &= (columns >= rows - left) & (columns <= rows + right)
    if arguments["key_value_lengths"] is not None:
        allowed &= columns < arguments["key_value_lengths"][:, None, None, None]
    if arguments["allowed"] is not None:
        allowed &= arguments["allowed"]
    lengths = arguments["query_lengths"]
    padded = np.zeros((B, 1, T), bool) if lengths is None else np.arange(T) >= lengths[:, None, None]
    return allowed, np.broadcast_to(padded, (B, N, T))


@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize(("T", "S"), [(5, 7), (6, 4)])
def test_operands_of_a_mask_are_the_dense_mask(T: int, S: int, kind: str):
    rng = np.random.default_rng(0)
    B, N, axes = 2, 3, ALLOWED[kind]
    for arguments in combinations(rng, B, T, S):
        allowed = None
        if axes is not None:
            shape = [n if is_full else 1 for n, is_full in zip((B, N, T, S), axes, strict=True)]
            allowed = rng.random(shape) < rng.choice((0.1, 0.5, 0.9))
        check_mask({**arguments, "allowed": allowed}, B, N, T, S)


def check_mask(arguments: dict[str, Any], B: int, N: int, T: int, S: int) -> None:
    expected, padded = dense_mask(arguments, B, N, T, S)
    traced = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    band, mask = join_masks.make_mask(T, S, **traced)
    dead = np.zeros((1, 1, 1), bool) if mask.dead is None else np.asarray(mask.dead)
    dead = np.broadcast_to(dead, (B, N, T))
    np.testing.assert_array_equal(dead, ~expected.any(-1) & ~padded)
    if mask.key_start is None:
        assert mask.key_stop is None
        start, stop = band.intervals(T, S)
    else:
        start, stop = np.asarray(mask.key_start), np.asarray(mask.key_stop)
    found = np.broadcast_to(intervals_as_array(start, stop, S), (B, N, T, S))
    # Padded rows visit nothing; dead ones attend all keys.
    assert not found[padded].any()
    if mask.key_start is not None:
        assert (np.broadcast_to(start, padded.shape)[padded] == S).all()
        assert (np.broadcast_to(stop, padded.shape)[padded] == 0).all()
    assert found[dead].all()
    if mask.allowed is not None:
        found = found & np.asarray(mask.allowed)
    live = ~padded & ~dead
    np.testing.assert_array_equal(found[live], expected[live])
    if band.is_complete:
        lengths = arguments["key_value_lengths"][:, None, None]
        start, stop = band.intervals(T, S)
        cut = intervals_as_array(np.minimum(start, lengths), np.minimum(stop, lengths), S)
        np.testing.assert_array_equal(np.broadcast_to(cut, expected.shape), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"key_value_lengths": 2}, True),
        ({"key_value_lengths": 2, "is_causal": True}, True),
        ({"is_causal": True}, False),
        ({"key_value_lengths": 2, "query_lengths": 2}, False),
        ({"key_value_lengths": 2, "static_window": (3, 0)}, False),
        ({"key_value_lengths": 2, "static_window": (10**6, -2)}, False),
        ({"key_value_lengths": 2, "traced_window": 2}, False),
        ({"key_value_lengths": 2, "allowed": (1, 1, 5, 7)}, False),
    ],
)
def test_kernels_compute_intervals_from_lengths_of_keys_alone(given: dict[str, Any], expected: bool) -> None:
    names = ("static_window", "traced_window", "query_lengths", "key_value_lengths", "allowed")
    arguments = {name: given.get(name) for name in names}
    for name in ("traced_window", "query_lengths", "key_value_lengths"):
        arguments[name] = None if arguments[name] is None else jnp.ones(2, jnp.int32)
    arguments["allowed"] = None if arguments["allowed"] is None else jnp.ones((1, 1, 5, 7), bool)
    band, _ = join_masks.make_mask(5, 7, is_causal=given.get("is_causal", False), **arguments)
    assert band.is_complete == expected


_LARGEST = 2**31 - 1


@pytest.mark.parametrize("has_dead_rows", [True, False])
@pytest.mark.parametrize("lengths", [None, (3, 0)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [None, (2, 1), (-1, 3), (0, 10**9), (_LARGEST, 0), (_LARGEST, _LARGEST)])
def test_numbers_say_what_intervals_of_moved_rows_say(
    window: tuple[int, int] | None, is_causal: bool, lengths: tuple[int, int] | None, has_dead_rows: bool
) -> None:
    T, S, rows = 5, 7, np.arange(5)
    key_lengths = None if lengths is None else jnp.array(lengths)
    for offset in ((0, 3), (-2, -9), (40, -(2**31)), (_LARGEST, 1 - _LARGEST)):
        band, mask = join_masks.make_mask(
            T,
            S,
            is_causal=is_causal,
            static_window=window,
            traced_window=None,
            query_lengths=None,
            key_value_lengths=key_lengths,
            allowed=None,
            order=Order(query_offset=jnp.array(offset)),
            has_dead_rows=has_dead_rows,
        )
        has_bounds = is_causal or window is not None
        is_empty = is_causal and window is not None and window[0] < 0
        assert (mask.shift is not None) == (has_bounds and not is_empty)
        if mask.shift is None:
            continue
        assert band.is_complete
        for b in range(2):
            lower, upper = (None if x is None else int(x) for x in band.moved(mask.shift[b], T, S))
            start, stop = masks.Band(lower, upper).interval(rows, S if lengths is None else lengths[b])
            dead = start >= stop
            if has_dead_rows:
                assert mask.dead is not None
                np.testing.assert_array_equal(mask.dead[b, 0], dead)
                start, stop = np.where(dead, 0, start), np.where(dead, S, stop)
            else:
                assert mask.dead is None
                start, stop = np.where(dead, S, start), np.where(dead, 0, stop)
            assert mask.key_start is not None
            assert mask.key_stop is not None
            np.testing.assert_array_equal(mask.key_start[b, 0], start, f"{offset}")
            np.testing.assert_array_equal(mask.key_stop[b, 0], stop, f"{offset}")


@pytest.mark.parametrize("name", ["query_lengths", "allowed", "traced_window", "static_band", "ids", "positions"])
def test_other_masks_beside_an_offset_need_intervals(name: str) -> None:
    ones, order = jnp.ones((1, 5), jnp.int32), Order(query_offset=jnp.array([1]))
    arguments: dict[str, Any] = {
        "query_lengths": jnp.array([3]),
        "allowed": jnp.ones((1, 1, 5, 5), bool),
        "traced_window": jnp.array([1, 1]),
        "static_band": masks.Band(None, 2),
        "ids": order._replace(query_ids=ones, key_ids=ones),
        "positions": order._replace(key_positions=ones),
    }
    given: dict[str, Any] = {"order" if name in ("ids", "positions") else name: arguments[name]}
    names = "static_window", "traced_window", "query_lengths", "key_value_lengths", "allowed"
    given = {**dict.fromkeys(names), "order": order, **given}
    band, mask = join_masks.make_mask(5, 5, is_causal=True, **given)
    assert mask.shift is None
    assert not band.is_complete
    assert mask.key_start is not None


@pytest.mark.parametrize("block_kv", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_classes_of_tiles(block_kv: int, xp: Any):
    """Tiles outside of a range are empty, and full ones have only allowed scores; the classes are as wide as may be."""
    rng = np.random.default_rng(block_kv)
    for _ in range(50 if xp is np else 5):
        S, rows = int(rng.integers(1, 17)), 4
        start, stop = np.sort(rng.integers(0, S + 1, (2, rows)), axis=0).astype(np.int32)
        if rng.random() < 0.5:  # long intervals, so that some tiles are full
            start, stop = start // 4, S - (S - stop) // 4
        is_empty = (stop <= start) | (rng.random(rows) < rng.choice((0.0, 0.5)))
        start, stop = np.where(is_empty, S, start), np.where(is_empty, 0, stop)  # the form of padded rows
        count = -(-S // block_kv)
        found = masks.column_range(xp.asarray(start), xp.asarray(stop), block_kv, count, xp)
        assert all(x.dtype == np.int32 for x in found)
        first, full_first, full_stop, end = (int(x) for x in found)
        assert 0 <= first <= full_first <= full_stop <= end <= count
        allowed = intervals_as_array(start, stop, S)
        tiles = [allowed[:, j * block_kv : (j + 1) * block_kv] for j in range(count)]
        context = f"{start} {stop} {found}"
        for j, tile in enumerate(tiles):
            if not first <= j < end:
                assert not tile.any(), context
            if full_first <= j < full_stop:
                assert tile.all(), context
                assert tile.shape[1] == block_kv, context
        if not is_empty.any():
            # No tile at an end of the range is empty, nor is one that could be full left to the edges, but for the last
            # one of a length that the block does not divide.
            assert tiles[first].any(), context
            assert tiles[end - 1].any(), context
            whole = [j for j, tile in enumerate(tiles) if tile.all() and tile.shape[1] == block_kv]
            assert whole == list(range(full_first, full_stop)), context
