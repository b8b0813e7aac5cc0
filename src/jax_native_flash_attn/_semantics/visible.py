"""Which rows have a key, and, where ids and positions decide, between which keys these lie. No T x S array is made."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .masks import DEAD, ROWS_OF_BOUNDS, Band, MaskOperands, rows_in_blocks
from .sizes import static_size


def rows_with_a_key(start: jax.Array, stop: jax.Array, allowed: jax.Array, *, is_banded: bool) -> jax.Array:
    """Whether a row's interval holds an allowed key; (batch..., N, T), axes of size 1 where nothing varies."""
    if not is_banded:
        # Kernels for GPUs ask for both ends of the rows anyway: then XLA computes them once.
        return lax.platform_dependent(allowed, cuda=lambda x: first_and_end(x)[1] > 0, default=_any_of_rows)
    if allowed.shape[-1] == 1:
        return (start < stop) & allowed[..., 0]
    if allowed.shape[-2] > 1:
        return _any_inside(start, stop, allowed)
    # One mask for all rows, and an interval each: counts of allowed keys up to either end, not a T x S array.
    count = jnp.cumsum(allowed[..., 0, :], -1, dtype=jnp.int32)
    count = jnp.concatenate([jnp.zeros_like(count[..., :1]), count], -1)
    lead = jnp.broadcast_shapes(start.shape[:-1], stop.shape[:-1], count.shape[:-1])
    count = jnp.broadcast_to(count, (*lead, count.shape[-1]))
    S = allowed.shape[-1]
    start, stop = (jnp.broadcast_to(jnp.clip(x, 0, S), (*lead, x.shape[-1])) for x in (start, stop))
    before, upto = (jnp.take_along_axis(count, x, -1) for x in (start, stop))
    return upto > before


