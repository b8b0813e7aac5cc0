"""Copies of float32 rows as products in TensorFloat-32 take them: rounded, and transposed (`host/tf32.py` says why).

A block of threads copies one tile of rows of one head: it is read once, and leaves twice. XLA would read it more than
once, some at a time: a product that has its left operand in registers wants the rows of each eight in another order
(`device/tf32.py`), which is no transposition of two axes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from ..host.turn_plan import ROWS, TurnBuffers, TurnOuts, TurnPlan
from ..pallas import broadcast_index, iota, load, pl, plgpu, store, unravel
from .overlap import rounded_to_tf32
from .tf32 import TILES


def kernel(plan: TurnPlan, operands: tuple[Any, Any | None], outs: TurnOuts, buffers: TurnBuffers) -> None:
    """Of one block of threads."""
    x, length = operands
    index = lax.axis_index("tile")
    *batch, head, tile_index = unravel(index, plan.tiles)
    if plan.tiles[-1] == 1:  # 0 too, but not to Mosaic, which would tile `buffers.rows`: see `TmaStore.at`
        tile_index = lax.div(index, jnp.int32(math.prod(plan.tiles)))
    row = tile_index * ROWS
    plgpu.copy_gmem_to_smem(x.at[(*batch, pl.ds(plan.at(row), ROWS), head)], buffers.rows, buffers.ready)
    plgpu.barrier_wait(buffers.ready)
    tile = rounded_to_tf32(load(buffers.rows, layout=plgpu.Layout.WGMMA))
    if length is not None:  # as `clean_padding`
        in_length = iota((ROWS, plan.columns), 0) + row < length[broadcast_index(batch, length.shape)]
        is_number = jnp.abs(tile) <= float(jnp.finfo(jnp.float32).max)
        tile = jnp.where(in_length | is_number, tile, 0.0)
    if buffers.columns is not None:
        _store_transposed(buffers.columns, tile)
    store(buffers.rows, tile)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.rows, outs.rows.at[(*batch, pl.ds(plan.at(row), ROWS), head)])
    if outs.columns is not None:
        at = (*batch, head, pl.ds(0, plan.columns), pl.ds(row, ROWS))
        plgpu.copy_smem_to_gmem(buffers.columns, outs.columns.at[at])
    plgpu.wait_smem_to_gmem(0)


def _store_transposed(ref: Any, x: jax.Array) -> None:
    """`x` (rows, columns) into `ref` (columns, rows), in tiles; of eight rows, 2 t and 2 t + 1 come to t and t + 4."""

    @plgpu.inline_mgpu(arg_types=(TILES, plgpu.Layout.WGMMA))
    def emit(_: Any, ref: Any, array: Any) -> None:
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        number = lambda n: arith.constant(i32, ir.IntegerAttr.get(i32, n))  # noqa: E731
        thread = arith.remui(mgpu.thread_idx(), number(128))
        lane = arith.remui(thread, number(32))
        first_row, first_column = arith.divui(lane, number(4)), arith.muli(arith.remui(lane, number(4)), number(2))
        # Where the row goes, of the eight.
        place = arith.addi(arith.divui(first_row, number(2)), arith.muli(arith.remui(first_row, number(2)), number(4)))
        warp_row = arith.muli(arith.divui(thread, number(32)), number(16))
        for i, register in enumerate(array.registers.flat):
            group, below = divmod(i, 2)
            row = arith.addi(arith.addi(warp_row, number(8 * below)), place)
            for j in range(2):
                within = arith.addi(first_column, number(j))  # of the eight columns
                tile, in_tile = arith.divui(row, number(32)), arith.remui(row, number(32))
                # Swizzled: four numbers, 16 bytes, stay together.
                chunk = arith.xori(arith.divui(in_tile, number(4)), within)
                in_row = arith.addi(arith.muli(chunk, number(4)), arith.remui(in_tile, number(4)))
                at = [arith.index_cast(index, n) for n in (number(group), tile, within, in_row)]
                memref.store(llvm.extractelement(register, number(j)), ref, at)

    emit(ref, x)
