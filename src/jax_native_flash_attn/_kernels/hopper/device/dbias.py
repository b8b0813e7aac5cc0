"""Gradient of a bias over the keys for Hopper GPUs, summed on the fly over the axes in which the bias broadcasts.

A block of threads goes through its visits of each tile of the bias that it owns (`host/dbias_plan.py`); the sum of
their dz stays in registers.

    load     | Q0 K0 dO0 V0 lse0 delta0 Q1 ... into a ring of `stages` slots
    compute  | S0 dP0 | dS0, sum | S1 dP1 | ...
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.tile_masks import EMPTY, FULL
from ..host.dbias_plan import DBiasBuffers, DBiasPlan
from ..operands import BackwardOperands
from ..pallas import ROW, Views, broadcast_index, load, pl, plgpu, store, unravel, warp_specialize, zeros
from ..scheduler import is_outside
from .backward import BackwardContext, logits_cotangent, softmax_weights
from .context import shared_fields
from .logits import TileLogits
from .masks import Intervals
from .transfers import Ring, key_slice, query_slice, row_slice


def kernel(plan: DBiasPlan, operands: BackwardOperands, out: Any, buffers: DBiasBuffers) -> None:
    """Of one block of threads."""
    block = BiasTiles.of(plan)
    context = DBiasContext.of(plan, operands, out, buffers)
    blocks = plan.blocks
    load_all, compute_all = (lambda: _load(context, block)), (lambda: _compute(context, block))
    warp_specialize(context.wg, blocks.warpgroups, blocks.registers, load_all, compute_all)


@dataclass(frozen=True)
class DBiasContext(BackwardContext):
    plan: DBiasPlan
    out: Any
    buffers: DBiasBuffers
    query: Views
    dout: Views
    key: Views
    value: Views
    ring: Ring

    @classmethod
    def of(cls, plan: DBiasPlan, operands: BackwardOperands, out: Any, buffers: DBiasBuffers) -> "DBiasContext":
        forward, blocks, tma, value_tma = operands.forward, plan.blocks, plan.tma, plan.value_tma
        return cls(
            **shared_fields(plan, forward, buffers.terms),
            row_operands=operands.rows,
            plan=plan,
            out=out,
            buffers=buffers,
            query=tma.views(buffers.query),
            dout=value_tma.views(buffers.dout),
            key=tma.views(buffers.key),
            value=value_tma.views(buffers.value),
            ring=Ring(blocks.stages, buffers.ready, buffers.free),
        )


class Visit(NamedTuple):
    """A tile of scores; whether any of its rows attends any of its keys, and whether not all attend all."""

    head: tuple
    block: Any
    tile: Any
    attends: Any
    is_edge: Any


@dataclass(frozen=True)
class BiasTiles:
    """What a block of threads owns: a run of tiles from `first_tile` on, at index `own` of `DBiasPlan.owned`.

    Attributes:
      begin: its first visit of a tile, `per_tile` how many it has.
      num_steps: visits of all tiles.
    """

    plan: DBiasPlan
    first_tile: Any
    own: tuple
    begin: Any
    per_tile: Any
    num_steps: Any

    @classmethod
    def of(cls, plan: DBiasPlan) -> "BiasTiles":
        first_tile, own = lax.axis_index("run") * plan.run, unravel(lax.axis_index("own"), plan.owned[:-1])
        own = (*own, lax.axis_index("rows"))
        begin = lax.axis_index("split") * plan.visits
        per_tile = jnp.minimum(plan.visits, plan.num_visits - begin)
        num_steps = jnp.minimum(plan.run, plan.key_blocks - first_tile) * per_tile
        return cls(plan, first_tile, own, begin, per_tile, num_steps)

    def visit(self, intervals: Intervals, i: Any) -> Visit:
        """Of step i."""
        plan = self.plan
        number = lax.div(i, self.per_tile)
        index, tile = unravel(self.begin + i - number * self.per_tile, plan.visited), self.first_tile + number
        *head, block = (a if n > 1 else b for a, b, n in zip(index, self.own, plan.visited, strict=True))
        if intervals.traced is not None and (classes := intervals.traced.tile_classes) is not None:
            found = classes[(*broadcast_index(head, classes.shape[:-2]), block, tile)]
            return Visit(tuple(head), block, tile, found != EMPTY, found != FULL)
        ranges = intervals.ranges(tuple(head), block, plan.blocks.rows)
        attends = (tile >= ranges.first) & (tile < ranges.stop)
        return Visit(tuple(head), block, tile, attends, is_outside(ranges, tile))


def _load(context: DBiasContext, block: BiasTiles) -> None:
    def step(i: Any, count: Any) -> Any:
        visit = block.visit(context.intervals, i)
        slot = context.ring.slot(count)
        pl.when(visit.attends)(lambda: _load_tile(context, visit, count, slot))
        return count + visit.attends.astype(jnp.int32)

    lax.fori_loop(0, block.num_steps, step, jnp.int32(0))


def _load_tile(context: DBiasContext, visit: Visit, count: Any, slot: Any) -> None:
    """Load what the `count`-th tile takes."""
    blocks, buffers, operands, rows = context.blocks, context.buffers, context.operands, context.row_operands
    head, ready = visit.head, context.ring.ready.at[slot]
    context.ring.wait_until_free(count, slot)
    for w in range(blocks.warpgroups):
        row = visit.block * blocks.rows + w * blocks.block_q
        for ref, views in ((operands.query, context.query), (rows.dout, context.dout)):
            plgpu.copy_gmem_to_smem(query_slice(ref, head, row, blocks.block_q), views.loaded.at[slot, w], ready)
        for ref, buffer in ((rows.lse, buffers.lse), (rows.delta, buffers.delta)):
            plgpu.copy_gmem_to_smem(row_slice(ref, head, row, blocks.block_q), buffer.at[slot, w], ready)
    for ref, views in ((operands.key, context.key), (operands.value, context.value)):
        keys = key_slice(ref, head, context.sizes.G, visit.tile, blocks.block_kv)
        plgpu.copy_gmem_to_smem(keys, views.loaded.at[slot], ready)
    for term in context.terms.tiled:
        term.copy_tile(head, visit.block * blocks.rows, blocks.rows, visit.tile, blocks.block_kv, slot, ready)


def _compute(context: DBiasContext, block: BiasTiles) -> None:
    shape = context.blocks.block_q, context.blocks.block_kv

    def step(i: Any, carry: tuple) -> tuple:
        visit = block.visit(context.intervals, i)

        def add(total: jax.Array, count: Any) -> tuple:
            return total + _dlogits(context, visit, count), count + 1

        def write(total: jax.Array) -> jax.Array:
            _write(context, block, visit.tile, total)
            return zeros(*shape)

        total, count = lax.cond(visit.attends, add, lambda total, count: (total, count), *carry)
        is_last = lax.rem(i + 1, block.per_tile) == 0
        return lax.cond(is_last, write, lambda total: total, total), count

    lax.fori_loop(0, block.num_steps, step, (zeros(*shape), jnp.int32(0)))


def _dlogits(context: DBiasContext, visit: Visit, count: Any) -> jax.Array:
    """dS of the `count`-th tile."""
    blocks, wg, tile = context.blocks, context.wg, visit.tile
    slot = context.ring.slot(count)
    logits = TileLogits(context, visit.head, row_in_block=wg * blocks.block_q)
    rows = logits.rows(visit.block * blocks.rows + wg * blocks.block_q, late=True)
    context.ring.wait_until_ready(slot)

    def products(state: tuple) -> None:
        plgpu.wgmma(state[0], context.query.tiles.at[slot, wg], context.key.tiles.at[slot].transpose((1, 0)))
        plgpu.wgmma(state[1], context.dout.tiles.at[slot, wg], context.value.tiles.at[slot].transpose((1, 0)))

    terms = logits.tile_terms(rows, tile, slot)
    lse, delta = (load(ref.at[slot, wg], layout=ROW) for ref in (context.buffers.lse, context.buffers.delta))
    s, dp = pl.run_state(products)((plgpu.ACC.init(zeros(*logits.shape)), plgpu.ACC.init(zeros(*logits.shape))))
    weights = softmax_weights(logits, s, terms, rows, tile, lse, visit.is_edge)
    context.ring.release(slot)
    ds = logits_cotangent(logits, weights.through, dp, rows, tile, delta)
    return logits.through_mask(ds, rows, tile, visit.is_edge)


def _write(context: DBiasContext, block: BiasTiles, tile: Any, total: jax.Array) -> None:
    blocks, (*head, own_block) = context.blocks, block.own
    rows = pl.ds(own_block * blocks.rows + context.wg * blocks.block_q, blocks.block_q)
    at = (lax.axis_index("split"), *head, rows, pl.ds(tile * blocks.block_kv, blocks.block_kv))
    store(context.out.at[at], total.astype(context.out.dtype))
