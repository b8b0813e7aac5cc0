"""Forward kernel for Hopper GPUs: attention of blocks of query rows, as a pipeline of warpgroups.

One warpgroup loads, the others compute, each on its own 64 query rows; all go through the same key/value tiles, last
tile first. For tile i (S = scores, P = weights, O = numerator of the output):

    load     | K0 Q V0 K1 V1 ...... K2 (slot of K0) V2 ...                TMA into a ring of `stages` slots
    compute  | S0=QK0  softmax0 | S1=QK1  O+=P0V0 ............. | S2=QK2  O+=P1V1 ............. |
             |                  |  (tensor cores)  softmax1     |  (tensor cores)  softmax2     |

Both products of a step are issued at once; they finish in order, so the softmax of S1 runs on the other units while the
tensor cores still work on P0 V0. The state of the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) lives
in registers, in base 2. The scheme is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

A block of threads goes through several items of `_mosaic_work.py`, one after the other, and its ring of slots through
all of them: while the computing warpgroups finish one item, the tiles of the next are loaded.

Only tiles in which some row's interval begins or ends need a mask. For a causal mask that is the first one visited;
other masks decide at run time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._logits import Config, Inputs
from ._mosaic import (
    ROW,
    broadcast_index,
    columns_of,
    heads_per_group,
    launch,
    matrix_buffer,
    pl,
    plgpu,
    round_up,
)
from ._mosaic_blocks import Blocks
from ._mosaic_logits import (
    NO_KEY,
    TileLogits,
    clean_padding,
    key_slice,
    prepare,
    query_slice,
    score_buffers,
    score_slice,
)
from ._mosaic_masks import Intervals
from ._mosaic_overlap import THREAD_COLUMNS, before_wait, fold_columns
from ._mosaic_work import part_of, plan
from ._numerics import LN2, LOG2E, lowest

_LOWEST = lowest(jnp.float32)
_CACHE_BYTES = 24e6  # of keys and values that blocks which run at once should share: half of Hopper's L2 cache


def forward(config: Config, inputs: Inputs, blocks: Blocks, out_dtype: Any, cores: int) -> tuple[jax.Array, ...]:
    """out (batch..., T, N, D) in `out_dtype` and, if needed, lse (batch..., N, T) in float32.

    `out_dtype` is query's, or float32 for derivatives, which need the output unrounded. `cores` is the number of
    multiprocessors.
    """
    if blocks.parts == 1:
        out, *lse = _partial_forward(config, inputs, blocks, out_dtype, cores)
        return (out[0], *(x[0] for x in lse))
    out, lse = _merge(*_partial_forward(config, inputs, blocks, jnp.float32, cores))
    return (out.astype(out_dtype), lse) if config.needs_lse else (out.astype(out_dtype),)


def _merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Out and lse over all parts: the means of the parts' outputs, weighted by their sums of exponentials."""
    # A row without keys in a part has the lowest lse there, and no weight; without any, zeros as without parts.
    top = lse.max(0, keepdims=True)
    weights = jnp.exp(lse - top)
    total = weights.sum(0, keepdims=True)
    has_key = top > NO_KEY
    factors = jnp.where(has_key, weights / total, 0.0)
    lse = jnp.where(has_key, top + jnp.log(total), 0.0)
    return (out * jnp.swapaxes(factors, -1, -2)[..., None]).sum(0), lse[0]


