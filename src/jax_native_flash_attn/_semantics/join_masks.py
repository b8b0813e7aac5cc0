"""All masks of a call as one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .masks import Band, MaskOperands, make_band
from .positions import Order, cut, moving_band, of_keys, of_rows, position_bounds, reach_of
from .tile_masks import MaskMod, and_masks, find_tiles
from .visible import Visible, find_visible, rows_with_a_key

_NO_BAND, _NO_ORDER = Band(), Order()


def make_mask(
    T: int,
    S: int,
    *,
    is_causal: bool,
    static_window: tuple[int, int] | None,
    traced_window: jax.Array | None,
    query_lengths: jax.Array | None,
    key_value_lengths: jax.Array | None,
    allowed: jax.Array | None,
    static_band: Band = _NO_BAND,
    static_offset: int = 0,
    order: Order = _NO_ORDER,
    find_visible: Callable[..., Visible] = find_visible,
    has_dead_rows: bool = True,
    within: tuple[jax.Array, jax.Array] | None = None,
    mask_mod: MaskMod | None = None,
) -> tuple[Band, MaskOperands]:
    """Intersect all masks of a call into one static band and the operands it cannot express.

    Args:
      static_band: what `hide_constant_mask` made of the mask.
      static_offset: added to the index of a row for its position.
      find_visible: see the function of this name.
      has_dead_rows: whether rows without a key attend all; otherwise they attend none, as padded ones.
      within: the interval of keys of each row, start and stop, (B, N, T), that another mask leaves.
      mask_mod: a function of indices.
    """
    reach = reach_of(is_causal=is_causal, static_window=static_window, traced_window=traced_window)
    if reach.left is None and reach.right is None and not order.has_positions:
        order = order._replace(query_offset=None)
    moves = order.has_positions or order.query_offset is not None
    is_static = traced_window is None and not moves and within is None
    window = None if moves else static_window
    band = make_band(
        T, S, is_causal=is_causal and not moves, window=window, also=static_band, offset=0 if moves else static_offset
    )
    start, stop = band.intervals(T, S)
    is_row = is_query_row(T, query_lengths, order.query_ids)
    padded = None if is_row is None else ~is_row[:, None, :]
    traced = (
        padded is not None
        or key_value_lengths is not None
        or not is_static
        or order.query_ids is not None
        or bool((stop <= start).any())  # the static form has no dead rows
    )
    if not traced and allowed is None and mask_mod is None:
        return band, MaskOperands()

    moving, shift = None, order.query_offset
    has_elements = allowed is not None or mask_mod is not None
    is_plain = padded is None and not has_elements and static_band == Band() and not order.has_positions
    if is_plain and shift is not None:
        moving = moving_band(reach)
    has_others = padded is not None or has_elements or not is_static or band.lower is not None
    is_cut = key_value_lengths is not None and not has_others and has_dead_rows and bool((stop > 0).all())
    start, stop = (jnp.asarray(x)[None, None, :] for x in (start, stop))
    operands = MaskOperands(allowed=allowed, key_value_length=key_value_lengths)
    if order.has_positions:
        operands = operands._replace(**position_bounds(T, S, order, reach, static_offset))
    elif not is_static and within is None:
        rows = jnp.arange(T, dtype=jnp.int32)[None, None, :]
        start, stop = cut(start, stop, rows, reach, order.query_offset, static_offset, T, S)
    if within is not None:
        start, stop = jnp.maximum(start, within[0]), jnp.minimum(stop, within[1])
    if key_value_lengths is not None:
        stop = jnp.minimum(stop, key_value_lengths[:, None, None])
    if order.query_ids is not None and order.key_ids is not None:
        operands = operands._replace(query_ids=of_rows(order.query_ids), key_ids=of_keys(order.key_ids))
    if operands.key_ids is not None or operands.key_positions is not None:
        in_length = is_query_row(T, query_lengths, None)
        is_known = (order.has_positions or is_static) and within is None and key_value_lengths is None
        found = find_visible(
            operands if is_known else operands._replace(key_start=start, key_stop=stop),
            T,
            S,
            None if in_length is None else ~in_length[:, None, :],
            None if has_elements or within is not None else has_dead_rows,
            band if is_known else None,
        )
        start, stop, has_key = found[:3]
        names = "is_exact", "row_start", "row_stop", "row_bounds"
        operands = operands._replace(**{name: getattr(found, name) for name in names})
    elif allowed is None or mask_mod is not None:
        has_key = start < stop
    else:
        is_banded = band != Band() or not is_static or key_value_lengths is not None
        has_key = rows_with_a_key(start, stop, allowed, is_banded=is_banded)
    if mask_mod is not None:
        is_alone = not traced and allowed is None and band == Band()
        first, end = (start, stop) if padded is None else (jnp.where(padded, S, start), jnp.where(padded, 0, stop))
        known = operands._replace(key_start=first, key_stop=end)
        if is_alone:
            tiles = mask_mod.tiles(T, S)
        else:
            tiles = find_tiles(and_masks(mask_mod.elements, known), T, S, mask_mod.block)
        operands, has_key = operands._replace(tile_classes=tiles.classes), tiles.has_key
    dead = ~has_key
    if not has_dead_rows:
        padded = dead if padded is None else dead | padded
    if padded is not None:
        dead &= ~padded
        start, stop = jnp.where(padded, S, start), jnp.where(padded, 0, stop)
    if has_dead_rows:
        start, stop = jnp.where(dead, 0, start), jnp.where(dead, S, stop)
    dead = dead if has_dead_rows else None
    operands = operands._replace(key_start=start, key_stop=stop, dead=dead)
    if moving is not None:
        return moving, operands._replace(shift=shift)
    return Band(band.lower, band.upper, is_cut), operands


def is_query_row(T: int, query_lengths: jax.Array | None, query_ids: jax.Array | None) -> jax.Array | None:
    """Which rows (B, T) are not padding; None: all."""
    terms = []
    if query_lengths is not None:
        terms.append(jnp.arange(T, dtype=jnp.int32)[None, :] < query_lengths[:, None])
    terms += [] if query_ids is None else [query_ids >= 0]
    return functools.reduce(jnp.logical_and, terms) if terms else None
