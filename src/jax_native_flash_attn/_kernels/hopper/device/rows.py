"""One item of the forward kernel as one warpgroup has it: its 64 query rows, the tiles it visits, and its results.

The pipeline is drawn in `forward.py`, which also says what the barriers are for.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Config
from ...._semantics.sizes import Sizes
from ..blocks import Blocks
from ..masks import Intervals
from ..operands import clean_padding, query_slice
from ..scheduler import Item
from .logits import TileLogits
from .overlap import rounded_to_tf32
from .pallas import Results, pl, plgpu, store


@dataclass(frozen=True)
class Kernel:
    """What all items of a call share, as the kernel sees it.

    Attributes:
      refs: the operands by name, `outs` the results that are wanted: out, unrounded, lse.
      local: shared memory and barriers by name.
      streamed: names of bias and mask that come with the keys.
      starts_with_bias: whether products do; see `TileLogits.start`.
      result: how out leaves.
    """

    config: Config
    sizes: Sizes
    blocks: Blocks
    intervals: Intervals
    refs: dict[str, Any]
    outs: dict[str, Any]
    local: dict[str, Any]
    streamed: tuple[str, ...]
    starts_with_bias: bool
    result: Results

    def slot(self, n: Any) -> Any:
        """Where a worker's n-th tile lies in the ring."""
        return lax.rem(n, jnp.int32(self.blocks.stages))


class Rows:
    """The rows of one item that one warpgroup computes: the item's tiles, last one first, and where its results go."""

    def __init__(self, kernel: Kernel, item: Item, wg: Any, scale: Any):
        """`scale` if it was read before."""
        z, blocks, local = kernel.sizes, kernel.blocks, kernel.local
        self.kernel, self.item, self.wg = kernel, item, wg
        self.shape, self.dtype = (blocks.block_q, blocks.block_kv), kernel.refs["query"].dtype
        self.num_tiles = item.num_tiles
        self.row = item.block * blocks.rows + wg * blocks.block_q
        self.logits = TileLogits(
            kernel.config,
            z,
            kernel.refs,
            {name: local[name] for name in kernel.streamed},
            kernel.intervals,
            item.head,
            *self.shape,
            row_in_block=wg * blocks.block_q,
            scale=scale,
            starts_with_bias=kernel.starts_with_bias,
        )
        self.no_output = plgpu.layout_cast(jnp.zeros((blocks.block_q, z.H), jnp.float32), plgpu.Layout.WGMMA)

    def slot(self, i: Any) -> Any:
        return self.kernel.slot(self.item.count + i)

    def wait_for_value(self, i: Any, *, may_be_padded: bool = True) -> None:
        """Values of tile i, without NaN in padding; full tiles hold none."""
        kernel, tile, slot = self.kernel, self.item.tile(i), self.slot(i)
        value, block_kv = kernel.local["value"], kernel.blocks.block_kv
        plgpu.barrier_wait(kernel.local["value ready"].at[slot])
        # `prepare` has cleaned float32.
        if "length" not in kernel.refs or self.dtype == jnp.float32 or not may_be_padded:
            return
        length = kernel.intervals.length(self.item.head)

        @pl.when((tile + 1) * block_kv > length)
        def _clean() -> None:
            @pl.when(self.wg == 0)
            def _first() -> None:
                clean_padding(value.at[slot], tile, length)
                plgpu.commit_smem()
                plgpu.barrier_arrive(kernel.local["value clean"].at[slot])

            plgpu.barrier_wait(kernel.local["value clean"].at[slot])

    def as_operand(self, p: Any) -> Any:
        """Weights where the second product takes them: what is in registers, or a reference once they are stored."""
        if not self.kernel.blocks.weights_in_shared:
            return p
        weights = self.kernel.local["weights"].at[self.wg]
        weights[...] = rounded_to_tf32(p) if self.dtype == jnp.float32 else p
        plgpu.commit_smem()
        return weights

    def value(self, slot: Any) -> Any:
        """As the right operand of the second product."""
        tile = self.kernel.local["value"].at[slot]
        return tile.transpose((1, 0)) if self.dtype == jnp.float32 else tile

    def write(self, out: Any, lse: Any) -> None:
        """Start writing the results: out (rows, D) and the log-sum-exp of the rows."""
        outs, local, wg = self.kernel.outs, self.kernel.local, self.wg
        index, count = (self.item.part, *self.item.head), self.shape[0]
        if "unrounded" in outs:
            store(query_slice(outs["unrounded"], index, self.row, count), out)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left
        if "out" in outs:
            store(local["out"].at[wg], out.astype(self.dtype))
        rows_of_lse = outs["lse"].at[(*index, pl.ds(self.row, count))] if "lse" in outs else None
        if "lse" in local:
            local["lse"][wg] = lse
        elif rows_of_lse is not None:
            store(rows_of_lse, lse)
        plgpu.commit_smem()
        if "out" in outs:
            row = self.kernel.result.at(self.row)
            plgpu.copy_smem_to_gmem(local["out"].at[wg], query_slice(outs["out"], index, row, count))
        if "lse" in local:
            plgpu.copy_smem_to_gmem(local["lse"].at[wg], rows_of_lse)
