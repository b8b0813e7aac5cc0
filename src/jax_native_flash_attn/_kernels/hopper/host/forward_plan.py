"""What a call of the forward kernel takes: shapes of its results, shared memory, and choices made beforehand."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...._semantics.call import Config, Inputs
from ...._semantics.numerics import LOG2E
from ..blocks import Blocks
from ..operands import Operands, TermBuffers, TermKind
from ..pallas import TmaLoad, TmaStore, matrix_buffer, plgpu, swizzle_bytes
from ..scheduler import TileScheduler, heads_per_group, is_even_band, schedule
from .operands import starts_with_addend, term_buffers
from .plan import KernelPlan

_LONG_ITEM = 8  # tiles
_LARGEST_EXPONENT = 80  # of a weight; leaves as much for values and the number of keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardOuts:
    """Over each split of the keys, which are a further axis in front; None if not wanted.

    Attributes:
      out: (batch..., T, N, D) in query's dtype.
      unrounded: the same in float32.
      lse, max_logits: (batch..., N, T) in float32.
    """

    out: Any | None = None
    unrounded: Any | None = None
    lse: Any | None = None
    max_logits: Any | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardBuffers:
    """Shared memory and barriers.

    Attributes:
      query: also has room for out if `ForwardPlan.shares_buffer`.
      *_ready: completed by TMA: the data are there.
      query_free: completed by the compute warpgroup whose rows they are: the next item's query may be loaded.
      key_free, value_free: completed by all compute warpgroups: the slot may be loaded again.
      turn: completed by the compute warpgroup before: it has issued its products, the next one may.
      all_done: completed by all compute warpgroups: nobody reads the query any more. Only where out takes its memory
        and has rows of another length, so that those of one warpgroup lie where another's query was.
      value_clean: completed by compute warpgroup 0: the padding in the values of a slot is clean.
    """

    query: Any
    out: Any | None
    key: Any
    value: Any
    lse: Any | None
    weights: Any | None
    terms: TermBuffers
    query_ready: Any
    key_ready: Any
    value_ready: Any
    query_free: Any
    key_free: Any
    value_free: Any
    turn: Any
    all_done: Any | None
    value_clean: Any


@dataclass(frozen=True)
class ForwardPlan(KernelPlan):
    """`streams_terms`: bias or mask come with the keys; `starts_with_addend`: see `host/operands.py`."""

    scheduler: TileScheduler
    needs_out: bool
    needs_unrounded: bool
    needs_lse: bool
    needs_max_logits: bool
    streams_terms: bool
    starts_with_addend: bool

    @classmethod
    def make(
        cls,
        config: Config,
        inputs: Inputs,
        operands: Operands,
        blocks: Blocks,
        cores: int,
        *,
        needs_out: bool,
        needs_unrounded: bool,
        needs_lse: bool,
        needs_max_logits: bool,
    ) -> "ForwardPlan":
        z, dtype, bias = inputs.sizes, inputs.query.dtype, operands.bias
        heads = (*z.batch, z.N)
        # The kernel cannot know how many tiles traced intervals leave to an item. A boolean mask leaves all.
        # Rows of a window that moves have as many keys, but for those at either end.
        is_even = operands.shift is not None or (
            (operands.intervals is None or operands.mask is not None)
            and is_even_band(config.band, z.T, z.S, blocks.rows)
        )
        scheduler = schedule(
            heads,
            -(-z.T // blocks.rows),
            heads_per_group(math.prod(heads), dtype.itemsize * z.S * (z.H + z.D) / z.G),
            # Beside a ring of devices' transfer, which holds multiprocessors, workers that wait for one would end late.
            cores if blocks.persistent and is_even and config.has_all_keys else None,
            config.band,
            splits=blocks.splits,
            batch_fastest=bias is not None and bias.kind is TermKind.TILED and bias.array.shape[:-3] != z.batch,
        )
        streams_terms = bool(operands.tiled or operands.columns)
        return cls(
            config,
            z,
            dtype,
            blocks,
            scheduler,
            needs_out,
            needs_unrounded,
            needs_lse,
            needs_max_logits,
            streams_terms,
            starts_with_addend(config, inputs),
        )

    @property
    def has_fixed_top(self) -> bool:
        """Whether nothing is subtracted from logits, as a soft cap keeps weights and their sums in range."""
        cap = self.config.logits_soft_cap
        is_wide = self.dtype != jnp.float16 and not self.needs_max_logits
        return cap is not None and cap * LOG2E <= _LARGEST_EXPONENT and is_wide

    @property
    def tma(self) -> TmaLoad:
        """Of query and key."""
        return TmaLoad(self.sizes.H, self.dtype)

    @property
    def value_tile(self) -> tuple[int, int]:
        keys, head_dim = self.blocks.block_kv, self.sizes.D
        return (head_dim, keys) if self.dtype == jnp.float32 else (keys, head_dim)

    @property
    def value_tma(self) -> TmaLoad:
        return TmaLoad(self.value_tile[-1], self.dtype)

    @property
    def store(self) -> TmaStore:
        return TmaStore(self.sizes.T, self.sizes.N)

    @property
    def takes_turns(self) -> bool:
        return self.blocks.takes_turns and self.blocks.warpgroups > 1

    @property
    def loads_keys_first(self) -> bool:
        """A slot of keys is free half a step before one of values: waiting for the latter would delay the former.

        (4% of causal calls with heads of 64, little elsewhere; items of a few tiles would take up to 6% more.)
        """
        z = self.sizes
        return not self.streams_terms and z.H <= 64 and -(-z.S // self.blocks.block_kv) >= _LONG_ITEM

    @property
    def shares_buffer(self) -> bool:
        """Without a next item, the output leaves through memory that held the query."""
        return self.needs_out and self.scheduler.is_single

    def out_types(self) -> ForwardOuts:
        # Of matrices TMA leaves out what lies past the end; vectors and what registers store are whole blocks.
        z, splits, all_rows = self.sizes, self.blocks.splits, self.scheduler.blocks * self.blocks.rows
        out = jax.ShapeDtypeStruct((splits, *z.batch, self.store.length, z.N, z.D), self.dtype)
        unrounded = jax.ShapeDtypeStruct((splits, *z.batch, all_rows, z.N, z.D), jnp.float32)
        lse = jax.ShapeDtypeStruct((splits, *z.batch, z.N, all_rows), jnp.float32)
        return ForwardOuts(
            out if self.needs_out else None,
            unrounded if self.needs_unrounded else None,
            lse if self.needs_lse else None,
            lse if self.needs_max_logits else None,
        )

    def buffers(self, operands: Operands) -> ForwardBuffers:
        blocks, dtype, value_tile = self.blocks, self.dtype, self.value_tile
        compute, stages = blocks.warpgroups, blocks.stages
        rows_like = compute, blocks.block_q
        out = self.store.buffer(*rows_like, self.sizes.D, dtype=dtype)
        # Float32 leaves no room for it; through shared memory takes less, for short items up to 5% of a call.
        has_lse = self.needs_lse and dtype != jnp.float32
        # Both operands of the second product have one swizzle.
        swizzle = swizzle_bytes(value_tile[-1], dtype, blocks.block_kv)
        weights = compute, blocks.block_q, blocks.block_kv
        num_streamed = len(operands.tiled) + len(operands.columns)
        shared = plgpu.RefUnion(*self.tma.buffers(*rows_like), out) if self.shares_buffer else None
        is_shifted = self.shares_buffer and self.sizes.H != self.sizes.D and compute > 1
        return ForwardBuffers(
            query=shared or self.tma.buffer(*rows_like),
            out=out if self.needs_out and not self.shares_buffer else None,
            key=self.tma.buffer(stages, blocks.block_kv),
            value=self.value_tma.buffer(stages, value_tile[0]),
            lse=plgpu.SMEM(rows_like, jnp.float32) if has_lse else None,
            weights=matrix_buffer(*weights, dtype=dtype, swizzle=swizzle) if blocks.weights_in_shared else None,
            terms=term_buffers(operands, (stages,), blocks.rows, blocks.block_kv, with_columns=True),
            query_ready=plgpu.Barrier(num_barriers=compute),
            key_ready=plgpu.Barrier(num_barriers=stages, num_arrivals=1 + num_streamed),
            value_ready=plgpu.Barrier(num_barriers=stages),
            query_free=plgpu.Barrier(num_barriers=compute),
            key_free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
            value_free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
            turn=plgpu.Barrier(num_barriers=compute),
            all_done=plgpu.Barrier(num_arrivals=compute) if is_shifted else None,
            value_clean=plgpu.Barrier(num_barriers=stages),
        )
