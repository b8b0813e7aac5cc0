"""What all blocks of threads of one kernel share, as the device code sees it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import lax

from ...._semantics.call import Config
from ...._semantics.masks import ColumnRange
from ...._semantics.sizes import Sizes
from ..blocks import Blocks
from ..host.plan import KernelPlan
from ..operands import Operands, TermBuffers
from ..scheduler import Item, TileScheduler
from .masks import Intervals
from .moved_masks import make_intervals
from .transfers import Terms


def shared_fields(plan: KernelPlan, operands: Operands, terms: TermBuffers, **of_intervals: Any) -> dict[str, Any]:
    """The fields of `KernelContext`; further arguments are those of `Intervals.make`."""
    return {
        "config": plan.config,
        "sizes": plan.sizes,
        "blocks": plan.blocks,
        "operands": operands,
        "terms": Terms.make(operands, terms),
        "intervals": make_intervals(plan.config.band, plan.sizes, plan.blocks.block_kv, operands, **of_intervals),
        "wg": lax.axis_index("wg"),
    }


@dataclass(frozen=True)
class KernelContext:
    """`operands` are references; `wg` is the number of this warpgroup."""

    config: Config
    sizes: Sizes
    blocks: Blocks
    operands: Operands
    terms: Terms
    intervals: Intervals
    wg: Any

    @property
    def dtype(self) -> Any:
        """Of query, and so of products."""
        return self.operands.query.dtype

    @property
    def edges_first(self) -> bool:
        """Whether the tiles that need a mask are visited before the others, in a loop of their own."""
        return False

    @property
    def has_tail(self) -> bool:
        """Whether all tiles that need a mask but one are visited behind the others, in a loop of their own."""
        return False

    def for_each_item(self, scheduler: TileScheduler, body: Callable[[Any, Item], None]) -> None:
        """`body(k, item)` for the k-th item of this worker, a block of query rows."""

        def ranges_of(head: Any, block: Any) -> ColumnRange:
            return self.intervals.ranges(head, block, self.blocks.rows)

        # Without tiles that need a mask before the others, these come last anyway.
        order = {"edges_first": self.edges_first and self.intervals.has_left_edge, "has_tail": self.has_tail}
        scheduler.for_each_item(lax.axis_index("worker"), ranges_of, body, **order, tile_at=self.intervals.tile_at)
