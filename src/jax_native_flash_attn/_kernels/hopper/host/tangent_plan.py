"""What a call of the tangent kernel takes: its operands, shapes of its results, and shared memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ...._semantics.call import Config, Inputs
from ...._semantics.sizes import Sizes
from ..blocks import Blocks
from ..operands import Operands, TangentOperands, TermBuffers
from ..pallas import TmaLoad, TmaStore, pad_axis, plgpu, round_up
from ..scheduler import TileScheduler, heads_per_group, schedule
from .backward import prepare_lse
from .operands import prepare, prepare_bias, term_buffers
from .plan import KernelPlan

_OTHER_REGISTERS = 40


@dataclass(frozen=True)
class Tangent:
    """One call of the tangent; any batch axis of any array may have size 1 and then broadcasts.

    Attributes:
      sizes: with the batch axes that all arrays broadcast to.
      tangents: of some of query, key, value, scale and bias, by name.
      out: (batch..., T, N, D) in float32.
      lse: (batch..., N, T) in float32.
    """

    config: Config
    inputs: Inputs
    sizes: Sizes
    tangents: Mapping[str, jax.Array]
    out: jax.Array
    lse: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TangentOuts:
    """`out`: (batch..., T, N, D); `lse`: (batch..., N, T) in float32, or None if nothing reaches the logits."""

    out: Any
    lse: Any | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TangentBuffers:
    """Shared memory and barriers; of tangents where there are any.

    Attributes:
      rows: query and its tangent; then the result, if `TangentPlan.shares_buffer`.
      *_ready: completed by TMA: the data are there. What is added to the logits comes with the keys.
      key_free, value_free: completed by all compute warpgroups: the slot may be loaded again.
      rows_free: completed by the compute warpgroup whose rows they are, once its result has left.
      padding_clean: completed by compute warpgroup 0: the padding in the values of a slot is clean.
    """

    rows: Any
    out: Any | None
    key: Any
    dkey: Any | None
    value: Any | None
    dvalue: Any | None
    terms: TermBuffers
    dterms: TermBuffers
    rows_ready: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    rows_free: Any
    padding_clean: Any


@dataclass(frozen=True)
class TangentPlan(KernelPlan):
    """The tangent of out comes in `out_dtype`: the dtype of query, or float32.

    `has_sinks`: the weights of a row then do not add up to 1.
    """

    scheduler: TileScheduler
    out_dtype: Any
    has_sinks: bool

    @classmethod
    def make(cls, call: Tangent, blocks: Blocks, out_dtype: Any, cores: int) -> "TangentPlan":
        z, dtype, heads = call.sizes, call.inputs.query.dtype, (*call.sizes.batch, call.sizes.N)
        group = heads_per_group(math.prod(heads), 4 * z.S * (z.H + z.D) / z.G)
        num_blocks = -(-z.T // blocks.rows)
        scheduler = schedule(heads, num_blocks, group, cores if blocks.persistent else None, call.config.band)
        return cls(call.config, z, dtype, blocks, scheduler, out_dtype, call.inputs.sinks is not None)

    @property
    def store(self) -> TmaStore:
        return TmaStore(self.sizes.T, self.sizes.N)

    @property
    def is_wide(self) -> bool:
        """Whether the result leaves from registers."""
        return jnp.dtype(self.out_dtype) != self.dtype

    @property
    def shares_buffer(self) -> bool:
        """Whether the result leaves through memory that held the query: rows of the same length lie alike."""
        return not self.is_wide and self.sizes.H == self.sizes.D

    @property
    def overlaps(self) -> bool:
        """Whether registers hold the products of a tile beside the operands of the tile before."""
        return self.sizes.D // 2 + 2 * self.blocks.block_kv + _OTHER_REGISTERS <= self.blocks.registers[0]

    def operands(self, call: Tangent) -> TangentOperands:
        blocks, tma, value_tma, tangents = self.blocks, self.tma, self.value_tma, call.tangents
        (T, S), inputs = (self.sizes.T, self.sizes.S), call.inputs
        lse, scales_lse = prepare_lse(call.config, inputs, call.lse, blocks.rows)

        def padded(name: str, length: int, tma: TmaLoad) -> jax.Array | None:
            return pad_axis(tangents[name], -3, round_up(length, tma.multiple)) if name in tangents else None

        bias = tangents.get("bias")
        changes = Operands(
            query=padded("query", T, tma),
            key=padded("key", S, tma),
            value=padded("value", S, value_tma),
            scale=tangents.get("scale"),
            intervals=None,
            elements=None,
            bias=None if bias is None else prepare_bias(bias, T, S, blocks.rows, blocks.block_kv),
            mask=None,
            length=None,
            dropout=None,
        )
        operands = TangentOperands(
            forward=prepare(call.config, inputs, blocks.rows, blocks.block_kv, tma, value_tma, needs_slope=True),
            tangents=changes,
            out=pad_axis(call.out, -3, round_up(T, blocks.rows)),
            lse=lse,
            scales_lse=scales_lse,
        )
        return operands if operands.has_dlogits else replace(operands, out=None)

    def out_types(self, operands: TangentOperands) -> TangentOuts:
        z, all_rows = self.sizes, self.scheduler.blocks * self.blocks.rows
        rows = all_rows if self.is_wide else self.store.length
        out = jax.ShapeDtypeStruct((*z.batch, rows, z.N, z.D), self.out_dtype)
        lse = jax.ShapeDtypeStruct((*z.batch, z.N, all_rows), jnp.float32)
        return TangentOuts(out, lse if operands.has_dlogits else None)

    def buffers(self, operands: TangentOperands) -> TangentBuffers:
        blocks, tma, value_tma, tangents = self.blocks, self.tma, self.value_tma, operands.tangents
        compute, stages, block_kv = blocks.warpgroups, blocks.stages, blocks.block_kv
        row_buffers = self.scheduler.buffers * compute
        rows_like = row_buffers, blocks.block_q
        query = tma.buffers(*rows_like)
        # As products see them and, where that is another way, as TMA loads them.
        views = [(x, x) if tangents.query is not None else (x,) for x in query]
        out = None if self.is_wide else self.store.buffer(*rows_like, self.sizes.D, dtype=self.dtype)
        shared = [(out,)] if self.shares_buffer else []
        has_value, has_dvalue = operands.has_dlogits, tangents.value is not None
        return TangentBuffers(
            rows=plgpu.RefUnion(*views, *shared),
            out=None if self.shares_buffer else out,
            key=tma.buffer(stages, block_kv),
            dkey=tma.buffer(stages, block_kv) if tangents.key is not None else None,
            value=value_tma.buffer(stages, block_kv) if has_value else None,
            dvalue=value_tma.buffer(stages, block_kv) if has_dvalue else None,
            terms=term_buffers(operands.forward, (stages,), blocks.rows, block_kv),
            dterms=term_buffers(tangents, (stages,), blocks.rows, block_kv),
            rows_ready=plgpu.Barrier(num_barriers=row_buffers, num_arrivals=1 + (tangents.query is not None)),
            key_ready=plgpu.Barrier(
                num_barriers=stages, num_arrivals=1 + (tangents.key is not None) + len(operands.tiled)
            ),
            value_ready=plgpu.Barrier(num_barriers=stages, num_arrivals=has_value + has_dvalue),
            key_free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
            value_free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
            rows_free=plgpu.Barrier(num_barriers=row_buffers),
            padding_clean=plgpu.Barrier(num_barriers=stages),
        )
