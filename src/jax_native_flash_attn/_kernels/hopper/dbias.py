"""Gradient of a bias over the keys for Hopper GPUs, summed on the fly over the axes in which the bias broadcasts.

A tile of the bias belongs to one block, which visits, in a fixed order, the tiles of scores onto which it broadcasts
(other batch rows, heads, rows of queries); the sum of their dz stays in registers. Few tiles would leave processors
idle, all of the time or in the last round: then the visits are divided into `parts` of equal size, which XLA adds up,
in order too. Many tiles of few visits would be all beginnings and ends: then a block owns a `run` of tiles.

    load     | Q0 K0 dO0 V0 lse0 delta0 Q1 ... into a ring of `stages` slots
    compute  | S0 dP0 | dS0, sum | S1 dP1 | ...
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .backward import Backward, logits_cotangent, row_slice, softmax_weights, zeros
from .blocks import Blocks, Chip
from .device.logits import TileLogits
from .device.pallas import ROW, Loads, in_roles, launch, load, pl, plgpu, store, unravel
from .masks import Intervals
from .operands import key_slice, prepare, query_slice, score_buffers, score_slice

_ENOUGH_BLOCKS = 2 * Chip().cores
_MOST_PARTS = 16
_LONG_RUN = 32  # visits beside which the beginning and the end of a block do not matter


def _visits_of_a_part(num_owned: int, num_visits: int) -> int:
    """Such that the rounds of blocks take the least time."""

    def duration(parts: int) -> int:
        """In visits: beginning and end of a block take about two, adding up a part one."""
        rounds = -(-num_owned * parts // Chip().cores)
        return rounds * (-(-num_visits // parts) + 2) + (parts + 2 if parts > 1 else 0)

    # Further parts are for bringing work to idle processors only: their sums take memory.
    most = max(1, min(num_visits, _MOST_PARTS, 16 * Chip().cores // num_owned))
    return -(-num_visits // min(range(1, most + 1), key=duration))


def dbias(call: Backward, blocks: Blocks, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Of a bias (batch..., N or 1, T or 1, S); axes of size 1, but for the last, are summed over.

    In float32 where XLA has something left to add up or to widen, else in the dtype that is wanted.
    """
    config, inputs, z, dtype = call.config, call.inputs, call.sizes, call.inputs.query.dtype
    compute, stages, shape = blocks.warpgroups, blocks.stages, (blocks.block_q, blocks.block_kv)
    row_blocks, key_blocks = -(-z.T // blocks.rows), -(-z.S // blocks.block_kv)
    everything = (*z.batch, z.N, row_blocks)
    owned = tuple(1 if n == 1 else m for n, m in zip(wanted.shape[:-1], everything, strict=True))
    visited = tuple(m if n == 1 else 1 for n, m in zip(owned, everything, strict=True))
    num_visits, num_owned = math.prod(visited), math.prod(owned) * key_blocks
    visits = _visits_of_a_part(num_owned, num_visits)
    parts = -(-num_visits // visits)
    run = max(1, min(key_blocks, _LONG_RUN // visits, num_owned // _ENOUGH_BLOCKS))
    loads = Loads(z.H, dtype)
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv, loads)
    arrays = operands.arrays | call.arrays(blocks.rows, loads)
    rows_like, keys_like = loads.buffer(stages, compute, blocks.block_q), loads.buffer(stages, blocks.block_kv)
    scores = score_buffers(operands, (stages,), blocks.rows, blocks.block_kv)
    scratch = {
        "query": rows_like,
        "dout": rows_like,
        "key": keys_like,
        "value": keys_like,
        "lse": plgpu.SMEM((stages, compute, blocks.block_q), jnp.float32),
        "delta": plgpu.SMEM((stages, compute, blocks.block_q), jnp.float32),
        **dict(zip(operands.tiled, scores, strict=True)),
        # Completed by TMA: the data are there.
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2 + 4 * compute + len(scores)),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
    }
    sums_rows = wanted.shape[-2] == 1
    is_float32 = parts > 1 or sums_rows or wanted.dtype == jnp.float64
    out_dtype = jnp.float32 if is_float32 else wanted.dtype
    rows_of_result = owned[-1] * blocks.rows

    def kernel(*args: Any) -> None:
        refs = dict(zip(arrays, args, strict=False))
        out = args[len(arrays)]
        local = dict(zip(scratch, args[len(arrays) + 1 :], strict=True))
        for name in ("query", "dout", "key", "value"):
            local[name], local[f"{name} loaded"] = loads.views(local[name])
        first_tile, own = lax.axis_index("run") * run, unravel(lax.axis_index("own"), owned[:-1])
        own = (*own, lax.axis_index("rows"))
        begin = lax.axis_index("part") * visits
        per_tile = jnp.minimum(visits, num_visits - begin)
        num_steps = jnp.minimum(run, key_blocks - first_tile) * per_tile
        intervals = Intervals(config.band, z.T, z.S, blocks.block_kv, refs)
        wg = lax.axis_index("wg")

        def visit(i: Any) -> tuple[tuple, Any, Any, Any, Any]:
            """Head, block of rows and tile of step i; whether they attend any key of the tile, and whether not all."""
            number = lax.div(i, per_tile)
            index, tile = unravel(begin + i - number * per_tile, visited), first_tile + number
            *head, block = (a if n > 1 else b for a, b, n in zip(index, own, visited, strict=True))
            ranges = intervals.ranges(tuple(head), block, blocks.rows)
            attends = (tile >= ranges.first) & (tile < ranges.stop)
            return tuple(head), block, tile, attends, (tile < ranges.full_first) | (tile >= ranges.full_stop)

        def load_all() -> None:
            def load(i: Any, count: Any) -> Any:
                head, block, tile, attends, _ = visit(i)
                slot = lax.rem(count, jnp.int32(stages))

                @pl.when(attends)
                def _load_tile() -> None:
                    ready = local["ready"].at[slot]
                    pl.when(count >= stages)(lambda: plgpu.barrier_wait(local["free"].at[slot]))
                    for w in range(compute):
                        row = block * blocks.rows + w * blocks.block_q
                        for name in ("query", "dout"):
                            rows = query_slice(refs[name], head, row, blocks.block_q)
                            plgpu.copy_gmem_to_smem(rows, local[f"{name} loaded"].at[slot, w], ready)
                        for name in ("lse", "delta"):
                            rows = row_slice(refs[name], head, row, blocks.block_q)
                            plgpu.copy_gmem_to_smem(rows, local[name].at[slot, w], ready)
                    for name in ("key", "value"):
                        keys = key_slice(refs[name], head, z.G, tile, blocks.block_kv)
                        plgpu.copy_gmem_to_smem(keys, local[f"{name} loaded"].at[slot], ready)
                    for name in operands.tiled:
                        score = score_slice(refs[name], head, block * blocks.rows, blocks.rows, tile, blocks.block_kv)
                        plgpu.copy_gmem_to_smem(score, local[name].at[slot], ready)

                return count + attends.astype(jnp.int32)

            lax.fori_loop(0, num_steps, load, jnp.int32(0))

        def compute_all() -> None:
            buffers = {name: local[name] for name in operands.tiled}

            def step(i: Any, carry: tuple) -> tuple:
                head, block, tile, attends, masked = visit(i)

                def add(total: jax.Array, count: Any) -> tuple:
                    slot = lax.rem(count, jnp.int32(stages))
                    logits = TileLogits(
                        config, z, refs, buffers, intervals, head, *shape, row_in_block=wg * blocks.block_q
                    )
                    rows = logits.rows(block * blocks.rows + wg * blocks.block_q, late=True)
                    plgpu.barrier_wait(local["ready"].at[slot])

                    def products(state: tuple) -> None:
                        plgpu.wgmma(state[0], local["query"].at[slot, wg], local["key"].at[slot].transpose((1, 0)))
                        plgpu.wgmma(state[1], local["dout"].at[slot, wg], local["value"].at[slot].transpose((1, 0)))

                    scores = logits.scores(rows, tile, slot)
                    row_lse, row_delta = (load(local[name].at[slot, wg], layout=ROW) for name in ("lse", "delta"))
                    s, dp = pl.run_state(products)((plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))))
                    weights = softmax_weights(logits, s, scores, rows, tile, row_lse, masked)
                    plgpu.barrier_arrive(local["free"].at[slot])
                    ds = logits_cotangent(logits, weights, dp, rows, tile, row_delta)
                    ds = logits.through_mask(ds, rows, tile, masked)
                    return total + ds, count + 1

                def write(total: jax.Array) -> jax.Array:
                    *own_head, own_block = own
                    at = (*own_head, pl.ds(own_block * blocks.rows + wg * blocks.block_q, blocks.block_q))
                    at = (lax.axis_index("part"), *at, pl.ds(tile * blocks.block_kv, blocks.block_kv))
                    store(out.at[at], total.astype(out_dtype))
                    return zeros(*shape)

                total, count = lax.cond(attends, add, lambda total, count: (total, count), *carry)
                is_last = lax.rem(i + 1, per_tile) == 0
                return lax.cond(is_last, write, lambda total: total, total), count

            lax.fori_loop(0, num_steps, step, (zeros(*shape), jnp.int32(0)))

        in_roles(wg, compute, blocks.registers, load_all, compute_all)

    (result,) = launch(
        kernel,
        out_types=[jax.ShapeDtypeStruct((parts, *owned[:-1], rows_of_result, key_blocks * blocks.block_kv), out_dtype)],
        scratch=tuple(scratch.values()),
        grid={"part": parts, "own": math.prod(owned[:-1]), "rows": owned[-1], "run": -(-key_blocks // run)},
        warpgroups=compute + 1,
    )(*arrays.values())
    result = result.sum(0)
    if sums_rows:
        return result.sum(-2, keepdims=True)[..., : z.S]
    return result[..., : z.T, : z.S]
