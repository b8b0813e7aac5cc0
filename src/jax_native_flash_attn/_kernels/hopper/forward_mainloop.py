"""Attention of one item by one warpgroup of the forward kernel: its 64 query rows against all of the item's tiles.

The pipeline is drawn in `forward.py`, which also says what the barriers are for.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from ..._semantics.numerics import LN2, LOG2E, lowest
from .device.logits import NO_KEY, from_base_2, to_base_2
from .device.overlap import THREAD_COLUMNS, before_wait, fold_columns, rounded_to_tf32
from .device.pallas import ROW, columns_of, load, pl, plgpu
from .device.rows import Kernel, Rows
from .scheduler import Item

_LOWEST = lowest(jnp.float32)


def compute_item(kernel: Kernel, item: Item, wg: Any, scale: Any) -> None:
    """Compute one item, and start writing its results; `scale` if it was read before."""
    rows = Rows(kernel, item, wg, scale)
    if not kernel.intervals.is_cut:
        attend(rows)
        return
    is_dead = kernel.intervals.is_dead(item.head)
    pl.when(is_dead)(lambda: average(rows))
    pl.when(jnp.logical_not(is_dead))(lambda: attend(rows))


def average(rows: Rows) -> None:
    """Rows without any key: their logits are all 0. Keys may hold NaN, and are not read."""
    kernel, item, logits = rows.kernel, rows.item, rows.logits
    local, block_kv = kernel.local, kernel.blocks.block_kv
    plgpu.barrier_wait(local["query ready"].at[rows.wg])
    plgpu.barrier_arrive(local["query free"].at[rows.wg])

    def step(i: Any, acc: Any) -> Any:
        slot = rows.slot(i)
        plgpu.barrier_wait(local["key ready"].at[slot])
        plgpu.barrier_arrive(local["key free"].at[slot])
        rows.wait_for_value(i)
        ones = plgpu.layout_cast(jnp.ones(rows.shape, jnp.float32), plgpu.Layout.WGMMA)
        weights = rows.as_operand(logits.drop(ones, rows.row, item.tile(i)).astype(rows.dtype))
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, rows.value(slot)))(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(local["value free"].at[slot])
        return acc

    acc = lax.fori_loop(0, rows.num_tiles, step, rows.no_output)
    keys = jnp.minimum(item.ranges.stop * block_kv, kernel.sizes.S) - item.ranges.first * block_kv
    count = plgpu.layout_cast(jnp.full((rows.shape[0],), keys.astype(jnp.float32), jnp.float32), ROW)
    lse = jnp.log2(count) * LN2
    if kernel.blocks.parts > 1:
        lse = jnp.where((count > 0) & jnp.logical_not(item.is_empty), lse, _LOWEST)
    rows.write(acc * columns_of(logits.rescaling / count, acc.shape), lse)


def attend(rows: Rows) -> None:
    """Rows with keys, or that masks alone tell from those."""
    kernel, item, wg, logits, shape, dtype = rows.kernel, rows.item, rows.wg, rows.logits, rows.shape, rows.dtype
    blocks, intervals, local, ranges = kernel.blocks, kernel.intervals, kernel.local, item.ranges
    num_tiles = rows.num_tiles
    takes_turns = blocks.takes_turns and blocks.warpgroups > 1
    vectors = logits.rows(rows.row, late=True)
    first_is_edge: Any = intervals.has_right_edge or intervals.has_left_edge
    if intervals.is_traced or intervals.is_cut:
        first_is_edge = (ranges.stop - 1 < ranges.full_first) | (ranges.stop > ranges.full_stop)

    def softmax(products: Any, scores: Any, i: Any, top: Any, total: Any, masked: Any) -> tuple[Any, Any, Any, Any]:
        """Weights of tile i for the second product; the new maximum and sums; what corrects older ones."""

        def exponents(x: Any, factor: Any) -> tuple[Any, Any]:
            largest = fold_columns(x, jnp.maximum).max(axis=1)
            if factor is None:
                new_top = jnp.maximum(top, largest)
                return x - columns_of(new_top, shape), new_top
            if logits.has_scores:
                factor = to_base_2(largest, logits.unit)
                new_top = jnp.maximum(top, largest * factor)
                return x * columns_of(factor, shape) - columns_of(new_top, shape), new_top
            new_top = jnp.maximum(top, largest * factor)
            return x * factor - columns_of(new_top, shape), new_top

        exponent, new_top = logits(products, scores, vectors, item.tile(i), magnitude, masked, exponents)
        weights = jnp.exp2(exponent)
        correction = jnp.exp2(top - new_top)
        total = total * columns_of(correction, total.shape) + fold_columns(weights, jnp.add)
        return logits.drop(weights, rows.row, item.tile(i)).astype(dtype), new_top, total, correction

    def is_edge(i: Any) -> Any:
        """Whether a tile behind the first needs a mask."""
        if not intervals.has_left_edge and intervals.right_tiles(blocks.rows) <= 1:
            return False  # the first tile was the only one
        return (item.tile(i) < ranges.full_first) | (item.tile(i) >= ranges.full_stop)

    def issue_scores(s_ref: Any, slot: Any) -> None:
        plgpu.wgmma(s_ref, query, local["key"].at[slot].transpose((1, 0)))

    query = local["query"].at[wg]
    plgpu.barrier_wait(local["query ready"].at[wg])
    # With a negated query for a negative scale, the largest product has the largest logit, and scaling can wait
    # for the exponent.
    magnitude = jnp.abs(logits.scale) * LOG2E

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

    top = plgpu.layout_cast(jnp.full((blocks.block_q,), _LOWEST, jnp.float32), ROW)
    # Each thread sums its own columns; the threads of a row add up at the end.
    total = plgpu.layout_cast(jnp.zeros((blocks.block_q, THREAD_COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    start = rows.slot(0)

    plgpu.barrier_wait(local["key ready"].at[start])
    first = logits.scores(vectors, item.tile(0), start)
    initial, first = logits.start(first)
    products = pl.run_state(lambda ref: issue_scores(ref, start))(plgpu.ACC.init(initial))
    p, top, total, _ = softmax(products, first, jnp.int32(0), top, total, first_is_edge)
    plgpu.barrier_arrive(local["key free"].at[start])
    # Values are waited for at the end of their step, or at the start of the next: with heads of 128 the latter takes 1
    # to 3% less, with 64 the former. Of a band that is cut off, the first tile must be cleaned, and no other.
    waits_at_end = intervals.is_cut or kernel.sizes.H <= 64
    if waits_at_end:
        rows.wait_for_value(jnp.int32(0))

    def step(i: Any, carry: tuple) -> tuple:
        acc, p, top, total = lax.optimization_barrier(carry)
        slot, previous = rows.slot(i), rows.slot(i - 1)
        # All waits come first: control flow between two products would serialise them.
        plgpu.barrier_wait(local["key ready"].at[slot])
        if not waits_at_end:
            rows.wait_for_value(i - 1)
        scores = logits.scores_before_products(vectors, item.tile(i), slot)
        initial, scores = logits.start(scores)
        if logits.starts_with_bias:
            initial = lax.optimization_barrier(initial)
        if takes_turns:
            plgpu.barrier_wait(local["turn"].at[wg])

        def products_and_softmax(state: tuple) -> None:
            acc_ref, s_ref, p_ref, top_ref, total_ref, correction_ref = state
            issue_scores(s_ref, slot)
            plgpu.wgmma(acc_ref, local["weights"].at[wg] if blocks.weights_in_shared else p, rows.value(previous))
            if takes_turns:
                plgpu.barrier_arrive(local["turn"].at[lax.rem(wg + 1, jnp.int32(blocks.warpgroups))])
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p_ref[...], top_ref[...], total_ref[...], correction_ref[...] = softmax(
                s, scores, i, top, total, is_edge(i)
            )
            plgpu.barrier_arrive(local["key free"].at[slot])
            before_wait(total_ref[...])

        # Leaving `run_state` waits for the second product.
        weights = plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)
        acc, _, p, top, total, correction = pl.run_state(products_and_softmax)(
            (plgpu.ACC.init(acc), plgpu.ACC.init(initial), weights, top, total, top)
        )
        plgpu.barrier_arrive(local["value free"].at[previous])
        if waits_at_end:
            rows.wait_for_value(i, may_be_padded=not intervals.is_cut)
        return acc * columns_of(correction, acc.shape), put(p), top, total

    def put(p: Any) -> Any:
        """What is carried from step to step: nothing if the weights are in shared memory."""
        operand = rows.as_operand(p)
        return top if blocks.weights_in_shared else operand

    carry = lax.fori_loop(1, num_tiles, step, (rows.no_output, put(p), top, total))
    acc, p, top, total = lax.optimization_barrier(carry)
    plgpu.barrier_arrive(local["query free"].at[wg])
    last = rows.slot(num_tiles - 1)
    if not waits_at_end:
        rows.wait_for_value(num_tiles - 1)
    weights = local["weights"].at[wg] if blocks.weights_in_shared else p
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, rows.value(last)))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(local["value free"].at[last])

    total = total.sum(axis=1)
    out = acc * columns_of(logits.rescaling / total, acc.shape)
    lse = (from_base_2(top, logits.unit) if logits.has_scores else top * LN2) + jnp.log2(total) * LN2
    no_key = NO_KEY * logits.unit.ceiling
    if blocks.parts > 1:
        lse = jnp.where((top > no_key) & jnp.logical_not(item.is_empty), lse, _LOWEST)
    elif intervals.is_traced:
        # Rows past the query's length have no key: their weights are those of masked logits.
        out = jnp.where(columns_of(top, acc.shape) > no_key, out, 0.0)
        lse = jnp.where(top > no_key, lse, 0.0)
    rows.write(out, lse)
