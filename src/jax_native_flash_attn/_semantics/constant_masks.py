"""Masks that are constants of a program."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .masks import Band


def hide_constant_mask(mask: np.ndarray, T: int, S: int) -> tuple[jax.Array | None, Band]:
    """A mask that is a constant of a program, (B or 1, N or 1, T or 1, S or 1): as an array or, if it is one, a band.

    XLA's constant folder would run the reductions that find what the array leaves empty, in seconds or minutes.
    """
    band = _as_band(mask, T, S)
    return (hidden(jnp.asarray(mask)), Band()) if band is None else (None, band)


def hidden(x: jax.Array) -> jax.Array:
    """A constant that XLA computes nothing from while it compiles."""
    return lax.optimization_barrier(x)


def _as_band(mask: np.ndarray, T: int, S: int) -> Band | None:
    """The band that this mask is, in all batch rows and heads; None if it is none."""
    if mask.size == 0 or T == 0 or S == 0:
        return None
    rows, position = mask[0, 0], np.arange(T)
    if not all(np.array_equal(mask[i], rows) for i in np.ndindex(mask.shape[:2])):
        return None
    rows = np.broadcast_to(rows, (rows.shape[0], S))
    count = np.count_nonzero(rows, axis=1)
    first, end = rows.argmax(1), S - rows[:, ::-1].argmax(1)
    if not ((count == end - first) | (count == 0)).all():
        return None
    is_live, first, end = (np.broadcast_to(x, T) for x in (count > 0, first, end))
    if not is_live.any():
        return Band(S, None)
    # A bound shows where it cuts a row that is left, else where it leaves no row.
    starts, ends = is_live & (first > 0), is_live & (end < S)
    one_row, other_row = is_live.argmax(), T - is_live[::-1].argmax()  # the first row with a key; behind the last
    lower = first[starts][0] - position[starts][0] if starts.any() else S - other_row if other_row < T else None
    upper = end[ends][0] - position[ends][0] - 1 if ends.any() else -one_row if one_row > 0 else None
    lower, upper = (None if x is None else int(x) for x in (lower, upper))
    band = Band(lower, upper)
    start, stop = band.intervals(T, S)
    is_same = np.where(is_live, (start == first) & (stop == end), stop <= start)
    return band if is_same.all() else None
