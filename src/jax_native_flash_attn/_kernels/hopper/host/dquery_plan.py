"""What a call of the kernel for the gradient of query takes: shapes of its results and shared memory."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..blocks import Blocks
from ..operands import BackwardOperands, Operands, TermBuffers, TransposedOperands
from ..pallas import TmaLoad, TmaStore, plgpu
from ..scheduler import TileScheduler, heads_per_group, schedule
from .backward import Backward
from .operands import term_buffers
from .plan import KernelPlan


class Moments(NamedTuple):
    """For the gradient of scale, of each row, (batch..., N, T) in float32: sums over the keys, with x = q . k.

    In a product with x, dz and p go through the derivative of the soft cap.
    """

    dz_x: Any
    dz: Any
    p_x: Any


NUM_MOMENTS = len(Moments._fields)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DQueryOuts:
    """`dquery`: (batch..., T, N, H)."""

    dquery: Any
    moments: Moments | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DQueryBuffers:
    """Shared memory and barriers.

    Attributes:
      rows: query and dout; then the result, in memory that held the query, or both (float32 for 16 bits).
      transposed_key: in float32; comes and goes with the key.
      *_ready: completed by TMA: the data are there. Bias and mask come with the values.
      key_free, value_free: completed by all compute warpgroups: the slot may be loaded again.
      rows_free: completed by the compute warpgroup whose rows they are, once its gradient has left.
      all_done: completed by all compute warpgroups: nobody reads query or dout any more.
      padding_clean: completed by compute warpgroup 0: the padding in a tile of keys and values is clean.
    """

    rows: Any
    key: Any
    transposed_key: Any | None
    value: Any
    moments: Any | None
    terms: TermBuffers
    rows_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    rows_free: Any
    all_done: Any
    padding_clean: Any


@dataclass(frozen=True)
class DQueryPlan(KernelPlan):
    """The result comes in `out_dtype`: the dtype of query, or float32."""

    scheduler: TileScheduler
    out_dtype: Any
    with_scale: bool

    @classmethod
    def make(cls, call: Backward, blocks: Blocks, out_dtype: Any, cores: int, *, with_scale: bool) -> "DQueryPlan":
        z, dtype, heads = call.sizes, call.inputs.query.dtype, (*call.sizes.batch, call.sizes.N)
        group = heads_per_group(math.prod(heads), 2 * z.S * (z.H + z.D) / z.G)
        is_persistent = blocks.persistent and jnp.dtype(out_dtype) == dtype
        num_blocks = -(-z.T // blocks.rows)
        scheduler = schedule(heads, num_blocks, group, cores if is_persistent else None, call.config.band)
        return cls(call.config, z, dtype, blocks, scheduler, out_dtype, with_scale)

    @property
    def store(self) -> TmaStore:
        return TmaStore(self.sizes.T, self.sizes.N)

    @property
    def is_wide(self) -> bool:
        """Whether the result takes the memory of query and dout."""
        return jnp.dtype(self.out_dtype) != self.dtype

    @property
    def key_tma(self) -> TmaLoad:
        """Of transposed keys."""
        return TmaLoad(self.blocks.block_kv, self.dtype)

    @property
    def value_stages(self) -> int:
        """A tile of values is free after its step, one of keys a step later."""
        return self.blocks.stages - 1

    def operands(self, call: Backward) -> BackwardOperands:
        forward = self.prepare(call, self.blocks.rows, self.blocks.block_kv)
        rows = call.row_operands(self.blocks.rows, self.value_tma, drops_dead_rows=True)
        turned = None if call.products is None else TransposedOperands(key=call.products.transposed.key)
        return BackwardOperands(forward, rows, transposed=turned)

    def out_types(self) -> DQueryOuts:
        z = self.sizes
        dquery = jax.ShapeDtypeStruct((*z.batch, self.store.length, z.N, z.H), self.out_dtype)
        moment = jax.ShapeDtypeStruct((*z.batch, z.N, self.scheduler.blocks * self.blocks.rows), jnp.float32)
        return DQueryOuts(dquery, Moments(moment, moment, moment) if self.with_scale else None)

    def buffers(self, operands: Operands) -> DQueryBuffers:
        blocks, tma, value_tma = self.blocks, self.tma, self.value_tma
        compute, stages, value_stages = blocks.warpgroups, blocks.stages, self.value_stages
        row_buffers = self.scheduler.buffers * compute
        rows_like = row_buffers, blocks.block_q
        query, dout = tma.buffers(*rows_like), value_tma.buffers(*rows_like)
        # As products see them and, where that is another way for either, as TMA loads them.
        views = [(query[0], dout[0]), (query[-1], dout[-1])][: max(len(query), len(dout))]
        result = self.store.buffer(*rows_like, self.sizes.H, dtype=self.out_dtype)
        moments = plgpu.SMEM((NUM_MOMENTS, compute, blocks.block_q), jnp.float32)
        return DQueryBuffers(
            rows=plgpu.RefUnion(*views, (result,)),
            key=tma.buffer(stages, blocks.block_kv),
            transposed_key=self.key_tma.buffer(stages, self.sizes.H) if self.is_float32 else None,
            value=value_tma.buffer(value_stages, blocks.block_kv),
            moments=moments if self.with_scale else None,
            terms=term_buffers(operands, (value_stages,), blocks.rows, blocks.block_kv),
            rows_ready=plgpu.Barrier(num_barriers=row_buffers, num_arrivals=2),
            key_ready=plgpu.Barrier(num_barriers=stages, num_arrivals=2 if self.is_float32 else 1),
            value_ready=plgpu.Barrier(num_barriers=value_stages, num_arrivals=1 + len(operands.tiled)),
            key_free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
            value_free=plgpu.Barrier(num_barriers=value_stages, num_arrivals=compute),
            rows_free=plgpu.Barrier(num_barriers=row_buffers),
            all_done=plgpu.Barrier(num_arrivals=compute),
            padding_clean=plgpu.Barrier(),
        )
