"""Gradients of key and value for Hopper GPUs: one block of keys against the query tiles that attend it.

All tiles are transposed, keys along the rows, so that weights and their cotangents leave the softmax in registers as
the left operand of the next product (notation as in `dquery.py`):

    S^T = K Q^T    dP^T = V dO^T    dS^T = P^T * (dP^T - delta)    dV += P^T dO    dK += dS^T Q

    load     | Q0 dO0 lse0 delta0 Q1 ... into a ring of `stages` slots
    compute  | S0 dP0 | P0 dS0 | dV += P0 dO0  dK += dS0 Q0 | S1 dP1 | ...

or, where that is faster, with the softmax beside products of its own warpgroup:

    compute  | S0 dP0 ...... | dV += P0 dO0 ...... | dK += dS0 Q0 | S1 dP1 | ...
             |    |   P0     | (tensor cores)  dS0 |

Two compute warpgroups, each with its own keys, fill each other's gaps. What shares the keys of a block (the query heads
of a group, the batch rows of a batch that shares its keys) follows one after the other, so that their sum is made in
registers, in the same order every time. Where items are short, a block of threads goes through several, one after the
other: keys and values of the next, and its first rows, are then loaded while the last one ends.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..host.dkey_dvalue_plan import KeyBuffers, KeyGradients, KeyPlan
from ..operands import BackwardOperands
from ..pallas import COLUMN, hide_from_compiler, load, pl, plgpu, store, warp_specialize, zeros
from .backward import Weights, logits_cotangent, scaled_lse, softmax_weights
from .dkey_dvalue_context import KeyBlock, KeyContext, Visit
from .logits import TileLogits
from .terms import RowVectors, TileTerms
from .tf32 import add_products
from .transfers import query_slice, row_slice

_MOST_HELD = 256  # columns of key and value up to which the compiler may keep descriptors from step to step


def kernel(plan: KeyPlan, operands: BackwardOperands, outs: KeyGradients, buffers: KeyBuffers) -> None:
    """Of one block of threads."""
    context = KeyContext.of(plan, operands, outs, buffers)

    def compute_all() -> None:
        context.for_each_block(_compute_block)
        plgpu.wait_smem_to_gmem(0)

    def load_all() -> None:
        context.for_each_block(_load_block)

    warp_specialize(context.wg, plan.blocks.warpgroups, plan.blocks.registers, load_all, compute_all)


def _load_block(block: KeyBlock) -> None:
    context, scheduler, blocks = block.context, block.context.plan.scheduler, block.context.blocks
    buffers, operands, rows_ring = context.buffers, context.operands, context.rows_ring
    for w in range(blocks.warpgroups):
        at = scheduler.buffer(block.k, w, blocks.warpgroups)
        if not scheduler.is_single:
            pl.when(block.k >= scheduler.buffers)(lambda at=at: plgpu.barrier_wait(buffers.keys_free.at[at]))
        for ref, views in ((operands.key, context.key), (operands.value, context.value)):
            if views is not None:
                keys, ready = block.keys_of(ref, w), buffers.keys_ready.at[at]
                plgpu.copy_gmem_to_smem(keys, views.loaded.at[at], ready)

    def load_tile(i: Any, visit: Visit) -> Visit:
        (head, row), slot = block.place_of(visit, block.listed(visit)), block.slot(i)
        ready, mod_rows = rows_ring.ready.at[slot], block.mod_rows(head, row)
        rows_ring.wait_until_free(block.count + i, slot)
        row_operands = context.row_operands
        for ref, views in ((operands.query, context.query), (row_operands.dout, context.dout)):
            if views is not None:
                plgpu.copy_gmem_to_smem(query_slice(ref, head, row, blocks.block_q), views.loaded.at[slot], ready)
        for operand in (context.transposed_query, context.transposed_dout):
            if operand is not None:
                operand.copy_tile(head, 1, row, blocks.block_q, slot, ready)
        for ref, buffer in ((row_operands.lse, buffers.lse), (row_operands.delta, buffers.delta)):
            plgpu.copy_gmem_to_smem(row_slice(ref, head, row, blocks.block_q), buffer.at[slot], ready)
        for source, buffer in zip(mod_rows, buffers.mod_rows, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready)
        for term in context.terms.tiled:
            for w in range(blocks.warpgroups):
                tile = block.block * blocks.warpgroups + w
                term.copy_tile(head, row, blocks.block_q, tile, blocks.block_kv, (slot, w), ready)
        return block.following(visit)

    lax.fori_loop(0, block.num_steps, load_tile, block.first_visit)


def _compute_block(block: KeyBlock) -> None:
    context, plan, blocks = block.context, block.context.plan, block.context.blocks
    tile = block.block * blocks.warpgroups + context.wg  # of this warpgroup's keys
    mine = plan.scheduler.buffer(block.k, context.wg, blocks.warpgroups)
    scale = _logits_of(context, block.head_of(jnp.int32(0)), None, ()).scale
    plgpu.barrier_wait(context.buffers.keys_ready.at[mine])
    first = block.first_visit
    listed = block.listed(first), block.listed(block.following(first))
    first_kind, scalars = block.kind(first, listed[0]), block.scalars(first)

    def step(i: Any, carry: tuple) -> tuple:
        visit, listed, kind, scalars, sums = carry
        (head, row), slot, next_visit = block.place_of(visit, listed[0]), block.slot(i), block.following(visit)
        masked, is_whole = block.needs_mask(first_kind if isinstance(first_kind, bool) else kind)
        next_kind, next_listed = block.kind(next_visit, listed[1]), block.listed(block.following(next_visit))
        next_scalars = scalars if math.prod(plan.members) == 1 else block.scalars(next_visit)
        logits = _logits_of(context, head, None if plan.scale_is_summed else scale, scalars)
        if logits.mods is not None:
            staged = plan.staged(logits.mods.mods)
            logits.mods.staged = {x: b.at[slot] for x, b in zip(staged, context.buffers.mod_rows, strict=True)}
        # Else descriptors of keys and values would stay in registers, and spill: see `dquery.py`.
        at = hide_from_compiler(mine) if plan.sizes.H + plan.sizes.D > _MOST_HELD else mine
        rows = logits.rows(row, late=True, is_whole=is_whole)
        vectors = None if context.terms.tiled else logits.tile_terms(rows, tile)
        context.rows_ring.wait_until_ready(slot)
        terms = logits.tile_terms(rows, tile, slot) if vectors is None else vectors
        key_tile = KeyTile(context, logits, rows, terms, tile, masked, slot, at)
        sums = lax.optimization_barrier(sums)
        scores = zeros(*logits.shape), zeros(*logits.shape)
        # Leaving `run_state` waits for all products.
        if plan.is_float32:
            s, dp = pl.run_state(key_tile.scores)(jax.tree.map(plgpu.ACC.init, scores))
            sums = key_tile.added_from_registers(s, dp, sums)
        else:
            _, _, sums = pl.run_state(key_tile.products)(jax.tree.map(plgpu.ACC.init, (*scores, sums)))
        context.rows_ring.release(slot)
        return next_visit, (listed[1], next_listed), next_kind, next_scalars, sums

    sums = jax.tree.map(lambda x: zeros(blocks.block_kv, x.shape[-1]), plan.wanted)
    *_, sums = lax.fori_loop(0, block.num_steps, step, (first, listed, first_kind, scalars, sums))
    outs = context.outs
    if sums.key is not None:
        dkey = sums.key if plan.scale_is_summed else sums.key * scale
        _write(block, dkey, outs.key, context.key_result, mine)
    if sums.value is not None:
        _write(block, sums.value, outs.value, context.value_result, mine)
    if not plan.scheduler.is_single:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(context.buffers.keys_free.at[mine])


def _logits_of(context: KeyContext, head: tuple, scale: Any, scalars: Any) -> TileLogits:
    return TileLogits(context, head, row_in_block=context.wg, transposed=True, scale=scale, scalars=scalars)


def _write(block: KeyBlock, x: jax.Array, out: Any, buffers: Any, mine: Any) -> None:
    """Start writing a gradient of this warpgroup's keys, by way of shared memory unless it is wider."""
    context = block.context
    if out.dtype != context.dtype:
        store(block.keys_of(out, context.wg), x)
        return
    buffer = buffers.at[mine]
    store(buffer, x.astype(context.dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, block.keys_of(out, context.wg, is_result=True))


@dataclass(frozen=True)
class KeyTile:
    """One step: a tile of a warpgroup's keys and of query rows.

    Attributes:
      tile: number of the tile of keys, `buffer` where these are.
      masked: whether the tile needs a mask.
      slot: of the query rows.
    """

    context: KeyContext
    logits: TileLogits
    rows: RowVectors
    terms: TileTerms
    tile: Any
    masked: Any
    slot: Any
    buffer: Any

    def scores(self, state: tuple) -> None:
        """The products S^T and dP^T."""
        (s_ref, dp_ref), context = state, self.context
        query = context.query.tiles.at[self.slot]
        plgpu.wgmma(s_ref, context.key.tiles.at[self.buffer], query.transpose((1, 0)))
        if context.value is not None and context.dout is not None:
            dout = context.dout.tiles.at[self.slot]
            plgpu.wgmma(dp_ref, context.value.tiles.at[self.buffer], dout.transpose((1, 0)))

    def products(self, state: tuple) -> None:
        """All of them."""
        (s_ref, dp_ref, sum_refs), context = state, self.context
        assert context.dout is not None
        self.scores((s_ref, dp_ref))
        add = self._add_overlapped if context.plan.overlaps else self._add
        add(s_ref, dp_ref, sum_refs, context.query.tiles.at[self.slot], context.dout.tiles.at[self.slot])

    def added_from_registers(self, s: Any, dp: Any, sums: KeyGradients) -> KeyGradients:
        """In float32: `sums` and the products of this tile, from its scores."""
        weights = self._weights(s)
        ds = None if sums.key is None else self._dlogits(weights.through, dp)
        p = None if sums.value is None else self._dropped(weights.p)
        ds, p = lax.optimization_barrier((ds, p))
        wanted = (sums.value, p, self.context.transposed_dout), (sums.key, ds, self.context.transposed_query)
        results = iter(add_products(*((x, left, right.tile(self.slot)) for x, left, right in wanted if right)))
        value, key = (next(results) if right else None for _, _, right in wanted)
        return KeyGradients(key, value)

    def _add_overlapped(self, s_ref: Any, dp_ref: Any, sum_refs: KeyGradients, query: Any, dout: Any) -> None:
        """With the softmax beside dP, and dS beside the product for values."""
        weights = self._weights(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
        p = self._dropped(weights.p) if sum_refs.value is not None else None
        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
        if sum_refs.value is not None:
            plgpu.wgmma(sum_refs.value, p, dout)
        if sum_refs.key is not None:
            plgpu.wgmma(sum_refs.key, self._dlogits(weights.through, dp), query)

    def _add(self, s_ref: Any, dp_ref: Any, sum_refs: KeyGradients, query: Any, dout: Any) -> None:
        weights = self._weights(plgpu.wgmma_accumulator_load(s_ref, wait_n=0))
        ds = p = None
        if sum_refs.key is not None:
            ds = self._dlogits(weights.through, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0))
        if sum_refs.value is not None:
            p = self._dropped(weights.p)
        ds, p = lax.optimization_barrier((ds, p))
        if sum_refs.value is not None:
            plgpu.wgmma(sum_refs.value, p, dout)
        if sum_refs.key is not None:
            plgpu.wgmma(sum_refs.key, ds, query)

    def _of_rows(self, buffer: Any) -> jax.Array:
        """Read late: a vector along the columns takes 16 registers, and these are all in use."""
        return load(buffer.at[self.slot], layout=COLUMN)

    def _weights(self, s: Any) -> Weights:
        lse = scaled_lse(self.context.row_operands, self._of_rows(self.context.buffers.lse))
        return softmax_weights(self.logits, s, self.terms, self.rows, self.tile, lse, self.masked)

    def _dropped(self, weights: jax.Array) -> jax.Array:
        logits = self.logits
        return (logits.drop(weights, self.rows.row, self.tile) * logits.rescaling).astype(self.context.dtype)

    def _dlogits(self, weights: jax.Array, dp: Any) -> jax.Array:
        logits, delta = self.logits, self._of_rows(self.context.buffers.delta)
        ds = logits_cotangent(logits, weights, dp, self.rows, self.tile, delta)
        ds = logits.through_mask(ds, self.rows, self.tile, self.masked)
        return (ds * logits.scale if self.context.plan.scale_is_summed else ds).astype(self.context.dtype)
