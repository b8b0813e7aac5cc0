"""Gradients of key and value for Hopper GPUs: one block of keys against the query tiles that attend it.

All tiles are transposed, keys along the rows, so that weights and their cotangents leave the softmax in registers as
the left operand of the next product (notation as in `dquery.py`):

    S^T = K Q^T    dP^T = V dO^T    dS^T = P^T * (dP^T - delta)    dV += P^T dO    dK += dS^T Q

    load     | Q0 dO0 lse0 delta0 Q1 ... into a ring of `stages` slots
    compute  | S0 dP0 | P0 dS0 | dV += P0 dO0  dK += dS0 Q0 | S1 dP1 | ...

or, where that is faster, with the softmax beside products of its own warpgroup:

    compute  | S0 dP0 ...... | dV += P0 dO0 ...... | dK += dS0 Q0 | S1 dP1 | ...
             |    |   P0     | (tensor cores)  dS0 |

Two compute warpgroups, each with its own keys, fill each other's gaps. What shares the keys of a block (the query heads
of a group, the batch rows of a batch that shares its keys) follows one after the other, so that their sum is made in
registers, in the same order every time. Where items are short, a block of threads goes through several, one after the
other: keys and values of the next, and its first rows, are then loaded while the last one ends.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .backward import Backward, logits_cotangent, row_slice, softmax_weights, zeros
from .blocks import Blocks
from .device.logits import TileLogits
from .device.pallas import (
    COLUMN,
    Loads,
    Results,
    broadcast_index,
    heads_per_group,
    in_roles,
    launch,
    load,
    opaque,
    pl,
    plgpu,
    store,
    swizzle_bytes,
    unravel,
)
from .masks import Intervals, query_ranges
from .operands import is_cut, prepare, query_slice, score_buffers, score_slice
from .scheduler import plan

_CACHE_BYTES = 24e6
# Head dimensions (above the first, up to the second) for which the softmax runs beside products of its own warpgroup:
# masked calls take 2 to 6% less there. Elsewhere it takes up to 3% more.
_OVERLAPPED = 64, 128
_MOST_HELD = 128  # head dimension up to which the compiler may keep descriptors from step to step


def dkey_dvalue(
    call: Backward, blocks: Blocks, wanted: Mapping[str, jax.ShapeDtypeStruct], cores: int
) -> dict[str, jax.Array]:
    """Of 'key' and 'value' those that are `wanted`, (batch..., S, K, H), with the same batch axes in both.

    Axes of size 1 in `wanted` are summed over; keys and values must have size 1 in them. Of `blocks`, block_kv are the
    keys of one compute warpgroup, and block_q the query rows of one tile; `cores` are multiprocessors.
    """
    config, inputs, z, dtype = call.config, call.inputs, call.sizes, call.inputs.query.dtype
    compute, stages, block_q, block_kv = blocks.warpgroups, blocks.stages, blocks.block_q, blocks.block_kv
    block_keys, shape = compute * block_kv, (block_kv, block_q)
    batch = next(iter(wanted.values())).shape[:-3]
    summed = tuple(n if m == 1 else 1 for n, m in zip(z.batch, batch, strict=True))
    # A block belongs to one of the former, and visits all of the latter.
    kv_heads, members = (*batch, z.K), (*summed, z.G)
    num_heads, num_blocks = math.prod(kv_heads), -(-z.S // block_keys)
    group = heads_per_group(num_heads, 4 * z.T * z.H * math.prod(members), _CACHE_BYTES)
    # Vectors of masks are read tile by tile: to a whole number of tiles.
    loads = Loads(z.H, dtype, swizzle_bytes(z.H, dtype, block_q))
    operands = prepare(config, inputs, block_q, block_keys, loads, transposes_mask=True)
    arrays = operands.arrays | call.arrays(block_q, loads)
    arrays.pop("ranges", None)
    arrays |= query_ranges(inputs.mask, z.T, z.S, block_q, block_keys, summed, is_cut=is_cut(config, inputs))
    work = plan(kv_heads, num_blocks, group, cores if blocks.persistent else None, config.band)
    key_buffers = work.buffers * compute
    keys_like = key_buffers, block_kv
    gradient = Results(z.S, z.K)
    # At the end, the memory of a key holds its gradient; so that of a value.
    key_and_gradient = plgpu.RefUnion(
        *loads.buffers(*keys_like), gradient.buffer(*keys_like, z.H, dtype=dtype, swizzle=loads.swizzle)
    )
    rows_like = loads.buffer(stages, block_q)
    scores = score_buffers(operands, (stages, compute), block_q, block_kv)
    needs_dlogits = "key" in wanted
    overlaps = needs_dlogits and _OVERLAPPED[0] < z.H <= _OVERLAPPED[1]
    loaded_keys = ("key", "value") if needs_dlogits else ("key",)
    scale_is_summed = any(n > 1 and m > 1 for n, m in zip(inputs.scale.shape, summed, strict=True))
    scratch = {
        "key": key_and_gradient,
        "value": key_and_gradient,
        "query": rows_like,
        "dout": rows_like,
        "lse": plgpu.SMEM((stages, block_q), jnp.float32),
        "delta": plgpu.SMEM((stages, block_q), jnp.float32),
        **dict(zip(operands.tiled, scores, strict=True)),
        # Completed by TMA: the data are there.
        "keys ready": plgpu.Barrier(num_barriers=key_buffers, num_arrivals=len(loaded_keys)),
        "rows ready": plgpu.Barrier(num_barriers=stages, num_arrivals=4 + compute * len(scores)),
        # Completed by the compute warpgroup whose keys they are, once their gradients have left.
        "keys free": plgpu.Barrier(num_barriers=key_buffers),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "rows free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
    }
    if not needs_dlogits:
        del scratch["value"]

    def kernel(*args: Any) -> None:
        refs = dict(zip(arrays, args, strict=False))
        outs = dict(zip(wanted, args[len(arrays) : len(arrays) + len(wanted)], strict=True))
        local = dict(zip(scratch, args[len(arrays) + len(wanted) :], strict=True))
        for name in loaded_keys:
            *views, local[f"{name} gradient"] = local[name]
            local[name], local[f"{name} loaded"] = views[0], views[-1]
        for name in ("query", "dout"):
            local[name], local[f"{name} loaded"] = loads.views(local[name])
        intervals = Intervals(config.band, z.T, z.S, block_kv, refs)
        wg = lax.axis_index("wg")
        first_visit = jnp.int32(0), jnp.int32(0)

        def for_each_item(body: Any) -> None:
            """`body(k, count, head, block)` for the k-th item of this worker, before which it had `count` steps."""

            def run(k: Any, n: Any, count: Any) -> Any:
                head, block, _ = work.item(n)
                return count + body(k, count, head, (num_blocks - 1) - block)  # with a causal mask, the longest first

            work.for_each(lax.axis_index("worker"), run)

        def item_of(k: Any, count: Any, kv_index: tuple, block: Any) -> tuple[Any, Callable, Callable]:
            """Steps of the k-th item, what loads for them, and what computes."""
            *batch_index, kv_head = kv_index
            kv_batch = tuple(batch_index)
            first, stop = intervals.query_tiles(kv_batch, block, block_q, block_keys)
            per_member = jnp.maximum(stop - first, 0)
            num_steps = per_member * math.prod(members)

            def head_of(member: Any) -> tuple:
                *index, g = unravel(member, members)
                return (
                    *(i if n > 1 else b for i, n, b in zip(index, summed, kv_batch, strict=True)),
                    kv_head * z.G + g,
                )

            def place_of(visit: tuple[Any, Any]) -> tuple[tuple, Any]:
                """Query head and first row of the n-th tile of a member."""
                member, n = visit
                return head_of(member), (first + n) * block_q

            def following(visit: tuple[Any, Any]) -> tuple[Any, Any]:
                """The next visit, counted on, as divisions take long; the last one follows itself."""
                member, n = visit[0], visit[1] + 1
                is_past, is_last = n >= per_member, member == math.prod(members) - 1
                next_member = jnp.where(is_past & jnp.logical_not(is_last), member + 1, member)
                return next_member, jnp.where(is_past, jnp.where(is_last, visit[1], 0), n)

            def slot_of(i: Any) -> Any:
                return lax.rem(count + i, jnp.int32(stages))

            def keys_of(ref: Any, w: Any, index: tuple, *, is_result: bool = False) -> Any:
                first_key = block * block_keys + w * block_kv
                keys = pl.ds(gradient.at(first_key) if is_result else first_key, block_kv)
                return ref.at[(*broadcast_index(index, ref.shape[:-3]), keys, kv_head if ref.shape[-2] > 1 else 0)]

            def load_item() -> None:
                for w in range(compute):
                    at = work.buffer(k, w, compute)
                    if not work.is_single:
                        pl.when(k >= work.buffers)(lambda at=at: plgpu.barrier_wait(local["keys free"].at[at]))
                    for name in loaded_keys:
                        keys, ready = keys_of(refs[name], w, kv_batch), local["keys ready"].at[at]
                        plgpu.copy_gmem_to_smem(keys, local[f"{name} loaded"].at[at], ready)

                def load_tile(i: Any, visit: tuple[Any, Any]) -> tuple[Any, Any]:
                    (head, row), slot = place_of(visit), slot_of(i)
                    ready = local["rows ready"].at[slot]
                    pl.when(count + i >= stages)(lambda: plgpu.barrier_wait(local["rows free"].at[slot]))
                    for name in ("query", "dout"):
                        rows = query_slice(refs[name], head, row, block_q)
                        plgpu.copy_gmem_to_smem(rows, local[f"{name} loaded"].at[slot], ready)
                    for name in ("lse", "delta"):
                        plgpu.copy_gmem_to_smem(row_slice(refs[name], head, row, block_q), local[name].at[slot], ready)
                    for name in operands.tiled:
                        for w in range(compute):
                            tile, is_transposed = block * compute + w, name in operands.transposed
                            score = score_slice(
                                refs[name], head, row, block_q, tile, block_kv, transposed=is_transposed
                            )
                            plgpu.copy_gmem_to_smem(score, local[name].at[slot, w], ready)
                    return following(visit)

                lax.fori_loop(0, num_steps, load_tile, first_visit)

            def compute_item() -> None:
                tile = block * compute + wg  # of this warpgroup's keys
                mine = work.buffer(k, wg, compute)
                tiled = {name: local[name] for name in operands.tiled}

                def logits_of(head: tuple, scale: Any = None) -> TileLogits:
                    return TileLogits(
                        config,
                        z,
                        refs,
                        tiled,
                        intervals,
                        head,
                        *shape[::-1],
                        row_in_block=wg,
                        transposed=True,
                        scale=scale,
                    )

                scale = logits_of(head_of(jnp.int32(0))).scale
                plgpu.barrier_wait(local["keys ready"].at[mine])

                def is_edge(visit: tuple[Any, Any]) -> Any:
                    return intervals.is_query_edge(*place_of(visit), block, block_q, block_keys)

                first_is_edge = is_edge(first_visit)
                is_static = isinstance(first_is_edge, bool)

                def step(i: Any, carry: tuple) -> tuple:
                    visit, masked, sums = carry
                    (head, row), slot, next_visit = place_of(visit), slot_of(i), following(visit)
                    masked = first_is_edge if is_static else masked
                    next_is_edge = is_edge(next_visit)  # traced masks: read from global memory, so a step ahead
                    logits = logits_of(head, None if scale_is_summed else scale)
                    query, cotangent = local["query"].at[slot], local["dout"].at[slot]
                    # Else descriptors of keys and values would stay in registers, and spill: see `dquery.py`.
                    at = opaque(mine) if z.H > _MOST_HELD else mine
                    key = local["key"].at[at]
                    rows = logits.rows(row, late=True)
                    vectors = None if operands.tiled else logits.scores(rows, tile)
                    plgpu.barrier_wait(local["rows ready"].at[slot])
                    scores = logits.scores(rows, tile, slot) if vectors is None else vectors

                    def of_rows(name: str) -> jax.Array:
                        """Read late: a vector along the columns takes 16 registers, and these are all in use."""
                        return load(local[name].at[slot], layout=COLUMN)

                    def products(state: tuple) -> None:
                        s_ref, dp_ref, *sum_refs = state
                        sum_of = dict(zip(wanted, sum_refs, strict=True))
                        plgpu.wgmma(s_ref, key, query.transpose((1, 0)))
                        if needs_dlogits:
                            plgpu.wgmma(dp_ref, local["value"].at[at], cotangent.transpose((1, 0)))

                        def weights_of(s: Any) -> jax.Array:
                            row_lse = call.base_2_lse(of_rows("lse"))
                            return softmax_weights(logits, s, scores, rows, tile, row_lse, masked)

                        def dropped(weights: jax.Array) -> jax.Array:
                            return (logits.drop(weights, row, tile) * logits.rescaling).astype(dtype)

                        def dlogits(weights: jax.Array, dp: Any) -> jax.Array:
                            ds = logits_cotangent(logits, weights, dp, rows, tile, of_rows("delta"))
                            ds = logits.through_mask(ds, rows, tile, masked)
                            return (ds * logits.scale if scale_is_summed else ds).astype(dtype)

                        if overlaps:
                            weights = weights_of(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
                            p = dropped(weights) if "value" in wanted else None
                            dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                            if "value" in wanted:
                                plgpu.wgmma(sum_of["value"], p, cotangent)
                            if "key" in wanted:
                                plgpu.wgmma(sum_of["key"], dlogits(weights, dp), query)
                            return
                        weights = weights_of(plgpu.wgmma_accumulator_load(s_ref, wait_n=0))
                        left: dict[str, jax.Array] = {}
                        if "key" in wanted:
                            left["key"] = dlogits(weights, plgpu.wgmma_accumulator_load(dp_ref, wait_n=0))
                        if "value" in wanted:
                            left["value"] = dropped(weights)
                        left = lax.optimization_barrier(left)
                        for name in reversed(list(wanted)):
                            plgpu.wgmma(sum_of[name], left[name], query if name == "key" else cotangent)

                    sums = lax.optimization_barrier(sums)
                    initial = (*(zeros(*shape) for _ in range(2)), *sums)
                    # Leaving `run_state` waits for all products.
                    _, _, *sums = pl.run_state(products)(tuple(plgpu.ACC.init(x) for x in initial))
                    plgpu.barrier_arrive(local["rows free"].at[slot])
                    return next_visit, next_is_edge, tuple(sums)

                carry = first_visit, first_is_edge, tuple(zeros(block_kv, z.H) for _ in wanted)
                *_, sums = lax.fori_loop(0, num_steps, step, carry)
                for name, x in zip(wanted, sums, strict=True):
                    x = x * scale if name == "key" and not scale_is_summed else x
                    if wanted[name].dtype != dtype:
                        store(keys_of(outs[name], wg, kv_batch), x)
                        continue
                    # A pass for the value alone has no buffer for it.
                    buffer = local[f"{name if needs_dlogits else 'key'} gradient"].at[mine]
                    store(buffer, x.astype(dtype))
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, keys_of(outs[name], wg, kv_batch, is_result=True))
                if not work.is_single:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(local["keys free"].at[mine])

            return num_steps, load_item, compute_item

        def load_one(*item: Any) -> Any:
            num_steps, load_item, _ = item_of(*item)
            load_item()
            return num_steps

        def compute_one(*item: Any) -> Any:
            num_steps, _, compute_item = item_of(*item)
            compute_item()
            return num_steps

        def compute_all() -> None:
            for_each_item(compute_one)
            plgpu.wait_smem_to_gmem(0)

        in_roles(wg, compute, blocks.registers, lambda: for_each_item(load_one), compute_all)

    # TMA leaves out what lies past the end, other stores do not.
    is_wide = any(x.dtype != dtype for x in wanted.values())
    padded_S = num_blocks * block_keys if is_wide else gradient.length
    results = launch(
        kernel,
        out_types=[jax.ShapeDtypeStruct((*batch, padded_S, z.K, z.H), x.dtype) for x in wanted.values()],
        scratch=tuple(scratch.values()),
        grid={"worker": work.workers},
        warpgroups=compute + 1,
    )(*arrays.values())
    return {name: x[..., : z.S, :, :] for name, x in zip(wanted, results, strict=True)}
