"""Forward kernel for Hopper GPUs: attention of blocks of query rows, as a pipeline of warpgroups.

One warpgroup loads, the others compute, each on its own 64 query rows; all go through the same key/value tiles, last
tile first. For tile i (S = scores, P = weights, O = numerator of the output):

    load     | K0 Q V0 K1 V1 ...... K2 (slot of K0) V2 ...                TMA into a ring of `stages` slots
    compute  | S0=QK0  softmax0 | S1=QK1  O+=P0V0 ............. | S2=QK2  O+=P1V1 ............. |
             |                  |  (tensor cores)  softmax1     |  (tensor cores)  softmax2     |

Both products of a step are issued at once; they finish in order, so the softmax of S1 runs on the other units while the
tensor cores still work on P0 V0. The state of the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) lives
in registers, in base 2. The scheme is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

A block of threads goes through several items of `scheduler.py`, one after the other, and its ring of slots through
all of them: while the computing warpgroups finish one item, the tiles of the next are loaded.

Only tiles in which some row's interval begins or ends need a mask. For a causal mask that is the first one visited.
Static windows and lengths decide at run time, in the loop. Where intervals are traced or moved, the first tile that
needs a mask starts the pipeline, and the others are visited behind it, one by one.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..host.forward_plan import ForwardBuffers, ForwardOuts, ForwardPlan
from ..operands import Operands
from ..pallas import pl, plgpu, warp_specialize
from ..scheduler import Item
from .forward_context import ForwardContext
from .forward_mainloop import compute_item
from .transfers import key_slice, query_slice, transposed_slice


def kernel(plan: ForwardPlan, operands: Operands, outs: ForwardOuts, buffers: ForwardBuffers) -> None:
    """Of one block of threads."""
    context = ForwardContext.of(plan, operands, outs, buffers)
    wg, compute = context.wg, plan.blocks.warpgroups

    def compute_all() -> None:
        if plan.takes_turns:
            pl.when(wg == compute - 1)(lambda: plgpu.barrier_arrive(buffers.turn.at[0]))
        ref = operands.scale
        scale = ref[(0,) * ref.ndim] if ref.size == 1 else None
        context.for_each_item(plan.scheduler, lambda _, item: compute_item(context, item, scale))
        plgpu.wait_smem_to_gmem(0)

    def load_all() -> None:
        context.for_each_item(
            plan.scheduler, lambda k, item: ItemLoader(context, k, item, item.block * plan.blocks.rows).load()
        )

    warp_specialize(wg, compute, plan.blocks.registers, load_all, compute_all)


@dataclass(frozen=True)
class ItemLoader:
    """Loads what the k-th item of this worker takes."""

    context: ForwardContext
    k: Any
    item: Item
    first_row: Any

    def load(self) -> None:
        count, num_tiles, stages = self.item.count, self.item.num_tiles, self.context.blocks.stages

        def load_tile(i: Any, carry: None) -> None:
            self.load_key(i)
            if self.context.plan.loads_keys_first:
                pl.when((i > 0) & (count + i > stages))(lambda: self.load_value(i - 1))
                pl.when(count + i < stages)(lambda: self.load_value(i))
            else:
                self.load_value(i)

        lax.fori_loop(0, num_tiles, load_tile, None)
        if self.context.plan.loads_keys_first:
            pl.when(count + num_tiles > stages)(lambda: self.load_value(num_tiles - 1))

    def load_key(self, i: Any) -> None:
        """The i-th tile of keys and what comes with it; behind the first one, the query."""
        context, head, blocks, ring = self.context, self.item.head, self.context.blocks, self.context.key_ring
        n, tile = self.item.count + i, self.item.tile(i)
        slot = ring.slot(n)
        ring.wait_until_free(n, slot)
        key = key_slice(context.operands.key, head, context.sizes.G, tile, blocks.block_kv)
        plgpu.copy_gmem_to_smem(key, context.key.loaded.at[slot], ring.ready.at[slot])
        for term in context.terms.streamed:
            term.copy_tile(head, self.first_row, blocks.rows, tile, blocks.block_kv, slot, ring.ready.at[slot])
        pl.when(i == 0)(self.load_query)

    def load_query(self) -> None:
        context, buffers, block_q = self.context, self.context.buffers, self.context.blocks.block_q
        for w in range(context.blocks.warpgroups):
            pl.when(self.k > 0)(lambda w=w: plgpu.barrier_wait(buffers.query_free.at[w]))
            rows = query_slice(context.operands.query, self.item.head, self.first_row + w * block_q, block_q)
            plgpu.copy_gmem_to_smem(rows, context.query.loaded.at[w], buffers.query_ready.at[w])

    def load_value(self, i: Any) -> None:
        context, ring = self.context, self.context.value_ring
        n, tile = self.item.count + i, self.item.tile(i)
        slot = ring.slot(n)
        ring.wait_until_free(n, slot)
        ref, keys = context.operands.value, context.blocks.block_kv
        if ref.dtype == jnp.float32:
            value = transposed_slice(ref, self.item.head, context.sizes.G, tile * keys, keys)
        else:
            value = key_slice(ref, self.item.head, context.sizes.G, tile, keys)
        plgpu.copy_gmem_to_smem(value, context.value.loaded.at[slot], ring.ready.at[slot])
