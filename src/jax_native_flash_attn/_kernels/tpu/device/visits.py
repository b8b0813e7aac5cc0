"""The loop of one step over its tiles: first those that need no mask, several at a time, then the others.

Tiles that stand side by side depend on each other only by what they add to. So while the vector units compute the
weights of one, the matrix units multiply for the next: the compiler sees all in one stretch without a branch.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax


def for_each_tile(
    ranges: tuple[Any, ...],
    start: Any,
    tiles: int,
    unrolled: int,
    body: Callable[[Any, bool], None],
    *,
    has_full: bool,
    has_edges: bool,
    is_whole: bool,
) -> None:
    """`body(tile, is_edge)` for the tiles of a range that are among `tiles` from `start` on; in no special order.

    Args:
      ranges: as of `Grid.range_of`.
      start, tiles: of this step.
      unrolled: how many that need no mask stand side by side; half as many if not all of `tiles` are sure to be full.
      body: see above.
      has_full, has_edges: whether there are tiles that need no mask, and tiles that do.
      is_whole: whether all of `tiles` are full.
    """

    def several(first: Any, count: int) -> Callable[[Any, None], None]:
        def run(i: Any, carry: None) -> None:
            for k in range(count):
                body(first + count * i + k, False)

        return run

    if is_whole and tiles % unrolled == 0:
        lax.fori_loop(0, tiles // unrolled, several(start, unrolled), None)
        return
    count = -(-unrolled // 2)
    end = start + tiles
    first, full_first, full_stop, stop = (jnp.clip(x, start, end) for x in ranges)
    if not has_edges:
        first, full_first, full_stop = full_first, first, stop
    single_first = full_first
    if has_full and tiles >= count:
        rounds = lax.div(full_stop - full_first, count)
        single_first = full_first + count * rounds
        lax.fori_loop(0, rounds, several(full_first, count), None)
    left = full_first - first if has_edges else 0

    def single(i: Any, carry: None) -> None:
        tile = jnp.where(i < left, first + i, single_first + (i - left)) if has_edges else single_first + i
        body(tile, has_edges)

    lax.fori_loop(0, left + stop - single_first, single, None)
