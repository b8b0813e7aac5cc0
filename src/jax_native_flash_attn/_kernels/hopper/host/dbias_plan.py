"""What a call of the kernel for the gradient of bias takes: which block visits what, its results and shared memory.

A tile of the bias belongs to one block, which visits, in a fixed order, the tiles of scores onto which it broadcasts
(other batch rows, heads, rows of queries). Few tiles would leave processors idle, all of the time or in the last round:
then the visits are divided into `splits` of equal size, which XLA adds up, in order too. Many tiles of few visits would
be all beginnings and ends: then a block owns a `run` of tiles.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..blocks import Blocks, Chip
from ..operands import BackwardOperands, Operands, TermBuffers
from ..pallas import plgpu
from .backward import Backward
from .operands import term_buffers
from .plan import KernelPlan

_ENOUGH_BLOCKS = 2 * Chip().cores
_MOST_SPLITS = 16
_LONG_RUN = 32  # visits beside which the beginning and the end of a block do not matter


def visits_of_a_split(num_owned: int, num_visits: int) -> int:
    """Such that the rounds of blocks take the least time."""

    def duration(splits: int) -> int:
        """In visits: beginning and end of a block take about two, adding up a split one."""
        rounds = -(-num_owned * splits // Chip().cores)
        return rounds * (-(-num_visits // splits) + 2) + (splits + 2 if splits > 1 else 0)

    # Further splits are for bringing work to idle processors only: their sums take memory.
    most = max(1, min(num_visits, _MOST_SPLITS, 16 * Chip().cores // num_owned))
    return -(-num_visits // min(range(1, most + 1), key=duration))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DBiasBuffers:
    """Shared memory and barriers.

    Attributes:
      ready: completed by TMA: the data are there.
      free: completed by all compute warpgroups: the slot may be loaded again.
    """

    query: Any
    dout: Any
    key: Any
    value: Any
    lse: Any
    delta: Any
    terms: TermBuffers
    ready: Any
    free: Any


@dataclass(frozen=True)
class DBiasPlan(KernelPlan):
    """Of a bias (batch..., N or 1, T or 1, S).

    Attributes:
      wanted: type of the result; axes of size 1, but for the last, are summed over.
      owned: numbers of the blocks of rows of the bias, (batch..., N, row blocks), 1 where it broadcasts.
      visited: those that each of them visits.
      visits: of a split, but for the last one, which may have fewer.
      run: tiles along the keys that a block owns.
    """

    wanted: jax.ShapeDtypeStruct
    owned: tuple[int, ...]
    visited: tuple[int, ...]
    visits: int
    run: int

    @classmethod
    def make(cls, call: Backward, blocks: Blocks, wanted: jax.ShapeDtypeStruct) -> "DBiasPlan":
        z = call.sizes
        everything = (*z.batch, z.N, -(-z.T // blocks.rows))
        owned = tuple(1 if n == 1 else m for n, m in zip(wanted.shape[:-1], everything, strict=True))
        visited = tuple(m if n == 1 else 1 for n, m in zip(owned, everything, strict=True))
        key_blocks = -(-z.S // blocks.block_kv)
        num_owned = math.prod(owned) * key_blocks
        visits = visits_of_a_split(num_owned, math.prod(visited))
        run = max(1, min(key_blocks, _LONG_RUN // visits, num_owned // _ENOUGH_BLOCKS))
        return cls(call.config, z, call.inputs.query.dtype, blocks, wanted, owned, visited, visits, run)

    @property
    def key_blocks(self) -> int:
        return -(-self.sizes.S // self.blocks.block_kv)

    @property
    def num_visits(self) -> int:
        return math.prod(self.visited)

    @property
    def splits(self) -> int:
        return -(-self.num_visits // self.visits)

    @property
    def sums_rows(self) -> bool:
        """Whether XLA sums over the rows of the result."""
        return self.wanted.shape[-2] == 1

    @property
    def grid(self) -> dict[str, int]:
        *heads, rows = self.owned
        return {"split": self.splits, "own": math.prod(heads), "rows": rows, "run": -(-self.key_blocks // self.run)}

    def operands(self, call: Backward) -> BackwardOperands:
        forward = self.prepare(call, self.blocks.rows, self.blocks.block_kv, reads_classes=True)
        return BackwardOperands(forward, call.row_operands(self.blocks.rows, self.value_tma))

    def out_type(self) -> jax.ShapeDtypeStruct:
        """Of all splits; in float32 where XLA has something left to add up or to widen, else in the wanted dtype."""
        *heads, rows = self.owned
        is_float32 = self.splits > 1 or self.sums_rows or self.wanted.dtype == jnp.float64
        shape = (self.splits, *heads, rows * self.blocks.rows, self.key_blocks * self.blocks.block_kv)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if is_float32 else self.wanted.dtype)

    def buffers(self, operands: Operands) -> DBiasBuffers:
        blocks, stages, compute = self.blocks, self.blocks.stages, self.blocks.warpgroups
        rows_like, keys_like = (stages, compute, blocks.block_q), (stages, blocks.block_kv)
        vector = plgpu.SMEM((stages, compute, blocks.block_q), jnp.float32)
        num_arrivals = 2 + 4 * compute + len(operands.tiled)
        return DBiasBuffers(
            query=self.tma.buffer(*rows_like),
            dout=self.value_tma.buffer(*rows_like),
            key=self.tma.buffer(*keys_like),
            value=self.value_tma.buffer(*keys_like),
            lse=vector,
            delta=vector,
            terms=term_buffers(operands, (stages,), blocks.rows, blocks.block_kv),
            ready=plgpu.Barrier(num_barriers=stages, num_arrivals=num_arrivals),
            free=plgpu.Barrier(num_barriers=stages, num_arrivals=compute),
        )
