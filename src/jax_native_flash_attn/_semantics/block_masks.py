"""All masks of a call whose keys are in several blocks, as one for each block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .join_masks import is_query_row, make_mask
from .masks import Band, MaskOperands, make_band
from .positions import Order, Reach, of_keys, of_rows, position_bounds, saturated_sum
from .visible import Visible


def make_block_masks(
    T: int,
    S: int,
    size: int,
    rank: jax.Array,
    *,
    is_causal: bool,
    static_window: tuple[int, int] | None,
    traced_window: jax.Array | None,
    query_lengths: jax.Array | None,
    key_value_lengths: jax.Array | None,
    allowed: jax.Array | None,
    static_offset: int,
    order: Order,
    find_visible: Callable[[MaskOperands, int, int], Visible],
    has_dead_rows: bool,
) -> tuple[Band, MaskOperands]:
    """As `make_mask`, of `size` blocks of S keys, and the T rows that are behind those of `rank` blocks of rows.

    Args:
      query_lengths: of these rows alone.
      allowed, order: of the keys of all blocks.

    Returns:
      The band of the block of the same number, if that is all there is; and the operands of all blocks, as
      `Config.ring` says.
    """
    is_moved = order.query_offset is not None or static_offset != 0
    others = (traced_window, query_lengths, key_value_lengths, allowed, order.query_ids)
    has_others = any(x is not None for x in others) or order.has_positions or is_moved
    if not has_others and not is_causal and static_window is None:
        return Band(), MaskOperands()
    band = Band()
    if not has_others and T == S:
        band = make_band(T, S, is_causal=is_causal, window=static_window, also=Band())
        start, stop = band.intervals(T, S)
        band = Band() if (stop <= start).any() else band
    first_row = rank * T
    if order.has_positions:
        order = _with_positions(order, T, S * size, first_row, static_offset)

    def of_block(block: jax.Array) -> tuple[jax.Array | None, ...]:
        def keys(x: jax.Array | None) -> jax.Array | None:
            if x is None or x.shape[-1] == 1 < S * size:
                return x
            return jax.lax.dynamic_slice_in_dim(x, block * S, S, -1)

        own = order._replace(key_ids=keys(order.key_ids), key_positions=keys(order.key_positions))
        if not order.has_positions:
            shift = jnp.full((1,), static_offset, jnp.int32) if order.query_offset is None else order.query_offset
            own = own._replace(query_offset=saturated_sum(shift, first_row - block * S))
        mask = make_mask(
            T,
            S,
            is_causal=is_causal,
            static_window=static_window,
            traced_window=traced_window,
            query_lengths=query_lengths,
            key_value_lengths=None if key_value_lengths is None else jnp.clip(key_value_lengths - block * S, 0, S),
            allowed=keys(allowed),
            order=own,
            find_visible=find_visible,
            has_dead_rows=False,
        )[1]
        return mask.key_start, mask.key_stop, mask.is_exact

    start, stop, is_exact = jax.vmap(of_block)(jnp.arange(size, dtype=jnp.int32))
    assert start is not None
    assert stop is not None
    start, stop = jnp.broadcast_arrays(start, stop)
    dead = None
    if has_dead_rows and band == Band():
        is_row = is_query_row(T, query_lengths, order.query_ids)
        dead = ~(start < stop).any(0)
        dead = dead if is_row is None else dead & is_row[:, None, :]
        start, stop = jnp.where(dead, 0, start), jnp.where(dead, S, stop)
    operands = MaskOperands(_joined(start), _joined(stop), allowed, dead, key_value_lengths)
    if order.query_ids is not None and order.key_ids is not None:
        operands = operands._replace(query_ids=of_rows(order.query_ids), key_ids=of_keys(order.key_ids))
    if order.has_positions:
        reach = Reach(*(static_window or (None, None))) if traced_window is None else Reach(*traced_window)
        operands = operands._replace(**position_bounds(T, S * size, order, reach.causal() if is_causal else reach, 0))
    return band, operands._replace(is_exact=None if is_exact is None else _joined(is_exact))


def _with_positions(order: Order, T: int, S: int, first_row: jax.Array, offset: int) -> Order:
    """With positions of rows and keys where one of them goes by its index."""
    query, key = order.query_positions, order.key_positions
    if query is None:
        shift = jnp.int32(offset) if order.query_offset is None else order.query_offset[:, None]
        query = saturated_sum(shift, first_row + jnp.arange(T, dtype=jnp.int32)[None, :])
    key = jnp.arange(S, dtype=jnp.int32)[None, :] if key is None else key
    return order._replace(query_positions=query, key_positions=key, query_offset=None)


def _joined(x: Any) -> jax.Array:
    """(blocks, B, N, T) -> (B, N, blocks * T)"""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)
