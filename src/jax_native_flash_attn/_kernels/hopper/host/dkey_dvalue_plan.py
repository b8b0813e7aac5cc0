"""What a call of the kernel for the gradients of key and value takes: shapes of its results and shared memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..backward_blocks import dkey_dvalue_vectors
from ..blocks import Blocks
from ..formulas import Formula, Kind
from ..operands import BackwardOperands, Mods, Operands, TermBuffers, TransposedOperands
from ..pallas import TmaLoad, TmaStore, plgpu, swizzle_bytes
from ..scheduler import TileScheduler, heads_per_group, is_one_sided, schedule
from .backward import Backward
from .intervals import query_tiles
from .mask_bits import visited
from .operands import term_buffers, term_bytes
from .plan import KernelPlan
from .tile_classes import query_tiles_of_classes

# Mean head dimensions (above the first, up to the second) with which the softmax runs beside products of its warpgroup:
# masked calls take 2 to 6% less there. Elsewhere it takes up to 3% more.
_OVERLAPPED = 64, 128
_MOST_AXES = 5  # of an array that TMA reads
_LEAST_ROWS = 2048  # of queries in a part, over all its heads; with fewer, sums would take what parts save
_ABOUT = 1.1  # times the shortest time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyGradients:
    """What belongs to the gradients of key and of value; None for one that is not wanted."""

    key: Any | None = None
    value: Any | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyBuffers:
    """Shared memory and barriers.

    Attributes:
      key, value: at the end, the memory of a key holds its gradient, and that of a value likewise. No value is loaded
        for the gradient of value alone, which then leaves through the memory of the key if its rows are as long.
      dout: not in float32 for the gradient of value alone, which reads it transposed.
      transposed_query, transposed_dout: in float32, for the gradients of key and of value.
      *_ready: completed by TMA: the data are there.
      keys_free: completed by the compute warpgroup whose keys they are, once their gradients have left.
      rows_free: completed by all compute warpgroups: the slot may be loaded again.
      mod_rows: of what functions of scores and indices read of the rows: see `KeyPlan.staged`.
    """

    key: Any
    value: Any | None
    query: Any
    dout: Any | None
    transposed_query: Any | None
    transposed_dout: Any | None
    lse: Any
    delta: Any
    terms: TermBuffers
    keys_ready: Any
    rows_ready: Any
    keys_free: Any
    rows_free: Any
    mod_rows: tuple[Any, ...] = ()


@dataclass(frozen=True)
class KeyPlan(KernelPlan):
    """Of `blocks`, block_kv are the keys of one compute warpgroup, and block_q the query rows of one tile.

    Attributes:
      wanted: types of the results.
      summed: the batch axes that a block of keys sums over, 1 for the others.
      scale_is_summed: whether scale differs along those.
      most_staged: of how many vectors along rows, that functions read, there is room for in shared memory.
    """

    scheduler: TileScheduler
    wanted: KeyGradients
    batch: tuple[int, ...]
    summed: tuple[int, ...]
    scale_is_summed: bool
    most_staged: int

    @classmethod
    def make(cls, call: Backward, blocks: Blocks, wanted: KeyGradients, cores: int) -> "KeyPlan":
        z, dtype = call.sizes, call.inputs.query.dtype
        batch = jax.tree.leaves(wanted)[0].shape[:-3]
        summed = tuple(n if m == 1 else 1 for n, m in zip(z.batch, batch, strict=True))
        # A block belongs to one head of keys, and visits all members: the query heads of its group in what is summed.
        kv_heads, num_members = (*batch, z.K), math.prod(summed) * z.G
        group = heads_per_group(math.prod(kv_heads), 2 * z.T * (z.H + z.D) * num_members)
        num_blocks = -(-z.S // (blocks.warpgroups * blocks.block_kv))
        is_persistent = blocks.persistent and call.config.has_all_keys  # as in `ForwardPlan`
        scheduler = schedule(kv_heads, num_blocks, group, cores if is_persistent else None, call.config.band)
        scale_is_summed = _differs_along(summed, call.inputs.scale)
        most_staged = dkey_dvalue_vectors(
            blocks,
            z,
            term_bytes(call.inputs),
            needs_key=wanted.key is not None,
            needs_value=wanted.value is not None,
            itemsize=dtype.itemsize,
        )
        return cls(call.config, z, dtype, blocks, scheduler, wanted, batch, summed, scale_is_summed, most_staged)

    def staged(self, mods: Mods | None) -> list[tuple[Formula, int]]:
        """The vectors along rows that come with the query rows; the others are read from global memory, late."""
        if mods is None:
            return []
        return [x for x in mods.vectors(Kind.ROWS) if len(mods.array(*x).shape) <= _MOST_AXES][: self.most_staged]

    @property
    def block_keys(self) -> int:
        return self.blocks.warpgroups * self.blocks.block_kv

    @property
    def members(self) -> tuple[int, ...]:
        return (*self.summed, self.sizes.G)

    @property
    def tma(self) -> TmaLoad:
        """Of query and key."""
        return self._tma(self.sizes.H)

    @property
    def value_tma(self) -> TmaLoad:
        """Of value and dout."""
        return self._tma(self.sizes.D)

    def _tma(self, columns: int) -> TmaLoad:
        return TmaLoad(columns, self.dtype, swizzle_bytes(columns, self.dtype, self.blocks.block_q))

    @property
    def store(self) -> TmaStore:
        return TmaStore(self.sizes.S, self.sizes.K)

    @property
    def needs_dlogits(self) -> bool:
        return self.wanted.key is not None

    @property
    def loads_dout(self) -> bool:
        return self.needs_dlogits or not self.is_float32

    @property
    def transposed_tma(self) -> TmaLoad:
        """Of transposed query and dout."""
        return TmaLoad(self.blocks.block_q, self.dtype)

    @property
    def overlaps(self) -> bool:
        return self.needs_dlogits and _OVERLAPPED[0] < (self.sizes.H + self.sizes.D) / 2 <= _OVERLAPPED[1]

    def operands(self, call: Backward) -> BackwardOperands:
        z, block_q = self.sizes, self.blocks.block_q
        # Vectors of masks are read tile by tile: to a whole number of tiles.
        mask = call.inputs.mask
        moved = [] if mask.shift is None else [mask.shift, mask.key_value_length]
        reads_intervals = any(_differs_along(self.summed, x) for x in moved if x is not None)
        options = {"transposes_mask": True, "reads_intervals": reads_intervals, "reads_classes": True}
        forward = self.prepare(call, block_q, self.block_keys, **options)
        rows = call.row_operands(block_q, self.value_tma)
        is_computed = forward.intervals is None
        bits = next((x.array for x in forward.tiled if x is forward.mask), None)
        classes = None if forward.intervals is None else forward.intervals.tile_classes
        if classes is not None:
            tiles = query_tiles_of_classes(classes, self.summed)
        else:
            tiles = query_tiles(
                mask,
                z.T,
                z.S,
                block_q,
                self.block_keys,
                self.summed,
                is_computed=is_computed,
                visited=None if bits is None else visited(bits, self.block_keys),
            )
        turned = None
        if call.products is not None:
            query, dout = call.products.transposed.query, call.products.transposed.dout
            turned = TransposedOperands(
                query=None if self.wanted.key is None else query, dout=None if self.wanted.value is None else dout
            )
        return BackwardOperands(forward.without_tile_ranges(), rows, tiles, turned)

    def out_types(self) -> KeyGradients:
        z, wanted = self.sizes, jax.tree.leaves(self.wanted)
        # TMA leaves out what lies past the end, other stores do not.
        is_wide = any(x.dtype != self.dtype for x in wanted)
        padded_S = self.scheduler.blocks * self.block_keys if is_wide else self.store.length
        shape = *self.batch, padded_S, z.K
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, x.shape[-1]), x.dtype), self.wanted)

    def buffers(self, operands: Operands) -> KeyBuffers:
        blocks, tma, value_tma = self.blocks, self.tma, self.value_tma
        compute, stages = blocks.warpgroups, blocks.stages
        key_buffers = self.scheduler.buffers * compute
        keys_like = key_buffers, blocks.block_kv

        def with_gradient(tma: TmaLoad) -> Any:
            gradient = self.store.buffer(*keys_like, tma.columns, dtype=tma.dtype, swizzle=tma.swizzle)
            return plgpu.RefUnion(*tma.buffers(*keys_like), gradient)

        def transposed_rows(columns: int, wanted: Any) -> Any:
            return self.transposed_tma.buffer(stages, columns) if self.is_float32 and wanted is not None else None

        num_matrices = 1 + self.loads_dout + self.is_float32 * len(jax.tree.leaves(self.wanted))
        staged = [] if operands.mods is None else [operands.mods.array(*x) for x in self.staged(operands.mods)]
        num_arrivals = num_matrices + 2 + compute * len(operands.tiled) + len(staged)
        return KeyBuffers(
            key=with_gradient(tma),
            value=with_gradient(value_tma) if self.needs_dlogits or tma != value_tma else None,
            query=tma.buffer(stages, blocks.block_q),
            dout=value_tma.buffer(stages, blocks.block_q) if self.loads_dout else None,
            transposed_query=transposed_rows(tma.columns, self.wanted.key),
            transposed_dout=transposed_rows(value_tma.columns, self.wanted.value),
            lse=plgpu.SMEM((stages, blocks.block_q), jnp.float32),
            delta=plgpu.SMEM((stages, blocks.block_q), jnp.float32),
            terms=term_buffers(operands, (stages, compute), blocks.block_q, blocks.block_kv),
            keys_ready=plgpu.Barrier(num_barriers=key_buffers, num_arrivals=2 if self.needs_dlogits else 1),
            rows_ready=plgpu.Barrier(num_barriers=stages, num_arrivals=num_arrivals),
            keys_free=plgpu.Barrier(num_barriers=key_buffers),
            rows_free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
            mod_rows=tuple(plgpu.SMEM((stages, blocks.block_q), x.dtype) for x in staged),
        )


def group_parts(call: Backward, blocks: Blocks, wanted: KeyGradients, cores: int) -> int:
    """Into how many parts to divide groups of query heads, so that no multiprocessor idles for want of heads of keys.

    A block of keys takes as long as its group is large, and with a causal mask the longest twice the mean.
    """
    z = call.sizes
    heads = math.prod(jax.tree.leaves(wanted)[0].shape[:-3]) * z.K
    items = heads * -(-z.S // (blocks.warpgroups * blocks.block_kv))
    is_uneven = is_one_sided(call.config.band)

    def time(parts: int) -> float:
        """In those of a mean block of keys, with its whole group."""
        if is_uneven:
            return max(2 / parts, items / cores)
        return -(-items * parts // cores) / parts

    most = max(1, z.G * z.T // _LEAST_ROWS)
    times = {n: time(n) for n in range(1, min(z.G, most) + 1) if z.G % n == 0}
    return next(n for n, x in times.items() if x <= _ABOUT * min(times.values()))


def _differs_along(summed: tuple[int, ...], x: jax.Array) -> bool:
    """Whether an array (batch...) may have several values for what one block of keys sums over."""
    return any(n > 1 and m > 1 for n, m in zip(x.shape, summed, strict=True))
