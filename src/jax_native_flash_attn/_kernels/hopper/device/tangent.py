"""Tangent of attention for Hopper GPUs: blocks of query rows against their key/value tiles, as the forward kernel goes.

With P the softmax weights, recomputed from the log-sum-exp, S and dS tiles of scores and their tangent, and dS of a row
from a reference r on, which is one number for each row (`TangentRows.mean`):

    S = Q K^T    dS = dQ K^T + Q dK^T - r    dO += (P * dS) V + P dV

    load     | K0 dK0 V0 dV0 K1 dK1 ... into two rings of `stages` slots, one for keys and one for values
    compute  | S0 dS0 | P0 dS0 | S1 dS1 dO+=P0dS0 V0 + P0 dV0 .... | S2 dS2 dO+=P1dS1 V1 + P1 dV1 .... |
             |        |        |    P1  (tensor cores)   P1dS1     |    P2  (tensor cores)   P2dS2     |

The five products of a step are issued at once and finish in order: P1 is computed beside dS1, P1dS1 beside those with
the values. In the end dlse = r + sum P dS, and dO is corrected by (r - dlse) O. Tangents that are zero have no product.

As in the forward, a block of threads goes through several items, one after the other, where these are short.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..host.tangent_plan import TangentBuffers, TangentOuts, TangentPlan
from ..operands import TangentOperands
from ..pallas import hide_from_compiler, pl, plgpu, warp_specialize, zeros
from ..scheduler import Item
from .overlap import fold_columns, order_before_wgmma_wait
from .tangent_context import NO_MEAN, TangentContext, TangentRows
from .transfers import key_slice, query_slice


def kernel(plan: TangentPlan, operands: TangentOperands, outs: TangentOuts, buffers: TangentBuffers) -> None:
    """Of one block of threads."""
    context = TangentContext.of(plan, operands, outs, buffers)

    def load_all() -> None:
        context.for_each_item(plan.scheduler, functools.partial(_load_item, context))

    def compute_all() -> None:
        context.for_each_item(plan.scheduler, functools.partial(_compute_item, context))
        plgpu.wait_smem_to_gmem(0)

    warp_specialize(context.wg, plan.blocks.warpgroups, plan.blocks.registers, load_all, compute_all)


def _load_item(context: TangentContext, k: Any, item: Item) -> None:
    """Load what the k-th item of this worker takes."""
    blocks, buffers, scheduler = context.blocks, context.buffers, context.plan.scheduler
    operands, tangents = context.operands, context.tangent_operands.tangents
    for w in range(blocks.warpgroups):
        at = scheduler.buffer(k, w, blocks.warpgroups)
        if not scheduler.is_single:
            pl.when(k >= scheduler.buffers)(lambda at=at: plgpu.barrier_wait(buffers.rows_free.at[at]))
        for ref, views in ((operands.query, context.query), (tangents.query, context.dquery)):
            if views is not None:
                rows = query_slice(ref, item.head, item.block * blocks.rows + w * blocks.block_q, blocks.block_q)
                plgpu.copy_gmem_to_smem(rows, views.loaded.at[at], buffers.rows_ready.at[at])

    def load_tile(i: Any, carry: None) -> None:
        n, tile = item.count + i, item.tile(i)
        keys = (operands.key, context.key), (tangents.key, context.dkey)
        values = (operands.value, context.value), (tangents.value, context.dvalue)
        for ring, pairs, terms in (
            (context.key_ring, keys, (*context.terms.tiled, *context.dterms.tiled)),
            (context.value_ring, values, ()),
        ):
            slot = ring.slot(n)
            ring.wait_until_free(n, slot)
            for ref, views in pairs:
                if views is not None:
                    some = key_slice(ref, item.head, context.sizes.G, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(some, views.loaded.at[slot], ring.ready.at[slot])
            for term in terms:
                row = item.block * blocks.rows
                term.copy_tile(item.head, row, blocks.rows, tile, blocks.block_kv, slot, ring.ready.at[slot])

    lax.fori_loop(0, item.num_tiles, load_tile, None)


def _compute_item(context: TangentContext, k: Any, item: Item) -> None:
    rows = TangentRows(context, k, item)
    plgpu.barrier_wait(context.buffers.rows_ready.at[rows.buffer])
    operands, means, sums = _tile_alone(rows, jnp.int32(0), None, rows.no_sums, is_first=True)
    acc = zeros(context.blocks.block_q, context.sizes.D)
    if context.plan.overlaps:
        step = functools.partial(_step, rows)
        acc, operands, means, sums = lax.fori_loop(1, rows.num_tiles, step, (acc, operands, means, sums))
        acc = _added(rows, acc, operands, rows.num_tiles - 1)
    else:
        acc = _added(rows, acc, operands, jnp.int32(0))
        whole_tile = functools.partial(_whole_tile, rows)
        acc, means, sums = lax.fori_loop(1, rows.num_tiles, whole_tile, (acc, means, sums))
    rows.write(acc, means, sums)


def _tile_alone(rows: TangentRows, i: Any, means: Any, sums: tuple, *, is_first: bool) -> tuple:
    """Of tile i, all but the products with the values."""
    context, slot = rows.context, rows.slot(i)
    context.key_ring.wait_until_ready(slot)
    # As in `dquery.py`: else descriptors of the query would stay in registers.
    buffer = hide_from_compiler(rows.buffer)

    def issue(refs: tuple) -> None:
        rows.issue(refs, buffer, slot)

    products: Any = pl.run_state(issue)(tuple(map(plgpu.ACC.init, rows.no_products())))
    terms = rows.logits.tile_terms(rows.vectors, rows.item.tile(i), slot)
    masked = _is_masked(rows, i, is_first=is_first)
    weights = rows.weights(products[0], terms, i, masked)
    dx = rows.dlogits(products, i, slot, masked) if context.tangent_operands.has_dlogits else None
    if is_first and context.is_centered and dx is not None:
        means = rows.mean(weights, dx)
    elif not is_first:
        means = _means_with(rows, means, weights, dx, i)
    operands, sums = rows.operands(weights, dx, means, i, sums)
    context.key_ring.release(slot)
    return operands, means, sums


def _means_with(rows: TangentRows, means: Any, weights: Any, dx: Any, i: Any) -> Any:
    """With those of tile i, where the tiles before gave a row none.

    Without a bias or the like, only tiles that need a mask leave rows without a weight, and the next one ends that.
    """
    context = rows.context
    if dx is None or not context.moves_reference:
        return means

    def update(means: Any) -> Any:
        return jnp.where(means > NO_MEAN, means, rows.mean(weights, dx))

    if context.excludes_anywhere:
        return update(means)
    is_due = (i == 1) | _is_masked(rows, i, is_first=False) | _is_masked(rows, i - 1, is_first=False)
    return lax.cond(is_due, update, lambda means: means, means)


def _whole_tile(rows: TangentRows, i: Any, carry: tuple) -> tuple:
    """For block shapes that leave no registers for two tiles at once."""
    acc, means, sums = carry
    operands, means, sums = _tile_alone(rows, i, means, sums, is_first=False)
    return _added(rows, acc, operands, i), means, sums


def _added(rows: TangentRows, acc: Any, operands: tuple, i: Any) -> Any:
    """With the products of tile i with the values."""
    slot = rows.slot(i)
    rows.wait_for_values(i)
    acc, operands = lax.optimization_barrier((acc, operands))

    def add(acc_ref: Any) -> None:
        rows.add(acc_ref, operands, slot)

    acc = pl.run_state(add)(plgpu.ACC.init(acc))
    rows.context.value_ring.release(slot)
    return acc


def _is_masked(rows: TangentRows, i: Any, *, is_first: bool) -> Any:
    """Whether tile i needs a mask; where that is not known before, a scalar."""
    intervals, item = rows.context.intervals, rows.item
    if is_first:
        return intervals.has_left_edge or intervals.has_right_edge
    is_edge = intervals.has_many_edges(rows.context.blocks.rows) and item.is_edge(i)
    # A head without keys attends all tiles, with logits of 0.
    is_all_dead = intervals.is_cut and not intervals.is_moved and intervals.is_dead(item.head)
    return is_all_dead if is_edge is False else is_edge | is_all_dead


def _step(rows: TangentRows, i: Any, carry: tuple) -> tuple:
    """Products, weights and dS of tile i, beside the products with the values of the tile before."""
    context, slot, previous = rows.context, rows.slot(i), rows.slot(i - 1)
    acc, operands, means, sums = lax.optimization_barrier(carry)
    # All waits come first: control flow between two products would serialise them.
    context.key_ring.wait_until_ready(slot)
    rows.wait_for_values(i - 1)
    terms = rows.logits.tile_terms_before_products(rows.vectors, rows.item.tile(i), slot)

    def products(state: tuple) -> None:
        acc_ref, refs, operand_refs, means_refs, sum_refs = state
        behind_first = rows.issue(refs, rows.buffer, slot)
        behind_all = rows.add(acc_ref, operands, previous)
        masked = _is_masked(rows, i, is_first=False)
        s = plgpu.wgmma_accumulator_load(refs[0], wait_n=behind_first + behind_all)
        weights = rows.weights(s, terms, i, masked)
        order_before_wgmma_wait(fold_columns(weights.p, jnp.add))
        loaded = (s, *(plgpu.wgmma_accumulator_load(ref, wait_n=behind_all) for ref in refs[1:]))
        dx = rows.dlogits(loaded, i, slot, masked) if context.tangent_operands.has_dlogits else None
        moved = _means_with(rows, means, weights, dx, i)
        found, so_far = rows.operands(weights, dx, moved, i, tuple(ref[...] for ref in sum_refs))
        kept = (moved,) if means_refs else ()
        for ref, x in zip((*operand_refs, *means_refs, *sum_refs), (*found, *kept, *so_far), strict=True):
            ref[...] = x
        context.key_ring.release(slot)
        if so_far:
            order_before_wgmma_wait(so_far[0])

    initial = plgpu.ACC.init(acc), tuple(map(plgpu.ACC.init, rows.no_products()))
    blank = zeros(*rows.shape).astype(context.dtype)
    # Leaving `run_state` waits for the products with the values.
    moving = (means,) if context.moves_reference else ()
    acc, _, operands, moving, sums = pl.run_state(products)((*initial, (blank,) * len(operands), moving, sums))
    context.value_ring.release(previous)
    return acc, operands, moving[0] if moving else means, sums
