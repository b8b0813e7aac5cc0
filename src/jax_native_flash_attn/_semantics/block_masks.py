"""All masks of a call whose keys are in several blocks, as one for each block."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .join_masks import is_query_row, make_mask
from .masks import Band, MaskOperands, make_band
from .positions import Order, Reach, of_keys, of_rows, position_bounds, saturated_sum


def part_starts(block: Any, size: int, length: int, *, is_balanced: bool) -> list[Any]:
    """The positions at which the equally long parts of a block of `length` tokens start; there are `size` blocks."""
    if not is_balanced:
        return [block * length]
    return [block * (length // 2), (2 * size - 1 - block) * (length // 2)]


def positions_of_block(block: Any, size: int, length: int, *, is_balanced: bool) -> jax.Array:
    """(length,) int32"""
    starts = part_starts(block, size, length, is_balanced=is_balanced)
    return jnp.concatenate([start + jnp.arange(length // len(starts), dtype=jnp.int32) for start in starts])


def sees_itself(reach: Reach, offset: int, others: Sequence[Any]) -> bool:
    """Whether each row is known to attend the key of its own index: `others` are what else there is of a mask."""
    sides = [side for side in reach if side is not None]
    return offset == 0 and all(x is None for x in others) and all(isinstance(x, int) and x >= 0 for x in sides)


def make_block_masks(
    T: int, S: int, size: int, rank: jax.Array, *, is_balanced: bool, **masks: Any
) -> tuple[Band, MaskOperands]:
    """As `make_mask` of these `masks`, of `size` blocks of S keys; the T rows are the block of number `rank`.

    `query_lengths` is of these rows alone; ids and positions of keys, and `allowed`, are of the keys of all blocks.
    There is no `static_band`.

    Returns:
      The band of the block of the same number, if that is all there is; and the operands of all blocks, as
      `Config.ring` says.
    """
    order: Order = masks["order"]
    static_window, traced_window = masks["static_window"], masks["traced_window"]
    allowed, key_value_lengths, query_lengths = masks["allowed"], masks["key_value_lengths"], masks["query_lengths"]
    reach = Reach(*(static_window or (None, None))) if traced_window is None else Reach(*traced_window)
    reach = reach.causal() if masks["is_causal"] else reach
    others = (query_lengths, key_value_lengths, allowed, order.query_ids)
    if reach == Reach(None, None) and all(x is None for x in others):
        return Band(), MaskOperands()
    rows = positions_of_block(rank, size, T, is_balanced=is_balanced)[None, :]
    shift = jnp.int32(masks["static_offset"]) if order.query_offset is None else order.query_offset[:, None]
    rows = saturated_sum(rows, shift)
    if order.has_positions:
        keys = jnp.arange(size * S, dtype=jnp.int32)[None, :] if order.key_positions is None else order.key_positions
        order = Order(
            order.query_ids, order.key_ids, rows if order.query_positions is None else order.query_positions, keys
        )

    def within(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = part_starts(block, size, S, is_balanced=is_balanced)

        def count(reached: jax.Array) -> jax.Array:
            """How many keys of the block are at positions up to those."""
            reached = jnp.clip(reached, -1, size * S)
            parts = [jnp.clip(reached - start + 1, 0, S // len(starts)) for start in starts]
            return sum(parts[1:], parts[0])[:, None, :]

        first = jnp.zeros((1, 1, T), jnp.int32) if reach.left is None else count(saturated_sum(rows, -reach.left) - 1)
        return first, jnp.full((1, 1, T), S) if reach.right is None else count(saturated_sum(rows, reach.right))

    def of_block(block: jax.Array) -> tuple[jax.Array | None, ...]:
        def keys(x: jax.Array | None) -> jax.Array | None:
            return x if x is None or x.shape[-1] == 1 else jax.lax.dynamic_slice_in_dim(x, block * S, S, -1)

        changed: dict[str, Any] = {"is_causal": False, "static_window": None, "traced_window": None}
        own = Order(order.query_ids, keys(order.key_ids))
        if order.has_positions:
            changed = {}
            own = own._replace(query_positions=order.query_positions, key_positions=keys(order.key_positions))
        if key_value_lengths is not None:
            changed["key_value_lengths"] = jnp.clip(key_value_lengths - block * S, 0, S)
        changed |= {"allowed": keys(allowed), "order": own, "has_dead_rows": False, "static_offset": 0}
        limits = None if order.has_positions else within(block)
        mask = make_mask(T, S, within=limits, **masks | changed)[1]
        return mask.key_start, mask.key_stop, mask.is_exact

    start, stop, is_exact = jax.vmap(of_block)(jnp.arange(size, dtype=jnp.int32))
    assert start is not None
    assert stop is not None
    start, stop = jnp.broadcast_arrays(start, stop)
    band, dead = Band(), None
    moving = (key_value_lengths, allowed, *order)
    if T == S and sees_itself(reach, masks["static_offset"], moving):
        if query_lengths is None and not (is_balanced and static_window):
            band = make_band(T, S, is_causal=masks["is_causal"], window=static_window, also=Band())
    elif masks["has_dead_rows"]:
        is_row = is_query_row(T, query_lengths, order.query_ids)
        dead = ~(start < stop).any(0)
        dead = dead if is_row is None else dead & is_row[:, None, :]
        start, stop = jnp.where(dead, 0, start), jnp.where(dead, S, stop)
    operands = MaskOperands(_joined(start), _joined(stop), allowed, dead, key_value_lengths)
    if order.query_ids is not None and order.key_ids is not None:
        operands = operands._replace(query_ids=of_rows(order.query_ids), key_ids=of_keys(order.key_ids))
    if order.has_positions:
        operands = operands._replace(**position_bounds(T, S * size, order, reach, 0))
    return band, operands._replace(is_exact=None if is_exact is None else _joined(is_exact))


def _joined(x: Any) -> jax.Array:
    """(blocks, B, N, T) -> (B, N, blocks * T)"""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)
