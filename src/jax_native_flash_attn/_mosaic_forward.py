"""Forward kernel for Hopper GPUs: attention of one block of query rows, as a pipeline of warpgroups.

One warpgroup loads, the others compute, each on its own 64 query rows; all go through the same key/value tiles, last
tile first. For tile i (S = scores, P = weights, O = numerator of the output):

    load     | K0 V0 K1 V1 ........ K2 (slot of K0) V2 ...                TMA into a ring of `stages` slots
    compute  | S0=QK0  softmax0 | S1=QK1  O+=P0V0 ............. | S2=QK2  O+=P1V1 ............. |
             |                  |  (tensor cores)  softmax1     |  (tensor cores)  softmax2     |

Both products of a step are issued at once; they finish in order, so the softmax of S1 runs on the other units while the
tensor cores still work on P0 V0. The state of the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) lives
in registers, in base 2. The scheme is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

Only tiles in which some row's interval begins or ends need a mask. For a causal mask that is the first one visited;
other masks decide at run time. Blocks of rows with many tiles (the last rows of a causal mask) start first.
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
    swizzle_bytes,
    unravel,
)
from ._mosaic_blocks import Blocks
from ._mosaic_logits import TileLogits, clean_padding, key_slice, prepare, query_slice, score_buffers, score_slice
from ._mosaic_masks import Intervals
from ._numerics import LN2, LOG2E, lowest

_LOWEST = lowest(jnp.float32)
_CACHE_BYTES = 24e6  # of keys and values that blocks which run at once should share: half of Hopper's L2 cache


def forward(config: Config, inputs: Inputs, blocks: Blocks, out_dtype: Any) -> tuple[jax.Array, ...]:
    """out (batch..., T, N, D) in `out_dtype` and, if needed, lse (batch..., N, T) in float32.

    `out_dtype` is query's, or float32 for derivatives, which need the output unrounded.
    """
    z, dtype = inputs.sizes, inputs.query.dtype
    padded_T = round_up(z.T, 8)
    compute, stages, shape = blocks.warpgroups, blocks.stages, (blocks.block_q, blocks.block_kv)
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv)
    heads = (*z.batch, z.N)
    num_heads, num_blocks = math.prod(heads), -(-z.T // blocks.rows)
    group = heads_per_group(num_heads, 4 * z.S * z.H / z.G, _CACHE_BYTES)

    out_types = [jax.ShapeDtypeStruct((*z.batch, padded_T, z.N, z.H), out_dtype)]
    if config.needs_lse:
        # Whole blocks: TMA clips matrices at the end of an axis, but not vectors.
        out_types.append(jax.ShapeDtypeStruct((*heads, num_blocks * blocks.rows), jnp.float32))
    rows_like = (compute, blocks.block_q, z.H)
    # The output leaves through shared memory that held the query (16 bit), or query and keys (float32).
    is_wide = jnp.dtype(out_dtype) != dtype
    loaded = (matrix_buffer(*rows_like, dtype=dtype), matrix_buffer(stages, blocks.block_kv, z.H, dtype=dtype))
    shared = plgpu.RefUnion(loaded, *([(matrix_buffer(*rows_like, dtype=out_dtype),)] if is_wide else []))
    scores = score_buffers(operands, (stages,), blocks.rows, blocks.block_kv)
    scratch = {
        "query, key, out": shared,
        "value": matrix_buffer(stages, blocks.block_kv, z.H, dtype=dtype),
        "lse": plgpu.SMEM((compute, blocks.block_q), jnp.float32),
        **(
            {"weights": matrix_buffer(compute, *shape, dtype=dtype, swizzle=swizzle_bytes(z.H, dtype, blocks.block_kv))}
            if blocks.weights_in_shared
            else {}
        ),
        **dict(zip(operands.tiled, scores, strict=True)),
        # Completed by TMA: the data are there.
        "query ready": plgpu.Barrier(num_barriers=compute),
        "key ready": plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(scores)),
        "value ready": plgpu.Barrier(num_barriers=stages),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "key free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        "value free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        # Completed by all compute warpgroups: nobody reads query or keys any more.
        "all done": plgpu.Barrier(num_arrivals=compute),
        # Completed by compute warpgroup 0: the padding in a tile of values is clean.
        "value clean": plgpu.Barrier(),
    }

    def kernel(*args: Any) -> None:
        num_inputs, num_outs = len(operands.arrays), len(out_types)
        refs = dict(zip(operands.arrays, args, strict=False))
        outs = args[num_inputs : num_inputs + num_outs]
        local = dict(zip(scratch, args[num_inputs + num_outs :], strict=True))
        (query_smem, key_smem), *wide = local["query, key, out"]
        out_smem = wide[0][0] if is_wide else query_smem
        value_smem = local["value"]

        head = unravel(lax.axis_index("group") * group + lax.axis_index("member"), heads)
        block = (num_blocks - 1) - lax.axis_index("block")
        intervals = Intervals(config.band, z.T, z.S, blocks.block_kv, refs)
        ranges = intervals.ranges(head, block, blocks.rows)
        num_tiles = ranges.stop - ranges.first
        wg = lax.axis_index("wg")

        def slot_of(i: Any) -> Any:
            return lax.rem(i, jnp.int32(stages))

        def tile_of(i: Any) -> Any:
            return ranges.stop - 1 - i

        @pl.when(wg == compute)
        def _load() -> None:
            plgpu.set_max_registers(blocks.registers[1], action="decrease")
            first_row = block * blocks.rows
            for w in range(compute):
                rows = query_slice(refs["query"], head, first_row + w * blocks.block_q, blocks.block_q)
                plgpu.copy_gmem_to_smem(rows, query_smem.at[w], local["query ready"].at[w])

            def load_tile(i: Any, carry: None) -> None:
                slot, tile = slot_of(i), tile_of(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(local["key free"].at[slot]))
                key = key_slice(refs["key"], head, z.G, tile, blocks.block_kv)
                plgpu.copy_gmem_to_smem(key, key_smem.at[slot], local["key ready"].at[slot])
                for name in operands.tiled:
                    score = score_slice(refs[name], head, first_row, blocks.rows, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(score, local[name].at[slot], local["key ready"].at[slot])
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(local["value free"].at[slot]))
                value = key_slice(refs["value"], head, z.G, tile, blocks.block_kv)
                plgpu.copy_gmem_to_smem(value, value_smem.at[slot], local["value ready"].at[slot])

            lax.fori_loop(0, num_tiles, load_tile, None)

        @pl.when(wg < compute)
        def _compute() -> None:
            plgpu.set_max_registers(blocks.registers[0], action="increase")
            row = block * blocks.rows + wg * blocks.block_q
            buffers = {name: local[name] for name in operands.tiled}
            logits = TileLogits(config, z, refs, buffers, intervals, head, *shape, row_in_block=wg * blocks.block_q)
            rows = logits.rows(row)
            has_edges = intervals.has_right_edge or intervals.has_left_edge

            def softmax(
                products: Any, scores: Any, i: Any, top: Any, total: Any, masked: Any
            ) -> tuple[Any, Any, Any, Any]:
                """Weights of tile i for the second product; the new maximum and sum; what corrects older sums."""
                x, factor = logits(products, scores, rows, tile_of(i), magnitude, masked)
                largest = x.max(axis=1)
                new_top = jnp.maximum(top, largest if factor is None else largest * factor)
                exponent = (x if factor is None else x * factor) - columns_of(new_top, shape)
                weights = jnp.exp2(exponent)
                correction = jnp.exp2(top - new_top)
                total = total * correction + weights.sum(axis=1)
                return logits.drop(weights, row, tile_of(i)).astype(dtype), new_top, total, correction

            def is_edge(i: Any) -> Any:
                """Whether a tile behind the first needs a mask."""
                if not intervals.has_left_edge and intervals.right_tiles(blocks.rows) <= 1:
                    return False  # the first tile was the only one
                return (tile_of(i) < ranges.full_first) | (tile_of(i) >= ranges.full_stop)

            def clean_value(i: Any) -> None:
                """Padding in the values of tile i, which are in shared memory; full tiles hold none."""
                if "length" not in refs:
                    return
                length = refs["length"]
                length = length[broadcast_index(head[:-1], length.shape)]

                @pl.when((tile_of(i) + 1) * blocks.block_kv > length)
                def _clean() -> None:
                    @pl.when(wg == 0)
                    def _first() -> None:
                        clean_padding(value_smem.at[slot_of(i)], tile_of(i), length)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(local["value clean"])

                    plgpu.barrier_wait(local["value clean"])

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
            total = plgpu.layout_cast(jnp.zeros((blocks.block_q,), jnp.float32), ROW)
            acc = plgpu.layout_cast(jnp.zeros((blocks.block_q, z.H), jnp.float32), plgpu.Layout.WGMMA)

            def first_scores(s_ref: Any) -> Any:
                plgpu.barrier_wait(local["key ready"].at[0])
                issue_scores(s_ref, 0)
                return s_ref[...]

            products = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
            first = logits.scores(rows, tile_of(0), 0)
            p, top, total, _ = softmax(products, first, jnp.int32(0), top, total, has_edges)
            plgpu.barrier_arrive(local["key free"].at[0])

            def put(p: Any) -> Any:
                if not blocks.weights_in_shared:
                    return p
                local["weights"][wg] = p
                plgpu.commit_smem()
                return top

            def step(i: Any, carry: tuple) -> tuple:
                acc, p, top, total = lax.optimization_barrier(carry)
                slot, previous = slot_of(i), slot_of(i - 1)
                # All waits come first: control flow between two products would serialise them.
                plgpu.barrier_wait(local["key ready"].at[slot])
                plgpu.barrier_wait(local["value ready"].at[previous])
                clean_value(i - 1)

                def products_and_softmax(state: tuple) -> None:
                    acc_ref, s_ref, p_ref, top_ref, total_ref, correction_ref = state
                    issue_scores(s_ref, slot)
                    plgpu.wgmma(
                        acc_ref, local["weights"].at[wg] if blocks.weights_in_shared else p, value_smem.at[previous]
                    )
                    scores = logits.scores(rows, tile_of(i), slot)
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    p_ref[...], top_ref[...], total_ref[...], correction_ref[...] = softmax(
                        s, scores, i, top, total, is_edge(i)
                    )
                    plgpu.barrier_arrive(local["key free"].at[slot])

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
            last = slot_of(num_tiles - 1)
            plgpu.barrier_wait(local["value ready"].at[last])
            clean_value(num_tiles - 1)
            weights = local["weights"].at[wg] if blocks.weights_in_shared else p
            acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, value_smem.at[last]))(plgpu.ACC.init(acc))

            out = acc * columns_of(logits.rescaling / total, acc.shape)
            lse = (top + jnp.log2(total)) * LN2
            if rows.intervals is not None:
                # Rows past the query's length have no key: their weights are those of masked logits.
                out = jnp.where(columns_of(top, acc.shape) > 0.9 * _LOWEST, out, 0.0)
                lse = jnp.where(top > 0.9 * _LOWEST, lse, 0.0)
            if is_wide:
                plgpu.barrier_arrive(local["all done"])
                plgpu.barrier_wait(local["all done"])
            out_smem[wg] = out.astype(out_dtype)
            if config.needs_lse:
                local["lse"][wg] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], query_slice(outs[0], head, row, blocks.block_q))
            if config.needs_lse:
                plgpu.copy_smem_to_gmem(local["lse"].at[wg], outs[1].at[(*head, pl.ds(row, blocks.block_q))])
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        kernel,
        out_types=out_types,
        scratch=tuple(scratch.values()),
        grid={"group": num_heads // group, "block": num_blocks, "member": group},
        warpgroups=compute + 1,
    )(*operands.arrays.values())
    out, *lse = results
    return (out[..., : z.T, :, :], *(x[..., : z.T] for x in lse))
