"""What all blocks of keys of the fused backward share in the kernel. The pipeline is drawn in `fused.py`."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..addition_order import BLOCK_KEYS, Work
from ..host.fused_plan import FusedBuffers, FusedGradients, FusedPlan
from ..operands import BackwardOperands, TermBuffers
from ..pallas import pl, plgpu, unravel
from .backward import BackwardContext
from .context import shared_fields
from .logits import TileLogits
from .transfers import Ring


@dataclass(frozen=True)
class FusedContext(BackwardContext):
    """`turns` counts the additions to each query tile."""

    plan: FusedPlan
    outs: FusedGradients
    buffers: FusedBuffers
    turns: Any
    rows_ring: Ring

    @classmethod
    def of(
        cls, plan: FusedPlan, operands: BackwardOperands, outs: FusedGradients, buffers: FusedBuffers
    ) -> "FusedContext":
        return cls(
            **shared_fields(plan, operands.forward, TermBuffers()),
            row_operands=operands.rows,
            plan=plan,
            outs=outs,
            buffers=buffers,
            turns=pl.get_global(plgpu.SemaphoreType.REGULAR((plan.turns,))),
            rows_ring=Ring(plan.blocks.stages, buffers.rows_ready, buffers.rows_free),
        )

    def for_each_work(self, body: Any) -> None:
        """`body(k, work, count)` for the k-th block of keys of this worker, behind `count` tiles of those before."""
        order, worker = self.plan.order, lax.axis_index("worker")

        def step(k: Any, count: Any) -> Any:
            work = order.work(k, worker)
            body(k, work, count)
            return count + work.tiles * order.group

        lax.fori_loop(0, order.rounds_of(worker), step, jnp.int32(0))

    def kv_head(self, work: Work) -> tuple:
        """The index (batch..., K)."""
        return self.kv_head_and_part(work)[:-1]

    def kv_head_and_part(self, work: Work) -> tuple:
        return unravel(work.head, (*self.sizes.batch, self.sizes.K, self.plan.parts))

    def head(self, work: Work, member: Any) -> tuple:
        """The index (batch..., N)."""
        *batch, head, part = self.kv_head_and_part(work)
        return (*batch, head * self.sizes.G + part * self.plan.order.group + member)

    def member(self, work: Work, i: Any) -> Any:
        """The query head of the group in step i."""
        return 0 if self.plan.order.group == 1 else lax.div(i, work.tiles)

    def turn(self, work: Work, member: Any, tile: Any) -> Any:
        """The counter of a query tile."""
        order = self.plan.order
        return self.turns.at[(work.head * order.group + member) * order.tiles + tile]

    def logits(self, work: Work, member: Any, scale: Any) -> TileLogits:
        return TileLogits(self, self.head(work, member), row_in_block=self.wg, transposed=True, scale=scale)

    def is_last_part(self, work: Work) -> Any:
        """Whether a block has keys beyond the last: they need a mask, as no weight may be infinite."""
        S = self.sizes.S
        return work.block == S // BLOCK_KEYS if S % BLOCK_KEYS else False
