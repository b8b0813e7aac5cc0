"""Gradients of key and value for Hopper GPUs: one block of keys against the query tiles that attend it.

All tiles are transposed, keys along the rows, so that weights and their cotangents leave the softmax in registers as
the left operand of the next product (notation as in `_mosaic_dquery.py`):

    S^T = K Q^T    dP^T = V dO^T    dS^T = P^T * (dP^T - delta)    dV += P^T dO    dK += dS^T Q

    load     | Q0 dO0 lse0 delta0 Q1 ... into a ring of `stages` slots
    compute  | S0 dP0 | P0 dS0 | dV += P0 dO0  dK += dS0 Q0 | S1 dP1 | ...

Two compute warpgroups, each with its own keys, fill each other's gaps. The query heads of a group follow one another,
so that their sum is made in registers, in the same order every time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._logits import Config, Inputs
from ._mosaic import COLUMN, heads_per_group, launch, matrix_buffer, pad_axis, pl, plgpu, round_up, unravel
from ._mosaic_blocks import Blocks
from ._mosaic_logits import TileLogits, prepare, query_slice
from ._mosaic_masks import Intervals, query_ranges
from ._numerics import LOG2E

_CACHE_BYTES = 24e6


def dkey_dvalue(
    config: Config, inputs: Inputs, blocks: Blocks, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each (batch..., S, K, H) in key's dtype; arguments as of `dquery`.

    Of `blocks`, block_kv are the keys of one compute warpgroup, and block_q the query rows of one tile.
    """
    z, dtype = inputs.sizes, inputs.query.dtype
    padded_T, padded_S = round_up(z.T, 8), round_up(z.S, 8)
    compute, stages, block_q, block_kv = blocks.warpgroups, blocks.stages, blocks.block_q, blocks.block_kv
    block_keys = compute * block_kv
    kv_heads = (*z.batch, z.K)
    num_heads, num_blocks = math.prod(kv_heads), -(-z.S // block_keys)
    group = heads_per_group(num_heads, 4 * z.T * z.H * z.G, _CACHE_BYTES)
    # Vectors of masks are read tile by tile: to a whole number of tiles.
    arrays = prepare(config, inputs, block_q, block_kv * compute).arrays
    arrays.pop("ranges", None)
    arrays |= {
        "dout": pad_axis(dout, -3, padded_T),
        # Whole tiles: TMA clips matrices at the end of an axis, but not vectors.
        "lse": pad_axis(lse * LOG2E, -1, round_up(z.T, block_q)),
        "delta": pad_axis(delta, -1, round_up(z.T, block_q)),
        **query_ranges(config.band, inputs.mask, z.T, z.S, block_q, block_keys),
    }
    keys_like = matrix_buffer(compute, block_kv, z.H, dtype=dtype)
    rows_like = matrix_buffer(stages, block_q, z.H, dtype=dtype)
    scratch = {
        "key": keys_like,  # and, at the end, its gradient; so value
        "value": keys_like,
        "query": rows_like,
        "dout": rows_like,
        "lse": plgpu.SMEM((stages, block_q), jnp.float32),
        "delta": plgpu.SMEM((stages, block_q), jnp.float32),
        # Completed by TMA: the data are there.
        "keys ready": plgpu.Barrier(num_barriers=compute, num_arrivals=2),
        "rows ready": plgpu.Barrier(num_barriers=stages, num_arrivals=4),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "rows free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
    }

    def kernel(*args: Any) -> None:
        refs = dict(zip(arrays, args, strict=False))
        dkey_ref, dvalue_ref = args[len(arrays) : len(arrays) + 2]
        local = dict(zip(scratch, args[len(arrays) + 2 :], strict=True))
        *batch, kv_head = unravel(lax.axis_index("group") * group + lax.axis_index("member"), kv_heads)
        block = lax.axis_index("block")
        intervals = Intervals(config.band, z.T, z.S, block_kv, refs)
        first, stop = intervals.query_tiles((*batch, kv_head * z.G), block, block_q, block_keys)
        per_head = jnp.maximum(stop - first, 0)
        wg = lax.axis_index("wg")

        def position(i: Any) -> tuple[tuple, Any, Any]:
            """Query head, first row, and slot of step i."""
            member = lax.div(i, jnp.maximum(per_head, 1))
            return (
                (*batch, kv_head * z.G + member),
                (first + i - member * per_head) * block_q,
                lax.rem(i, jnp.int32(stages)),
            )

        @pl.when(wg == compute)
        def _load() -> None:
            plgpu.set_max_registers(blocks.registers[1], action="decrease")
            for w in range(compute):
                for name in ("key", "value"):
                    ref, start = refs[name], block * block_keys + w * block_kv
                    keys = ref.at[(*batch, pl.ds(start, block_kv), kv_head)]
                    plgpu.copy_gmem_to_smem(keys, local[name].at[w], local["keys ready"].at[w])

            def load_tile(i: Any, carry: None) -> None:
                head, row, slot = position(i)
                ready = local["rows ready"].at[slot]
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(local["rows free"].at[slot]))
                for name in ("query", "dout"):
                    plgpu.copy_gmem_to_smem(query_slice(refs[name], head, row, block_q), local[name].at[slot], ready)
                for name in ("lse", "delta"):
                    plgpu.copy_gmem_to_smem(refs[name].at[(*head, pl.ds(row, block_q))], local[name].at[slot], ready)

            lax.fori_loop(0, per_head * z.G, load_tile, None)

        @pl.when(wg < compute)
        def _compute() -> None:
            plgpu.set_max_registers(blocks.registers[0], action="increase")
            tile = block * compute + wg  # of this warpgroup's keys
            key, value = local["key"].at[wg], local["value"].at[wg]
            shape = (block_kv, block_q)

            def zeros(*shape: int) -> jax.Array:
                return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

            def logits_of(head: tuple, scale: Any = None) -> TileLogits:
                return TileLogits(config, z, refs, {}, intervals, head, block_q, block_kv, transposed=True, scale=scale)

            scale = logits_of((*batch, kv_head)).scale
            plgpu.barrier_wait(local["keys ready"].at[wg])

            def step(i: Any, carry: tuple) -> tuple:
                head, row, slot = position(i)
                logits = logits_of(head, scale)
                query, cotangent = local["query"].at[slot], local["dout"].at[slot]
                masked = intervals.is_query_edge(head, row, block, block_q, block_keys)
                rows = logits.rows(row, late=True)
                scores = logits.scores(rows, tile)
                plgpu.barrier_wait(local["rows ready"].at[slot])

                def scores_and_dweights(state: tuple) -> None:
                    plgpu.wgmma(state[0], key, query.transpose((1, 0)))
                    plgpu.wgmma(state[1], value, cotangent.transpose((1, 0)))

                row_lse, row_delta = (
                    logits.of_rows(plgpu.load(local[name].at[slot], layout=COLUMN, optimized=False))
                    for name in ("lse", "delta")
                )
                initial = plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))
                s, dp = pl.run_state(scores_and_dweights)(initial)
                x, factor = logits(s, scores, rows, tile, logits.scale * LOG2E, masked)
                weights = jnp.exp2((x if factor is None else x * factor) - row_lse)
                if config.dropout is not None:
                    dp = logits.drop(dp, row, tile) * logits.rescaling
                ds = weights * (dp - row_delta)
                ds = logits.through_mask(ds, rows, masked)
                p, ds = (logits.drop(weights, row, tile) * logits.rescaling).astype(dtype), ds.astype(dtype)
                dkey, dvalue, p, ds = lax.optimization_barrier((*carry, p, ds))

                def gradients(state: tuple) -> None:
                    plgpu.wgmma(state[1], p, cotangent)
                    plgpu.wgmma(state[0], ds, query)

                carry = pl.run_state(gradients)((plgpu.ACC.init(dkey), plgpu.ACC.init(dvalue)))
                plgpu.barrier_arrive(local["rows free"].at[slot])
                return tuple(carry)

            accumulators = (zeros(block_kv, z.H), zeros(block_kv, z.H))
            dkey, dvalue = lax.fori_loop(0, per_head * z.G, step, accumulators)
            key[...] = (dkey * scale).astype(dtype)
            value[...] = dvalue.astype(dtype)
            plgpu.commit_smem()
            at = (*batch, pl.ds(tile * block_kv, block_kv), kv_head)
            plgpu.copy_smem_to_gmem(key, dkey_ref.at[at])
            plgpu.copy_smem_to_gmem(value, dvalue_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

    result = jax.ShapeDtypeStruct((*z.batch, padded_S, z.K, z.H), dtype)
    gradients = launch(
        kernel,
        out_types=[result, result],
        scratch=tuple(scratch.values()),
        grid={"group": num_heads // group, "block": num_blocks, "member": group},
        warpgroups=compute + 1,
    )(*arrays.values())
    dkey, dvalue = (x[..., : z.S, :, :] for x in gradients)
    return dkey, dvalue
