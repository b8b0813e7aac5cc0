"""Which block of threads computes what: the items of a forward call, their order, and their splits of the keys.

An item is one block of query rows of one head, against all of its key/value tiles or one split of them. There are as
many *workers* (blocks of threads that stay) as multiprocessors, and each takes every so-manieth item, so that the loads
of its next item run beside the end of the last. Round after round the order of the workers turns: where items get
shorter along the list, as with a causal mask, that balances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._semantics.masks import Band, ColumnRange
from .pallas import unravel

_BALANCED_ROUNDS = 8
_LEAST_EVEN = 0.85  # mean number of keys of an item over the largest
_CACHE_BYTES = 24e6  # of what blocks that run at once should share: half of Hopper's L2 cache


def is_outside(ranges: ColumnRange, tile: Any) -> Any:
    """Whether a tile is none of those that all rows attend in full."""
    return (tile < ranges.full_first) | (tile >= ranges.full_stop)


class Item(NamedTuple):
    """One item of a worker. Its tiles are visited last one first, or those with a mask before or behind the others.

    Attributes:
      count: tiles of the worker's items before; the ring of slots goes on from there.
      head: index (batch..., N).
      block, split: of the query rows, and of the keys.
      ranges: its tiles.
      is_empty: whether the split has no tiles; the one in `ranges` then counts for nothing.
      edges_first: whether the tiles that need a mask are visited first.
      has_tail: whether these, but for the first, are visited behind the others instead.
      tile_at: the tile at a place in `ranges`; None where that is its number.
    """

    count: Any
    head: tuple[Any, ...]
    block: Any
    split: Any
    ranges: ColumnRange
    is_empty: Any
    edges_first: bool = False
    has_tail: bool = False
    tile_at: Callable[[Any], Any] | None = None

    @property
    def num_tiles(self) -> Any:
        return self.ranges.stop - self.ranges.first

    @property
    def num_edges(self) -> Any:
        """How many tiles need a mask."""
        return self.num_tiles - (self.ranges.full_stop - self.ranges.full_first)

    @property
    def num_before_tail(self) -> Any:
        """How many tiles are visited before those of the tail: the first one, and those that need no mask."""
        return self.num_tiles - (jnp.maximum(self.num_edges, 1) - 1) if self.has_tail else self.num_tiles

    def tile(self, i: Any) -> Any:
        """The i-th one visited."""
        place = self.place(i)
        return place if self.tile_at is None else self.tile_at(place)

    def is_edge(self, i: Any) -> Any:
        """Whether that may need a mask."""
        return is_outside(self.ranges, self.place(i))

    def place(self, i: Any) -> Any:
        """In `ranges`."""
        first, full_first, full_stop, stop = self.ranges
        if self.has_tail:  # from the order without a tail: the first, those behind the edges, and these
            before, behind = self.num_before_tail, self.num_tiles - self.num_before_tail
            i = jnp.where(i == 0, i, jnp.where(i < before, i + behind, i - (before - 1)))
        if not self.edges_first:
            return stop - 1 - i
        # Behind the full ones, before them, and these.
        right, left = stop - full_stop, full_first - first
        end = jnp.where(i < right, stop, jnp.where(i < right + left, full_first + right, stop + left))
        return end - 1 - i


@dataclass(frozen=True)
class TileScheduler:
    """The items of a call.

    Attributes:
      heads: sizes of the batch axes and N.
      blocks: of query rows, the last one first, as it has the most tiles with a causal mask; but for `first_first`.
      splits: of each block's key/value tiles.
      group: heads that run side by side, a divisor of their number.
      workers: blocks of threads; one for each item if there are that many.
      batch_fastest: whether heads that differ in their batch row are neighbours: those share a bias.
      first_first: whether the first block has the most tiles, as with a band of keys behind each row alone.
    """

    heads: tuple[int, ...]
    blocks: int
    splits: int
    group: int
    workers: int
    batch_fastest: bool = False
    first_first: bool = False

    @property
    def items(self) -> int:
        return math.prod(self.heads) * self.blocks * self.splits

    @property
    def is_single(self) -> bool:
        return self.workers >= self.items

    @property
    def buffers(self) -> int:
        """For what a backward kernel keeps of an item; that of the next is loaded while this one's is in use."""
        return 1 if self.is_single else 2

    def buffer(self, k: Any, wg: Any, warpgroups: int) -> Any:
        """Which of `buffers * warpgroups` has what warpgroup wg keeps of the k-th item."""
        return wg if self.is_single else lax.rem(jnp.int32(k), jnp.int32(self.buffers)) * warpgroups + wg

    def item(self, n: Any) -> tuple[tuple[Any, ...], Any, Any]:
        """Head (batch..., N), block and split of item n."""
        num_heads = math.prod(self.heads)
        group, block, split, member = unravel(n, (num_heads // self.group, self.blocks, self.splits, self.group))
        head = group * self.group + member
        last, block = jnp.int32(self.blocks - 1), jnp.int32(self.blocks - 1) - block
        block = last - block if self.first_first else block  # a traced number in any case
        if self.batch_fastest:
            *batch, heads = self.heads
            index, *rows = unravel(head, (heads, *batch))
            return (*rows, index), block, split
        return unravel(head, self.heads), block, split

    def place(self, k: Any, worker: Any) -> Any:
        """Of a worker in round k."""
        return jnp.where(lax.rem(jnp.int32(k), jnp.int32(2)) == 0, worker, self.workers - 1 - worker)

    def for_each(self, worker: Any, body: Callable[[Any, Any, Any], Any]) -> None:
        """`count = body(k, n, count)` for the k-th item n of a worker; the counts add up what the items before had."""
        if self.is_single:
            body(jnp.int32(0), worker, jnp.int32(0))
            return
        rounds, rest = divmod(self.items, self.workers)

        def step(k: Any, count: Any) -> Any:
            return body(k, k * self.workers + self.place(k, worker), count)

        mine = rounds + (self.place(rounds, worker) < rest).astype(jnp.int32)
        lax.fori_loop(0, mine, step, jnp.int32(0))

    def for_each_item(
        self,
        worker: Any,
        ranges_of: Callable[[Any, Any], ColumnRange],
        body: Callable[[Any, Item], None],
        *,
        edges_first: bool = False,
        has_tail: bool = False,
        tile_at: Callable[[Any, Any], Callable[[Any], Any] | None] = lambda head, block: None,
    ) -> None:
        """`body(k, item)` for the k-th item of a worker; `ranges_of(head, block)` are tiles of all splits.

        `tile_at(head, block)` is that of the item.
        """

        def run(k: Any, n: Any, count: Any) -> Any:
            head, block, split = self.item(n)
            ranges, is_empty = split_of(ranges_of(head, block), split, self.splits)
            item = Item(count, head, block, split, ranges, is_empty, edges_first, has_tail, tile_at(head, block))
            body(k, item)
            return count + item.num_tiles

        self.for_each(worker, run)


def schedule(
    heads: tuple[int, ...],
    blocks: int,
    group: int,
    cores: int | None,
    band: Band,
    *,
    splits: int = 1,
    batch_fastest: bool = False,
) -> TileScheduler:
    """For so many multiprocessors; one worker for each item for None, and where the turns would not balance.

    With a causal `band`, blocks have more tiles the later they are; with one that ends below alone, the earlier. Each
    group of heads is then a list that starts long and ends short, and only a long list balances; the GPU gives new
    blocks to whichever multiprocessor is free.
    """
    items = math.prod(heads) * blocks * splits
    is_uneven = is_one_sided(band)
    if cores is None or (is_uneven and group * blocks * splits < _BALANCED_ROUNDS * cores):
        cores = items
    first_first = is_uneven and band.upper is None
    return TileScheduler(heads, blocks, splits, group, min(items, cores), batch_fastest, first_first)


def is_one_sided(band: Band) -> bool:
    """Whether blocks have more keys the later they are, or the earlier."""
    return (band.upper is None) != (band.lower is None)


def is_even_band(band: Band, T: int, S: int, rows: int) -> bool:
    """Whether blocks of so many rows have about as many keys each; of a causal mask `schedule` knows more."""
    if band.lower is None or band.upper is None:
        return True
    start, stop = band.intervals(T, S)
    first = np.arange(0, T, rows)
    keys = np.maximum(stop[np.minimum(first + rows, T) - 1] - start[first], 0)
    return keys.mean() >= _LEAST_EVEN * keys.max()


def heads_per_group(num_heads: int, bytes_per_head: float) -> int:
    """How many heads run side by side: as many as leave in the L2 cache what the blocks of a head share."""
    limit = max(1, int(_CACHE_BYTES / max(1.0, bytes_per_head)))
    group = max(d for d in range(1, min(num_heads, limit) + 1) if num_heads % d == 0)
    # The slowest axis of a grid has 16 bits.
    return group if num_heads // group < 1 << 16 else num_heads


def split_of(ranges: ColumnRange, split: Any, splits: int) -> tuple[ColumnRange, Any]:
    """The tiles of one split, at least one, and whether there are none for it (which that one stands in for)."""
    if splits == 1:
        return ranges, False
    tiles = ranges.stop - ranges.first
    first = ranges.first + lax.div(tiles * split, jnp.int32(splits))
    stop = ranges.first + lax.div(tiles * (split + 1), jnp.int32(splits))
    is_empty = stop == first
    stop = jnp.maximum(stop, first + 1)
    full_first = jnp.minimum(jnp.maximum(ranges.full_first, first), stop)
    full_stop = jnp.minimum(jnp.maximum(ranges.full_stop, full_first), stop)
    return ColumnRange(first, full_first, full_stop, stop), is_empty
