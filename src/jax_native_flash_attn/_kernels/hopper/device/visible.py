"""Kernel that finds, of ids and positions, the keys between which those of each row lie, without a sorted search.

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
from ..host.visible_plan import CHUNKS, ROWS, VisibleOperands, VisibleOuts, VisiblePlan
from ..pallas import COLUMN, ROW, broadcast_index, iota, load, pl, plgpu, spread, store, unravel

_LEAST, _LAST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def kernel(plan: VisiblePlan, operands: VisibleOperands, outs: VisibleOuts, _: Any) -> None:
    """Of one block of threads."""
    index = lax.axis_index("block")
    pl.when(index < plan.checks)(lambda: _check(plan, operands, outs, unravel(index, plan.key_lead)))

    @pl.when(index >= plan.checks)
    def _search() -> None:
        *lead, block = unravel(index - plan.checks, (*plan.lead, plan.blocks))
        _Search.make(plan, operands, tuple(lead), block).run(outs)


def _check(plan: VisiblePlan, operands: VisibleOperands, outs: VisibleOuts, lead: tuple) -> None:
    """Whether keys are sorted as `_semantics.visible` says, neighbour by neighbour; blocks of these may overlap."""
    count = plan.pairs
    last = plan.padded_S - 1 - count
    layout = plgpu.Layout.WG_STRIDED((count,), vec_size=1)
    ids, positions = operands.key_ids, operands.key_positions

    def vectors(ref: Any, at: Any) -> tuple[jax.Array, jax.Array]:
        index = broadcast_index(lead, ref.shape[:-1])
        left, right = (load(ref.at[(*index, pl.ds(at + i, count))], layout=layout) for i in (0, 1))
        return left, right

    padding = None
    if ids is not None:
        first = ids[(*broadcast_index(lead, ids.shape[:-1]), 0)]
        padding = jnp.where(first < 0, jnp.int32(-1), jnp.int32(_LAST))

    def step(i: Any, bad: Any) -> Any:
        at = jnp.minimum(i * count, last)
        is_sorted = None
        if positions is not None:
            left, right = vectors(positions, at)
        if ids is not None:
            raw = vectors(ids, at)
            before, after = (jnp.where(x >= 0, x, padding) for x in raw)
            is_tie_sorted = before == after
            if positions is not None:
                left, right = (jnp.where(x >= 0, y, 0) for x, y in zip(raw, (left, right), strict=True))
                is_tie_sorted &= left <= right
            is_sorted = ((before < after) | is_tie_sorted) & (raw[0] < _LAST) & (raw[1] < _LAST)
        else:
            is_sorted = left <= right
        return jnp.maximum(bad, jnp.where(is_sorted, 0, 1).max())

    bad = lax.fori_loop(0, -(-(plan.padded_S - 1) // count), step, jnp.int32(0))
    outs.is_sorted[lead] = 1 - bad


class _Between(NamedTuple):
    """What a key's id or position must be for a row: of all rows of a block, the least and the largest such number."""

    least: Any
    largest: Any


class _Search(NamedTuple):
    """Of one block of rows.

    Attributes:
      start, stop: what other masks leave to each row.
      is_row: which rows are no padding.
      ids, lowest, highest: of each row, or None.
      keys: numbers of the keys that other masks leave to any row: first and end.
      id_range, position_range: of the rows; None without any.
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
    id_range: _Between | None
    position_range: _Between | None

    @classmethod
    def make(cls, plan: VisiblePlan, operands: VisibleOperands, lead: tuple, block: Any) -> "_Search":
        def rows(ref: Any) -> Any | None:
            if ref is None:
                return None
            index = (*broadcast_index(lead, ref.shape[:-1]), pl.ds(block * ROWS, ROWS))
            return load(ref.at[index], layout=ROW)

        start, stop, ids = rows(operands.key_start), rows(operands.key_stop), rows(operands.query_ids)
        if plan.band is not None:
            row = iota((ROWS, 8), 0).max(axis=1) + block * ROWS
            start, stop = plan.band.interval(row, plan.S, jnp)
            stop = jnp.where(row < plan.T, stop, -1)
        lowest, highest = rows(operands.lowest_position), rows(operands.highest_position)
        is_row = stop >= 0
        if ids is not None:
            is_row &= ids >= 0

        def between(low: Any | None, high: Any | None) -> _Between:
            least = _LEAST if low is None else jnp.where(is_row, low, _LAST).min()
            largest = _LAST if high is None else jnp.where(is_row, high, _LEAST).max()
            return _Between(least, largest)

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
            keys=(jnp.where(is_row, start, plan.S).min(), jnp.where(is_row, stop, 0).max()),
            id_range=None if ids is None else between(ids, ids),
            position_range=None if operands.position_chunks is None else between(lowest, highest),
        )

    def run(self, outs: VisibleOuts) -> None:
        plan, S = self.plan, self.plan.S
        none = jnp.zeros_like(self.start)
        chunks = self.chunks(0) if plan.parts == 1 else None
        first = self.scan(none + S, self.is_row, chunks, is_forward=True)
        has_key = first < S
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
            if wanted is None:
                continue
            assert ref is not None
            index = broadcast_index(self.lead, ref.shape[:-2])
            keys = load(ref.at[(*index, pl.ds(part * CHUNKS, CHUNKS), pl.ds(0, size))], layout=plgpu.Layout.WGMMA)
            may_match &= (keys.max(axis=1) >= wanted.least) & (keys.min(axis=1) <= wanted.largest)
        return jnp.where(may_match, number, -1)

    def scan(self, found: jax.Array, sought: jax.Array, chunks: jax.Array | None, *, is_forward: bool) -> jax.Array:
        """The first key of each row that is sought, or the end of its keys; what was `found` before, of others."""
        parts = self.plan.parts
        if chunks is not None:
            return self.scan_part(found, sought, chunks, is_forward=is_forward)

        def step(i: Any, found: jax.Array) -> jax.Array:
            part = i if is_forward else parts - 1 - i
            return self.scan_part(found, sought, self.chunks(part), is_forward=is_forward)

        return lax.fori_loop(0, parts, step, found)

    def scan_part(self, found: jax.Array, sought: jax.Array, chunks: jax.Array, *, is_forward: bool) -> jax.Array:
        """Likewise, in these chunks, one after the other until nothing more is sought."""
        nothing, end = (self.plan.S, _LAST) if is_forward else (0, -1)

        def following(at: Any, found: jax.Array) -> Any:
            """The next chunk to look at; `end` if there is none, or nothing is missing."""
            if is_forward:
                chunk = jnp.where(chunks > at, chunks, end).min()
            else:
                chunk = jnp.where(chunks < at, chunks, end).max()
            is_missing = jnp.where(sought & (found == nothing), 1, 0).max()
            return jnp.where(is_missing > 0, chunk, end)

        def step(state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            at, found = state
            found = self.compare(at, found, is_forward=is_forward)
            return following(at, found), found

        first = following(jnp.int32(-1 if is_forward else _LAST), found)
        return lax.while_loop(lambda state: state[0] != end, step, (first, found))[1]

    def compare(self, chunk: Any, found: jax.Array, *, is_forward: bool) -> jax.Array:
        """The first key of each row, or the end of its keys, with those of a chunk."""
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