def first_and_end(allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of rows (..., T) of a mask (..., T, S), the first key that it leaves, and the end of those; S and 0 of none."""
    S, axis = allowed.shape[-1], allowed.ndim - 1
    column = lax.broadcasted_iota(jnp.int32, allowed.shape, axis)

    def combine(x: tuple, y: tuple) -> tuple:
        return jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1])

    ends = jnp.where(allowed, column, S), jnp.where(allowed, column + 1, 0)
    first, end = lax.reduce(ends, (jnp.int32(S), jnp.int32(0)), combine, (axis,))
    return first, end


def _any_of_rows(allowed: jax.Array) -> jax.Array:
    """any(-1), in two steps: XLA:CPU vectorises a reduction of an axis that is not the last, four times faster."""
    lanes = 32
    *lead, T, S = allowed.shape
    if T == 1 or S % lanes != 0:
        return allowed.any(-1)
    # The barrier keeps XLA from joining the steps.
    return lax.optimization_barrier(allowed.reshape(*lead, T, S // lanes, lanes).any(-2)).any(-1)


@jax.jit
def _any_inside(start: jax.Array, stop: jax.Array, allowed: jax.Array) -> jax.Array:
    """In one compiled reduction, which makes no array of the size of its operand."""
    columns = jnp.arange(allowed.shape[-1], dtype=jnp.int32).reshape((1,) * (allowed.ndim - 1) + (-1,))
    return ((columns >= start[..., None]) & (columns < stop[..., None]) & allowed).any(-1)


class Visible(NamedTuple):
    """See `find_visible`."""

    key_start: jax.Array
    key_stop: jax.Array
    has_key: jax.Array
    is_exact: jax.Array
    row_start: jax.Array | None = None
    row_stop: jax.Array | None = None
    row_bounds: jax.Array | None = None


def find_visible(
    mask: MaskOperands,
    T: int,
    S: int,
    padded: jax.Array | None = None,
    has_dead_rows: bool | None = None,
    band: Band | None = None,
    *,
    may_branch: bool = True,
    block_scores: int = 1 << 20,
) -> Visible:
    """Intervals of keys that hold all that ids and positions leave of those given.

    Where keys are sorted by id, and within an id by position, each row's are an interval, found by binary search.
    Keys of a negative id may stand before all others, or all behind. Otherwise every element is compared.

    Args:
      mask: all but `dead` and `is_exact`.
      T, S: the lengths.
      padded: (batch..., 1, T) bool: rows that are none, beside those of a negative id; None: no others.
      has_dead_rows: whether rows without a key attend all; None: that is not known yet, and nothing is said of rows.
      band: in place of the intervals of `mask`, if nothing traced is in them.
      may_branch: whether the choice between the two may be made at run time, once for all batch rows. Otherwise every
        element is compared.
      block_scores: how many elements are compared at once; XLA may write them.

    Returns:
      `key_start`, `key_stop`, (batch..., N or 1, T); `has_key`, likewise, whether a row has a key that `allowed` leaves
      too; and `is_exact`, (batch..., 1, 1), whether the intervals hold no other keys. `row_start`, `row_stop` and
      `row_bounds` are as in `MaskOperands`.
    """
    mask = with_intervals(mask, T, S, band)
    assert mask.key_start is not None
    assert mask.key_stop is not None
    key_start, key_stop = mask.key_start, mask.key_stop
    keys = _sort_keys(mask)
    is_sorted = _is_sorted(keys)[..., None]
    orders = (mask.query_ids, mask.key_ids, mask.lowest_position, mask.highest_position, mask.key_positions)
    lead = jnp.broadcast_shapes(
        key_start.shape[:-1], key_stop.shape[:-1], *(x.shape[:-2] for x in orders if x is not None)
    )
    all_lead = lead if mask.allowed is None else jnp.broadcast_shapes(lead, mask.allowed.shape[:-2])

    def in_full(start: jax.Array, stop: jax.Array, has_key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start, stop = (jnp.broadcast_to(x, (*lead, T)).astype(jnp.int32) for x in (start, stop))
        return start, stop, jnp.broadcast_to(has_key, (*all_lead, T))

    def by_search() -> tuple[jax.Array, jax.Array, jax.Array]:
        first, end = _search(keys, mask, S)
        start, stop = jnp.maximum(key_start, first), jnp.minimum(key_stop, end)
        has_key = start < stop if mask.allowed is None else rows_with_a_key(start, stop, mask.allowed, is_banded=True)
        return in_full(start, stop, has_key)

    def by_comparison() -> tuple[jax.Array, jax.Array, jax.Array]:
        return in_full(*_compare(mask, T, S, max(1, block_scores // max(1, static_size((*all_lead, S))))))

    if not may_branch:
        start, stop, has_key = by_comparison()
        are_sorted = jnp.bool_(False)
    else:
        are_sorted = is_sorted.all()
        start, stop, has_key = lax.cond(are_sorted, by_search, by_comparison)
    found = Visible(start, stop, has_key, jnp.broadcast_to(are_sorted, is_sorted.shape).astype(jnp.int32))
    if has_dead_rows is None:
        return found
    return found._replace(**_rows(found, padded_rows(mask, padded), S, has_dead_rows=has_dead_rows))


def with_intervals(mask: MaskOperands, T: int, S: int, band: Band | None) -> MaskOperands:
    """With those of a band, if there is one."""
    if band is None:
        return mask
    batch = next(x.ndim for x in (mask.key_ids, mask.key_positions) if x is not None) - 2
    start, stop = (jnp.asarray(x).reshape((1,) * batch + (T,)) for x in band.intervals(T, S))
    return mask._replace(key_start=start, key_stop=stop)


def padded_rows(mask: MaskOperands, padded: jax.Array | None) -> jax.Array | None:
    """`padded` and rows of a negative id; None if there are none."""
    if mask.query_ids is None:
        return padded
    has_no_id = mask.query_ids[..., 0] < 0
    return has_no_id if padded is None else padded | has_no_id


def _rows(found: Visible, padded: jax.Array | None, S: int, *, has_dead_rows: bool) -> dict[str, jax.Array]:
    start, stop = (DEAD, S) if has_dead_rows else (S, 0)
    start, stop = jnp.where(found.has_key, found.key_start, start), jnp.where(found.has_key, found.key_stop, stop)
    if padded is not None:
        start, stop = jnp.where(padded, S, start), jnp.where(padded, 0, stop)
    T = start.shape[-1]
    edges = [(0, 0)] * (start.ndim - 1) + [(0, rows_in_blocks(T) - T)]
    start, stop = jnp.pad(start, edges, constant_values=S), jnp.pad(stop, edges)
    first, end = (x.reshape(*x.shape[:-1], -1, ROWS_OF_BOUNDS) for x in (start, stop))
    is_dead = first == DEAD
    first = jnp.where(is_dead, 0, first)
    bounds = first.min(-1), first.max(-1), jnp.where(is_dead, 0, end).min(-1), end.max(-1)
    return {"row_start": start, "row_stop": stop, "row_bounds": jnp.stack(bounds, -1)}


def _compare(mask: MaskOperands, T: int, S: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`key_start`, `key_stop` and `has_key`, by comparing every element, for so many rows at once."""

    def of_rows(at: Any, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        def some(x: jax.Array, axis: int) -> jax.Array:
            is_whole = x.shape[axis] == 1 or count == T
            return x if is_whole else lax.dynamic_slice_in_dim(x, at, count, x.ndim + axis)

        assert mask.key_start is not None
        assert mask.key_stop is not None
        start, stop = some(mask.key_start, -1)[..., None], some(mask.key_stop, -1)[..., None]
        column = jnp.arange(S, dtype=jnp.int32).reshape((1,) * (start.ndim - 1) + (-1,))
        match = mask.matches(lambda x: some(x, -2))
        assert match is not None
        match &= (column >= start) & (column < stop)
        start = jnp.where(match, column, S).min(-1)
        stop = jnp.where(match, column + 1, 0).max(-1)
        has_key = start < stop if mask.allowed is None else (match & some(mask.allowed, -2)).any(-1)
        return start, stop, has_key

    if block >= T:
        return of_rows(0, T)

    def step(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        at = jnp.minimum(i * block, T - block)
        pairs = zip(results, of_rows(at, block), strict=True)
        return tuple(lax.dynamic_update_slice_in_dim(x, y, at, x.ndim - 1) for x, y in pairs)

    types = jax.eval_shape(lambda: of_rows(0, T))
    return lax.fori_loop(0, -(-T // block), step, tuple(jnp.zeros(x.shape, x.dtype) for x in types))


_LAST = jnp.iinfo(jnp.int32).max


class _SortKeys(NamedTuple):
    """What keys are to be sorted by, each (batch..., 1, S); `ids` come before `positions`."""

    ids: jax.Array | None
    positions: jax.Array | None
    is_last_id: jax.Array | None = None


def _sort_keys(mask: MaskOperands) -> _SortKeys:
    positions = None if mask.key_positions is None else mask.key_positions[..., 0, :]
    if mask.key_ids is None:
        return _SortKeys(None, positions)
    # Padding counts as before all ids, if the first key is padding, or else as behind; its position does not count.
    ids = mask.key_ids[..., 0, :]
    is_id = ids >= 0
    sort_ids = jnp.where(is_id, ids, jnp.where(ids[..., :1] < 0, -1, _LAST))
    positions = None if positions is None else jnp.where(is_id, positions, 0)
    return _SortKeys(sort_ids, positions, ids == _LAST)


def _is_sorted(keys: _SortKeys) -> jax.Array:
    """(batch..., 1)"""
    is_tie_sorted = True if keys.positions is None else keys.positions[..., :-1] <= keys.positions[..., 1:]
    if keys.ids is None:
        return jnp.asarray(is_tie_sorted).all(-1)
    left, right = keys.ids[..., :-1], keys.ids[..., 1:]
    assert keys.is_last_id is not None
    # The last of all ids would not be told from padding.
    is_pair_sorted = ((left < right) | ((left == right) & is_tie_sorted)) & ~keys.is_last_id[..., 1:]
    return is_pair_sorted.all(-1) & ~keys.is_last_id[..., 0]


def _search(keys: _SortKeys, mask: MaskOperands, S: int) -> tuple[jax.Array, jax.Array]:
    """The first key of each row, and the end of its keys, (batch..., 1, T), of sorted keys."""
    ids = None if mask.query_ids is None else mask.query_ids[..., 0]
    low, high = (None if x is None else x[..., 0] for x in (mask.lowest_position, mask.highest_position))

    def count(ids: jax.Array | None, bound: jax.Array | None, *, with_ties: bool) -> jax.Array:
        """How many keys are before (id, bound), or there, if `with_ties`; a bound of None is before or behind all."""

        def is_counted(at: jax.Array) -> jax.Array:
            is_tie_counted = jnp.asarray(with_ties)
            if bound is not None and keys.positions is not None:
                position = _take(keys.positions, at)
                is_tie_counted = position <= bound if with_ties else position < bound
            if ids is None or keys.ids is None:
                return is_tie_counted
            key = _take(keys.ids, at)
            return (key < ids) | ((key == ids) & is_tie_counted)

        rows = [x.shape for x in (ids, bound) if x is not None]
        lead = [(*x.shape[:-1], 1) for x in (keys.ids, keys.positions) if x is not None]
        found = jnp.zeros(jnp.broadcast_shapes(*rows, *lead), jnp.int32)
        # Unrolled: XLA makes one kernel of it.
        for step in (1 << n for n in reversed(range(S.bit_length()))):
            further = found + step
            found = jnp.where((further <= S) & is_counted(jnp.minimum(further, S) - 1), further, found)
        return found

    first = count(ids, low, with_ties=False)
    end = count(None if ids is None else jnp.minimum(ids, _LAST - 1), high, with_ties=True)
    return first, end


def _take(keys: jax.Array, at: jax.Array) -> jax.Array:
    """Elements of the last axis, with broadcasting in the others."""
    keys = jnp.broadcast_to(keys, (*at.shape[:-1], keys.shape[-1]))
    return jnp.take_along_axis(keys, at, -1, mode="promise_in_bounds")
