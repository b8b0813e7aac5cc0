"""Gradient of query for Hopper GPUs: one block of query rows against its key/value tiles, as the forward kernel goes.

With P the softmax weights, recomputed from the log-sum-exp, and S, dP, dS tiles of scores and cotangents
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2; delta as in `_kernels.py`):

    S = Q K^T    dP = dO V^T    dS = P * (dP - delta)    dQ += dS K

    load     | K0 V0 K1 V1 ... into a ring of `stages` slots
    compute  | S0 dP0 | dS0 | S1 dP1 dQ+=dS0 K0 ...... | S2 dP2 dQ+=dS1 K1 ...... |
             |        |     | (tensor cores)   dS1     | (tensor cores)   dS2     |

The three products of a step are issued at once and finish in order: dS1 is computed beside the last of them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._logits import Config, Inputs
from ._mosaic import ROW, heads_per_group, launch, matrix_buffer, pad_axis, pl, plgpu, round_up, unravel
from ._mosaic_blocks import Blocks
from ._mosaic_logits import TileLogits, key_slice, prepare, query_slice
from ._mosaic_masks import Intervals
from ._numerics import LOG2E

_CACHE_BYTES = 24e6


def dquery(
    config: Config, inputs: Inputs, blocks: Blocks, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> jax.Array:
    """(batch..., T, N, H) in query's dtype.

    Args:
      dout: (batch..., T, N, H) in query's dtype.
      lse: (batch..., N, T) log-sum-exp of the logits.
      delta: (batch..., N, T), dout . out less the cotangent of lse.
    """
    z, dtype = inputs.sizes, inputs.query.dtype
    padded_T = round_up(z.T, 8)
    compute, stages, shape = blocks.warpgroups, blocks.stages, (blocks.block_q, blocks.block_kv)
    heads = (*z.batch, z.N)
    num_heads, num_blocks = math.prod(heads), -(-z.T // blocks.rows)
    group = heads_per_group(num_heads, 4 * z.S * z.H / z.G, _CACHE_BYTES)
    full_rows = num_blocks * blocks.rows
    arrays = {
        **prepare(config, inputs, blocks.rows, blocks.block_kv).arrays,
        "dout": pad_axis(dout, -3, padded_T),
        "lse": pad_axis(lse * LOG2E, -1, full_rows),
        "delta": pad_axis(delta, -1, full_rows),
    }
    rows_like = matrix_buffer(compute, blocks.block_q, z.H, dtype=dtype)
    keys_like = matrix_buffer(stages, blocks.block_kv, z.H, dtype=dtype)
    scratch = {
        "query": rows_like,  # and, at the end, its gradient
        "dout": rows_like,
        "key": keys_like,
        "value": keys_like,
        # Completed by TMA: the data are there.
        "rows ready": plgpu.Barrier(num_barriers=compute, num_arrivals=2),
        "key ready": plgpu.Barrier(num_barriers=stages),
        "value ready": plgpu.Barrier(num_barriers=stages),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "key free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        "value free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
    }

    def kernel(*args: Any) -> None:
        refs = dict(zip(arrays, args, strict=False))
        out = args[len(arrays)]
        local = dict(zip(scratch, args[len(arrays) + 1 :], strict=True))
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
            for w in range(compute):
                for name in ("query", "dout"):
                    rows = query_slice(refs[name], head, block * blocks.rows + w * blocks.block_q, blocks.block_q)
                    plgpu.copy_gmem_to_smem(rows, local[name].at[w], local["rows ready"].at[w])

            def load_tile(i: Any, carry: None) -> None:
                slot = slot_of(i)
                for name in ("key", "value"):
                    free, ready = local[f"{name} free"].at[slot], local[f"{name} ready"].at[slot]
                    pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free))
                    keys = key_slice(refs[name], head, z.G, tile_of(i), blocks.block_kv)
                    plgpu.copy_gmem_to_smem(keys, local[name].at[slot], ready)

            lax.fori_loop(0, num_tiles, load_tile, None)

        @pl.when(wg < compute)
        def _compute() -> None:
            plgpu.set_max_registers(blocks.registers[0], action="increase")
            row = block * blocks.rows + wg * blocks.block_q
            logits = TileLogits(config, z, refs, {}, intervals, head, *shape)
            rows = logits.rows(row)
            at_rows = (*head, pl.ds(row, blocks.block_q))
            row_lse, row_delta = (
                plgpu.load(refs[name].at[at_rows], layout=ROW, optimized=False) for name in ("lse", "delta")
            )
            query, cotangent = local["query"].at[wg], local["dout"].at[wg]
            has_edges = intervals.has_left_edge or intervals.has_right_edge

            def is_edge(i: Any) -> Any:
                if not intervals.has_left_edge and intervals.right_tiles(blocks.rows) <= 1:
                    return False
                return (tile_of(i) < ranges.full_first) | (tile_of(i) >= ranges.full_stop)

            def dscores(s: Any, dp: Any, scores: Any, i: Any, masked: Any) -> Any:
                x, factor = logits(s, scores, rows, tile_of(i), logits.scale * LOG2E, masked)
                exponent = (x if factor is None else x * factor) - logits.of_rows(row_lse)
                dp = logits.drop(dp, row, tile_of(i)) * logits.rescaling
                ds = jnp.exp2(exponent) * (dp - logits.of_rows(row_delta))
                return logits.through_mask(ds, rows, masked).astype(dtype)

            def issue(s_ref: Any, dp_ref: Any, slot: Any) -> None:
                plgpu.wgmma(s_ref, query, local["key"].at[slot].transpose((1, 0)))
                plgpu.wgmma(dp_ref, cotangent, local["value"].at[slot].transpose((1, 0)))

            def zeros(*shape: int) -> jax.Array:
                return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

            plgpu.barrier_wait(local["rows ready"].at[wg])
            plgpu.barrier_wait(local["key ready"].at[0])
            plgpu.barrier_wait(local["value ready"].at[0])
            first: Any = pl.run_state(lambda state: issue(state[0], state[1], 0))
            s, dp = first((plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))))
            plgpu.barrier_arrive(local["value free"].at[0])
            ds = dscores(s, dp, logits.scores(rows, tile_of(0)), jnp.int32(0), has_edges)

            def step(i: Any, carry: tuple) -> tuple:
                acc, ds = lax.optimization_barrier(carry)
                slot, previous = slot_of(i), slot_of(i - 1)
                plgpu.barrier_wait(local["key ready"].at[slot])
                plgpu.barrier_wait(local["value ready"].at[slot])

                def products(state: tuple) -> None:
                    acc_ref, s_ref, dp_ref, ds_ref = state
                    issue(s_ref, dp_ref, slot)
                    plgpu.wgmma(acc_ref, ds, local["key"].at[previous])
                    scores = logits.scores(rows, tile_of(i))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
                    ds_ref[...] = dscores(s, dp, scores, i, is_edge(i))
                    plgpu.barrier_arrive(local["value free"].at[slot])

                # Leaving `run_state` waits for the product with the previous keys.
                initial = plgpu.ACC.init(acc), plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))
                acc, _, _, ds = pl.run_state(products)((*initial, zeros(*shape).astype(dtype)))
                plgpu.barrier_arrive(local["key free"].at[previous])
                return acc, ds

            acc, ds = lax.optimization_barrier(lax.fori_loop(1, num_tiles, step, (zeros(blocks.block_q, z.H), ds)))
            last = local["key"].at[slot_of(num_tiles - 1)]
            acc = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, last))(plgpu.ACC.init(acc))
            query[...] = (acc * logits.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, query_slice(out, head, row, blocks.block_q))
            plgpu.wait_smem_to_gmem(0)

    (result,) = launch(
        kernel,
        out_types=[jax.ShapeDtypeStruct((*z.batch, padded_T, z.N, z.H), dtype)],
        scratch=tuple(scratch.values()),
        grid={"group": num_heads // group, "block": num_blocks, "member": group},
        warpgroups=compute + 1,
    )(*arrays.values())
    return result[..., : z.T, :, :]
