"""Gradients of query, key and value in one kernel for Hopper GPUs: five products for a tile.

As in `dkey_dvalue.py`, blocks of threads go through blocks of keys, and tiles are transposed (notation as in
`dquery.py`). What `dquery.py` computes again is here added up in global memory, in an order that is the same every time
(`addition_order.py`), by TMA, in float32:

    S^T = K Q^T    dP^T = V dO^T    dS^T = P^T * (dP^T - delta)    dV += P^T dO    dK += dS^T Q    dQ += dS K

    load     | Q0 dO0 lse0 delta0 ... into a ring of two slots | add dQ0, when it is its turn | Q2 dO2 ... | add dQ1
    compute  | S0 dP0 ...... | dV += P0 dO0 ...... | dQ0 = dS0 K  dK += dS0 Q0 ...... | S1 dP1
             |    |   P0     | (tensor cores)  dS0 | (tensor cores)   dQ0 leaves      |

Two compute warpgroups have 64 keys each. dQ sums over both: they exchange dS through shared memory, and each makes half
of the columns. So they keep step, once for each tile.

The compiler's own barriers around shared memory would take 4% of the time, and are off: each thread meets the others of
its warpgroup in `commit_smem`, and those of other warpgroups in barriers at which every thread arrives.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.numerics import LOG2E
from ..addition_order import BLOCK_KEYS, BLOCK_ROWS, Work
from ..host.fused_plan import HALF, HEAD_DIM, FusedBuffers, FusedGradients, FusedPlan
from ..operands import BackwardOperands
from ..pallas import COLUMN, hide_from_compiler, load, pl, plgpu, store, warp_specialize, zeros
from .backward import Weights, logits_cotangent, scaled_lse, softmax_weights
from .changes import prepared
from .fused_context import FusedContext
from .logits import TileLogits
from .masks import within_band
from .terms import RowVectors, TileTerms
from .transfers import query_slice, row_slice

_KEYS = BLOCK_KEYS // 2  # of one warpgroup
_SLOTS = 2  # of dS, and of dQ
_LAG = 2  # tiles between what is loaded and what is added: the steps that a tile takes


def kernel(plan: FusedPlan, operands: BackwardOperands, outs: FusedGradients, buffers: FusedBuffers) -> None:
    """Of one block of threads."""
    context = FusedContext.of(plan, operands, outs, buffers)

    def compute_all() -> None:
        context.for_each_work(lambda _, work, count: _compute(context, work, count))
        plgpu.wait_smem_to_gmem(0)

    def load_all() -> None:
        context.for_each_work(lambda k, work, count: _load_and_add(context, k, work, count))
        plgpu.wait_smem_to_gmem(0)

    warp_specialize(context.wg, plan.blocks.warpgroups, plan.blocks.registers, load_all, compute_all)


def _load_and_add(context: FusedContext, k: Any, work: Work, count: Any) -> None:
    """Load what one block of keys takes, and add what it gives to the gradient of query."""
    buffers, order, operands = context.buffers, context.plan.order, context.operands
    *batch, kv_head = context.kv_head(work)
    pl.when(k > 0)(lambda: plgpu.barrier_wait(buffers.keys_free))
    for w in range(2):
        at = pl.ds(work.block * BLOCK_KEYS + w * _KEYS, _KEYS)
        for half in range(2):
            key = operands.key.at[(*batch, at, kv_head, pl.ds(half * HALF, HALF))]
            plgpu.copy_gmem_to_smem(key, buffers.key.at[w, half], buffers.keys_ready)
        plgpu.copy_gmem_to_smem(operands.value.at[(*batch, at, kv_head)], buffers.value.at[w], buffers.keys_ready)
    steps = work.tiles * order.group

    def visit(i: Any, carry: tuple) -> tuple:
        loaded, added = carry
        pl.when(i < steps)(lambda: _load_rows(context, work, i, count, loaded))
        pl.when(i >= _LAG)(lambda: _add(context, work, i - _LAG, count, added))
        return order.following(work, loaded), jnp.where(i >= _LAG, order.following(work, added), added)

    lax.fori_loop(0, steps + _LAG, visit, (work.first, work.first))


def _load_rows(context: FusedContext, work: Work, i: Any, count: Any, tile: Any) -> None:
    """What step i takes of the query rows of a tile."""
    ring, buffers, rows = context.rows_ring, context.buffers, context.row_operands
    head, row, slot = context.head(work, context.member(work, i)), tile * BLOCK_ROWS, ring.slot(count + i)
    ring.wait_until_free(count + i, slot)
    for ref, buffer in ((context.operands.query, buffers.query), (rows.dout, buffers.dout)):
        plgpu.copy_gmem_to_smem(query_slice(ref, head, row, BLOCK_ROWS), buffer.at[slot], ring.ready.at[slot])
    for ref, buffer in ((rows.lse, buffers.lse), (rows.delta, buffers.delta)):
        plgpu.copy_gmem_to_smem(row_slice(ref, head, row, BLOCK_ROWS), buffer.at[slot], ring.ready.at[slot])


def _add(context: FusedContext, work: Work, i: Any, count: Any, tile: Any) -> None:
    """Add the gradient of query of step i, once all earlier additions to its tile are there."""
    buffers, slot, member = context.buffers, _slot(count + i), context.member(work, i)
    turn, rank = context.turn(work, member, tile), context.plan.order.rank(work, tile)
    plgpu.barrier_wait(buffers.dquery_ready.at[slot])
    plgpu.semaphore_wait(turn, rank, decrement=False, memory_scope="gpu")
    rows = query_slice(context.outs.query, context.head(work, member), tile * BLOCK_ROWS, BLOCK_ROWS)

    def copy(**options: Any) -> None:
        for half in range(2):
            columns = rows.at[:, pl.ds(half * HALF, HALF)]
            plgpu.copy_smem_to_gmem(buffers.dquery.at[slot, half], columns, **options)

    pl.when(rank == 0)(copy)
    pl.when(rank > 0)(lambda: copy(reduction_op="add"))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(buffers.dquery_free.at[slot])
    plgpu.wait_smem_to_gmem(0)
    plgpu.semaphore_signal(turn, memory_scope="gpu")


def _compute(context: FusedContext, work: Work, count: Any) -> None:
    buffers, order, wg = context.buffers, context.plan.order, context.wg
    scale = context.logits(work, 0, None).scale
    plgpu.barrier_wait(buffers.keys_ready)

    def step(carry: tuple, masked: Any) -> tuple:
        i, tile, sums = carry
        n, member = count + i, context.member(work, i)
        slot = context.rows_ring.slot(n)
        logits = context.logits(work, member, scale)
        rows = logits.rows(tile * BLOCK_ROWS, late=True)
        terms = logits.tile_terms(rows, work.block * 2 + wg)
        # Hidden, descriptors of keys and values stay in no registers: see `dquery.py`.
        key_tile = FusedTile(context, logits, rows, terms, work.block * 2 + wg, masked, n, slot, hide_from_compiler(wg))
        sums = lax.optimization_barrier(sums)
        context.rows_ring.wait_until_ready(slot)
        initial = zeros(_KEYS, BLOCK_ROWS), zeros(_KEYS, BLOCK_ROWS), *sums, zeros(BLOCK_ROWS, HALF)
        # Leaving `run_state` waits for all products.
        _, _, dkey, dvalue, _ = pl.run_state(key_tile.products)(tuple(map(plgpu.ACC.init, initial)))
        context.rows_ring.release(slot)
        return i + 1, order.following(work, tile), (dkey, dvalue)

    def steps(number: Any, carry: tuple, masked: Any) -> tuple:
        return lax.fori_loop(0, number, lambda _, carry: step(carry, masked), carry)

    carry = jnp.int32(0), work.first, (zeros(_KEYS, HEAD_DIM), zeros(_KEYS, HEAD_DIM))
    if order.is_causal:
        # Loops of their own for tiles at the diagonal, first ones going up and last ones going down: a branch in the
        # pipeline takes registers that there are not.
        edges, is_down = jnp.minimum(2, work.tiles), work.step < 0

        def part(s: Any, carry: tuple) -> tuple:
            carry = steps(jnp.where(is_down & (s == 0), 0, edges), carry, masked=True)
            return steps(jnp.where(is_down & (s == order.group), 0, work.tiles - edges), carry, masked=False)

        carry = lax.fori_loop(0, order.group + is_down.astype(jnp.int32), part, carry)
    else:
        carry = steps(work.tiles * order.group, carry, context.is_last_part(work))
    *_, (dkey, dvalue) = carry
    plgpu.barrier_arrive(buffers.keys_done)
    plgpu.barrier_wait(buffers.keys_done)
    _write_keys(context, work, dkey * scale, dvalue)


def _write_keys(context: FusedContext, work: Work, dkey: jax.Array, dvalue: jax.Array) -> None:
    """Start writing the gradients of this warpgroup's keys and values, through the memory of these."""
    buffers, outs, wg = context.buffers, context.outs, context.wg
    *batch, kv_head, part = context.kv_head_and_part(work)
    keys = pl.ds(work.block * BLOCK_KEYS + wg * _KEYS, _KEYS)
    if context.plan.is_wide:
        store(outs.key.at[(*batch, part, keys, kv_head)], dkey)
        store(outs.value.at[(*batch, part, keys, kv_head)], dvalue)
        plgpu.barrier_arrive(buffers.keys_free)
        return
    for half in range(2):
        store(buffers.key.at[wg, half], dkey[:, half * HALF : (half + 1) * HALF].astype(context.dtype))
    store(buffers.value.at[wg], dvalue.astype(context.dtype))
    plgpu.commit_smem()
    for half in range(2):
        out = outs.key.at[(*batch, keys, kv_head, pl.ds(half * HALF, HALF))]
        plgpu.copy_smem_to_gmem(buffers.key.at[wg, half], out)
    plgpu.copy_smem_to_gmem(buffers.value.at[wg], outs.value.at[(*batch, keys, kv_head)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(buffers.keys_free)


def _slot(n: Any) -> Any:
    """Of dS and of dQ in the n-th step of a worker."""
    return lax.rem(n, jnp.int32(_SLOTS))


@dataclass(frozen=True)
class FusedTile:
    """One step: a tile of a warpgroup's keys and of query rows.

    Attributes:
      tile: number of the tile of keys.
      masked: whether the tile needs a mask.
      n: number of the step.
      slot: of the query rows.
      buffer: of the warpgroup's keys and values, and the half of the columns of dQ that it makes.
    """

    context: FusedContext
    logits: TileLogits
    rows: RowVectors
    terms: TileTerms
    tile: Any
    masked: Any
    n: Any
    slot: Any
    buffer: Any

    def products(self, state: tuple) -> None:
        """All of them."""
        s_ref, dp_ref, dkey_ref, dvalue_ref, dquery_ref = state
        context, buffers, wg = self.context, self.context.buffers, self.context.wg
        query, dout = buffers.query.at[self.slot], buffers.dout.at[self.slot]
        for half in range(2):
            columns = query.at[:, pl.ds(half * HALF, HALF)]
            plgpu.wgmma(s_ref, buffers.key.at[self.buffer, half], columns.transpose((1, 0)))
        s: Any = None
        if context.config.logits_soft_cap is not None:  # its branch takes the registers of dP
            s = prepared(self.logits, plgpu.wgmma_accumulator_load(s_ref, wait_n=0), self.logits.scale * LOG2E)
        plgpu.wgmma(dp_ref, buffers.value.at[self.buffer], dout.transpose((1, 0)))
        weights = self._weights(plgpu.wgmma_accumulator_load(s_ref, wait_n=1) if s is None else s)
        rounded = weights.p.astype(context.dtype)
        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
        plgpu.wgmma(dvalue_ref, rounded, dout)
        delta = self._of_rows(buffers.delta)
        ds = logits_cotangent(self.logits, weights.through, dp, self.rows, self.tile, delta).astype(context.dtype)
        at = _slot(self.n)
        store(buffers.dlogits.at[at, wg], ds)
        plgpu.commit_smem()
        plgpu.barrier_arrive(buffers.dlogits_ready.at[at])
        plgpu.barrier_wait(buffers.dlogits_ready.at[at])
        for w in range(2):
            plgpu.wgmma(dquery_ref, buffers.dlogits.at[at, w].transpose((1, 0)), buffers.key.at[w, self.buffer])
        plgpu.wgmma(dkey_ref, ds, query)
        dquery = plgpu.wgmma_accumulator_load(dquery_ref, wait_n=1)
        pl.when(self.n >= _SLOTS)(lambda: plgpu.barrier_wait(buffers.dquery_free.at[at]))
        store(buffers.dquery.at[at, wg], dquery)
        plgpu.commit_smem()
        plgpu.barrier_arrive(buffers.dquery_ready.at[at])

    def _of_rows(self, buffer: Any) -> jax.Array:
        """Read late: a vector along the columns takes 16 registers, and these are all in use."""
        return load(buffer.at[self.slot], layout=COLUMN)

    def _weights(self, s: Any) -> Weights:
        """P^T. It is masked last, where fewest registers are in use."""
        lse = scaled_lse(self.context.row_operands, self._of_rows(self.context.buffers.lse))
        weights = softmax_weights(self.logits, s, self.terms, self.rows, self.tile, lse, masked=False)

        def edge(weights: Weights) -> Weights:
            # Counted from the tile's first key: that leaves fewer numbers in registers.
            S, first, band = self.context.sizes.S, self.tile * _KEYS, self.context.config.band
            row, end = hide_from_compiler(self.rows.row) - first, S - first if S % BLOCK_KEYS else None
            return weights.where(within_band(band, row, 0, end, self.logits.shape, q_axis=1))

        if isinstance(self.masked, bool):
            return edge(weights) if self.masked else weights
        return lax.cond(self.masked, edge, lambda weights: weights, weights)