def _partial_forward(
    config: Config, inputs: Inputs, blocks: Blocks, out_dtype: Any, cores: int
) -> tuple[jax.Array, ...]:
    """out (parts, batch..., T, N, D) and, if needed, lse (parts, batch..., N, T), over each part of the tiles."""
    z, dtype = inputs.sizes, inputs.query.dtype
    padded_T = round_up(z.T, 8)
    compute, stages, shape = blocks.warpgroups, blocks.stages, (blocks.block_q, blocks.block_kv)
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv)
    heads = (*z.batch, z.N)
    num_heads, num_blocks = math.prod(heads), -(-z.T // blocks.rows)
    work = plan(
        heads,
        num_blocks,
        blocks.parts,
        heads_per_group(num_heads, 4 * z.S * z.H / z.G, _CACHE_BYTES),
        cores if blocks.persistent else None,
        is_uneven=config.band.upper is not None and config.band.lower is None,
        batch_fastest="bias" in operands.tiled and operands.arrays["bias"].shape[:-3] != z.batch,
    )
    needs_lse = config.needs_lse or blocks.parts > 1
    takes_turns = blocks.takes_turns and compute > 1

    out_types = [jax.ShapeDtypeStruct((blocks.parts, *z.batch, padded_T, z.N, z.H), out_dtype)]
    if needs_lse:
        # Whole blocks: TMA clips matrices at the end of an axis, but not vectors.
        out_types.append(jax.ShapeDtypeStruct((blocks.parts, *heads, num_blocks * blocks.rows), jnp.float32))
    rows_like = (compute, blocks.block_q, z.H)
    loaded = (matrix_buffer(*rows_like, dtype=dtype), matrix_buffer(stages, blocks.block_kv, z.H, dtype=dtype))
    out_buffer = matrix_buffer(*rows_like, dtype=out_dtype)
    if work.is_single:
        # The output leaves through memory that held the query (16 bit), or query and keys (float32).
        is_wide = jnp.dtype(out_dtype) != dtype
        buffers = {"query, key, out": plgpu.RefUnion(loaded, *([(out_buffer,)] if is_wide else []))}
    else:
        is_wide = False
        buffers = {"query": loaded[0], "key": loaded[1], "out": out_buffer}
    scores = score_buffers(operands, stages, blocks.rows, blocks.block_kv)
    scratch = {
        **buffers,
        "value": matrix_buffer(stages, blocks.block_kv, z.H, dtype=dtype),
        "lse": plgpu.SMEM((compute, blocks.block_q), jnp.float32),
        **({"weights": matrix_buffer(compute, *shape, dtype=dtype)} if blocks.weights_in_shared else {}),
        **scores,
        # Completed by TMA: the data are there.
        "query ready": plgpu.Barrier(num_barriers=compute),
        "key ready": plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(scores)),
        "value ready": plgpu.Barrier(num_barriers=stages),
        # Completed by the compute warpgroup whose rows they are: the next item's query may be loaded.
        "query free": plgpu.Barrier(num_barriers=compute),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "key free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        "value free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        # Completed by all compute warpgroups: nobody reads query or keys any more.
        "all done": plgpu.Barrier(num_arrivals=compute),
        # Completed by the compute warpgroup before: it has issued its products, the next one may.
        "turn": plgpu.Barrier(num_barriers=compute),
        # Completed by compute warpgroup 0: the padding in the values of a slot is clean.
        "value clean": plgpu.Barrier(num_barriers=stages),
    }

    def kernel(*args: Any) -> None:
        num_inputs, num_outs = len(operands.arrays), len(out_types)
        refs = dict(zip(operands.arrays, args, strict=False))
        outs = args[num_inputs : num_inputs + num_outs]
        local = dict(zip(scratch, args[num_inputs + num_outs :], strict=True))
        if work.is_single:
            (query_smem, key_smem), *wide = local["query, key, out"]
            out_smem = wide[0][0] if is_wide else query_smem
        else:
            query_smem, key_smem, out_smem = local["query"], local["key"], local["out"]
        value_smem = local["value"]
        intervals = Intervals(config.band, z.T, z.S, blocks.block_kv, refs)
        wg = lax.axis_index("wg")

        def for_each_item(body: Any) -> None:
            """`body(k, head, block, part, ranges, is_empty, slot_of)` for each item of this worker.

            `slot_of(i)` is the place in the ring of an item's i-th tile, and `slot_of.count(i)` how many came before.
            """

            def run(k: Any, n: Any, count: Any) -> Any:
                head, block, part = work.item(n)
                ranges, is_empty = part_of(intervals.ranges(head, block, blocks.rows), part, blocks.parts)
                body(k, count, head, block, part, ranges, is_empty)
                return count + (ranges.stop - ranges.first)

            work.for_each(lax.axis_index("worker"), run)

        def slot_of(n: Any) -> Any:
            return lax.rem(n, jnp.int32(stages))

        @pl.when(wg == compute)
        def _load() -> None:
            plgpu.set_max_registers(blocks.registers[1], action="decrease")

            def load(k: Any, count: Any, head: Any, block: Any, part: Any, ranges: Any, is_empty: Any) -> None:
                first_row = block * blocks.rows

                def load_query() -> None:
                    for w in range(compute):
                        pl.when(k > 0)(lambda w=w: plgpu.barrier_wait(local["query free"].at[w]))
                        rows = query_slice(refs["query"], head, first_row + w * blocks.block_q, blocks.block_q)
                        plgpu.copy_gmem_to_smem(rows, query_smem.at[w], local["query ready"].at[w])

                def load_tile(i: Any, carry: None) -> None:
                    n, tile = count + i, ranges.stop - 1 - i
                    slot = slot_of(n)
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(local["key free"].at[slot]))
                    key = key_slice(refs["key"], head, z.G, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(key, key_smem.at[slot], local["key ready"].at[slot])
                    for name in operands.streamed:
                        rows = (first_row, blocks.rows) if name in operands.tiled else None
                        score = score_slice(refs[name], head, rows, tile, blocks.block_kv)
                        plgpu.copy_gmem_to_smem(score, local[name].at[slot], local["key ready"].at[slot])
                    pl.when(i == 0)(load_query)
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(local["value free"].at[slot]))
                    value = key_slice(refs["value"], head, z.G, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(value, value_smem.at[slot], local["value ready"].at[slot])

                lax.fori_loop(0, ranges.stop - ranges.first, load_tile, None)

            for_each_item(load)

        def compute_item(
            scale: Any, k: Any, count: Any, head: Any, block: Any, part: Any, ranges: Any, is_empty: Any
        ) -> None:
            num_tiles = ranges.stop - ranges.first
            row = block * blocks.rows + wg * blocks.block_q
            buffers = {name: local[name] for name in operands.streamed}
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

            def softmax(
                products: Any, scores: Any, i: Any, top: Any, total: Any, masked: Any
            ) -> tuple[Any, Any, Any, Any]:
                """Weights of tile i for the second product; the new maximum and sums; what corrects older ones."""

                def exponents(x: Any, factor: Any) -> tuple[Any, Any]:
                    largest = fold_columns(x, jnp.maximum).max(axis=1)
                    new_top = jnp.maximum(top, largest if factor is None else largest * factor)
                    return (x if factor is None else x * factor) - columns_of(new_top, shape), new_top

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
                if length is None:
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

            def issue_scores(s_ref: Any, slot: Any) -> None:
                plgpu.wgmma(s_ref, query, key_smem.at[slot].transpose((1, 0)))

            query = query_smem.at[wg]
            plgpu.barrier_wait(local["query ready"].at[wg])
            # With a negated query for a negative scale, the largest product has the largest logit, and scaling can wait
            # for the exponent.
            magnitude = jnp.abs(logits.scale) * LOG2E

            @pl.when(logits.scale < 0)
            def _negate() -> None:
                query[...] = -query[...]
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
                local["weights"][wg] = p
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
                    plgpu.wgmma(
                        acc_ref, local["weights"].at[wg] if blocks.weights_in_shared else p, value_smem.at[previous]
                    )
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
            acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, value_smem.at[last]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(local["value free"].at[last])

            total = total.sum(axis=1)
            out = acc * columns_of(logits.rescaling / total, acc.shape)
            lse = (top + jnp.log2(total)) * LN2
            if blocks.parts > 1:
                lse = jnp.where((top > NO_KEY) & jnp.logical_not(is_empty), lse, _LOWEST)
            elif intervals.is_traced:
                # Rows past the query's length have no key: their weights are those of masked logits.
                out = jnp.where(columns_of(top, acc.shape) > NO_KEY, out, 0.0)
                lse = jnp.where(top > NO_KEY, lse, 0.0)
            if is_wide:
                plgpu.barrier_arrive(local["all done"])
                plgpu.barrier_wait(local["all done"])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left
            out_smem[wg] = out.astype(out_dtype)
            if needs_lse:
                local["lse"][wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], query_slice(outs[0], (part, *head), row, blocks.block_q))
            if needs_lse:
                plgpu.copy_smem_to_gmem(local["lse"].at[wg], outs[1].at[(part, *head, pl.ds(row, blocks.block_q))])

        @pl.when(wg < compute)
        def _compute() -> None:
            plgpu.set_max_registers(blocks.registers[0], action="increase")
            if takes_turns:
                pl.when(wg == compute - 1)(lambda: plgpu.barrier_arrive(local["turn"].at[0]))
            scale = refs["scale"][(0,) * refs["scale"].ndim] if refs["scale"].size == 1 else None
            for_each_item(lambda *item: compute_item(scale, *item))
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        kernel,
        out_types=out_types,
        scratch=tuple(scratch.values()),
        grid={"worker": work.workers},
        warpgroups=compute + 1,
    )(*operands.arrays.values())
    out, *lse = results
    return (out[..., : z.T, :, :], *(x[..., : z.T] for x in lse))
