"""The kernel for the gradient of a bias: a tile of it is resident, and all scores onto which it broadcasts pass.

    step (bias batch row, bias head, query block, key block, visit)
      first visit   the sum starts
      each visit    dS as in `dquery.py`, of one batch row and head onto which the tile broadcasts; sum += dS
      last visit    the sum, or, of a bias of keys, that of its rows too, is written

Nothing has T x S elements but a bias with both. One of keys alone has no query blocks of its own: they are visits.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Call
from ..blocks import Blocks
from ..host.backward import Backward
from ..host.operands import Grid, Place, of_masks, scalar_vectors
from ..host.ranges import has_edges, key_tiles
from ..pallas import launch, pl, pltpu, product
from .gradients import gradients
from .logits import Scores, tile_of, vector_buffers


@dataclass(frozen=True)
class BiasGrid(Grid):
    """The axes are rows of the bias' batch, its heads, its query blocks, key blocks, and visits.

    Attributes:
      bias_batch, bias_heads, bias_rows: sizes of the bias; the last counts blocks, 1 if it has no rows.
      key_blocks: number.
    """

    bias_batch: tuple[int, ...] = ()
    bias_heads: int = 1
    bias_rows: int = 1
    key_blocks: int = 1

    @property
    def visits(self) -> tuple[int, ...]:
        """Batch axes and heads along which the bias broadcasts, and query blocks: sizes, 1 where it does not."""
        batch = tuple(n if own == 1 else 1 for n, own in zip(self.batch, self.bias_batch, strict=True))
        return (*batch, self.heads // self.bias_heads, self.resident // self.bias_rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        return math.prod(self.bias_batch), self.bias_heads, self.bias_rows, self.key_blocks, math.prod(self.visits)

    @property
    def parallel(self) -> int:
        return 4

    def place(self, ids: tuple[Any, ...], ranges: Any) -> Place:
        bias_row, head, block, key_block, visit = ids
        at = _unravel(visit, self.visits)
        own = _unravel(bias_row, self.bias_batch)
        batch = 0
        for n, x, y in zip(self.batch, own, at, strict=False):
            batch = batch * n + x + y
        return Place(batch, head + at[-2], block + at[-1], key_block, key_block)


def _unravel(index: Any, shape: tuple[int, ...]) -> list[Any]:
    result: list[Any] = []
    for size in reversed(shape):
        result.append(0 if size == 1 else lax.rem(index, jnp.int32(size)))
        index = index if size == 1 else lax.div(index, jnp.int32(size))
    return result[::-1]


def dbias(
    backward: Backward, blocks: Blocks, wanted: jax.ShapeDtypeStruct, precision: Any, interpret: Any
) -> jax.Array:
    """Of a bias (batch..., N or 1, T or 1, S); axes of size 1 are summed over, but for the last."""
    call, z = backward.call, backward.sizes
    masks, ranges = of_masks(call), key_tiles(call, blocks)
    operands = {**backward.operands(), **masks.operands}
    *bias_batch, bias_heads, bias_rows, _ = wanted.shape
    sums_rows = bias_rows == 1
    row_blocks = ranges.shape[-2]
    grid = BiasGrid(
        batch=z.batch,
        heads=z.N,
        group=z.G,
        resident=row_blocks,
        steps=1,
        blocks=blocks,
        ranges=ranges.shape[:-2],
        bias_batch=tuple(bias_batch),
        bias_heads=bias_heads,
        bias_rows=1 if sums_rows else row_blocks,
        key_blocks=-(-z.S // blocks.tile),
    )
    is_edge = has_edges(call, blocks, streams_rows=False) or (sums_rows and z.T % blocks.resident != 0)
    vectors = vector_buffers(operands, grid)
    types = Call(call.config, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call.inputs))

    def body(scalar_refs: Any, refs: Any, outs: Any, buffers: Any) -> None:
        ids = tuple(pl.program_id(i) for i in range(len(grid.sizes)))
        place = grid.place(ids, scalar_refs["ranges"])
        spread = {name: buffers[name] for name in vectors}
        scores = Scores(types, grid, operands, masks.scalars, sums_rows, scalar_refs, refs, spread, place)
        first, _, _, stop = grid.range_of(scalar_refs["ranges"], place.batch, place.row_block)

        @pl.when(ids[-1] == 0)
        def _begin() -> None:
            buffers["acc"][...] = jnp.zeros_like(buffers["acc"])

        @pl.when((place.key_block >= first) & (place.key_block < stop))
        def _visit() -> None:
            scores.spread_vectors()
            at = tile_of(grid, place, place.key_block, 0, is_edge=is_edge)
            products = product(refs["query"][...], refs["key"][...], "nt", precision)
            of_tile = gradients(
                scores, at, products, lambda: product(refs["dout"][...], refs["value"][...], "nt", precision)
            )
            buffers["acc"][...] += of_tile.dproducts

        @pl.when(ids[-1] == grid.sizes[-1] - 1)
        def _end() -> None:
            total = buffers["acc"][...]
            total = total.sum(0, keepdims=True) if sums_rows else total
            outs["bias"][...] = total.astype(wanted.dtype)

    shape = (math.prod(bias_batch), bias_heads, bias_rows, z.S)
    block = (None, None, 1 if sums_rows else blocks.resident, blocks.tile)
    like = jax.ShapeDtypeStruct(shape, wanted.dtype)
    results = launch(
        body,
        scalars={"ranges": ranges.reshape(-1), **scalar_vectors(masks.scalars)},
        inputs={name: (x.array, grid.spec(x)) for name, x in operands.items()},
        outputs={"bias": (like, pl.BlockSpec(block, lambda *ids: (*ids[:4],)))},
        scratch={**vectors, "acc": pltpu.VMEM((blocks.resident, blocks.tile), jnp.float32)},
        grid=grid.sizes,
        parallel=grid.parallel,
        interpret=interpret,
    )
    return results["bias"].reshape(wanted.shape)
