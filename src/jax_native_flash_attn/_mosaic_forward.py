"""Forward kernel for Hopper GPUs: attention of one block of query rows, as a pipeline of three warpgroups."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._logits import Config, Inputs
from ._masks import MaskOperands
from ._mosaic import (
    ROW,
    broadcast_index,
    columns_of,
    heads_per_group,
    launch,
    matrix_buffer,
    pad_axis,
    pl,
    plgpu,
    round_up,
    unravel,
)
from ._mosaic_masks import Intervals, interval_operands
from ._numerics import LN2, LOG2E, lowest

_LOWEST = lowest(jnp.float32)


@dataclass(frozen=True)
class Blocks:
    block_q: int
    block_kv: int
    stages: int
    warpgroups: int = 2
    overlap: bool = True
    pingpong: bool = True
    compute_registers: int = 240
    load_registers: int = 24


def forward(config: Config, inputs: Inputs, blocks: Blocks, out_dtype: Any) -> tuple[jax.Array, ...]:
    """out (batch..., T, K, G, D) in `out_dtype` and, if needed, lse (batch..., K, G, T) in float32."""
    z = inputs.sizes
    T, S, H = round_up(z.T, 8), round_up(z.S, 8), z.H
    dtype = inputs.query.dtype
    block_q, block_kv, stages, compute = blocks.block_q, blocks.block_kv, blocks.stages, blocks.warpgroups
    block_rows = compute * block_q
    num_heads = math.prod((*z.batch, z.K, z.G))
    head_shape = (*z.batch, z.K, z.G)
    num_batch = len(z.batch)
    blocks_of_rows = -(-z.T // block_rows)
    group = heads_per_group(num_heads, 4 * z.S * H / z.G, 24e6)

    operands = {
        "query": pad_axis(inputs.query, -4, T),
        "key": pad_axis(inputs.key, -3, S),
        "value": pad_axis(_without_padding(inputs.value, inputs.mask), -3, S),
        "scale": inputs.scale,
        **interval_operands(inputs.mask, z.T, z.S, block_rows, block_kv),
    }
    out_types = [jax.ShapeDtypeStruct((*z.batch, T, z.K, z.G, H), out_dtype)]
    if config.needs_lse:
        out_types.append(jax.ShapeDtypeStruct((*head_shape, T), jnp.float32))
    is_wide = jnp.dtype(out_dtype).itemsize == 4

    query_buffer = matrix_buffer(compute, block_q, H, dtype=dtype)
    key_buffer = matrix_buffer(stages, block_kv, H, dtype=dtype)
    value_buffer = matrix_buffer(stages, block_kv, H, dtype=dtype)
    if is_wide:
        shared = plgpu.RefUnion((query_buffer, key_buffer), (matrix_buffer(compute, block_q, H, dtype=out_dtype),))
    else:
        shared = plgpu.RefUnion((query_buffer, key_buffer))
    scratch = [
        shared,
        value_buffer,
        plgpu.SMEM((compute, block_q), jnp.float32),
        plgpu.Barrier(num_barriers=compute),  # query is in shared memory
        plgpu.Barrier(num_barriers=stages),  # key ...
        plgpu.Barrier(num_barriers=stages),  # ... and value are
        plgpu.Barrier(num_barriers=stages, num_arrivals=compute),  # key ...
        plgpu.Barrier(num_barriers=stages, num_arrivals=compute),  # ... and value may be overwritten
        plgpu.Barrier(num_arrivals=compute),  # whose turn the tensor cores are
        plgpu.Barrier(num_arrivals=compute),  # all products done
    ]

    def kernel(*refs: Any) -> None:
        inputs_refs = dict(zip(operands, refs, strict=False))
        rest = refs[len(operands) :]
        outs, rest = rest[: len(out_types)], rest[len(out_types) :]
        shared, value_smem, lse_smem, query_ready, key_ready, value_ready, key_free, value_free, turn, done = rest
        if is_wide:
            (query_smem, key_smem), (out_smem,) = shared
        else:
            ((query_smem, key_smem),) = shared
            out_smem = query_smem
        head_number = lax.axis_index("group") * group + lax.axis_index("member")
        head = unravel(head_number, head_shape)
        batch, kv_head, query_head = head[:num_batch], head[num_batch], head[num_batch + 1]
        block = (blocks_of_rows - 1) - lax.axis_index("block")
        intervals = Intervals(
            config.band, z.T, z.S, block_kv, {k: v for k, v in inputs_refs.items() if k in ("key_start", "key_stop", "ranges")}
        )
        ranges = intervals.ranges(head, block, block_rows)
        num_tiles = ranges.stop - ranges.first
        wg = lax.axis_index("wg")
        no_index = broadcast_index

        @pl.when(wg == compute)
        def _load():
            plgpu.set_max_registers(blocks.load_registers, action="decrease")
            for w in range(compute):
                ref = inputs_refs["query"]
                index = (*broadcast_index(batch, ref.shape[:num_batch]), pl.ds(block * block_rows + w * block_q, block_q))
                plgpu.copy_gmem_to_smem(ref.at[(*index, kv_head, query_head)], query_smem.at[w], query_ready.at[w])

            def load_tile(i: Any, carry: None) -> None:
                tile, slot = ranges.stop - 1 - i, lax.rem(i, jnp.int32(stages))
                for name, buffer, ready, free in (
                    ("key", key_smem, key_ready, key_free),
                    ("value", value_smem, value_ready, value_free),
                ):
                    ref = inputs_refs[name]
                    index = (*broadcast_index(batch, ref.shape[:num_batch]), pl.ds(tile * block_kv, block_kv), kv_head)
                    pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[index], buffer.at[slot], ready.at[slot])

            lax.fori_loop(0, num_tiles, load_tile, None)

        @pl.when(wg < compute)
        def _compute():
            plgpu.set_max_registers(blocks.compute_registers, action="increase")
            row = block * block_rows + wg * block_q
            rows = intervals.rows(head, row, block_q)
            shape = (block_q, block_kv)
            query = query_smem.at[wg]
            scale = inputs_refs["scale"]
            multiplier = scale[broadcast_index(batch, scale.shape)] * LOG2E if num_batch else scale[...] * LOG2E

            def take_turn() -> None:
                if blocks.pingpong:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            plgpu.barrier_wait(query_ready.at[wg])

            @pl.when(multiplier < 0)
            def _negate():
                query[...] = -query[...]
                plgpu.commit_smem()

            magnitude = jnp.abs(multiplier)
            m = plgpu.layout_cast(jnp.full((block_q,), _LOWEST, jnp.float32), ROW)
            l = plgpu.layout_cast(jnp.zeros((block_q,), jnp.float32), ROW)
            acc = plgpu.layout_cast(jnp.zeros((block_q, H), jnp.float32), plgpu.Layout.WGMMA)

            def softmax(s: Any, i: Any, m: Any, l: Any, masked: bool) -> tuple:
                factor = magnitude
                if masked:
                    tile = ranges.stop - 1 - i
                    s = s * magnitude
                    dead = intervals.dead(rows, shape)
                    if dead is not None:
                        s = jnp.where(dead, 0.0, s)
                    s = jnp.where(intervals.allowed(rows, row, tile, shape), s, _LOWEST)
                    new_m = jnp.maximum(m, s.max(axis=1))
                    p = jnp.exp2(s - columns_of(new_m, shape))
                else:
                    new_m = jnp.maximum(m, s.max(axis=1) * factor)
                    p = jnp.exp2(s * factor - columns_of(new_m, shape))
                correction = jnp.exp2(m - new_m)
                l = l * correction + p.sum(axis=1)
                return p.astype(dtype), new_m, l, correction

            def slot_of(i: Any) -> Any:
                return lax.rem(i, jnp.int32(stages))

            def scores(s_ref: Any, i: Any) -> None:
                plgpu.barrier_wait(key_ready.at[slot_of(i)])
                plgpu.wgmma(s_ref, query, key_smem.at[slot_of(i)].transpose((1, 0)))

            score_type = plgpu.ACC(shape, jnp.float32)
            right = max(1, 0)
            n_right = jnp.maximum(ranges.stop - ranges.full_stop, right)
            n_full = jnp.maximum(ranges.stop - ranges.full_first, n_right)

            if blocks.overlap:
                pl.when(wg == 1)(take_turn)
                def first(s_ref: Any) -> Any:
                    scores(s_ref, jnp.int32(0))
                    return s_ref[...]

                s = pl.run_scoped(first, score_type)
                plgpu.barrier_arrive(key_free.at[0])
                p, m, l, _ = softmax(s, jnp.int32(0), m, l, intervals.has_left_edge or intervals.has_right_edge)

                def step(i: Any, carry: tuple, masked: bool = False) -> tuple:
                    acc, p, m, l = carry

                    def body(refs: Any) -> None:
                        acc_ref, p_ref, m_ref, l_ref, c_ref = refs
                        take_turn()

                        def products(s_ref: Any) -> Any:
                            scores(s_ref, i)
                            plgpu.barrier_wait(value_ready.at[slot_of(i - 1)])
                            plgpu.wgmma(acc_ref, p, value_smem.at[slot_of(i - 1)])
                            take_turn()
                            return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

                        s = pl.run_scoped(products, score_type)
                        plgpu.barrier_arrive(key_free.at[slot_of(i)])
                        p_ref[...], m_ref[...], l_ref[...], c_ref[...] = softmax(s, i, m, l, masked)

                    acc, p, m, l, c = pl.run_state(body)((plgpu.ACC.init(acc), p, m, l, m))
                    plgpu.barrier_arrive(value_free.at[slot_of(i - 1)])
                    return acc * columns_of(c, acc.shape), p, m, l

                carry = (acc, p, m, l)
                if intervals.has_right_edge:
                    carry = lax.fori_loop(1, n_right, lambda i, c: step(i, c, True), carry)
                carry = lax.fori_loop(n_right, n_full, step, carry)
                if intervals.has_left_edge:
                    carry = lax.fori_loop(n_full, num_tiles, lambda i, c: step(i, c, True), carry)
                acc, p, m, l = carry
                pl.when(wg == 0)(take_turn)
                last = slot_of(num_tiles - 1)
                plgpu.barrier_wait(value_ready.at[last])
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, value_smem.at[last]))(plgpu.ACC.init(acc))
            else:
                pl.when(wg == 1)(take_turn)

                def step(i: Any, carry: tuple, masked: bool = False) -> tuple:
                    acc, m, l = carry

                    def product(s_ref: Any) -> Any:
                        scores(s_ref, i)
                        take_turn()
                        return s_ref[...]

                    s = pl.run_scoped(product, score_type)
                    plgpu.barrier_arrive(key_free.at[slot_of(i)])
                    p, m, l, c = softmax(s, i, m, l, masked)
                    acc = acc * columns_of(c, acc.shape)
                    acc, p, m, l = lax.optimization_barrier((acc, p, m, l))
                    plgpu.barrier_wait(value_ready.at[slot_of(i)])
                    take_turn()
                    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, value_smem.at[slot_of(i)]))(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(value_free.at[slot_of(i)])
                    return acc, m, l

                carry = (acc, m, l)
                n_right = ranges.stop - ranges.full_stop
                if intervals.has_right_edge:
                    carry = lax.fori_loop(0, n_right, lambda i, c: step(i, c, True), carry)
                carry = lax.fori_loop(n_right, n_full, step, carry)
                if intervals.has_left_edge:
                    carry = lax.fori_loop(n_full, num_tiles, lambda i, c: step(i, c, True), carry)
                acc, m, l = carry
                pl.when(wg == 0)(take_turn)

            out = acc * columns_of(1 / l, acc.shape)
            if rows is not None:
                out = jnp.where(columns_of(m, acc.shape) > 0.9 * _LOWEST, out, 0.0)
            if is_wide:
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)
            out_smem[wg] = out.astype(out_dtype)
            if config.needs_lse:
                lse_smem[wg] = (m + jnp.log2(l)) * LN2
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[wg], outs[0].at[(*batch, pl.ds(row, block_q), kv_head, query_head)])
            if config.needs_lse:
                plgpu.copy_smem_to_gmem(lse_smem.at[wg], outs[1].at[(*head, pl.ds(row, block_q))])
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        kernel,
        out_types=out_types,
        scratch=scratch,
        grid={"group": num_heads // group, "block": blocks_of_rows, "member": group},
        warpgroups=compute + 1,
    )(*operands.values())
    out, *lse = results
    return (out[..., : z.T, :, :, :], *(x[..., : z.T] for x in lse))


def _without_padding(value: jax.Array, mask: MaskOperands) -> jax.Array:
    """NaN or inf in padding would survive a weight of zero (0 * NaN)."""
    length = mask.key_value_length
    if length is None:
        return value
    position = jnp.arange(value.shape[-3], dtype=jnp.int32)[:, None, None]
    return jnp.where((position >= length[..., None, None, None]) & ~jnp.isfinite(value), 0, value)
