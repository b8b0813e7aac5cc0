"""All masks of a call whose keys are in several blocks, as one for each block."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from .call import MOST_UNROLLED, Arrays, Call, Ring, Settings, mesh_order
from .join_masks import is_query_row, make_mask
from .masks import Band, MaskOperands, make_band
from .positions import Order, Reach, of_keys, of_rows, position_bounds, reach_of, saturated_sum
from .tile_masks import MaskMod, part


def part_starts(block: Any, size: int, length: int, *, is_balanced: bool) -> list[Any]:
    """The positions at which the equally long parts of a block of `length` tokens start; there are `size` blocks."""
    if not is_balanced:
        return [block * length]
    return [block * (length // 2), (2 * size - 1 - block) * (length // 2)]


def positions_of_block(block: Any, size: int, length: int, *, is_balanced: bool) -> jax.Array:
    """(length,) int32"""
    starts = part_starts(block, size, length, is_balanced=is_balanced)
    return jnp.concatenate([start + jnp.arange(length // len(starts), dtype=jnp.int32) for start in starts])


def positions_of_blocks(size: int, length: int, *, is_balanced: bool) -> jax.Array:
    """Of all blocks, one after the other, (size * length,) int32."""

    def of_block(block: jax.Array) -> jax.Array:
        return positions_of_block(block, size, length, is_balanced=is_balanced)

    return jax.vmap(of_block)(jnp.arange(size, dtype=jnp.int32)).reshape(-1)


def numbers_of_blocks(
    T: int, S: int, size: int, rank: jax.Array, order: Order, static_offset: int, *, is_balanced: bool
) -> tuple[jax.Array, jax.Array]:
    """See `Order.numbers`: of the T rows of the block of number `rank`, and of the S keys of each of all blocks."""
    rows = positions_of_block(rank, size, T, is_balanced=is_balanced)
    return order.numbers(rows, positions_of_blocks(size, S, is_balanced=is_balanced), static_offset)


def sees_itself(reach: Reach, offset: int, others: Sequence[Any]) -> bool:
    """Whether each row is known to attend the key of its own index: `others` are what else there is of a mask."""
    sides = [side for side in reach if side is not None]
    return offset == 0 and all(x is None for x in others) and all(isinstance(x, int) and x >= 0 for x in sides)


def make_ring(
    settings: Settings,
    arrays: Arrays,
    lengths: tuple[int, int],
    axis_name: Any,
    mesh_axes: Mapping[Any, int],
    size: int,
    *,
    is_balanced: bool = False,
) -> Ring:
    """The ring of a call whose devices have so many rows and keys each, over a mesh with these axes."""
    distances = visited_distances(settings, arrays, *lengths, size, is_balanced=is_balanced)
    reach = None if len(distances) == 1 else _only_reach(settings, arrays, lengths)
    window = None if is_balanced or reach is None or reach.right != 0 else reach.left
    if window is not None and (len(distances) > MOST_UNROLLED or window >= (size - 1) * lengths[1]):
        window = None  # most of the blocks are attended as a whole: on devices that have none before them, by nobody
    order, has_halves = mesh_order(axis_name, mesh_axes), is_balanced and reach == Reach(None, 0)
    return Ring(axis_name, size, distances, order, is_balanced, window=window, has_halves=has_halves)


def _only_reach(settings: Settings, arrays: Arrays, lengths: tuple[int, int]) -> Reach | None:
    """What a row attends, if that is all that masks say, and itself is in it."""
    masks = ("mask", "query_lengths", "key_value_lengths", "query_segment_ids", "key_value_segment_ids")
    moving = ("traced_window", "query_positions", "key_value_positions", "query_offset")
    if any(getattr(arrays, name) is not None for name in masks + moving):
        return None
    if settings.mask_mod is not None or settings.static_band != Band():
        return None
    reach = reach_of(is_causal=settings.is_causal, static_window=settings.static_window, traced_window=None)
    if lengths[0] != lengths[1] or not sees_itself(reach, settings.static_offset, ()):
        return None
    return reach


def visited_distances(
    settings: Settings, arrays: Arrays, T: int, S: int, size: int, *, is_balanced: bool
) -> tuple[int, ...]:
    """How far back the blocks are that hold keys of any row, as far as that is known while the program is made.

    The own one, 0, is always among them, and all are where a row without a key would attend all.
    """
    everywhere = tuple(range(size))
    moving = (arrays.traced_window, arrays.query_offset, arrays.query_positions, arrays.key_value_positions)
    if any(x is not None for x in moving) or settings.static_band != Band():
        return everywhere
    if not (settings.is_causal or settings.static_window):
        return everywhere
    offset, unbounded = settings.static_offset, size * (T + S) + abs(settings.static_offset)
    left, right = settings.static_window or (unbounded, unbounded)
    right = min(right, 0) if settings.is_causal else right
    others = (arrays.key_value_lengths, arrays.key_value_segment_ids, arrays.mask, settings.mask_mod)
    if arrays.sinks is None and not (T == S and sees_itself(Reach(left, right), offset, others)):
        return everywhere

    def meets(rows: int, keys: int) -> bool:
        """Whether any row of one block attends a key of another."""
        row_parts, key_parts = (
            part_starts(block, size, length, is_balanced=is_balanced) for block, length in ((rows, T), (keys, S))
        )
        row_length, key_length = T // len(row_parts), S // len(key_parts)
        between = [
            (key - (row + row_length - 1) - offset, key + key_length - 1 - row - offset)
            for row, key in itertools.product(row_parts, key_parts)
        ]
        return any(first <= right and last >= -left for first, last in between)

    pairs = [(rows, keys) for rows in everywhere for keys in everywhere if meets(rows, keys)]
    return tuple(sorted({0} | {(rows - keys) % size for rows, keys in pairs}))


def make_block_masks(
    T: int, S: int, size: int, rank: jax.Array, *, is_balanced: bool, **masks: Any
) -> tuple[Band, MaskOperands]:
    """As `make_mask` of these `masks`, of `size` blocks of S keys; the T rows are the block of number `rank`.

    `query_lengths` is of these rows alone; ids and positions of keys, `allowed` and `mask_mod` are of the keys of all
    blocks, and so is `static_band`.

    Returns:
      The band of the block of the same number, if that is all there is; and the operands of all blocks, as
      `Config.ring` says.
    """
    order: Order = masks["order"]
    mask_mod: MaskMod | None = masks["mask_mod"]
    static_window, traced_window = masks["static_window"], masks["traced_window"]
    allowed, key_value_lengths, query_lengths = masks["allowed"], masks["key_value_lengths"], masks["query_lengths"]
    reach = reach_of(is_causal=masks["is_causal"], static_window=static_window, traced_window=traced_window)
    static_band: Band = masks["static_band"]
    band_reach = Reach(None if static_band.lower is None else -static_band.lower, static_band.upper)
    others = (query_lengths, key_value_lengths, allowed, order.query_ids, mask_mod)
    if all(x is None for x in (*reach, *band_reach, *others)):
        return Band(), MaskOperands()
    places = positions_of_block(rank, size, T, is_balanced=is_balanced)[None, :]
    rows, keys = numbers_of_blocks(T, S, size, rank, order, masks["static_offset"], is_balanced=is_balanced)
    if order.has_positions:
        order = Order(order.query_ids, order.key_ids, rows, keys)

    def within(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = part_starts(block, size, S, is_balanced=is_balanced)

        def count(reached: jax.Array) -> jax.Array:
            """How many keys of the block are at positions up to those."""
            reached = jnp.clip(reached, -1, size * S)
            parts = [jnp.clip(reached - start + 1, 0, S // len(starts)) for start in starts]
            return sum(parts[1:], parts[0])[:, None, :]

        first, stop = jnp.zeros((1, 1, T), jnp.int32), jnp.full((1, 1, T), S, jnp.int32)
        for at, (left, right) in [(places, band_reach), *([] if order.has_positions else [(rows, reach)])]:
            first = first if left is None else jnp.maximum(first, count(jnp.maximum(saturated_sum(at, -left), 0) - 1))
            stop = stop if right is None else jnp.minimum(stop, count(saturated_sum(at, right)))
        return first, stop

    def of_block(block: jax.Array) -> tuple[jax.Array | None, ...]:
        def keys(x: jax.Array | None) -> jax.Array | None:
            return x if x is None or x.shape[-1] == 1 else jax.lax.dynamic_slice_in_dim(x, block * S, S, -1)

        # What goes by index is in `within`.
        changed: dict[str, Any] = {"is_causal": False, "static_window": None, "traced_window": None}
        own = Order(order.query_ids, keys(order.key_ids))
        if order.has_positions:
            changed = {}
            own = own._replace(query_positions=order.query_positions, key_positions=keys(order.key_positions))
        if key_value_lengths is not None:
            changed["key_value_lengths"] = jnp.clip(key_value_lengths - block * S, 0, S)
        if mask_mod is not None:
            changed["mask_mod"] = mask_mod.from_key(block * S)
        changed |= {
            "allowed": keys(allowed),
            "static_band": Band(),
            "order": own,
            "has_dead_rows": False,
            "static_offset": 0,
        }
        mask = make_mask(T, S, within=within(block), **masks | changed)[1]
        return mask.key_start, mask.key_stop, mask.is_exact, mask.tile_classes

    start, stop, is_exact, classes = jax.vmap(of_block)(jnp.arange(size, dtype=jnp.int32))
    assert start is not None
    assert stop is not None
    start, stop = jnp.broadcast_arrays(start, stop)
    band, dead = Band(), None
    moving = (key_value_lengths, allowed, mask_mod, *order)
    if T == S and sees_itself(reach, masks["static_offset"], moving) and sees_itself(band_reach, 0, ()):
        if query_lengths is None and not (is_balanced and static_window):
            band = make_band(T, S, is_causal=masks["is_causal"], window=static_window, also=static_band)
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
    is_exact, classes = (None if x is None else _joined(x) for x in (is_exact, classes))
    return band, operands._replace(is_exact=is_exact, tile_classes=classes)


def split_masks(call: Call, rank: jax.Array) -> Call:
    """The same call with the masks of blocks, where `Ring.has_whole_masks`; the rows are the block of number `rank`."""
    (config, inputs), z = call, call.sizes
    ring, mask = config.ring, inputs.mask
    if ring is None or not ring.has_whole_masks:
        return call
    own, T, S = Band(), z.T, z.S
    start, stop = mask.key_start, mask.key_stop
    if start is None and config.band != Band():
        rows = (rank * T + jnp.arange(T, dtype=jnp.int32)).reshape((1,) * (len(z.batch) + 1) + (T,))
        start, stop = config.band.interval(rows, ring.size * S, jnp)
        first, end = config.band.intervals(T, S)
        own = config.band if T == S and (first < end).all() else own
    if start is not None and stop is not None:
        start, stop = jnp.broadcast_arrays(start, stop)
        blocks = (jnp.arange(ring.size, dtype=jnp.int32) * S).reshape((1,) * (start.ndim - 1) + (-1, 1))
        start, stop = (jnp.clip(x[..., None, :] - blocks, 0, S) for x in (start, stop))
        start, stop = (x.reshape(*x.shape[:-2], -1) for x in (start, stop))
    is_exact = mask.is_exact
    is_exact = None if is_exact is None else jnp.broadcast_to(is_exact, (*is_exact.shape[:-1], ring.size))
    classes = mask.tile_classes
    if classes is not None:
        classes = part(classes, config.mask_block, -2, rank * T, T)
        blocks = [part(classes, config.mask_block, -1, jnp.int32(i * S), S) for i in range(ring.size)]
        classes = jnp.concatenate(blocks, -1)
    mask = mask.without_rows()._replace(key_start=start, key_stop=stop)
    mask = mask._replace(is_exact=is_exact, tile_classes=classes, shift=None)
    return Call(replace(config, band=own, ring=replace(ring, has_whole_masks=False)), inputs._replace(mask=mask))


def _joined(x: Any) -> jax.Array:
    """(blocks, ..., n) -> (..., blocks * n)"""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)
