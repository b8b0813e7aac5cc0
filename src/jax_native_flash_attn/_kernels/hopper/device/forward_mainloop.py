"""Attention of one item by one warpgroup of the forward kernel: its 64 query rows against all of the item's tiles.

The pipeline is drawn in `forward.py`; `ForwardBuffers` says what the barriers are for.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ...._semantics.numerics import LN2, LOG2E, lowest
from ..operands import DEAD
from ..pallas import ROW, columns_of, load, pl, plgpu, zeros
from ..scheduler import Item
from .forward_context import ForwardContext, Rows
from .logits import RowVectors, TileLogits, TileTerms
from .overlap import THREAD_COLUMNS, fold_columns, order_before_wgmma_wait, rounded_to_tf32
from .units import NO_KEY, from_base_2, to_base_2

_LOWEST = lowest(jnp.float32)


def compute_item(context: ForwardContext, item: Item, scale: Any) -> None:
    """Compute one item, and start writing its results; `scale` if it was read before."""
    rows = Rows(context, item, scale)
    if not context.intervals.is_cut:
        attend(rows)
        return
    is_dead = context.intervals.is_dead(item.head)
    pl.when(is_dead)(lambda: average(rows))
    pl.when(jnp.logical_not(is_dead))(lambda: attend(rows))


def average(rows: Rows) -> None:
    """Rows without any key: their logits are all 0. Keys may hold NaN, and are not read."""
    context, item, logits = rows.context, rows.item, rows.logits
    block_kv = context.blocks.block_kv
    plgpu.barrier_wait(context.buffers.query_ready.at[rows.wg])
    plgpu.barrier_arrive(context.buffers.query_free.at[rows.wg])

    def step(i: Any, acc: Any) -> Any:
        slot = rows.slot(i)
        context.key_ring.wait_until_ready(slot)
        context.key_ring.release(slot)
        rows.wait_for_value(i)
        ones = plgpu.layout_cast(jnp.ones(rows.shape, jnp.float32), plgpu.Layout.WGMMA)
        weights = rows.as_operand(logits.drop(ones, rows.row, item.tile(i)).astype(rows.dtype))
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, rows.value(slot)))(plgpu.ACC.init(acc))
        context.value_ring.release(slot)
        return acc

    acc = lax.fori_loop(0, rows.num_tiles, step, rows.no_output)
    keys = jnp.minimum(item.ranges.stop * block_kv, context.sizes.S) - item.ranges.first * block_kv
    count = plgpu.layout_cast(jnp.full((rows.shape[0],), keys.astype(jnp.float32), jnp.float32), ROW)
    lse = jnp.log2(count) * LN2
    if context.blocks.splits > 1:
        lse = jnp.where((count > 0) & jnp.logical_not(item.is_empty), lse, _LOWEST)
    largest = None
    if context.plan.needs_max_logits:
        largest = plgpu.layout_cast(jnp.full((rows.shape[0],), -jnp.inf, jnp.float32), ROW)
    rows.write(acc * columns_of(logits.rescaling / count, acc.shape), lse, largest)


def attend(rows: Rows) -> None:
    """Rows with keys, or that masks alone tell from those."""
    context, logits = rows.context, rows.logits
    vectors = logits.rows(rows.row, late=True)
    first_is_edge = _first_is_edge(rows)
    plgpu.barrier_wait(context.buffers.query_ready.at[rows.wg])
    # With a negated query for a negative scale, the largest product has the largest logit, and scaling can wait
    # for the exponent.
    softmax = Softmax(rows, vectors, jnp.abs(logits.scale) * LOG2E)
    _scale_query(rows)
    p, top, total = _first_tile(softmax, first_is_edge)
    step = functools.partial(_step, softmax, top)
    carry = rows.no_output, _carried(rows, p, top), top, total
    carry = lax.fori_loop(1, rows.num_tiles, step, carry)
    acc, p, top, total = lax.optimization_barrier(carry)
    _finish(rows, acc, p, top, total)


def _first_is_edge(rows: Rows) -> Any:
    """Whether the first tile needs a mask."""
    intervals, ranges = rows.context.intervals, rows.item.ranges
    if intervals.is_traced or intervals.is_cut:
        return (ranges.stop - 1 < ranges.full_first) | (ranges.stop > ranges.full_stop)
    return intervals.has_right_edge or intervals.has_left_edge


def _scale_query(rows: Rows) -> None:
    """Multiply the query by what cannot wait for the exponent."""
    query, logits, dtype = rows.context.query.tiles.at[rows.wg], rows.logits, rows.dtype
    if logits.starts_with_bias:
        power = jnp.asarray(logits.power)

        @pl.when(power != 1.0)
        def _multiply() -> None:
            query[...] = load(query, layout=plgpu.Layout.WGMMA) * power.astype(dtype)
            plgpu.commit_smem()

    else:

        @pl.when(logits.scale < 0)
        def _negate() -> None:
            query[...] = -query[...]
            plgpu.commit_smem()

    if dtype == jnp.float32:
        query[...] = rounded_to_tf32(load(query, layout=plgpu.Layout.WGMMA))
        plgpu.commit_smem()


@dataclass(frozen=True)
class Softmax:
    """The online softmax of some rows; `magnitude` is the multiplier of the products, in base 2."""

    rows: Rows
    vectors: RowVectors
    magnitude: Any

    def __call__(self, products: Any, terms: TileTerms, i: Any, top: Any, total: Any, masked: Any) -> tuple:
        """Weights of tile i for the second product; the new maximum and sums; what corrects older ones."""
        rows, logits = self.rows, self.rows.logits
        has_fixed_top = rows.context.plan.has_fixed_top

        def exponents(x: Any, factor: Any) -> tuple[Any, Any]:
            if has_fixed_top:
                return x if factor is None else x * factor, top
            largest = fold_columns(x, jnp.maximum).max(axis=1)
            if factor is None:
                new_top = jnp.maximum(top, largest)
                return x - columns_of(new_top, rows.shape), new_top
            if logits.has_terms:
                factor = to_base_2(largest, logits.unit)
                new_top = jnp.maximum(top, largest * factor)
                return x * columns_of(factor, rows.shape) - columns_of(new_top, rows.shape), new_top
            new_top = jnp.maximum(top, largest * factor)
            return x * factor - columns_of(new_top, rows.shape), new_top

        tile = rows.item.tile(i)
        products, terms, multiplier = logits.capped(products, terms, self.magnitude)
        exponent, new_top = logits(products, terms, self.vectors, tile, multiplier, masked, exponents)
        weights = jnp.exp2(exponent)
        correction = top
        if not has_fixed_top:
            correction = jnp.exp2(top - new_top)
            total = total * columns_of(correction, total.shape)
        total = total + fold_columns(weights, jnp.add)
        return logits.drop(weights, rows.row, rows.item.tile(i)).astype(rows.dtype), new_top, total, correction


def _issue_scores(rows: Rows, s_ref: Any, slot: Any) -> None:
    context = rows.context
    plgpu.wgmma(s_ref, context.query.tiles.at[rows.wg], context.key.tiles.at[slot].transpose((1, 0)))


def _waits_at_end(rows: Rows) -> bool:
    """Whether values are waited for at the end of their step, or at the start of the next.

    With heads of 128 the latter takes 1 to 3% less, with 64 the former. Of a band that is cut off, the first tile must
    be cleaned, and no other.
    """
    return rows.context.intervals.is_cut or rows.context.sizes.H <= 64


def _first_tile(softmax: Softmax, is_edge: Any) -> tuple[Any, Any, Any]:
    """Weights, maxima and sums of the first tile."""
    rows, context, logits = softmax.rows, softmax.rows.context, softmax.rows.logits
    block_q = context.blocks.block_q
    start = 0.0 if context.plan.has_fixed_top else _LOWEST
    top = plgpu.layout_cast(jnp.full((block_q,), start, jnp.float32), ROW)
    # Each thread sums its own columns; the threads of a row add up at the end.
    total = zeros(block_q, THREAD_COLUMNS)
    start = rows.slot(0)
    context.key_ring.wait_until_ready(start)
    terms = logits.tile_terms(softmax.vectors, rows.item.tile(0), start)
    initial, terms = logits.start(terms)
    products = pl.run_state(lambda ref: _issue_scores(rows, ref, start))(plgpu.ACC.init(initial))
    p, top, total, _ = softmax(products, terms, jnp.int32(0), top, total, is_edge)
    context.key_ring.release(start)
    if _waits_at_end(rows):
        rows.wait_for_value(jnp.int32(0))
    return p, top, total


def _step(softmax: Softmax, no_weights: Any, i: Any, carry: tuple) -> tuple:
    """Scores and softmax of tile i, beside the second product of the tile before."""
    rows, context, logits = softmax.rows, softmax.rows.context, softmax.rows.logits
    takes_turns, turn, warpgroups = context.plan.takes_turns, context.buffers.turn, context.blocks.warpgroups
    acc, p, top, total = lax.optimization_barrier(carry)
    slot, previous = rows.slot(i), rows.slot(i - 1)
    # All waits come first: control flow between two products would serialise them.
    context.key_ring.wait_until_ready(slot)
    if not _waits_at_end(rows):
        rows.wait_for_value(i - 1)
    terms = logits.tile_terms_before_products(softmax.vectors, rows.item.tile(i), slot)
    initial, terms = logits.start(terms)
    if logits.starts_with_bias:
        initial = lax.optimization_barrier(initial)
    if takes_turns:
        plgpu.barrier_wait(turn.at[rows.wg])

    def products_and_softmax(state: tuple) -> None:
        acc_ref, s_ref, p_ref, top_ref, total_ref, correction_ref = state
        _issue_scores(rows, s_ref, slot)
        plgpu.wgmma(acc_ref, _weights(rows, p), rows.value(previous))
        if takes_turns:
            plgpu.barrier_arrive(turn.at[lax.rem(rows.wg + 1, jnp.int32(warpgroups))])
        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
        is_edge = context.intervals.is_later_edge(rows.item.ranges, rows.item.tile(i), context.blocks.rows)
        p_ref[...], top_ref[...], total_ref[...], correction_ref[...] = softmax(s, terms, i, top, total, is_edge)
        context.key_ring.release(slot)
        order_before_wgmma_wait(total_ref[...])

    # Leaving `run_state` waits for the second product.
    weights = plgpu.layout_cast(jnp.zeros(rows.shape, rows.dtype), plgpu.Layout.WGMMA)
    acc, _, p, top, total, correction = pl.run_state(products_and_softmax)(
        (plgpu.ACC.init(acc), plgpu.ACC.init(initial), weights, top, total, top)
    )
    context.value_ring.release(previous)
    if _waits_at_end(rows):
        rows.wait_for_value(i, may_be_padded=not context.intervals.is_cut)
    acc = acc if context.plan.has_fixed_top else acc * columns_of(correction, acc.shape)
    return acc, _carried(rows, p, no_weights), top, total


def _carried(rows: Rows, p: Any, no_weights: Any) -> Any:
    """What is carried from step to step as the weights; `no_weights` if those are in shared memory."""
    operand = rows.as_operand(p)
    return operand if rows.context.buffers.weights is None else no_weights


def _weights(rows: Rows, carried: Any) -> Any:
    """As the left operand of the second product."""
    buffer = rows.context.buffers.weights
    return carried if buffer is None else buffer.at[rows.wg]


def _finish(rows: Rows, acc: Any, p: Any, top: Any, total: Any) -> None:
    """The second product of the last tile, and the results."""
    context, logits = rows.context, rows.logits
    plgpu.barrier_arrive(context.buffers.query_free.at[rows.wg])
    last = rows.slot(rows.num_tiles - 1)
    if not _waits_at_end(rows):
        rows.wait_for_value(rows.num_tiles - 1)
    weights = _weights(rows, p)
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, rows.value(last)))(plgpu.ACC.init(acc))
    context.value_ring.release(last)

    total = total.sum(axis=1)
    factor, sink = logits.rescaling / total, rows.sink()
    if sink is not None:
        # The share of the keys.
        factor = factor / (1.0 + jnp.exp2((sink - _lse(logits, top, total)) * LOG2E))
    out = acc * columns_of(factor, acc.shape)
    lse = _lse(logits, top, total)
    if sink is not None:
        larger, smaller = jnp.maximum(lse, sink), jnp.minimum(lse, sink)
        lse = larger + jnp.log2(1.0 + jnp.exp2((smaller - larger) * LOG2E)) * LN2
    # With a fixed top, sums alone tell. Else this is compared with the top.
    sign, no_key = (total, 0.0) if context.plan.has_fixed_top else (top, NO_KEY * logits.unit.ceiling)
    if context.blocks.splits > 1:
        lse = jnp.where((sign > no_key) & jnp.logical_not(rows.item.is_empty), lse, _LOWEST)
    elif context.intervals.is_traced:
        # Rows past the query's length have no key: their weights are those of masked logits.
        out = jnp.where(columns_of(sign, acc.shape) > no_key, out, 0.0)
        lse = jnp.where(sign > no_key, lse, 0.0 if sink is None else sink)
    rows.write(out, lse, _largest(rows, top) if context.plan.needs_max_logits else None)


def _lse(logits: TileLogits, top: Any, total: Any) -> Any:
    """Of the keys."""
    return _top_logit(logits, top) + jnp.log2(total) * LN2


def _top_logit(logits: TileLogits, top: Any) -> Any:
    return from_base_2(top, logits.unit) if logits.has_terms else top * LN2


def _largest(rows: Rows, top: Any) -> Any:
    """The largest visible logit of each row; -inf where no key is visible, as in dead rows."""
    logits, intervals = rows.logits, rows.context.intervals
    has_key = top > NO_KEY * logits.unit.ceiling
    if rows.context.blocks.splits > 1:
        has_key = has_key & jnp.logical_not(rows.item.is_empty)
    if (pair := intervals.rows(rows.item.head, rows.row, rows.shape[0], ROW)) is not None:
        has_key = has_key & (pair[0] != DEAD)
    return jnp.where(has_key, _top_logit(logits, top), -jnp.inf)
