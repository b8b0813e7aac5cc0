"""What all items of a forward call share in the kernel, and the rows of one item that one warpgroup computes.

The pipeline is drawn in `forward.py`; `ForwardBuffers` says what the barriers are for.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from ..host.forward_plan import ForwardBuffers, ForwardOuts, ForwardPlan
from ..operands import Operands
from ..pallas import ROW, Views, broadcast_index, load, pl, plgpu, store, zeros
from ..scheduler import Item
from .context import KernelContext, shared_fields
from .logits import TileLogits
from .overlap import rounded_to_tf32
from .transfers import Ring, by_first_warpgroup, clean_padding, query_slice


@dataclass(frozen=True)
class ForwardContext(KernelContext):
    """`out` is shared memory through which out leaves, if it is wanted."""

    plan: ForwardPlan
    outs: ForwardOuts
    buffers: ForwardBuffers
    query: Views
    key: Views
    value: Views
    out: Any | None
    key_ring: Ring
    value_ring: Ring

    @classmethod
    def of(cls, plan: ForwardPlan, operands: Operands, outs: ForwardOuts, buffers: ForwardBuffers) -> "ForwardContext":
        blocks = plan.blocks
        if plan.shares_buffer:
            *views, out = buffers.query
            query = Views(views[0], views[-1])
        else:
            query, out = plan.tma.views(buffers.query), buffers.out
        return cls(
            **shared_fields(plan, operands, buffers.terms),
            plan=plan,
            outs=outs,
            buffers=buffers,
            query=query,
            key=plan.tma.views(buffers.key),
            value=plan.value_tma.views(buffers.value),
            out=out,
            key_ring=Ring(blocks.stages, buffers.key_ready, buffers.key_free),
            value_ring=Ring(blocks.stages, buffers.value_ready, buffers.value_free),
        )

    @property
    def edges_first(self) -> bool:
        return self.has_tail

    @property
    def has_tail(self) -> bool:
        """Where each tile may need a mask, a branch in the pipeline's loop takes longer than these tiles alone.

        Before the pipeline, their loop takes longer than behind it, also where it has no tile: the first tile of the
        pipeline then has the sums of others to keep.
        """
        return self.intervals.is_traced or self.intervals.is_moved


class Rows:
    """The rows of one item that one warpgroup computes: the item's tiles in their order, and where its results go."""

    def __init__(self, context: ForwardContext, item: Item, scale: Any):
        """`scale` if it was read before."""
        context = replace(context, intervals=context.intervals.of_head(item.head))
        blocks, self.wg = context.blocks, context.wg
        self.context, self.item, self.dtype = context, item, context.dtype
        self.shape = blocks.block_q, blocks.block_kv
        self.num_tiles = item.num_tiles
        self.row = item.block * blocks.rows + self.wg * blocks.block_q
        self.logits = TileLogits(
            context,
            item.head,
            row_in_block=self.wg * blocks.block_q,
            scale=scale,
            starts_with_addend=context.plan.starts_with_addend,
            scales_cap=True,
        )
        self.no_output = zeros(blocks.block_q, context.sizes.D)

    def slot(self, i: Any) -> Any:
        """Of keys and of values."""
        return self.context.key_ring.slot(self.item.count + i)

    def wait_for_value(self, i: Any, *, may_be_padded: bool = True) -> None:
        """Values of tile i, without NaN in padding; full tiles hold none."""
        context, tile, slot = self.context, self.item.tile(i), self.slot(i)
        value, clean = context.value.tiles, context.buffers.value_clean
        context.value_ring.wait_until_ready(slot)
        # `prepare` has cleaned float32.
        if not context.intervals.has_length or self.dtype == jnp.float32 or not may_be_padded:
            return
        length = context.intervals.length(self.item.head)

        @pl.when((tile + 1) * context.blocks.block_kv > length)
        def _clean() -> None:
            by_first_warpgroup(self.wg, clean.at[slot], lambda: clean_padding(value.at[slot], tile, length))

    def as_operand(self, p: Any) -> Any:
        """Weights where the second product takes them: what is in registers, or a reference once they are stored."""
        buffer = self.context.buffers.weights
        if buffer is None:
            return p
        weights = buffer.at[self.wg]
        weights[...] = rounded_to_tf32(p) if self.dtype == jnp.float32 else p
        plgpu.commit_smem()
        return weights

    def value(self, slot: Any) -> Any:
        """As the right operand of the second product."""
        tile = self.context.value.tiles.at[slot]
        return tile.transpose((1, 0)) if self.dtype == jnp.float32 else tile

    def sink(self) -> Any | None:
        """Of each row."""
        ref, count = self.context.operands.sinks, self.shape[0]
        if ref is None:
            return None
        index = broadcast_index(self.item.head, ref.shape[:-1])
        if ref.shape[-1] > 1:
            return load(ref.at[(*index, pl.ds(self.row, count))], layout=ROW)
        return plgpu.layout_cast(jnp.full((count,), ref[(*index, 0)], jnp.float32), ROW)

    def write(self, out: Any, lse: Any, max_logits: Any | None) -> None:
        """Start writing the results: out (rows, D), the log-sum-exp of the rows, and their largest logits."""
        outs, context, wg = self.context.outs, self.context, self.wg
        index, count = (self.item.split, *self.item.head), self.shape[0]
        if outs.unrounded is not None:
            store(query_slice(outs.unrounded, index, self.row, count), out)
        if outs.max_logits is not None and max_logits is not None:
            store(outs.max_logits.at[(*index, pl.ds(self.row, count))], max_logits)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left
        if (all_done := context.buffers.all_done) is not None:
            plgpu.barrier_arrive(all_done)
            plgpu.barrier_wait(all_done)
        if context.out is not None:
            store(context.out.at[wg], out.astype(self.dtype))
        rows_of_lse = outs.lse.at[(*index, pl.ds(self.row, count))] if outs.lse is not None else None
        lse_buffer = context.buffers.lse
        if lse_buffer is not None:
            lse_buffer[wg] = lse
        elif rows_of_lse is not None:
            store(rows_of_lse, lse)
        plgpu.commit_smem()
        if context.out is not None:
            row = context.plan.store.at(self.row)
            plgpu.copy_smem_to_gmem(context.out.at[wg], query_slice(outs.out, index, row, count))
        if lse_buffer is not None:
            plgpu.copy_smem_to_gmem(lse_buffer.at[wg], rows_of_lse)
