"""What a call of the kernel for the gradients of query, key and value takes, and which calls take that kernel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...._semantics.call import Config, Inputs
from ...._semantics.masks import Band
from ..addition_order import BLOCK_KEYS, BLOCK_ROWS, AdditionOrder
from ..blocks import Blocks
from ..operands import BackwardOperands
from ..pallas import matrix_buffer, plgpu
from .backward import Backward
from .plan import KernelPlan

BLOCKS = Blocks(BLOCK_ROWS, BLOCK_KEYS // 2, 2, 2, persistent=True)
HEAD_DIM = 128
HALF = HEAD_DIM // 2  # columns of the gradient of query that one warpgroup makes
_LEAST_TILES = 32  # of query rows; fewer were not measured
_FULL = Band(), Band(is_complete=True)
_CAUSAL = Band(upper=0), Band(upper=0, is_complete=True)
_ROW_BYTES = 8 * HEAD_DIM  # of query and dout in 16 bits, and of the gradient in float32
_MOST_BYTES = 100 << 20  # 67 MiB of 4 heads of a group took .95 of two kernels' time, 134 of 8 took 1.04 (H200)
_JAX = (0, 11, 2)  # before, descriptors stay in registers, and these do not suffice: `hide_from_compiler`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedGradients:
    """(batch..., rows, heads, H). The kernel leaves that of query in float32, and not multiplied by scale.

    Those of key and value it leaves in float32, too, where they are asked for so, or where a group of query heads has
    several parts: (batch..., parts, whole blocks of keys, K, H).
    """

    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedBuffers:
    """Shared memory and barriers.

    Attributes:
      key: (warpgroup, half of the columns, keys, HALF); at the end it holds its gradient, and value likewise.
      dlogits: dS^T of both warpgroups, in two slots.
      dquery: (slot, half of the columns, rows, HALF) in float32.
      keys_ready, rows_ready: completed by TMA: the data are there.
      keys_done: completed by both compute warpgroups: no product reads keys and values any more.
      keys_free: completed likewise: their gradients have left.
      rows_free: completed likewise: the slot may be loaded again.
      dlogits_ready: completed likewise: the slot holds those of both.
      dquery_ready: completed likewise: the slot may be added.
      dquery_free: completed by the warpgroup that loads: the slot has been read.
    """

    key: Any
    value: Any
    query: Any
    dout: Any
    lse: Any
    delta: Any
    dlogits: Any
    dquery: Any
    keys_ready: Any
    keys_done: Any
    keys_free: Any
    rows_ready: Any
    rows_free: Any
    dlogits_ready: Any
    dquery_ready: Any
    dquery_free: Any


@dataclass(frozen=True)
class FusedPlan(KernelPlan):
    """`is_wide`: whether the gradients of key and value leave in float32."""

    order: AdditionOrder
    is_wide: bool

    @property
    def grid(self) -> dict[str, int]:
        return {"worker": self.order.workers}

    @property
    def parts(self) -> int:
        """How many a group of query heads has, each with the keys to itself."""
        return self.sizes.G // self.order.group

    @property
    def turns(self) -> int:
        """How many counters of additions there are: one for each query tile."""
        return self.order.heads * self.order.group * self.order.tiles

    def operands(self, call: Backward) -> BackwardOperands:
        forward = self.prepare(call, BLOCK_ROWS, BLOCK_KEYS)
        return BackwardOperands(forward, call.row_operands(BLOCK_ROWS, self.value_tma))

    def out_types(self) -> FusedGradients:
        z = self.sizes
        keys = jax.ShapeDtypeStruct((*z.batch, z.S, z.K, z.H), self.dtype)
        if self.is_wide:
            keys = jax.ShapeDtypeStruct((*z.batch, self.parts, self.order.blocks * BLOCK_KEYS, z.K, z.H), jnp.float32)
        query = jax.ShapeDtypeStruct((*z.batch, z.T, z.N, z.H), jnp.float32)
        return FusedGradients(query, keys, keys)

    def buffers(self) -> FusedBuffers:
        stages, dtype = self.blocks.stages, self.dtype
        rows = stages, BLOCK_ROWS, HEAD_DIM
        return FusedBuffers(
            key=matrix_buffer(2, 2, BLOCK_KEYS // 2, HALF, dtype=dtype),
            value=matrix_buffer(2, BLOCK_KEYS // 2, HEAD_DIM, dtype=dtype),
            query=matrix_buffer(*rows, dtype=dtype),
            dout=matrix_buffer(*rows, dtype=dtype),
            lse=plgpu.SMEM(rows[:2], jnp.float32),
            delta=plgpu.SMEM(rows[:2], jnp.float32),
            dlogits=matrix_buffer(2, 2, BLOCK_KEYS // 2, BLOCK_ROWS, dtype=dtype),
            dquery=matrix_buffer(2, 2, BLOCK_ROWS, HALF, dtype=jnp.float32),
            keys_ready=plgpu.Barrier(num_arrivals=6),
            keys_done=plgpu.Barrier(num_arrivals=2),
            keys_free=plgpu.Barrier(num_arrivals=2),
            rows_ready=plgpu.Barrier(num_barriers=stages, num_arrivals=4),
            rows_free=plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            dlogits_ready=plgpu.Barrier(num_barriers=2, num_arrivals=2),
            dquery_ready=plgpu.Barrier(num_barriers=2, num_arrivals=2),
            dquery_free=plgpu.Barrier(num_barriers=2),
        )


def fused_order(config: Config, inputs: Inputs, cores: int, *, at_once: bool) -> AdditionOrder | None:
    """How the kernel goes through a call, for so many multiprocessors; None where it does not, or takes longer.

    `at_once`: as of `cotangent.plan`.
    """
    if not _takes(config, inputs):
        return None
    parts = (n for n in range(1, inputs.sizes.G + 1) if inputs.sizes.G % n == 0)
    orders = (_order(config, inputs, cores, n, at_once=at_once) for n in parts)
    return next((order for order in orders if order is not None), None)


def _order(config: Config, inputs: Inputs, cores: int, parts: int, *, at_once: bool) -> AdditionOrder | None:
    """With so many parts of each group; without a mask there is but one, as all blocks are at one head at a time."""
    z, is_causal = inputs.sizes, config.band in _CAUSAL
    if parts > 1 and not is_causal:
        return None
    blocks, tiles, group = -(-z.S // BLOCK_KEYS), -(-z.T // BLOCK_ROWS), z.G // parts
    shape = math.prod(z.batch) * z.K * parts, blocks, tiles, group, cores
    if tiles < _LEAST_TILES:
        return None

    def fits(order: AdditionOrder) -> bool:
        """Whether what heads that run at once read and add to, and each block reads again, stays in the cache.

        In launch order, without a mask, blocks go through the rows together: the first one reads for all.
        """
        heads = -(-min(order.workers, cores) // blocks) * (group if is_causal else 1)
        goes_together = order.in_launch_order and not is_causal
        return goes_together or heads * z.T * _ROW_BYTES <= _MOST_BYTES

    order = None
    if config.has_all_keys:  # transfers around a ring hold multiprocessors: many blocks of one worker would begin late
        order = AdditionOrder.make(*shape, is_causal=is_causal)
    if order is not None:
        # Without a mask, blocks that begin less than two tiles apart would wait for each other (two: as measured).
        waits = not is_causal and tiles < 2 * min(order.workers, blocks) - 1
        may_wait = at_once or not order.needs_all_at_once
        order = order if may_wait and not waits and fits(order) else None
    if order is None:
        order = AdditionOrder.make_in_launch_order(*shape, is_causal=is_causal)
    return order if order is not None and fits(order) else None


def _takes(config: Config, inputs: Inputs) -> bool:
    """Whether the kernel can make the gradients of a call."""
    z, is_causal = inputs.sizes, config.band in _CAUSAL
    is_plain = (
        inputs.bias is None
        and all(x is None for x in inputs.mask)
        and config.dropout is None
        and config.score_mod is None
        and config.mask_mod is None
        and (is_causal or config.band in _FULL)
        and config.ring is None
    )
    has_own_rows = all(x.shape[:-3] == z.batch for x in (inputs.query, inputs.key, inputs.value))
    if not (is_plain and has_own_rows and z.H == z.D == HEAD_DIM and jax.__version_info__ >= _JAX):
        return False
    is_16_bit = inputs.query.dtype != jnp.float32
    # TMA stores whole tiles of 8 rows, and a symbolic batch has no number of blocks.
    are_known = all(isinstance(n, int) and n > 0 for n in z.batch) and z.T % 8 == z.S % 8 == 0 < min(z.T, z.S)
    return is_16_bit and are_known and (z.T == z.S or not is_causal)


def makes_all(inputs: Inputs, batch: tuple[Any, ...], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether gradients of query, key and value of all batch rows are `wanted`, and nothing else.

    Cotangents, whose `batch` axes these are, may have batch rows that the inputs share, as under `jax.vmap` of a
    pullback; the kernel has no sums.
    """
    batches = {inputs.sizes.batch, batch, *(x.shape[:-3] for x in wanted.values())}
    has_all = set(wanted) == {"query", "key", "value"} and wanted["key"].dtype == wanted["value"].dtype
    return has_all and len(batches) == 1
