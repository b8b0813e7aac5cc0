"""Gradient of query for Hopper GPUs: one block of query rows against its key/value tiles, as the forward kernel goes.

With P the softmax weights, recomputed from the log-sum-exp, and S, dP, dS tiles of scores and cotangents
(FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2; delta as in `kernels.py`):

    S = Q K^T    dP = dO V^T    dS = P * (dP - delta)    dQ += dS K

    load     | K0 V0 K1 V1 ... into a ring of `stages` slots
    compute  | S0 dP0 | dS0 | S1 dP1 dQ+=dS0 K0 ...... | S2 dP2 dQ+=dS1 K1 ...... |
             |        |     | (tensor cores)   dS1     | (tensor cores)   dS2     |

The three products of a step are issued at once and finish in order: dS1 is computed beside the last of them.

As in the forward, a block of threads goes through several items, one after the other, where these are short: rows of
the next item, and its first tiles, are then loaded while the last one ends.

The gradient of scale, sum_ts dS_ts x_ts with x = Q K^T, has terms of both signs that cancel. So dS is not rounded for
it, and comes without the error of delta, which is the same for a whole row (`kernels.py`, `cotangent`): the kernel
leaves three sums, the *moments* of each row.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.masks import ColumnRange
from .backward import Backward, logits_cotangent, row_slice, softmax_weights, zeros
from .blocks import Blocks
from .device.logits import TileLogits
from .device.overlap import THREAD_COLUMNS, before_wait, fold_columns
from .device.pallas import ROW, Loads, Results, heads_per_group, in_roles, launch, load, opaque, pl, plgpu, store
from .masks import Intervals
from .operands import clean_padding, key_slice, prepare, query_slice, score_buffers, score_slice
from .scheduler import Item, plan

_CACHE_BYTES = 24e6
_MAX_PIPELINED = 192  # head dimension


MOMENTS = ("dz x", "dz", "p x")  # summed over the keys


def dquery(call: Backward, blocks: Blocks, out_dtype: Any, cores: int, *, with_scale: bool) -> tuple[jax.Array, ...]:
    """The gradient of query, (batch..., T, N, H) in `out_dtype` (query's, or float32), and, if `with_scale`, the
    `MOMENTS` of each row, (batch..., N, T) in float32; on so many multiprocessors.
    """
    config, inputs, z, dtype = call.config, call.inputs, call.sizes, call.inputs.query.dtype
    compute, stages, shape = blocks.warpgroups, blocks.stages, (blocks.block_q, blocks.block_kv)
    value_stages = stages - 1  # a tile of values is free after its step, one of keys a step later
    heads = (*z.batch, z.N)
    num_heads, num_blocks = math.prod(heads), -(-z.T // blocks.rows)
    group = heads_per_group(num_heads, 4 * z.S * z.H / z.G, _CACHE_BYTES)
    loads = Loads(z.H, dtype)
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv, loads)
    arrays = operands.arrays | call.arrays(blocks.rows, loads, drops_dead_rows=True)
    is_wide, gradient = jnp.dtype(out_dtype) != dtype, Results(z.T, z.N)
    work = plan(heads, num_blocks, group, cores if blocks.persistent and not is_wide else None, config.band)
    row_buffers = work.buffers * compute
    rows_like = row_buffers, blocks.block_q
    query_and_dout = zip(loads.buffers(*rows_like), loads.buffers(*rows_like), strict=True)
    # The gradient leaves through shared memory that held the query (16 bit), or query and dout (float32).
    shared = plgpu.RefUnion(*query_and_dout, (gradient.buffer(*rows_like, z.H, dtype=out_dtype),))
    scores = score_buffers(operands, (value_stages,), blocks.rows, blocks.block_kv)
    scratch = {
        "query, dout, result": shared,
        "key": loads.buffer(stages, blocks.block_kv),
        "value": loads.buffer(value_stages, blocks.block_kv),
        **({"moments": plgpu.SMEM((len(MOMENTS), compute, blocks.block_q), jnp.float32)} if with_scale else {}),
        **dict(zip(operands.tiled, scores, strict=True)),
        # Completed by TMA: the data are there. Bias and mask come with the values.
        "rows ready": plgpu.Barrier(num_barriers=row_buffers, num_arrivals=2),
        "key ready": plgpu.Barrier(num_barriers=stages),
        "value ready": plgpu.Barrier(num_barriers=value_stages, num_arrivals=1 + len(scores)),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "key free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        "value free": plgpu.Barrier(num_barriers=value_stages, num_arrivals=compute),
        # Completed by the compute warpgroup whose rows they are, once its gradient has left.
        "rows free": plgpu.Barrier(num_barriers=row_buffers),
        # Completed by all compute warpgroups: nobody reads query or dout any more.
        "all done": plgpu.Barrier(num_arrivals=compute),
        # Completed by compute warpgroup 0: the padding in a tile of keys and values is clean.
        "padding clean": plgpu.Barrier(),
    }
    out_types = [jax.ShapeDtypeStruct((*z.batch, gradient.length, z.N, z.H), out_dtype)]
    if with_scale:
        row_type = jax.ShapeDtypeStruct((*heads, num_blocks * blocks.rows), jnp.float32)
        out_types += [row_type] * len(MOMENTS)

    def kernel(*args: Any) -> None:
        refs = dict(zip(arrays, args, strict=False))
        outs = args[len(arrays) : len(arrays) + len(out_types)]
        local = dict(zip(scratch, args[len(arrays) + len(out_types) :], strict=True))
        *views, (local["result"],) = local["query, dout, result"]
        (local["query"], local["dout"]), (local["query loaded"], local["dout loaded"]) = views[0], views[-1]
        for name in ("key", "value"):
            local[name], local[f"{name} loaded"] = loads.views(local[name])
        intervals = Intervals(config.band, z.T, z.S, blocks.block_kv, refs, skips_dead_rows=True)
        wg = lax.axis_index("wg")

        def for_each_item(body: Any) -> None:
            def ranges_of(head: Any, block: Any) -> ColumnRange:
                return intervals.ranges(head, block, blocks.rows)

            work.for_each_item(lax.axis_index("worker"), ranges_of, body)

        def load_item(k: Any, item: Item) -> None:
            for w in range(compute):
                at = work.buffer(k, w, compute)
                if not work.is_single:
                    pl.when(k >= work.buffers)(lambda at=at: plgpu.barrier_wait(local["rows free"].at[at]))
                for name in ("query", "dout"):
                    row = item.block * blocks.rows + w * blocks.block_q
                    rows = query_slice(refs[name], item.head, row, blocks.block_q)
                    plgpu.copy_gmem_to_smem(rows, local[f"{name} loaded"].at[at], local["rows ready"].at[at])

            def load_tile(i: Any, carry: None) -> None:
                n, tile = item.count + i, item.tile(i)
                for name, slots in (("key", stages), ("value", value_stages)):
                    slot = lax.rem(n, jnp.int32(slots))
                    free, ready = local[f"{name} free"].at[slot], local[f"{name} ready"].at[slot]
                    pl.when(n >= slots)(lambda free=free: plgpu.barrier_wait(free))
                    keys = key_slice(refs[name], item.head, z.G, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(keys, local[f"{name} loaded"].at[slot], ready)
                slot = lax.rem(n, jnp.int32(value_stages))
                for name in operands.tiled:
                    first_row = item.block * blocks.rows
                    score = score_slice(refs[name], item.head, first_row, blocks.rows, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(score, local[name].at[slot], local["value ready"].at[slot])

            lax.fori_loop(0, item.num_tiles, load_tile, None)

        def compute_item(k: Any, item: Item) -> None:
            head, block, ranges, num_tiles, tile_of = item.head, item.block, item.ranges, item.num_tiles, item.tile
            row = block * blocks.rows + wg * blocks.block_q
            tiled = {name: local[name] for name in operands.tiled}
            logits = TileLogits(config, z, refs, tiled, intervals, head, *shape, row_in_block=wg * blocks.block_q)
            rows = logits.rows(row)
            row_lse, row_delta = (
                load(row_slice(refs[name], head, row, blocks.block_q), layout=ROW) for name in ("lse", "delta")
            )
            row_lse = call.base_2_lse(row_lse)
            mine = work.buffer(k, wg, compute)

            def slot_of(i: Any, slots: int = stages) -> Any:
                return lax.rem(item.count + i, jnp.int32(slots))

            has_edges = intervals.has_left_edge or intervals.has_right_edge

            def is_outside(i: Any) -> Any:
                """Of the tiles that all rows attend."""
                return (tile_of(i) < ranges.full_first) | (tile_of(i) >= ranges.full_stop)

            def is_edge(i: Any) -> Any:
                """Whether a tile behind the first needs a mask."""
                if not intervals.has_left_edge and intervals.right_tiles(blocks.rows) <= 1:
                    return False  # the first tile was the only one
                return is_outside(i)

            no_moments = (zeros(blocks.block_q, THREAD_COLUMNS),) * (len(MOMENTS) if with_scale else 0)

            def dlogits(s: Any, dp: Any, scores: Any, i: Any, masked: Any, moments: tuple) -> tuple[Any, tuple]:
                """dS in the dtype of products, and the moments with those of this tile, within each thread."""
                weights = softmax_weights(logits, s, scores, rows, tile_of(i), row_lse, masked)
                ds = logits_cotangent(logits, weights, dp, rows, tile_of(i), row_delta)
                before_wait(fold_columns(ds, jnp.add))
                if with_scale:
                    terms = ds * s, ds, weights * s
                    moments = tuple(x + fold_columns(y, jnp.add) for x, y in zip(moments, terms, strict=True))
                return ds.astype(dtype), moments

            def wait_for_tile(i: Any, *, is_first: bool) -> None:
                """Keys and values of tile i; NaN in padding, which only edge tiles hold, would survive a dz of zero."""
                plgpu.barrier_wait(local["key ready"].at[slot_of(i)])
                plgpu.barrier_wait(local["value ready"].at[slot_of(i, value_stages)])
                # Of a band that is cut off, the tiles end with the first one.
                if "length" not in refs or (intervals.is_cut and not is_first):
                    return
                length = intervals.length(head)

                @pl.when((tile_of(i) + 1) * blocks.block_kv > length)
                def _clean() -> None:
                    @pl.when(wg == 0)
                    def _first() -> None:
                        clean_padding(local["key"].at[slot_of(i)], tile_of(i), length)
                        clean_padding(local["value"].at[slot_of(i, value_stages)], tile_of(i), length)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(local["padding clean"])

                    plgpu.barrier_wait(local["padding clean"])

            def issue(s_ref: Any, dp_ref: Any, at: Any, slot: Any, value_slot: Any) -> None:
                plgpu.wgmma(s_ref, local["query"].at[at], local["key"].at[slot].transpose((1, 0)))
                plgpu.wgmma(dp_ref, local["dout"].at[at], local["value"].at[value_slot].transpose((1, 0)))

            def pipelined() -> tuple[jax.Array, tuple]:
                first_key, first_value = slot_of(0), slot_of(0, value_stages)
                wait_for_tile(jnp.int32(0), is_first=True)
                products: Any = pl.run_state(lambda state: issue(state[0], state[1], mine, first_key, first_value))
                s, dp = products((plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))))
                ds, moments = dlogits(s, dp, logits.scores(rows, tile_of(0), first_value), 0, has_edges, no_moments)
                plgpu.barrier_arrive(local["value free"].at[first_value])

                def step(i: Any, carry: tuple) -> tuple:
                    acc, ds, moments = lax.optimization_barrier(carry)
                    slot, value_slot, previous = slot_of(i), slot_of(i, value_stages), slot_of(i - 1)
                    wait_for_tile(i, is_first=False)
                    scores = logits.scores_before_products(rows, tile_of(i), value_slot)

                    def products(state: tuple) -> None:
                        acc_ref, s_ref, dp_ref, ds_ref, *moment_refs = state
                        issue(s_ref, dp_ref, mine, slot, value_slot)
                        plgpu.wgmma(acc_ref, ds, local["key"].at[previous])
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
                        so_far = tuple(ref[...] for ref in moment_refs)
                        ds_ref[...], so_far = dlogits(s, dp, scores, i, is_edge(i), so_far)
                        for ref, x in zip(moment_refs, so_far, strict=True):
                            ref[...] = x
                        plgpu.barrier_arrive(local["value free"].at[value_slot])

                    # Leaving `run_state` waits for the product with the previous keys.
                    initial = plgpu.ACC.init(acc), plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))
                    acc, _, _, ds, *moments = pl.run_state(products)((*initial, zeros(*shape).astype(dtype), *moments))
                    plgpu.barrier_arrive(local["key free"].at[previous])
                    return acc, ds, tuple(moments)

                carry = zeros(blocks.block_q, z.H), ds, moments
                acc, ds, moments = lax.optimization_barrier(lax.fori_loop(1, num_tiles, step, carry))
                last = slot_of(num_tiles - 1)
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, local["key"].at[last]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(local["key free"].at[last])
                return acc, moments

            def one_by_one() -> tuple[jax.Array, tuple]:
                """For head dimensions that leave no registers for two tiles at once."""

                def step(i: Any, carry: tuple) -> tuple:
                    acc, moments = carry
                    slot, value_slot = slot_of(i), slot_of(i, value_stages)
                    wait_for_tile(i, is_first=True)  # or any other
                    # The compiler would keep the descriptors of query and dout, one for each 16 columns, in registers
                    # from step to step, and spill (a third of the instructions; 10% of a gradient).
                    at = opaque(mine)
                    products: Any = pl.run_state(lambda state: issue(state[0], state[1], at, slot, value_slot))
                    s, dp = products((plgpu.ACC.init(zeros(*shape)), plgpu.ACC.init(zeros(*shape))))
                    masked = has_edges and is_outside(i)
                    if not operands.tiled:  # those come with the values, and are yet to be read
                        plgpu.barrier_arrive(local["value free"].at[value_slot])
                    ds, moments = dlogits(s, dp, logits.scores(rows, tile_of(i), value_slot), i, masked, moments)
                    if operands.tiled:
                        plgpu.barrier_arrive(local["value free"].at[value_slot])
                    acc, ds = lax.optimization_barrier((acc, ds))
                    key = local["key"].at[slot]
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, ds, key))(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(local["key free"].at[slot])
                    return acc, moments

                return lax.fori_loop(0, num_tiles, step, (zeros(blocks.block_q, z.H), no_moments))

            plgpu.barrier_wait(local["rows ready"].at[mine])
            acc, moments = pipelined() if z.H <= _MAX_PIPELINED else one_by_one()
            for i, x in enumerate(moments):
                local["moments"][i, wg] = x.sum(axis=1)
            if is_wide:
                plgpu.barrier_arrive(local["all done"])
                plgpu.barrier_wait(local["all done"])
            result = local["result"].at[mine]
            store(result, (acc * logits.scale).astype(out_dtype))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result, query_slice(outs[0], head, gradient.at(row), blocks.block_q))
            for i, out in enumerate(outs[1:]):
                plgpu.copy_smem_to_gmem(local["moments"].at[i, wg], row_slice(out, head, row, blocks.block_q))
            if not work.is_single:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(local["rows free"].at[mine])

        def compute_all() -> None:
            for_each_item(compute_item)
            plgpu.wait_smem_to_gmem(0)

        in_roles(wg, compute, blocks.registers, lambda: for_each_item(load_item), compute_all)

    result, *moments = launch(
        kernel,
        out_types=out_types,
        scratch=tuple(scratch.values()),
        grid={"worker": work.workers},
        warpgroups=compute + 1,
    )(*arrays.values())
    return (result[..., : z.T, :, :], *(x[..., : z.T] for x in moments))
