"""The loop of one step over its tiles: first those that need no mask, two at a time, then the others.

The two tiles of a pair depend on each other only by what they add to. So while the vector units compute the weights of
one, the matrix units multiply for the other: the compiler sees both in one stretch without a branch.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

_PAIR = 2


def for_each_tile(
    ranges: tuple[Any, ...],
    start: Any,
    tiles: int,
    body: Callable[[Any, bool], None],
    *,
    has_full: bool,
    has_edges: bool,
) -> None:
    """`body(tile, is_edge)` for the tiles of a range that are among `tiles` from `start` on; in no special order."""
    end = start + tiles
    first, full_first, full_stop, stop = (jnp.clip(x, start, end) for x in ranges)
    if not has_edges:
        first, full_first, full_stop = full_first, first, stop
    paired = full_first
    if has_full and tiles >= _PAIR:
        pairs = lax.div(full_stop - full_first, _PAIR)
        paired = full_first + _PAIR * pairs

        def pair(i: Any, carry: None) -> None:
            for k in range(_PAIR):
                body(full_first + _PAIR * i + k, False)

        lax.fori_loop(0, pairs, pair, None)
    left = full_first - first if has_edges else 0

    def single(i: Any, carry: None) -> None:
        tile = jnp.where(i < left, first + i, paired + (i - left)) if has_edges else paired + i
        body(tile, has_edges)

    lax.fori_loop(0, left + stop - paired, single, None)
