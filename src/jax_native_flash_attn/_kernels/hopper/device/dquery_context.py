"""What all items of the kernel for the gradient of query share, and the rows of one item that one warpgroup computes.

The pipeline is drawn in `dquery.py`; `DQueryBuffers` says what the barriers are for.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ..host.dquery_plan import NUM_MOMENTS, DQueryBuffers, DQueryOuts, DQueryPlan
from ..operands import BackwardOperands, TransposedOperands
from ..pallas import ROW, Views, load, pl, plgpu, store, zeros
from ..scheduler import Item
from .backward import BackwardContext, logits_cotangent, scaled_lse, softmax_weights
from .context import shared_fields
from .logits import TileLogits
from .overlap import THREAD_COLUMNS, fold_columns, order_before_wgmma_wait
from .terms import TileTerms
from .transfers import Ring, Transposed, by_first_warpgroup, clean_padding, query_slice, row_slice


@dataclass(frozen=True)
class DQueryContext(BackwardContext):
    plan: DQueryPlan
    outs: DQueryOuts
    buffers: DQueryBuffers
    query: Views
    dout: Views
    result: Any
    key: Views
    transposed_key: Transposed | None
    value: Views
    key_ring: Ring
    value_ring: Ring

    @classmethod
    def of(
        cls, plan: DQueryPlan, operands: BackwardOperands, outs: DQueryOuts, buffers: DQueryBuffers
    ) -> "DQueryContext":
        *views, (result,) = buffers.rows
        (query, dout), (query_loaded, dout_loaded) = views[0], views[-1]
        forward, blocks = operands.forward, plan.blocks
        turned = operands.transposed or TransposedOperands()
        return cls(
            **shared_fields(plan, forward, buffers.terms, skips_dead_rows=True),
            row_operands=operands.rows,
            plan=plan,
            outs=outs,
            buffers=buffers,
            query=Views(query, query_loaded),
            dout=Views(dout, dout_loaded),
            result=result,
            key=plan.tma.views(buffers.key),
            transposed_key=Transposed.of(turned.key, plan.key_tma, buffers.transposed_key),
            value=plan.value_tma.views(buffers.value),
            key_ring=Ring(blocks.stages, buffers.key_ready, buffers.key_free),
            value_ring=Ring(plan.value_stages, buffers.value_ready, buffers.value_free),
        )

    @property
    def edges_first(self) -> bool:
        """As in the forward, but not of intervals that are read."""
        return self.intervals.is_moved


class DQueryRows:
    """The rows of the k-th item that one warpgroup computes."""

    def __init__(self, context: DQueryContext, k: Any, item: Item):
        blocks, wg = context.blocks, context.wg
        self.context, self.item, self.num_tiles = context, item, item.num_tiles
        self.shape = blocks.block_q, blocks.block_kv
        self.row = item.block * blocks.rows + wg * blocks.block_q
        self.logits = TileLogits(context, item.head, row_in_block=wg * blocks.block_q)
        self.vectors = self.logits.rows(self.row)
        operands = context.row_operands
        lse, self.delta = (
            load(row_slice(ref, item.head, self.row, blocks.block_q), layout=ROW)
            for ref in (operands.lse, operands.delta)
        )
        self.lse = scaled_lse(operands, lse)
        self.buffer = context.plan.scheduler.buffer(k, wg, blocks.warpgroups)
        self.no_moments = (zeros(blocks.block_q, THREAD_COLUMNS),) * (NUM_MOMENTS if context.plan.with_scale else 0)

    def key_slot(self, i: Any) -> Any:
        return self.context.key_ring.slot(self.item.count + i)

    def value_slot(self, i: Any) -> Any:
        return self.context.value_ring.slot(self.item.count + i)

    @property
    def has_edges(self) -> bool:
        return self.context.intervals.has_left_edge or self.context.intervals.has_right_edge

    def dlogits(self, s: Any, dp: Any, terms: TileTerms, i: Any, masked: Any, moments: tuple) -> tuple[Any, tuple]:
        """dS in the dtype of products, and the moments with those of this tile, within each thread."""
        logits, vectors, tile = self.logits, self.vectors, self.item.tile
        weights = softmax_weights(logits, s, terms, vectors, tile(i), self.lse, masked)
        ds = logits_cotangent(logits, weights.through, dp, vectors, tile(i), self.delta)
        order_before_wgmma_wait(fold_columns(ds, jnp.add))
        if self.context.plan.with_scale:
            dz = ds
            if weights.through is not weights.p:
                dz = logits_cotangent(logits, weights.p, dp, vectors, tile(i), self.delta)
            sums = ds * s, dz, weights.through * s
            moments = tuple(x + fold_columns(y, jnp.add) for x, y in zip(moments, sums, strict=True))
        return ds.astype(self.context.dtype), moments

    def wait_for_tile(self, i: Any, *, is_first: bool) -> None:
        """Keys and values of tile i; NaN in padding, which only edge tiles hold, would survive a dz of zero."""
        context, tile = self.context, self.item.tile
        intervals, clean = context.intervals, context.buffers.padding_clean
        context.key_ring.wait_until_ready(self.key_slot(i))
        context.value_ring.wait_until_ready(self.value_slot(i))
        # Of a band that is cut off, the tiles end with the first one. XLA has cleaned float32.
        if not intervals.has_length or (intervals.is_cut and not is_first) or context.plan.is_float32:
            return
        length = intervals.length(self.item.head)

        def work() -> None:
            clean_padding(context.key.tiles.at[self.key_slot(i)], tile(i), length)
            clean_padding(context.value.tiles.at[self.value_slot(i)], tile(i), length)

        is_padded = (tile(i) + 1) * context.blocks.block_kv > length
        pl.when(is_padded)(lambda: by_first_warpgroup(context.wg, clean, work))

    def issue(self, s_ref: Any, dp_ref: Any, buffer: Any, key_slot: Any, value_slot: Any) -> None:
        """The products S and dP; `buffer` is that of these rows."""
        context = self.context
        plgpu.wgmma(s_ref, context.query.tiles.at[buffer], context.key.tiles.at[key_slot].transpose((1, 0)))
        plgpu.wgmma(dp_ref, context.dout.tiles.at[buffer], context.value.tiles.at[value_slot].transpose((1, 0)))

    def write(self, acc: Any, moments: tuple) -> None:
        """Start writing the results: dS K, not yet multiplied by the scale, and the moments."""
        context, plan, item = self.context, self.context.plan, self.item
        buffers, outs, block_q = context.buffers, context.outs, context.blocks.block_q
        if buffers.moments is not None:
            for i, x in enumerate(moments):
                buffers.moments[i, context.wg] = x.sum(axis=1)
        if plan.is_wide:
            plgpu.barrier_arrive(buffers.all_done)
            plgpu.barrier_wait(buffers.all_done)
        result = context.result.at[self.buffer]
        store(result, (acc * self.logits.scale).astype(plan.out_dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, query_slice(outs.dquery, item.head, plan.store.at(self.row), block_q))
        if outs.moments is not None and buffers.moments is not None:
            for i, out in enumerate(outs.moments):
                rows = row_slice(out, item.head, self.row, block_q)
                plgpu.copy_smem_to_gmem(buffers.moments.at[i, context.wg], rows)
        if not plan.scheduler.is_single:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(buffers.rows_free.at[self.buffer])
