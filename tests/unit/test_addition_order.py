"""The order in which blocks of keys add to the gradient of query, against a simulation of all workers."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_native_flash_attn._kernels.hopper.addition_order import AdditionOrder

_FULL = [(2, 4, 8, 1, 132), (5, 3, 5, 1, 7), (3, 7, 13, 2, 9), (4, 1, 1, 3, 3), (2, 6, 2, 1, 12)]
_CAUSAL = [(6, 4, 8, 1, 8), (4, 4, 7, 1, 4), (3, 5, 9, 3, 5), (8, 2, 4, 4, 8)]
# In launch order, without multiprocessors.
_FULL += [(2, 4, 8, 1), (3, 7, 5, 2)]
_CAUSAL += [(2, 8, 16, 1), (2, 5, 9, 3)]


def _sequences(order: AdditionOrder) -> list[list[tuple]]:
    """Of each worker, the additions (head, member, tile, block, rank) in the order in which it comes to them."""
    result = []
    work_of, rank_of, following = jax.jit(order.work), jax.jit(order.rank), jax.jit(order.following)
    for worker in range(order.workers):
        mine = []
        for k in range(int(order.rounds_of(jnp.int32(worker)))):
            work = work_of(k, worker)
            tile = work.first
            for i in range(order.group * int(work.tiles)):
                member = i // int(work.tiles)
                rank = rank_of(work, tile)
                mine.append(tuple(int(x) for x in (work.head, member, tile, work.block, rank)))
                tile = following(work, tile)
        result.append(mine)
    return result


def _order(case: tuple, *, is_causal: bool) -> AdditionOrder:
    heads, blocks, tiles, group, *cores = case
    if not cores:
        return AdditionOrder(heads, blocks, tiles, group, is_causal, heads * blocks, in_launch_order=True)
    (cores,) = cores
    order = AdditionOrder.make(heads, blocks, tiles, group, cores, is_causal=is_causal)
    if order is None:  # where workers would idle, it is right all the same
        order = AdditionOrder(heads, blocks, tiles, group, is_causal, min(cores, heads * blocks))
    return order


@pytest.mark.parametrize(("is_causal", "case"), [*((False, x) for x in _FULL), *((True, x) for x in _CAUSAL)], ids=str)
def test_additions(is_causal, case):
    """Each block adds once to each tile that it meets; ranks are an order; nobody waits for ever, or for long."""
    order = _order(case, is_causal=is_causal)
    sequences = _sequences(order)
    ranks = collections.defaultdict(list)
    for head, member, tile, block, rank in (x for each in sequences for x in each):
        assert not is_causal or tile >= 2 * block
        ranks[head, member, tile].append((rank, block))
    assert len(ranks) == order.heads * order.group * order.tiles
    for (_, _, tile), found in ranks.items():
        blocks = [b for b in range(order.blocks) if not is_causal or tile >= 2 * b]
        assert sorted(r for r, _ in found) == list(range(len(blocks)))
        assert sorted(b for _, b in found) == blocks

    assert not (order.in_launch_order and order.needs_all_at_once)
    if not order.needs_all_at_once:
        turns = collections.defaultdict(dict)
        for worker, each in enumerate(sequences):
            for *tile, _, rank in each:
                turns[tuple(tile)][rank] = worker
        assert all(list(np.diff([x[r] for r in sorted(x)]) > 0) == [True] * (len(x) - 1) for x in turns.values())

    # One addition of each worker in a step, if it is its turn at the beginning of the step.
    done, places, steps = collections.Counter(), [0] * order.workers, 0
    while any(place < len(each) for place, each in zip(places, sequences, strict=True)):
        now = [
            w
            for w, (at, each) in enumerate(zip(places, sequences, strict=True))
            if at < len(each) and done[each[at][:3]] == each[at][4]
        ]
        assert now, "all wait"
        for w in now:
            done[sequences[w][places[w]][:3]] += 1
            places[w] += 1
        steps += 1
    # Less than two steps for each other block: those that all begin at one tile would take tens of times as long.
    longest = max(map(len, sequences))
    assert steps <= longest + 2 * order.blocks


@pytest.mark.parametrize(
    ("heads", "blocks", "group", "is_causal", "workers"),
    [
        (32, 64, 1, False, 132),
        (48, 36, 1, False, 132),
        (32, 64, 1, True, 128),
        (8, 64, 8, True, 128),
        (16, 256, 1, True, None),  # more blocks than run at once
        (48, 36, 1, True, None),  # 108 of 132
        (1, 64, 1, False, None),
    ],
)
def test_workers(heads, blocks, group, is_causal, workers):
    order = AdditionOrder.make(heads, blocks, 2 * blocks, group, 132, is_causal=is_causal)
    assert (None if order is None else order.workers) == workers


@pytest.mark.parametrize(
    ("heads", "blocks", "tiles", "group", "is_causal", "is_made"),
    [
        (16, 128, 256, 1, False, True),
        (16, 256, 512, 1, True, True),
        (16, 128, 128, 1, False, True),  # fewer rows than keys
        (48, 128, 32, 1, False, False),  # so few that the first block of a head ends before the last begins
        (33, 128, 32, 4, False, True),
        (48, 36, 72, 1, False, True),
        (48, 36, 72, 1, True, True),
        (1, 64, 128, 1, False, False),
        (4, 33, 66, 1, False, False),  # one round, and half of another until its last block begins
        (4, 64, 128, 8, False, True),
        (1, 64, 128, 8, True, False),
    ],
)
def test_in_launch_order(heads, blocks, tiles, group, is_causal, is_made):
    order = AdditionOrder.make_in_launch_order(heads, blocks, tiles, group, 132, is_causal=is_causal)
    assert (order is not None) == is_made
    assert order is None or order.workers == heads * blocks
