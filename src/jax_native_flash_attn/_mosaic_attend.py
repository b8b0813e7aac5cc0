"""Attention of one item by one warpgroup of the forward kernel: its 64 query rows against all of the item's tiles.

The pipeline is drawn in `_mosaic_forward.py`, which also says what the barriers are for.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ._mosaic import ROW, broadcast_index, columns_of, load, pl, plgpu
from ._mosaic_blocks import Blocks
from ._mosaic_logits import NO_KEY, TileLogits, from_base_2, to_base_2
from ._mosaic_masks import Intervals
from ._mosaic_operands import clean_padding, query_slice
from ._mosaic_overlap import THREAD_COLUMNS, before_wait, fold_columns, rounded_to_tf32
from ._numerics import LN2, LOG2E, lowest
from ._operands import Config
from ._tiles import ColumnRange, Sizes

_LOWEST = lowest(jnp.float32)


class Item(NamedTuple):
    """One item of a worker.

    Attributes:
      count: tiles of the worker's items before; the ring of slots goes on from there.
      head: index (batch..., N).
      block, part: of the query rows, and of the keys.
      ranges: its tiles.
      is_empty: whether the part has no tiles; the one in `ranges` then counts for nothing.
    """

    count: Any
    head: tuple[Any, ...]
    block: Any
    part: Any
    ranges: ColumnRange
    is_empty: Any


@dataclass(frozen=True)
class Kernel:
    """What all items of a call share, as the kernel sees it.

    Attributes:
      refs: the operands by name, `outs` the results that are wanted: out, unrounded, lse.
      local: shared memory and barriers by name.
    """

    config: Config
    sizes: Sizes
    blocks: Blocks
    intervals: Intervals
    refs: dict[str, Any]
    outs: dict[str, Any]
    local: dict[str, Any]
    streamed: tuple[str, ...]

    def slot(self, n: Any) -> Any:
        """Where a worker's n-th tile lies in the ring."""
        return lax.rem(n, jnp.int32(self.blocks.stages))


