"""Which tiles the Hopper kernels visit, and which need a mask, against a dense mask: plain numbers, no kernel runs."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._semantics.masks import Band, ColumnRange, MaskOperands
from tests.support.grids import thinned
from tests.support.targets import needs_backend, why_no_backend

if why_no_backend() is None:
    from jax_native_flash_attn._kernels.hopper.scheduler import Item

pytestmark = needs_backend

T, S, ROWS, KEYS = 150, 190, 64, 48
BANDS = {"all": Band(), "causal": Band(None, 0), "window": Band(-70, 30), "wide": Band(-100, None)}
HEAD = (0, 0)


def dense(band: Band, length: int | None) -> np.ndarray:
    start, stop = band.intervals(T, S)
    columns = np.arange(S)
    mask = (columns >= start[:, None]) & (columns < stop[:, None])
    return mask if length is None else mask & (columns < length)


def tiles_of(mask: np.ndarray, block: int, rows: int = ROWS, keys: int = KEYS) -> list[np.ndarray]:
    """The dense mask of each tile of keys of a block of rows."""
    some = mask[block * rows : (block + 1) * rows]
    return [some[:, k : k + keys] for k in range(0, S, keys)]


def make_intervals(band: Band, length: int | None, *, is_traced: bool):
    from jax_native_flash_attn._kernels.hopper.device.masks import Intervals
    from jax_native_flash_attn._kernels.hopper.host.intervals import query_tiles, row_intervals

    key_length = None if length is None else jnp.array([length])
    start, stop = (jnp.asarray(x)[None, None] for x in band.intervals(T, S))
    operands = MaskOperands(start, stop if length is None else jnp.minimum(stop, length), None, None, key_length)
    is_cut = length is not None and not is_traced
    mask = operands if is_traced or is_cut else MaskOperands()
    rows = row_intervals(mask, T, S, ROWS, KEYS) if is_traced else None
    tiles = query_tiles(mask, T, S, ROWS, KEYS, (1,), is_computed=not is_traced)
    return Intervals(band, T, S, KEYS, rows, key_length, is_cut, query_tiles=tiles)


# A length cuts off a band without a lower bound; other bands are traced then.
CASES = [
    (name, length, is_traced)
    for name, band in BANDS.items()
    for length in (None, 1, 100, 144, 300)
    for is_traced in (False, True)
    if length is None or band.lower is None
]
of_cases = pytest.mark.parametrize(("name", "length", "is_traced"), thinned(CASES, 4, 1))


@of_cases
def test_tiles_of_a_block_of_rows(name: str, length: int | None, is_traced: bool) -> None:
    intervals, mask = make_intervals(BANDS[name], length, is_traced=is_traced), dense(BANDS[name], length)
    for block in range(-(-T // ROWS)):
        first, full_first, full_stop, stop = (int(x) for x in intervals.ranges(HEAD, block, ROWS))
        tiles = tiles_of(mask, block)
        occupied = [k for k, tile in enumerate(tiles) if tile.any()]
        assert list(range(first, stop)) == occupied
        # A block that is not whole ends with rows without any key if intervals are traced.
        has_all_rows = (block + 1) * ROWS <= T
        full = [k for k, tile in enumerate(tiles) if tile.all() and tile.shape[1] == KEYS]
        assert list(range(full_first, full_stop)) == (full if has_all_rows or not is_traced else [])
        assert stop - full_stop <= intervals.right_tiles(ROWS)
        assert intervals.has_left_edge or full_first == first


@of_cases
def test_query_tiles_of_a_block_of_keys(name: str, length: int | None, is_traced: bool) -> None:
    intervals, mask = make_intervals(BANDS[name], length, is_traced=is_traced), dense(BANDS[name], length)
    for block in range(-(-S // KEYS)):
        first, stop = (int(x) for x in intervals.query_tiles_of(HEAD[:-1], block, ROWS, KEYS))
        tiles = [tiles_of(mask, row)[block] for row in range(-(-T // ROWS))]
        occupied = [row for row, tile in enumerate(tiles) if tile.any()]
        assert list(range(first, stop)) == occupied
        for row in occupied:
            is_edge = bool(intervals.is_query_edge(HEAD, row * ROWS, block, ROWS, KEYS))
            assert is_edge or tiles[row].all(), (block, row)


def test_dead_rows_visit_all_tiles_or_one() -> None:
    intervals = make_intervals(Band(None, 0), 0, is_traced=False)
    first, _, _, stop = intervals.ranges(HEAD, 0, ROWS)
    assert (int(first), int(stop)) == (0, -(-S // KEYS))
    first, _, _, stop = replace(intervals, skips_dead_rows=True).ranges(HEAD, 0, ROWS)
    assert int(stop - first) == 1


SHIFTS = (-(2**31), -400, -150, -70, -1, 0, 1, 37, 128, 400, 2**31 - 1)
MOVED = {"causal": Band(None, 0), "window": Band(-70, 30), "behind": Band(10, 60), "left": Band(-20, None)}
MOVED["extremes"] = Band(-(2**31) + 1, 2**31 - 1)


def moved_mask(band: Band, shift: int, length: int | None, group: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What each row may attend, (T, S), and which rows have no key."""
    position, columns = (np.arange(T, dtype=np.int64) // group + shift)[:, None], np.arange(S)
    mask = np.broadcast_to(columns < (S if length is None else length), (T, S)).copy()
    mask &= True if band.lower is None else columns >= position + band.lower
    mask &= True if band.upper is None else columns <= position + band.upper
    return mask, ~mask.any(1)


def moved_intervals(band: Band, shift: int, length: int | None, *, attends: bool = True, group: int = 1):
    """Of rows moved by a shift; `attends`: those without a key attend all."""
    from jax_native_flash_attn._kernels.hopper.device.moved_masks import MovedIntervals
    from jax_native_flash_attn._kernels.hopper.host.intervals import query_tiles

    band = replace(band, is_complete=True, rows_per_position=group)
    key_length = None if length is None else jnp.array([length])
    operands = MaskOperands(key_value_length=key_length, shift=jnp.array([shift]))
    tiles = query_tiles(operands, T, S, ROWS, KEYS, (1,), is_computed=True)
    assert tiles is None
    return MovedIntervals(
        band,
        T,
        S,
        KEYS,
        None,
        key_length,
        length is not None,
        shift=jnp.int32(shift) if attends else jnp.array([shift]),  # of all batch rows, or of each
        attends_without_key=attends,
    )


def of_moved(function):
    """Cases of a test of moved rows."""
    cases = itertools.product((True, False), MOVED, (None, 0, 100))
    return pytest.mark.parametrize(("attends", "name", "length"), thinned(cases, 4))(function)


@of_moved
@pytest.mark.parametrize("group", [1, 3])
def test_tiles_of_moved_rows(name: str, length: int | None, attends: bool, group: int) -> None:
    for shift in SHIFTS:
        mask, dead = moved_mask(MOVED[name], shift, length, group)
        intervals = moved_intervals(MOVED[name], shift, length, attends=attends, group=group)
        for block in range(-(-T // ROWS)):
            first, full_first, full_stop, stop = (int(x) for x in intervals.ranges(HEAD, block, ROWS))
            tiles = tiles_of(mask, block)
            occupied = [k for k, tile in enumerate(tiles) if tile.any()]
            full = [k for k, tile in enumerate(tiles) if tile.all() and tile.shape[1] == KEYS]
            if dead[block * ROWS :][:ROWS].any() and attends:
                occupied, full = list(range(len(tiles))), []
            if occupied:
                assert list(range(first, stop)) == occupied, (shift, block)
            assert stop - first == max(len(occupied), 1), (shift, block)
            assert list(range(full_first, full_stop)) == full, (shift, block)
            assert stop - full_stop <= intervals.right_tiles(ROWS)
            assert intervals.has_left_edge or full_first in (first, full_stop)
            # Tiles that need a mask come first, and so last ones where no others can need one.
            ranges = ColumnRange(first, full_first, full_stop, stop)
            item = Item(0, HEAD, block, 0, ranges, False, edges_first=intervals.has_left_edge)
            visited = [int(item.tile(i)) for i in range(item.num_tiles)]
            assert sorted(visited[: item.num_edges]) == sorted(set(range(first, stop)) - set(full))


@of_moved
def test_query_tiles_of_moved_rows(name: str, length: int | None, attends: bool) -> None:
    for shift in SHIFTS:
        mask, dead = moved_mask(MOVED[name], shift, length)
        intervals = moved_intervals(MOVED[name], shift, length, attends=attends)
        for block in range(-(-S // KEYS)):
            first, stop = (int(x) for x in intervals.query_tiles_of(HEAD[:-1], block, ROWS, KEYS))
            tiles = [tiles_of(mask, row)[block] for row in range(-(-T // ROWS))]
            occupied = [row for row, tile in enumerate(tiles) if tile.any()]
            if dead.any() and attends:
                assert (first, stop) == (0, len(tiles)), (shift, block)
            elif occupied:
                assert list(range(first, stop)) == occupied, (shift, block)
            else:
                assert stop - first <= 1  # for rows past the last
            for row in range(first, stop):
                is_edge = bool(intervals.is_query_edge(HEAD, row * ROWS, block, ROWS, KEYS))
                assert is_edge or tiles[row].all(), (shift, block, row)


@of_moved
@pytest.mark.parametrize(("q_axis", "group"), [(0, 1), (1, 1), (0, 3)])
def test_elements_of_a_tile_of_moved_rows(
    name: str, length: int | None, attends: bool, q_axis: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_native_flash_attn._kernels.hopper.device import moved_masks

    monkeypatch.setattr(moved_masks, "iota", lambda shape, axis: np.indices(shape)[axis].astype(np.int32))
    vectors = SimpleNamespace(broadcasted_iota=lambda dtype, shape, axis, layout: np.arange(*shape, dtype=dtype))
    monkeypatch.setattr(moved_masks, "plgpu", vectors)
    for shift in SHIFTS:
        mask, dead = moved_mask(MOVED[name], shift, length, group)
        intervals = moved_intervals(MOVED[name], shift, length, attends=attends, group=group)
        for row, column in ((0, 0), (ROWS, KEYS), (ROWS, S - S % KEYS)):
            shape = (ROWS, KEYS)[:: -1 if q_axis else 1]
            allowed = np.asarray(intervals.allowed(None, HEAD, row, column, shape, q_axis))
            found_dead = intervals.dead(None, HEAD, row, shape, q_axis)
            allowed = allowed.T if q_axis else allowed
            inside = mask[row : row + ROWS, column : column + KEYS]
            here = dead[row : row + ROWS]
            if attends:
                found_dead = np.asarray(found_dead)
                found_dead = found_dead.T if q_axis else found_dead
                np.testing.assert_array_equal(found_dead, np.broadcast_to(here[:, None], (ROWS, KEYS)))
                inside = inside | here[:, None]
                np.testing.assert_array_equal(intervals.have_keys(HEAD, row, len(here)), ~here)
            else:
                assert found_dead is None
                assert intervals.have_keys(HEAD, row, len(here)) is None
            np.testing.assert_array_equal(allowed[:, : inside.shape[1]], inside)
            assert not allowed[:, inside.shape[1] :].any()


def test_dead_moved_rows_may_skip_their_tiles() -> None:
    intervals = moved_intervals(Band(None, 0), -100, None, attends=False)
    assert [int(x) for x in intervals.ranges(HEAD, 0, ROWS)] == [0, 0, 0, 1]
    assert [int(x) for x in intervals.ranges(HEAD, 1, ROWS)] == [0, 0, 0, 1]
    assert intervals.dead(None, HEAD, 0, (ROWS, KEYS), 0) is None


def test_ids_and_positions_of_one_row_reach_all_heads_of_a_group() -> None:
    """Heads become rows where rows are few, and what all of them share keeps a row axis of size 1."""
    from jax_native_flash_attn._kernels.hopper.host.operands import _elements

    row, keys = jnp.full((2, 1, 1, 1), 3), jnp.zeros((2, 1, 1, S), int)
    mask = MaskOperands(
        query_ids=row,
        key_ids=keys,
        lowest_position=row,
        highest_position=row,
        key_positions=keys,
        is_exact=jnp.zeros((2, 1, 1), bool),
    )
    elements = _elements(mask, 4, S, ROWS, KEYS)
    for name in ("query_ids", "lowest_position", "highest_position"):
        x = getattr(elements, name)
        assert x.shape == (2, 1, ROWS)
        assert (x[..., :4] == 3).all()
