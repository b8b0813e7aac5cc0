"""Kernel that finds, of ids and positions, the keys between which those of each row lie, without a binary search.

A block of threads has a block of rows. Of each chunk of keys it knows the least and the largest id and position, so
which chunks may hold a key of its rows. These it compares element by element: from the first one on, until all of its
rows have met a key, and from the last one back likewise. Of sorted keys that is one chunk or two either way, and of
any others as many as it takes. So nothing is decided beforehand, and the host waits for nothing.

A block of threads for each batch row of the keys finds out whether these are sorted, beside the others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...._semantics.masks import DEAD
from ..host.visible_plan import CHUNKS, PADDED, ROWS, VisibleOperands, VisibleOuts, VisiblePlan
from ..pallas import COLUMN, ROW, broadcast_index, iota, load, pl, plgpu, spread, store, unravel

_LEAST, _LAST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def kernel(plan: VisiblePlan, operands: VisibleOperands, outs: VisibleOuts, _: Any) -> None:
    """Of one block of threads."""
    index = lax.axis_index("block")
    pl.when(index < plan.checks)(lambda: _check(plan, operands, outs, unravel(index, plan.key_lead)))

    @pl.when(index >= plan.checks)
    def _find() -> None:
        *lead, block = unravel(index - plan.checks, (*plan.lead, plan.blocks))
        _Search.make(plan, operands, tuple(lead), block).run(outs)


def _check(plan: VisiblePlan, operands: VisibleOperands, outs: VisibleOuts, lead: tuple) -> None:
    """Whether keys are sorted, as `_semantics/visible.py` says, neighbour by neighbour; some are compared twice."""
    count, pairs = plan.pairs, plan.padded_S - 1
    layout = plgpu.Layout.WG_STRIDED((count,), vec_size=1)
    ids, positions, padding = operands.key_ids, operands.key_positions, jnp.int32(_LAST)
    if ids is not None:
        first = ids[(*broadcast_index(lead, ids.shape[:-1]), 0)]
        padding = jnp.where(first < 0, jnp.int32(-1), padding)

    def neighbours(ref: Any, at: Any) -> tuple[jax.Array, jax.Array]:
        index = broadcast_index(lead, ref.shape[:-1])
        left, right = (load(ref.at[(*index, pl.ds(at + i, count))], layout=layout) for i in (0, 1))
        return left, right

    def are_sorted(at: Any) -> jax.Array:
        places = None if positions is None else neighbours(positions, at)
        if ids is None:
            assert places is not None
            return places[0] <= places[1]
        given = neighbours(ids, at)
        left, right = (jnp.where(x >= 0, x, padding) for x in given)
        is_tie_sorted = left == right
        if places is not None:
            before, after = (jnp.where(x >= 0, place, 0) for x, place in zip(given, places, strict=True))
            is_tie_sorted &= before <= after
        # The last of all ids would not be told from padding.
        return ((left < right) | is_tie_sorted) & (given[0] < _LAST) & (given[1] < _LAST)

    def step(i: Any, is_sorted: Any) -> Any:
        at = jnp.minimum(i * count, pairs - count)
        return jnp.minimum(is_sorted, _number(are_sorted(at)).min())

    outs.is_sorted[lead] = lax.fori_loop(jnp.int32(0), jnp.int32(-(-pairs // count)), step, jnp.int32(1))


def _number(x: jax.Array) -> jax.Array:
    """1 where it is true, else 0."""
    return jnp.where(x, jnp.int32(1), jnp.int32(0))


class _Range(NamedTuple):
    """What ids or positions of keys may be to be of interest to a row of a block."""

    least: Any
    largest: Any


class _Search(NamedTuple):
    """Of one block of rows.

    Attributes:
      start, stop: what other masks leave to each row.
      is_row: which rows are no padding.
      ids, lowest, highest: of each row, or None.
      keys: numbers of keys, first and end, outside of which other masks leave none to any row.
      id_range, position_range: of all rows; None without any.
    """

    plan: VisiblePlan
    operands: VisibleOperands
    lead: tuple
    block: Any
    start: Any
    stop: Any
    is_row: Any
    ids: Any | None
    lowest: Any | None
    highest: Any | None
    keys: tuple[Any, Any]
    id_range: _Range | None
    position_range: _Range | None

    @classmethod
    def make(cls, plan: VisiblePlan, operands: VisibleOperands, lead: tuple, block: Any) -> "_Search":
        def rows(ref: Any) -> Any:
            if ref is None:
                return None
            index = (*broadcast_index(lead, ref.shape[:-1]), pl.ds(first, ROWS))
            return load(ref.at[index], layout=ROW)

        first = jnp.minimum(block, plan.last_block) * ROWS

        ids, lowest, highest = map(rows, (operands.query_ids, operands.lowest_position, operands.highest_position))
        row = iota((ROWS, 8), 0).max(axis=1) + block * ROWS
        is_row = row < plan.T
        if plan.band is None:
            start, stop = rows(operands.key_start), rows(operands.key_stop)
            is_row &= start < PADDED
        else:
            start, stop = plan.band.interval(row, plan.S, jnp)
        is_row = is_row if ids is None else is_row & (ids >= 0)
        if plan.band is None:
            keys = jnp.where(is_row, start, plan.S).min(), jnp.where(is_row, stop, 0).max()
        else:
            ends = plan.band.interval(block * ROWS, plan.S, jnp)[0], block * ROWS + (ROWS - 1)
            keys = ends[0], plan.band.interval(ends[1], plan.S, jnp)[1]

        def range_of(low: Any | None, high: Any | None) -> _Range:
            least = _LEAST if low is None else jnp.where(is_row, low, _LAST).min()
            largest = _LAST if high is None else jnp.where(is_row, high, _LEAST).max()
            return _Range(least, largest)

        return cls(
            plan,
            operands,
            lead,
            block,
            start,
            stop,
            is_row,
            ids,
            lowest,
            highest,
            keys,
            id_range=None if ids is None else range_of(ids, ids),
            position_range=None if operands.position_chunks is None else range_of(lowest, highest),
        )

    def run(self, outs: VisibleOuts) -> None:
        plan, S = self.plan, self.plan.S
        none = jnp.zeros_like(self.start)
        chunks = self.chunks(jnp.int32(0)) if plan.parts == 1 else None
        first = self.scan(none + S, self.is_row, chunks, is_forward=True)
        has_key = self.is_row & (first < S)
        end = self.scan(none, has_key, chunks, is_forward=False)
        start, stop = (DEAD, S) if plan.marks_dead else (S, 0)
        start, stop = jnp.where(has_key, first, start), jnp.where(has_key, end, stop)
        start, stop = jnp.where(self.is_row, start, S), jnp.where(self.is_row, stop, 0)
        at = (*self.lead, pl.ds(self.block * ROWS, ROWS))
        store(outs.start.at[at], start)
        store(outs.stop.at[at], stop)
        is_dead = start == DEAD
        visited = jnp.where(is_dead, 0, start)
        bounds = visited.min(), visited.max(), jnp.where(is_dead, 0, stop).min(), stop.max()
        for i, bound in enumerate(bounds):
            outs.bounds[(*self.lead, self.block, i)] = bound

    def chunks(self, part: Any) -> jax.Array:
        """The number of each chunk of a part that may hold a key of one of the rows, or -1: (CHUNKS,)."""
        number = iota((CHUNKS, 8), 0).max(axis=1) + part * CHUNKS
        size = self.plan.chunk
        may_match = (number * size < self.keys[1]) & ((number + 1) * size > self.keys[0])
        for ref, wanted in (
            (self.operands.id_chunks, self.id_range),
            (self.operands.position_chunks, self.position_range),
        ):
            if ref is None or wanted is None:
                continue
            index = broadcast_index(self.lead, ref.shape[:-2])
            keys = load(ref.at[(*index, pl.ds(part * CHUNKS, CHUNKS), pl.ds(0, size))], layout=plgpu.Layout.WGMMA)
            may_match &= (keys.max(axis=1) >= wanted.least) & (keys.min(axis=1) <= wanted.largest)
        return jnp.where(may_match, number, -1)

    def scan(self, found: jax.Array, sought: jax.Array, chunks: jax.Array | None, *, is_forward: bool) -> jax.Array:
        """The first key of each row that is sought, or the end of its keys; of others, as it was `found` before.

        `chunks`: those of the only part; None if there are several.
        """
        if chunks is not None:
            return self.scan_part(found, sought, chunks, is_forward=is_forward)
        keys_of_part = jnp.int32(CHUNKS * self.plan.chunk)
        first, end = lax.div(self.keys[0], keys_of_part), lax.div(self.keys[1] + (keys_of_part - 1), keys_of_part)

        def step(state: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            i, _, found = state
            part = first + i if is_forward else end - 1 - i
            found = self.scan_part(found, sought, self.chunks(part), is_forward=is_forward)
            return i + 1, self.is_any_missing(found, sought, is_forward=is_forward), found

        def goes_on(state: tuple[Any, Any, jax.Array]) -> Any:
            return (state[0] < end - first) & (state[1] > 0)

        state = jnp.int32(0), self.is_any_missing(found, sought, is_forward=is_forward), found
        return lax.while_loop(goes_on, step, state)[-1]

    def is_any_missing(self, found: jax.Array, sought: jax.Array, *, is_forward: bool) -> Any:
        """1 if nothing is found yet of a row that is sought, else 0."""
        nothing = self.plan.S if is_forward else 0
        return _number(sought & (found == nothing)).max()

    def scan_part(self, found: jax.Array, sought: jax.Array, chunks: jax.Array, *, is_forward: bool) -> jax.Array:
        """Likewise, in these chunks, one after the other until nothing more is missing."""
        end = jnp.int32(_LAST if is_forward else -1)

        def following(at: Any) -> Any:
            if is_forward:
                return jnp.where(chunks > at, chunks, _LAST).min()
            return jnp.where(chunks < at, chunks, -1).max()

        def step(state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            at, found = state
            found = self.compare(at, found, is_forward=is_forward)
            is_missing = self.is_any_missing(found, sought, is_forward=is_forward) > 0
            return jnp.where(is_missing, following(at), end), found

        first = following(jnp.int32(-1 if is_forward else _LAST))
        return lax.while_loop(lambda state: state[0] != end, step, (first, found))[1]

    def compare(self, chunk: Any, found: jax.Array, *, is_forward: bool) -> jax.Array:
        """What was found, with the keys of a chunk."""
        size, S = self.plan.chunk, self.plan.S
        shape = ROWS, size

        def of_rows(x: Any) -> jax.Array:
            return spread(x, shape, 0)

        def keys(ref: Any) -> jax.Array:
            index = (*broadcast_index(self.lead, ref.shape[:-2]), chunk, pl.ds(0, size))
            return spread(load(ref.at[index], layout=COLUMN), shape, 1)

        column = iota(shape, 1) + chunk * size
        terms = [column >= of_rows(self.start), column < of_rows(self.stop)]
        if self.ids is not None:
            terms.append(keys(self.operands.id_chunks) == of_rows(self.ids))
        if self.operands.position_chunks is not None:
            positions = keys(self.operands.position_chunks)
            if self.lowest is not None:
                terms.append(positions >= of_rows(self.lowest))
            if self.highest is not None:
                terms.append(positions <= of_rows(self.highest))
        match = functools.reduce(jnp.logical_and, terms)
        if is_forward:
            return jnp.minimum(found, jnp.where(match, column, S).min(axis=1))
        return jnp.maximum(found, jnp.where(match, column + 1, 0).max(axis=1))
