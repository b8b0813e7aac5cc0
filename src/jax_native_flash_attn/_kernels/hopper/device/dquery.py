"""Gradient of query for Hopper GPUs: one block of query rows against its key/value tiles, as the forward kernel goes.

With P the softmax weights, recomputed from the log-sum-exp, and S, dP, dS tiles of scores and cotangents
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2; delta as in `xla/cotangent.py`):

    S = Q K^T    dP = dO V^T    dS = P * (dP - delta)    dQ += dS K

    load     | K0 V0 K1 V1 ... into a ring of `stages` slots
    compute  | S0 dP0 | dS0 | S1 dP1 dQ+=dS0 K0 ...... | S2 dP2 dQ+=dS1 K1 ...... |
             |        |     | (tensor cores)   dS1     | (tensor cores)   dS2     |

The three products of a step are issued at once and finish in order: dS1 is computed beside the last of them.

As in the forward, a block of threads goes through several items, one after the other, where these are short: rows of
the next item, and its first tiles, are then loaded while the last one ends.

The gradient of scale, sum_ts dS_ts x_ts with x = Q K^T, has terms of both signs that cancel. So dS is not rounded for
it, and comes without the error of delta, which is the same for a whole row (`xla/cotangent.py`): the kernel
leaves three sums, the *moments* of each row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..host.dquery_plan import DQueryBuffers, DQueryOuts, DQueryPlan
from ..operands import BackwardOperands
from ..pallas import hide_from_compiler, pl, plgpu, warp_specialize, zeros
from ..scheduler import Item
from .dquery_context import DQueryContext, DQueryRows
from .tf32 import add_products
from .transfers import key_slice, query_slice

_MAX_PIPELINED = 192  # head dimension


def kernel(plan: DQueryPlan, operands: BackwardOperands, outs: DQueryOuts, buffers: DQueryBuffers) -> None:
    """Of one block of threads."""
    context = DQueryContext.of(plan, operands, outs, buffers)

    def load_all() -> None:
        context.for_each_item(plan.scheduler, functools.partial(_load_item, context))

    def compute_all() -> None:
        context.for_each_item(plan.scheduler, functools.partial(_compute_item, context))
        plgpu.wait_smem_to_gmem(0)

    warp_specialize(context.wg, plan.blocks.warpgroups, plan.blocks.registers, load_all, compute_all)


def _load_item(context: DQueryContext, k: Any, item: Item) -> None:
    """Load what the k-th item of this worker takes."""
    blocks, buffers, scheduler, operands = context.blocks, context.buffers, context.plan.scheduler, context.operands
    for w in range(blocks.warpgroups):
        at = scheduler.buffer(k, w, blocks.warpgroups)
        if not scheduler.is_single:
            pl.when(k >= scheduler.buffers)(lambda at=at: plgpu.barrier_wait(buffers.rows_free.at[at]))
        for ref, views in ((operands.query, context.query), (context.row_operands.dout, context.dout)):
            row = item.block * blocks.rows + w * blocks.block_q
            rows = query_slice(ref, item.head, row, blocks.block_q)
            plgpu.copy_gmem_to_smem(rows, views.loaded.at[at], buffers.rows_ready.at[at])

    def load_tile(i: Any, carry: None) -> None:
        n, tile = item.count + i, item.tile(i)
        for ring, ref, views in (
            (context.key_ring, operands.key, context.key),
            (context.value_ring, operands.value, context.value),
        ):
            slot = ring.slot(n)
            ring.wait_until_free(n, slot)
            keys = key_slice(ref, item.head, context.sizes.G, tile, blocks.block_kv)
            plgpu.copy_gmem_to_smem(keys, views.loaded.at[slot], ring.ready.at[slot])
        if context.transposed_key is not None:
            slot, columns = context.key_ring.slot(n), blocks.block_kv
            ready = context.key_ring.ready.at[slot]
            context.transposed_key.copy_tile(item.head, context.sizes.G, tile * columns, columns, slot, ready)
        ring = context.value_ring
        slot = ring.slot(n)
        for term in context.terms.tiled:
            row = item.block * blocks.rows
            term.copy_tile(item.head, row, blocks.rows, tile, blocks.block_kv, slot, ring.ready.at[slot])

    lax.fori_loop(0, item.num_tiles, load_tile, None)


def _compute_item(context: DQueryContext, k: Any, item: Item) -> None:
    rows = DQueryRows(context, k, item)
    plgpu.barrier_wait(context.buffers.rows_ready.at[rows.buffer])
    is_pipelined = context.sizes.H <= _MAX_PIPELINED and not context.plan.is_float32
    acc, moments = _pipelined(rows) if is_pipelined else _one_by_one(rows)
    rows.write(acc, moments)


def _pipelined(rows: DQueryRows) -> tuple[jax.Array, tuple]:
    context, item, logits, shape = rows.context, rows.item, rows.logits, rows.shape
    start, acc, moments = 0, None, rows.no_moments
    if context.edges_first:
        start, acc = jnp.maximum(item.num_edges - 1, 0), _no_tiles(rows)
        acc, moments = lax.fori_loop(0, start, functools.partial(_tile_alone, rows, masked=True), (acc, moments))
    first_key, first_value = rows.key_slot(start), rows.value_slot(start)
    rows.wait_for_tile(jnp.int32(start), is_first=True)
    products: Any = pl.run_state(lambda state: rows.issue(state[0], state[1], rows.buffer, first_key, first_value))
    s, dp = products((plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))))
    terms = logits.tile_terms(rows.vectors, item.tile(start), first_value)
    ds, moments = rows.dlogits(s, dp, terms, start, rows.has_edges, moments)
    context.value_ring.release(first_value)

    carry = _no_tiles(rows) if acc is None else acc, ds, moments
    carry = lax.fori_loop(start + 1, rows.num_tiles, functools.partial(_step, rows), carry)
    acc, ds, moments = lax.optimization_barrier(carry)
    last = rows.key_slot(rows.num_tiles - 1)
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, context.key.tiles.at[last]))(plgpu.ACC.init(acc))
    context.key_ring.release(last)
    return acc, moments


def _no_tiles(rows: DQueryRows) -> jax.Array:
    """The gradient before the first tile."""
    return zeros(rows.context.blocks.block_q, rows.context.sizes.H)


def _step(rows: DQueryRows, i: Any, carry: tuple) -> tuple:
    """S, dP and dS of tile i, beside the product of dS with the tile before."""
    context, item, shape = rows.context, rows.item, rows.shape
    acc, ds, moments = lax.optimization_barrier(carry)
    slot, value_slot, previous = rows.key_slot(i), rows.value_slot(i), rows.key_slot(i - 1)
    rows.wait_for_tile(i, is_first=False)
    terms = rows.logits.tile_terms_before_products(rows.vectors, item.tile(i), value_slot)

    def products(state: tuple) -> None:
        acc_ref, s_ref, dp_ref, ds_ref, *moment_refs = state
        rows.issue(s_ref, dp_ref, rows.buffer, slot, value_slot)
        plgpu.wgmma(acc_ref, ds, context.key.tiles.at[previous])
        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
        so_far = tuple(ref[...] for ref in moment_refs)
        has_edges = context.intervals.has_many_edges(context.blocks.rows) and not context.edges_first
        is_edge = has_edges and item.is_edge(i)
        ds_ref[...], so_far = rows.dlogits(s, dp, terms, i, is_edge, so_far)
        for ref, x in zip(moment_refs, so_far, strict=True):
            ref[...] = x
        context.value_ring.release(value_slot)

    # Leaving `run_state` waits for the product with the previous keys.
    initial = plgpu.ACC.init(acc), plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))
    acc, _, _, ds, *moments = pl.run_state(products)((*initial, zeros(*shape).astype(context.dtype), *moments))
    context.key_ring.release(previous)
    return acc, ds, tuple(moments)


def _one_by_one(rows: DQueryRows) -> tuple[jax.Array, tuple]:
    """For head dimensions that leave no registers for two tiles at once."""

    def step(i: Any, carry: tuple) -> tuple:
        return _tile_alone(rows, i, carry, masked=None)

    carry = _no_tiles(rows), rows.no_moments
    return lax.fori_loop(0, rows.num_tiles, step, carry)


def _tile_alone(rows: DQueryRows, i: Any, carry: tuple, *, masked: bool | None) -> tuple:
    """All of tile i; whether it is `masked` is found out for None."""
    context, item, shape = rows.context, rows.item, rows.shape
    acc, moments = carry
    slot, value_slot = rows.key_slot(i), rows.value_slot(i)
    rows.wait_for_tile(i, is_first=True)  # or any other
    # The compiler would keep the descriptors of query and dout, one for each 16 columns, in registers
    # from step to step, and spill (a third of the instructions; 10% of a gradient).
    buffer = hide_from_compiler(rows.buffer)
    products: Any = pl.run_state(lambda state: rows.issue(state[0], state[1], buffer, slot, value_slot))
    s, dp = products((plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))))
    if masked is None:
        masked = rows.has_edges and item.is_edge(i)
    if not context.terms.tiled:  # those come with the values, and are yet to be read
        context.value_ring.release(value_slot)
    terms = rows.logits.tile_terms(rows.vectors, item.tile(i), value_slot)
    ds, moments = rows.dlogits(s, dp, terms, i, masked, moments)
    if context.terms.tiled:
        context.value_ring.release(value_slot)
    acc, ds = lax.optimization_barrier((acc, ds))
    if context.transposed_key is not None:
        (acc,) = add_products((acc, ds, context.transposed_key.tile(slot)))
    else:
        key = context.key.tiles.at[slot]
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, key))(plgpu.ACC.init(acc))
    context.key_ring.release(slot)
    return acc, moments
