"""Who computes what on a Hopper GPU: each item has one worker, and the splits of an item's tiles are all of them."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._semantics.masks import Band, ColumnRange
from tests.support.grids import in_part
from tests.support.targets import needs_backend, why_no_backend

if why_no_backend() is None:
    from jax_native_flash_attn._kernels.hopper.scheduler import Item, TileScheduler, schedule, split_of

pytestmark = [needs_backend, in_part(0)]


@pytest.mark.parametrize(("items", "workers", "splits"), [(1, 1, 1), (300, 132, 1), (264, 132, 2), (7, 132, 3)])
def test_every_item_has_one_worker(items: int, workers: int, splits: int) -> None:
    work = TileScheduler((items,), 1, splits, 1, min(workers, items * splits))
    rounds, rest = divmod(work.items, work.workers)
    taken = []
    for worker in range(work.workers):
        seen: list[int] = []
        mine = rounds + int(work.place(rounds, worker) < rest)
        seen += [k * work.workers + int(work.place(k, worker)) for k in range(mine)]
        taken += seen
    assert sorted(taken) == list(range(work.items))


def as_ints(x: Any) -> Any:
    return jax.tree.map(int, x)


@pytest.mark.parametrize("batch_fastest", [False, True])
@pytest.mark.parametrize(
    ("heads", "blocks", "splits", "group"), [((2, 3), 2, 1, 3), ((6,), 1, 2, 2), ((2, 1, 2), 3, 2, 4)]
)
def test_items_are_every_head_block_and_split_once(
    heads: tuple[int, ...], blocks: int, splits: int, group: int, batch_fastest: bool
) -> None:
    work = TileScheduler(heads, blocks, splits, group, 5, batch_fastest)
    found = [as_ints(work.item(jnp.int32(n))) for n in range(work.items)]
    everything = itertools.product(itertools.product(*map(range, heads)), range(blocks), range(splits))
    assert sorted(found) == sorted(everything)
    # Heads of a group are neighbours, and blocks begin with the last.
    assert {block for _, block, _ in found[:group]} == {blocks - 1}
    assert len({head for head, _, _ in found[: group * blocks * splits]}) == group


@pytest.mark.parametrize(("blocks", "splits", "workers"), [(3, 1, 4), (2, 2, 5), (2, 1, 12), (1, 3, 7)])
def test_workers_visit_each_tile_of_each_item_once(blocks: int, splits: int, workers: int) -> None:
    """With another range of tiles for each head and block, and counts that go on from item to item."""
    rng = np.random.default_rng(0)
    heads = (2, 3)
    work = TileScheduler(heads, blocks, splits, 3, min(workers, 6 * blocks * splits))
    bounds = np.sort(rng.integers(0, 8, (*heads, blocks, 4)), axis=-1)
    bounds[..., 3] = np.maximum(bounds[..., 3], bounds[..., 0] + 1)  # every block has a tile
    visited: list[tuple[Any, ...]] = []
    edges: set[tuple[Any, ...]] = set()

    def ranges_of(head: Any, block: Any) -> ColumnRange:
        return ColumnRange(*map(jnp.int32, bounds[as_ints((*head, block))]))

    with jax.disable_jit():
        for worker in range(work.workers):
            count = 0

            def body(k: Any, item: Any) -> None:
                nonlocal count
                assert int(item.count) == count
                count += int(item.num_tiles)
                tiles = [int(item.tile(i)) for i in range(int(item.num_tiles))]
                assert len(tiles) >= 1
                if not item.is_empty:
                    here = as_ints((*item.head, item.block))
                    visited.extend((*here, tile) for tile in tiles)
                    full = range(int(item.ranges.full_first), int(item.ranges.full_stop))
                    edges.update((*here, tile) for tile in tiles if tile not in full)

            work.for_each_item(jnp.int32(worker), ranges_of, body)

    expected, expected_edges = [], set()
    for index in np.ndindex(*heads, blocks):
        first, full_first, full_stop, stop = bounds[index]
        expected += [(*index, tile) for tile in range(first, stop)]
        expected_edges |= {(*index, tile) for tile in range(first, stop) if not full_first <= tile < full_stop}
    assert sorted(visited) == sorted(expected)
    assert edges == expected_edges


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_of_a_range_are_all_of_it(splits: int) -> None:
    rng = np.random.default_rng(splits)
    for _ in range(20):
        first, full_first, full_stop, stop = (int(x) for x in np.sort(rng.integers(0, 12, 4)))
        whole = ColumnRange(*map(jnp.int32, (first, full_first, full_stop, stop)))
        found: list[tuple[int, bool]] = []
        for split in range(splits):
            ranges, is_empty = split_of(whole, jnp.int32(split), splits)
            a, full_a, full_b, b = as_ints(ranges)
            assert a <= full_a <= full_b <= b
            if not is_empty:
                found += [(tile, full_a <= tile < full_b) for tile in range(a, b)]
        assert found == [(tile, full_first <= tile < full_stop) for tile in range(first, stop)]


@pytest.mark.parametrize("band", [Band(), Band(None, 0), Band(-5, 0)])
@pytest.mark.parametrize("cores", [None, 1, 16, 132])
@pytest.mark.parametrize(("blocks", "group", "splits"), [(1, 1, 1), (40, 4, 1), (8, 32, 1), (3, 2, 4)])
def test_plans(blocks: int, group: int, splits: int, cores: int | None, band: Band) -> None:
    work = schedule((2, 32), blocks, group, cores, band, splits=splits)
    assert work.items == 64 * blocks * splits
    assert work.workers <= work.items
    if work.workers == work.items:
        assert work.is_single
        return
    assert work.workers == cores
    assert not work.is_single
    is_causal = band == Band(None, 0)
    durations = np.array([block + 1 if is_causal else 1 for block in reversed(range(blocks))])
    items = np.tile(np.repeat(durations, splits * group), 64 // group)
    loads = np.zeros(work.workers)
    for n, duration in enumerate(items):
        k, place = divmod(n, work.workers)
        loads[place if k % 2 == 0 else work.workers - 1 - place] += duration
    # Taking turns balances: a list that gets shorter is cut into workers only where it does so for all.
    assert loads.max() <= (1.05 * loads.mean() if is_causal else loads.min() + 1)


@pytest.mark.parametrize(
    ("owned", "visits"), [(144, 256), (288, 256), (48, 384), (1, 10), (1, 1000), (5000, 3), (7, 1)]
)
def test_splits_of_the_gradient_of_bias_keep_multiprocessors_busy(owned: int, visits: int) -> None:
    from jax_native_flash_attn._kernels.hopper.blocks import Chip
    from jax_native_flash_attn._kernels.hopper.host.dbias_plan import visits_of_a_split

    split = visits_of_a_split(owned, visits)
    splits = -(-visits // split)
    assert splits * owned <= 16 * Chip().cores or splits == 1
    rounds = -(-owned * splits // Chip().cores)
    ideal = max(1, owned * visits / Chip().cores)
    if owned * visits >= 32 * Chip().cores:  # else beginnings and ends decide
        assert rounds * split <= 1.25 * ideal, (rounds, split)


@pytest.mark.parametrize("ranges", [(2, 4, 7, 8), (0, 0, 5, 7), (3, 6, 6, 6), (1, 1, 1, 4), (0, 0, 3, 3)])
def test_each_tile_is_visited_once_and_edges_before_others(ranges: tuple[int, int, int, int]) -> None:
    item = Item(0, (0,), 0, 0, ColumnRange(*ranges), False, edges_first=True)
    first, full_first, full_stop, stop = ranges
    edges = [*range(stop - 1, full_stop - 1, -1), *range(full_first - 1, first - 1, -1)]
    visited = [int(item.tile(i)) for i in range(item.num_tiles)]
    assert item.num_edges == len(edges)
    full = [*range(full_stop - 1, full_first - 1, -1)]
    assert visited == [*edges, *full]
    downwards = item._replace(edges_first=False)
    assert [int(downwards.tile(i)) for i in range(stop - first)] == [*range(first, stop)][::-1]
    item = item._replace(has_tail=True)
    before = int(item.num_before_tail)
    visited = [int(item.tile(i)) for i in range(item.num_tiles)]
    assert visited[:before] == ([edges[0], *full] if edges else full)
    assert visited[before:] == edges[1:]
    if full_first == first:  # edges come first downwards, too
        assert [int(downwards._replace(has_tail=True).tile(i)) for i in range(item.num_tiles)] == visited


@pytest.mark.parametrize("band", [Band(None, 0), Band(None, -300), Band(0, None), Band(-300, None)])
def test_the_longest_items_come_first(band: Band) -> None:
    """Of a group of heads; else the last items would leave most multiprocessors idle."""
    rows, T = 128, 1024
    work = schedule((4,), T // rows, 2, None, band)
    start, stop = band.intervals(T, T)
    keys = np.maximum(stop - start, 0).reshape(-1, rows).sum(1)
    blocks = [int(work.item(jnp.int32(n))[1]) for n in range(work.items // 2)]
    lengths = keys[blocks]
    assert (np.diff(lengths) <= 0).all()
    assert lengths[0] > lengths[-1]
