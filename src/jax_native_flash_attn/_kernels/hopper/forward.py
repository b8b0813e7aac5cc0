"""Forward kernel for Hopper GPUs: attention of blocks of query rows, as a pipeline of warpgroups.

One warpgroup loads, the others compute, each on its own 64 query rows; all go through the same key/value tiles, last
tile first. For tile i (S = scores, P = weights, O = numerator of the output):

    load     | K0 Q V0 K1 V1 ...... K2 (slot of K0) V2 ...                TMA into a ring of `stages` slots
    compute  | S0=QK0  softmax0 | S1=QK1  O+=P0V0 ............. | S2=QK2  O+=P1V1 ............. |
             |                  |  (tensor cores)  softmax1     |  (tensor cores)  softmax2     |

Both products of a step are issued at once; they finish in order, so the softmax of S1 runs on the other units while the
tensor cores still work on P0 V0. The state of the online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) lives
in registers, in base 2. The scheme is that of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).

A block of threads goes through several items of `scheduler.py`, one after the other, and its ring of slots through
all of them: while the computing warpgroups finish one item, the tiles of the next are loaded.

Only tiles in which some row's interval begins or ends need a mask. For a causal mask that is the first one visited;
other masks decide at run time.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.call import Config, Inputs
from ..._semantics.masks import ColumnRange
from .blocks import Blocks
from .device.logits import NO_KEY
from .device.pallas import Loads, Results, heads_per_group, in_roles, launch, matrix_buffer, pl, plgpu, swizzle_bytes
from .device.rows import Kernel
from .forward_mainloop import compute_item
from .masks import Intervals
from .operands import (
    column_buffers,
    column_slice,
    key_slice,
    prepare,
    query_slice,
    score_buffers,
    score_slice,
    starts_with_bias,
    value_slice,
)
from .scheduler import Item, plan

_CACHE_BYTES = 24e6  # of keys and values that blocks which run at once should share: half of Hopper's L2 cache
_LONG_ITEM = 8  # tiles


def forward(config: Config, inputs: Inputs, blocks: Blocks, cores: int) -> tuple[jax.Array, ...]:
    """As `select.forward`, on so many multiprocessors."""
    wanted = (
        "out" if config.rounds_out else "unrounded",
        *(["lse"] if config.needs_lse else []),
        *(["out"] if config.adds_rounded else []),
    )
    if blocks.parts == 1:
        results = _partial_forward(config, inputs, blocks, wanted, cores)
        return tuple(results[name][0] for name in wanted)
    parts = _partial_forward(config, inputs, blocks, ("unrounded", "lse"), cores)
    out, lse = _merge(parts["unrounded"], parts["lse"])
    results = {"unrounded": out, "lse": lse, "out": out.astype(inputs.query.dtype)}
    return tuple(results[name] for name in wanted)


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
    config: Config, inputs: Inputs, blocks: Blocks, wanted: Sequence[str], cores: int
) -> dict[str, jax.Array]:
    """Results by name, over each part of the tiles, which are a further axis in front.

    'out', in query's dtype, and 'unrounded' are (batch..., T, N, D), 'lse' is (batch..., N, T).
    """
    z, dtype = inputs.sizes, inputs.query.dtype
    compute, stages = blocks.warpgroups, blocks.stages
    loads = Loads(z.H, dtype)
    operands = prepare(config, inputs, blocks.rows, blocks.block_kv, loads)
    streamed = (*operands.tiled, *operands.columns)  # what comes with the keys
    heads = (*z.batch, z.N)
    num_heads, num_blocks = math.prod(heads), -(-z.T // blocks.rows)
    work = plan(
        heads,
        num_blocks,
        heads_per_group(num_heads, 2 * dtype.itemsize * z.S * z.H / z.G, _CACHE_BYTES),
        cores if blocks.persistent else None,
        config.band,
        parts=blocks.parts,
        batch_fastest="bias" in operands.tiled and operands.arrays["bias"].shape[:-3] != z.batch,
    )
    value_tile = (z.H, blocks.block_kv) if dtype == jnp.float32 else (blocks.block_kv, z.H)
    value_loads = Loads(value_tile[-1], dtype)
    # Both operands of the second product have one swizzle.
    weights, swizzle = (compute, blocks.block_q, blocks.block_kv), swizzle_bytes(value_tile[-1], dtype, blocks.block_kv)
    takes_turns = blocks.takes_turns and compute > 1
    # A slot of keys is free half a step before one of values: waiting for the latter would delay the former (4% of
    # causal calls with heads of 64, little elsewhere; items of a few tiles would take up to 6% more).
    keys_first = not streamed and z.H <= 64 and -(-z.S // blocks.block_kv) >= _LONG_ITEM

    result = Results(z.T, z.N)
    # Of matrices TMA leaves out what lies past the end; vectors, and what is stored from registers, are whole blocks.
    parts, all_rows = blocks.parts, num_blocks * blocks.rows
    out_types = {
        "out": jax.ShapeDtypeStruct((parts, *z.batch, result.length, z.N, z.H), dtype),
        "unrounded": jax.ShapeDtypeStruct((parts, *z.batch, all_rows, z.N, z.H), jnp.float32),
        "lse": jax.ShapeDtypeStruct((parts, *heads, all_rows), jnp.float32),
    }
    out_types = {name: x for name, x in out_types.items() if name in wanted}
    rows_like = compute, blocks.block_q
    out_buffer = result.buffer(*rows_like, z.H, dtype=dtype)
    # Without a next item, the output leaves through memory that held the query.
    shares_buffer = "out" in wanted and work.is_single
    # Float32 leaves no room for it; through shared memory takes less, for short items up to 5% of a call.
    has_lse_buffer = "lse" in wanted and dtype != jnp.float32
    scores = [
        *score_buffers(operands, (stages,), blocks.rows, blocks.block_kv),
        *column_buffers(operands, stages, blocks.block_kv),
    ]
    scratch = {
        "query": plgpu.RefUnion(*loads.buffers(*rows_like), out_buffer) if shares_buffer else loads.buffer(*rows_like),
        **({"out": out_buffer} if "out" in wanted and not shares_buffer else {}),
        "key": loads.buffer(stages, blocks.block_kv),
        "value": value_loads.buffer(stages, value_tile[0]),
        **({"lse": plgpu.SMEM((compute, blocks.block_q), jnp.float32)} if has_lse_buffer else {}),
        **({"weights": matrix_buffer(*weights, dtype=dtype, swizzle=swizzle)} if blocks.weights_in_shared else {}),
        **dict(zip(streamed, scores, strict=True)),
        # Completed by TMA: the data are there.
        "query ready": plgpu.Barrier(num_barriers=compute),
        "key ready": plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(scores)),
        "value ready": plgpu.Barrier(num_barriers=stages),
        # Completed by the compute warpgroup whose rows they are: the next item's query may be loaded.
        "query free": plgpu.Barrier(num_barriers=compute),
        # Completed by all compute warpgroups: the slot may be loaded again.
        "key free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        "value free": plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        # Completed by the compute warpgroup before: it has issued its products, the next one may.
        "turn": plgpu.Barrier(num_barriers=compute),
        # Completed by compute warpgroup 0: the padding in the values of a slot is clean.
        "value clean": plgpu.Barrier(num_barriers=stages),
    }

    def kernel(*args: Any) -> None:
        num_inputs, num_outs = len(operands.arrays), len(out_types)
        refs = dict(zip(operands.arrays, args, strict=False))
        outs = dict(zip(out_types, args[num_inputs : num_inputs + num_outs], strict=True))
        local = dict(zip(scratch, args[num_inputs + num_outs :], strict=True))
        if shares_buffer:
            *views, local["out"] = local["query"]
            local["query"], local["query loaded"] = views[0], views[-1]
        else:
            local["query"], local["query loaded"] = loads.views(local["query"])
        for name, how in (("key", loads), ("value", value_loads)):
            local[name], local[f"{name} loaded"] = how.views(local[name])
        intervals = Intervals(config.band, z.T, z.S, blocks.block_kv, refs)
        wg = lax.axis_index("wg")

        shared = Kernel(config, z, blocks, intervals, refs, outs, local, streamed, starts_with_bias(inputs), result)

        def for_each_item(body: Any) -> None:
            def ranges_of(head: Any, block: Any) -> ColumnRange:
                return intervals.ranges(head, block, blocks.rows)

            work.for_each_item(lax.axis_index("worker"), ranges_of, body)

        def load_all() -> None:
            def load(k: Any, item: Item) -> None:
                head, ranges, first_row = item.head, item.ranges, item.block * blocks.rows

                def load_query() -> None:
                    for w in range(compute):
                        pl.when(k > 0)(lambda w=w: plgpu.barrier_wait(local["query free"].at[w]))
                        rows = query_slice(refs["query"], head, first_row + w * blocks.block_q, blocks.block_q)
                        plgpu.copy_gmem_to_smem(rows, local["query loaded"].at[w], local["query ready"].at[w])

                def load_key(i: Any) -> None:
                    n, tile = item.count + i, ranges.stop - 1 - i
                    slot = shared.slot(n)
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(local["key free"].at[slot]))
                    key = key_slice(refs["key"], head, z.G, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(key, local["key loaded"].at[slot], local["key ready"].at[slot])
                    for name in streamed:
                        score = (
                            score_slice(refs[name], head, first_row, blocks.rows, tile, blocks.block_kv)
                            if name in operands.tiled
                            else column_slice(refs[name], head, tile, blocks.block_kv)
                        )
                        plgpu.copy_gmem_to_smem(score, local[name].at[slot], local["key ready"].at[slot])
                    pl.when(i == 0)(load_query)

                def load_value(i: Any) -> None:
                    n, tile = item.count + i, ranges.stop - 1 - i
                    slot = shared.slot(n)
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(local["value free"].at[slot]))
                    value = value_slice(refs["value"], head, z.G, tile, blocks.block_kv)
                    plgpu.copy_gmem_to_smem(value, local["value loaded"].at[slot], local["value ready"].at[slot])

                def load_tile(i: Any, carry: None) -> None:
                    load_key(i)
                    if keys_first:
                        pl.when((i > 0) & (item.count + i > stages))(lambda: load_value(i - 1))
                        pl.when(item.count + i < stages)(lambda: load_value(i))
                    else:
                        load_value(i)

                count = item.num_tiles
                lax.fori_loop(0, count, load_tile, None)
                if keys_first:
                    pl.when(item.count + count > stages)(lambda: load_value(count - 1))

            for_each_item(load)

        def compute_all() -> None:
            if takes_turns:
                pl.when(wg == compute - 1)(lambda: plgpu.barrier_arrive(local["turn"].at[0]))
            scale = refs["scale"][(0,) * refs["scale"].ndim] if refs["scale"].size == 1 else None
            for_each_item(lambda _, item: compute_item(shared, item, wg, scale))
            plgpu.wait_smem_to_gmem(0)

        in_roles(wg, compute, blocks.registers, load_all, compute_all)

    results = launch(
        kernel,
        out_types=tuple(out_types.values()),
        scratch=tuple(scratch.values()),
        grid={"worker": work.workers},
        warpgroups=compute + 1,
    )(*operands.arrays.values())
    named = dict(zip(out_types, results, strict=True))
    return {name: x[..., : z.T] if name == "lse" else x[..., : z.T, :, :] for name, x in named.items()}
