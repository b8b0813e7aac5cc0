"""Who computes which blocks of keys when, and in which order they add to the gradient of query: the fused backward.

Blocks of keys that run at once each add to the gradient of all query tiles. Sums that are the same in every run need an
order of these additions, and a block that waits for its turn idles. So the blocks are made to *come* in order, by
shifts as those of Qiang et al. (2026, arXiv:2601.21824). Time is counted in steps, one query tile each:

- Without a mask, the m blocks of a head that run at once begin m-ths of the tiles apart, and go round. A block then
  comes to a tile at least a step behind the block before it.
- With a causal mask, block b meets the tiles from 2 b on. A worker takes a long block *up*, from the first tile to the
  last, then a short one *down*, from the last tile to the first, so that both together are as long for every worker.
  Going up, block b is at tile q at time q - 2 b: two steps behind block b + 1. Going down, all end at once, and block b
  is two steps behind block b - 1. All blocks of a head run at once.

The order of additions to a tile is that of these times. A worker comes to its tiles at rising times, so nobody waits
for a later one: there is no deadlock, if all workers run at once. With a causal mask each waits for workers of lower
numbers alone, which a GPU starts first: then they need not.

*In launch order* no call needs that, and heads may have any number of blocks: a worker takes one block, and waits for
workers of lower numbers alone. Without a mask all begin at the first tile, each behind the block before it: in the
first round they wait for that, and later ones follow from it, if the first one of a head does not end before the last
has begun. With a causal mask all go up, and short blocks come first. Long blocks so come last, and some multiprocessors
idle then.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

BLOCK_KEYS, BLOCK_ROWS = 128, 64
_RATIO = BLOCK_KEYS // BLOCK_ROWS  # tiles of rows across a block of keys
_LEAST_BUSY = 0.9  # of the workers, over the whole call


class Work(NamedTuple):
    """One block of keys of one worker.

    Attributes:
      head: of keys, over all batch rows.
      block: of keys.
      first: the query tile that it begins with; it goes round, if there is no mask.
      step: 1 up, -1 down.
      tiles: how many it visits of one query head.
      round: of the worker's blocks.
    """

    head: Any
    block: Any
    first: Any
    step: Any
    tiles: Any
    round: Any


@dataclass(frozen=True)
class AdditionOrder:
    """For `heads` of keys, each with `blocks` of keys, and `tiles` of rows in each of its `group` query heads.

    A group may have been divided into parts: each then counts as a head of keys.

    `workers` are multiprocessors that all run at once, or, in launch order, all blocks.
    """

    heads: int
    blocks: int
    tiles: int
    group: int
    is_causal: bool
    workers: int
    in_launch_order: bool = False

    @classmethod
    def make(
        cls, heads: int, blocks: int, tiles: int, group: int, cores: int, *, is_causal: bool
    ) -> "AdditionOrder | None":
        """For so many multiprocessors that all run at once; None where too many of them would idle."""
        workers = min(cores, heads * blocks)
        if is_causal:
            workers = blocks * min(cores // blocks, heads)
        if workers == 0:
            return None
        order = cls(heads, blocks, tiles, group, is_causal, workers)
        # Of a causal mask, two rounds take as long as the shortest and the longest block: as two of mean length.
        rounds = order.rounds + (order.rounds % 2 if is_causal else 0)
        return order if heads * blocks >= _LEAST_BUSY * cores * rounds else None

    @classmethod
    def make_in_launch_order(
        cls, heads: int, blocks: int, tiles: int, group: int, cores: int, *, is_causal: bool
    ) -> "AdditionOrder | None":
        """None where too many of so many multiprocessors would idle."""
        if is_causal:  # the last ones have the most tiles, and half of the multiprocessors may wait for them
            steps = heads * blocks * (tiles - (blocks - 1) * _RATIO / 2)
            idle = cores * tiles / 2
        elif 2 * tiles * group <= min(blocks, cores):  # half a step apart, they would wait in every round
            return None
        else:  # the first ones of a head begin up to a step apart
            steps = heads * blocks * tiles
            idle = cores * (-(-heads * blocks // cores) * tiles + blocks / group) - steps
        is_busy = steps >= _LEAST_BUSY * (steps + idle)
        return cls(heads, blocks, tiles, group, is_causal, heads * blocks, in_launch_order=True) if is_busy else None

    @property
    def rounds(self) -> int:
        """The most blocks that a worker takes."""
        return -(-self.heads * self.blocks // self.workers)

    @property
    def needs_all_at_once(self) -> bool:
        """Whether a worker may wait for one of a higher number."""
        return not (self.in_launch_order or self.is_causal)

    def rounds_of(self, worker: Any) -> Any:
        full, rest = divmod(self.heads * self.blocks, self.workers)
        return full + (worker < rest).astype(jnp.int32)

    def work(self, k: Any, worker: Any) -> Work:
        """The k-th block of a worker."""
        n = k * self.workers + worker
        if not self.is_causal:
            head = _div(n, self.blocks)
            block = n - head * self.blocks
            if self.in_launch_order:
                return Work(head, block, jnp.int32(0), jnp.int32(1), jnp.int32(self.tiles), k)
            start, count = self._running(head, k)
            first = lax.div((block - start) * self.tiles, count)
            return Work(head, block, first, jnp.int32(1), jnp.int32(self.tiles), k)
        is_down, head = lax.rem(k, jnp.int32(2)) == 1, _div(n, self.blocks)
        place = n - head * self.blocks
        block = jnp.where(is_down, place, self.blocks - 1 - place)
        first = jnp.where(is_down, self.tiles - 1, _RATIO * block)
        return Work(head, block, first, jnp.where(is_down, -1, 1), self.tiles - _RATIO * block, k)

    def following(self, work: Work, tile: Any) -> Any:
        """The query tile behind another; behind the last one of a query head, the first one of the next."""
        if not self.is_causal:
            return jnp.where(tile + 1 >= self.tiles, 0, tile + 1)
        is_last = tile == jnp.where(work.step > 0, self.tiles - 1, _RATIO * work.block)
        return jnp.where(is_last, work.first, tile + work.step)

    def rank(self, work: Work, tile: Any) -> Any:
        """How many blocks add to a tile of any query head before this one does."""
        if not self.is_causal and self.in_launch_order:
            return work.block
        if not self.is_causal:
            start, count = self._running(work.head, work.round)
            last = lax.div((tile + 1) * count - 1, jnp.int32(self.tiles)) - (work.block - start)
            return start + jnp.where(last < 0, last + count, last)
        blocks = jnp.minimum(_div(tile, _RATIO) + 1, self.blocks)  # that add to the tile
        return jnp.where(work.step > 0, blocks - 1 - work.block, work.block)

    def _running(self, head: Any, k: Any) -> tuple[Any, Any]:
        """The first of the blocks of a head that run in round k, and how many do."""
        before = k * self.workers - head * self.blocks
        start = jnp.maximum(before, 0)
        return start, jnp.minimum(before + self.workers, self.blocks) - start


def _div(a: Any, b: Any) -> Any:
    return lax.div(a, jnp.int32(b))