def attend(kernel: Kernel, item: Item, wg: Any, scale: Any) -> None:
    """Compute one item, and start writing its results; `scale` if it was read before."""
    config, z, blocks, intervals, refs, local = (
        kernel.config,
        kernel.sizes,
        kernel.blocks,
        kernel.intervals,
        kernel.refs,
        kernel.local,
    )
    count, head, block, part, ranges, is_empty = item
    compute, shape, slot_of = blocks.warpgroups, (blocks.block_q, blocks.block_kv), kernel.slot
    dtype = refs["query"].dtype
    key_smem, value_smem = local["key"], local["value"]
    takes_turns = blocks.takes_turns and compute > 1
    num_tiles = ranges.stop - ranges.first
    row = block * blocks.rows + wg * blocks.block_q
    buffers = {name: local[name] for name in kernel.streamed}
    logits = TileLogits(
        config, z, refs, buffers, intervals, head, *shape, row_in_block=wg * blocks.block_q, scale=scale
    )
    rows = logits.rows(row, late=True)
    first_is_edge: Any = intervals.has_right_edge or intervals.has_left_edge
    if intervals.is_traced:
        first_is_edge = (ranges.stop - 1 < ranges.full_first) | (ranges.stop > ranges.full_stop)
    length = refs.get("length")
    length = None if length is None else length[broadcast_index(head[:-1], length.shape)]

    def tile_of(i: Any) -> Any:
        return ranges.stop - 1 - i

    def softmax(products: Any, scores: Any, i: Any, top: Any, total: Any, masked: Any) -> tuple[Any, Any, Any, Any]:
        """Weights of tile i for the second product; the new maximum and sums; what corrects older ones."""

        def exponents(x: Any, factor: Any) -> tuple[Any, Any]:
            largest = fold_columns(x, jnp.maximum).max(axis=1)
            if factor is None:
                new_top = jnp.maximum(top, largest)
                return x - columns_of(new_top, shape), new_top
            if logits.has_scores:
                factor = to_base_2(largest)
                new_top = jnp.maximum(top, largest * factor)
                return x * columns_of(factor, shape) - columns_of(new_top, shape), new_top
            new_top = jnp.maximum(top, largest * factor)
            return x * factor - columns_of(new_top, shape), new_top

        exponent, new_top = logits(products, scores, rows, tile_of(i), magnitude, masked, exponents)
        weights = jnp.exp2(exponent)
        correction = jnp.exp2(top - new_top)
        total = total * columns_of(correction, total.shape) + fold_columns(weights, jnp.add)
        return logits.drop(weights, row, tile_of(i)).astype(dtype), new_top, total, correction

    def is_edge(i: Any) -> Any:
        """Whether a tile behind the first needs a mask."""
        if not intervals.has_left_edge and intervals.right_tiles(blocks.rows) <= 1:
            return False  # the first tile was the only one
        return (tile_of(i) < ranges.full_first) | (tile_of(i) >= ranges.full_stop)

    def clean_value(i: Any) -> None:
        """Padding in the values of tile i, which are in shared memory; full tiles hold none."""
        if length is None or dtype == jnp.float32:  # `prepare` has cleaned those
            return
        slot = slot_of(count + i)

        @pl.when((tile_of(i) + 1) * blocks.block_kv > length)
        def _clean() -> None:
            @pl.when(wg == 0)
            def _first() -> None:
                clean_padding(value_smem.at[slot], tile_of(i), length)
                plgpu.commit_smem()
                plgpu.barrier_arrive(local["value clean"].at[slot])

            plgpu.barrier_wait(local["value clean"].at[slot])

    def value_tile(slot: Any) -> Any:
        return value_smem.at[slot].transpose((1, 0)) if dtype == jnp.float32 else value_smem.at[slot]

    def issue_scores(s_ref: Any, slot: Any) -> None:
        plgpu.wgmma(s_ref, query, key_smem.at[slot].transpose((1, 0)))

    query = local["query"].at[wg]
    plgpu.barrier_wait(local["query ready"].at[wg])
    # With a negated query for a negative scale, the largest product has the largest logit, and scaling can wait
    # for the exponent.
    magnitude = jnp.abs(logits.scale) * LOG2E

    @pl.when(logits.scale < 0)
    def _negate() -> None:
        query[...] = -query[...]
        plgpu.commit_smem()

    if dtype == jnp.float32:
        query[...] = rounded_to_tf32(load(query, layout=plgpu.Layout.WGMMA))
        plgpu.commit_smem()

    top = plgpu.layout_cast(jnp.full((blocks.block_q,), _LOWEST, jnp.float32), ROW)
    # Each thread sums its own columns; the threads of a row add up at the end.
    total = plgpu.layout_cast(jnp.zeros((blocks.block_q, THREAD_COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
    acc = plgpu.layout_cast(jnp.zeros((blocks.block_q, z.H), jnp.float32), plgpu.Layout.WGMMA)
    start = slot_of(count)

    def first_scores(s_ref: Any) -> Any:
        plgpu.barrier_wait(local["key ready"].at[start])
        issue_scores(s_ref, start)
        return s_ref[...]

    products = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
    first = logits.scores(rows, tile_of(0), start)
    p, top, total, _ = softmax(products, first, jnp.int32(0), top, total, first_is_edge)
    plgpu.barrier_arrive(local["key free"].at[start])

    def put(p: Any) -> Any:
        if not blocks.weights_in_shared:
            return p
        local["weights"][wg] = rounded_to_tf32(p) if dtype == jnp.float32 else p
        plgpu.commit_smem()
        return top

    def step(i: Any, carry: tuple) -> tuple:
        acc, p, top, total = lax.optimization_barrier(carry)
        slot, previous = slot_of(count + i), slot_of(count + i - 1)
        # All waits come first: control flow between two products would serialise them.
        plgpu.barrier_wait(local["key ready"].at[slot])
        plgpu.barrier_wait(local["value ready"].at[previous])
        clean_value(i - 1)
        if takes_turns:
            plgpu.barrier_wait(local["turn"].at[wg])

        def products_and_softmax(state: tuple) -> None:
            acc_ref, s_ref, p_ref, top_ref, total_ref, correction_ref = state
            issue_scores(s_ref, slot)
            plgpu.wgmma(acc_ref, local["weights"].at[wg] if blocks.weights_in_shared else p, value_tile(previous))
            if takes_turns:
                plgpu.barrier_arrive(local["turn"].at[lax.rem(wg + 1, jnp.int32(compute))])
            scores = logits.scores(rows, tile_of(i), slot)
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p_ref[...], top_ref[...], total_ref[...], correction_ref[...] = softmax(
                s, scores, i, top, total, is_edge(i)
            )
            plgpu.barrier_arrive(local["key free"].at[slot])
            before_wait(total_ref[...])

        # Leaving `run_state` waits for the second product.
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        weights = plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)
        acc, _, p, top, total, correction = pl.run_state(products_and_softmax)(
            (plgpu.ACC.init(acc), plgpu.ACC.init(zeros), weights, top, total, top)
        )
        plgpu.barrier_arrive(local["value free"].at[previous])
        return acc * columns_of(correction, acc.shape), put(p), top, total

    carry = lax.fori_loop(1, num_tiles, step, (acc, put(p), top, total))
    acc, p, top, total = lax.optimization_barrier(carry)
    plgpu.barrier_arrive(local["query free"].at[wg])
    last = slot_of(count + num_tiles - 1)
    plgpu.barrier_wait(local["value ready"].at[last])
    clean_value(num_tiles - 1)
    weights = local["weights"].at[wg] if blocks.weights_in_shared else p
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, value_tile(last)))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(local["value free"].at[last])

    total = total.sum(axis=1)
    out = acc * columns_of(logits.rescaling / total, acc.shape)
    lse = (from_base_2(top) if logits.has_scores else top * LN2) + jnp.log2(total) * LN2
    if blocks.parts > 1:
        lse = jnp.where((top > NO_KEY) & jnp.logical_not(is_empty), lse, _LOWEST)
    elif intervals.is_traced:
        # Rows past the query's length have no key: their weights are those of masked logits.
        out = jnp.where(columns_of(top, acc.shape) > NO_KEY, out, 0.0)
        lse = jnp.where(top > NO_KEY, lse, 0.0)
    if "unrounded" in kernel.outs:
        query_slice(kernel.outs["unrounded"], (part, *head), row, blocks.block_q)[...] = out
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left
    if "out" in kernel.outs:
        local["out"][wg] = out.astype(dtype)
    rows_of_lse = kernel.outs["lse"].at[(part, *head, pl.ds(row, blocks.block_q))] if "lse" in kernel.outs else None
    if "lse" in local:
        local["lse"][wg] = lse
    elif rows_of_lse is not None:
        rows_of_lse[...] = lse
    plgpu.commit_smem()
    if "out" in kernel.outs:
        rows_of_out = query_slice(kernel.outs["out"], (part, *head), row, blocks.block_q)
        plgpu.copy_smem_to_gmem(local["out"].at[wg], rows_of_out)
    if "lse" in local:
        plgpu.copy_smem_to_gmem(local["lse"].at[wg], rows_of_lse)
