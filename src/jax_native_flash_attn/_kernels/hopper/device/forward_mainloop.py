"""Attention of one item by one warpgroup of the forward kernel: its 64 query rows against all of the item's tiles.

The pipeline is drawn in `forward.py`; `ForwardBuffers` says what the barriers are for.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ...._semantics.numerics import LN2, LOG2E, lowest
from ..pallas import ROW, columns_of, load, pl, plgpu, zeros
from ..scheduler import Item
from .changes import changed, start_products
from .forward_context import ForwardContext, Rows
from .forward_results import write
from .overlap import THREAD_COLUMNS, fold_columns, order_before_wgmma_wait, rounded_to_tf32
from .terms import RowVectors, TileTerms
from .units import to_base_2

_LOWEST = lowest(jnp.float32)


def compute_item(context: ForwardContext, item: Item, scale: Any) -> None:
    """Compute one item, and start writing its results; `scale` if it was read before."""
    rows = Rows(context, item, scale)
    if not context.intervals.is_cut or context.intervals.is_moved:
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
    acc, p, top, total = _first_tile(softmax, first_is_edge)
    carry, stop = (acc, _carried(rows, p, top), top, total), rows.item.num_before_tail
    carry = lax.fori_loop(1, stop, functools.partial(_step, softmax, top), carry)
    acc, p, top, total = lax.optimization_barrier(carry)
    free_query = functools.partial(plgpu.barrier_arrive, context.buffers.query_free.at[rows.wg])
    if context.has_tail:
        pl.when(stop == rows.num_tiles)(free_query)
        acc = _last_product(rows, acc, p, stop - 1)
        tail = functools.partial(_tail_tile, softmax)
        acc, top, total = lax.fori_loop(stop, rows.num_tiles, tail, (acc, top, total))
        pl.when(stop < rows.num_tiles)(free_query)
    else:
        free_query()
        acc = _last_product(rows, acc, p, stop - 1)
    write(rows, acc, top, total)


def _no_tiles(rows: Rows) -> tuple:
    """The numerator of the output, maxima and sums, before the first tile."""
    block_q = rows.context.blocks.block_q
    start = 0.0 if rows.context.plan.has_fixed_top else _LOWEST
    top = plgpu.layout_cast(jnp.full((block_q,), start, jnp.float32), ROW)
    # Each thread sums its own columns; the threads of a row add up at the end.
    return rows.no_output, top, zeros(block_q, THREAD_COLUMNS)


def _first_is_edge(rows: Rows) -> Any:
    """Whether the first tile of the pipeline needs a mask."""
    intervals, ranges = rows.context.intervals, rows.item.ranges
    if intervals.is_moved:
        return True
    if rows.context.has_tail:
        return rows.item.num_edges > 0
    if intervals.is_cut:
        return (ranges.stop - 1 < ranges.full_first) | (ranges.stop > ranges.full_stop)
    return intervals.has_right_edge or intervals.has_left_edge


def _scale_query(rows: Rows) -> None:
    """Multiply the query by what cannot wait for the exponent."""
    query, logits, dtype = rows.context.query.tiles.at[rows.wg], rows.logits, rows.dtype
    if logits.starts_with_addend:
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
        products, terms, multiplier, _ = changed(logits, products, terms, self.vectors, tile, self.magnitude)
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


def _tile_alone(softmax: Softmax, i: Any, is_edge: Any, top: Any, total: Any) -> tuple[Any, Any, Any, Any]:
    """As `softmax`, with the scores of tile i, beside which no product runs."""
    rows, context, logits = softmax.rows, softmax.rows.context, softmax.rows.logits
    slot = rows.slot(i)
    context.key_ring.wait_until_ready(slot)
    terms = logits.tile_terms(softmax.vectors, rows.item.tile(i), slot)
    initial, terms = start_products(logits, terms, softmax.vectors, rows.item.tile(i))
    products = pl.run_state(lambda ref: _issue_scores(rows, ref, slot))(plgpu.ACC.init(initial))
    p, top, total, correction = softmax(products, terms, i, top, total, is_edge)
    context.key_ring.release(slot)
    return p, top, total, correction


def _tail_tile(softmax: Softmax, i: Any, carry: tuple) -> tuple:
    """All of a tile that needs a mask, behind those that do not: its code stays out of the pipeline's loop."""
    rows = softmax.rows
    acc, *so_far = carry
    p, top, total, correction = _tile_alone(softmax, i, True, *so_far)
    if not rows.context.plan.has_fixed_top:
        acc = acc * columns_of(correction, acc.shape)
    rows.wait_for_value(i)
    weights, slot = rows.as_operand(p), rows.slot(i)
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, rows.value(slot)))(plgpu.ACC.init(acc))
    rows.context.value_ring.release(slot)
    return acc, top, total


def _first_tile(softmax: Softmax, is_edge: Any) -> tuple[Any, Any, Any, Any]:
    """The first tile of the pipeline, up to its second product: the state of a step."""
    rows = softmax.rows
    acc, *nothing = _no_tiles(rows)
    p, top, total, _ = _tile_alone(softmax, jnp.int32(0), is_edge, *nothing)
    if _waits_at_end(rows):
        rows.wait_for_value(jnp.int32(0))
    return acc, p, top, total


def _step(softmax: Softmax, no_weights: Any, i: Any, carry: tuple) -> tuple:
    """Scores and softmax of tile i, beside the second product of the tile before."""
    rows, context, logits = softmax.rows, softmax.rows.context, softmax.rows.logits
    takes_turns, turn, warpgroups = context.plan.takes_turns, context.buffers.turn, context.blocks.warpgroups
    acc, p, top, total = lax.optimization_barrier(carry)
    slot, previous = rows.slot(i), rows.slot(i - 1)
    has_edges = context.intervals.has_many_edges(context.blocks.rows) and not context.has_tail
    # All waits come first: control flow between two products would serialise them.
    context.key_ring.wait_until_ready(slot)
    if not _waits_at_end(rows):
        rows.wait_for_value(i - 1)
    terms = logits.tile_terms_before_products(softmax.vectors, rows.item.tile(i), slot, masked=has_edges)
    initial, terms = start_products(logits, terms, softmax.vectors, rows.item.tile(i))
    if logits.starts_with_addend:
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
        is_edge = has_edges and rows.item.is_edge(i)
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
        rows.wait_for_value(i, may_be_padded=False)
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


def _last_product(rows: Rows, acc: Any, p: Any, i: Any) -> Any:
    """The second product of the pipeline's last tile."""
    last = rows.slot(i)
    if not _waits_at_end(rows):
        rows.wait_for_value(i)
    weights = _weights(rows, p)
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, rows.value(last)))(plgpu.ACC.init(acc))
    rows.context.value_ring.release(last)
    return acc
