"""Attention of a sequence that is split over devices, inside `jax.shard_map`: who sends what to whom.

ring        key/value blocks travel, see `_sharding/ring.py`; nothing else does
all_to_all  heads are exchanged for the sequence before the call, and back behind it: each device has all of the
            sequence, and some heads (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509)
all_gather  keys and values are gathered before the call
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._arguments import check
from ._attention import Results, attention, rows_of_length
from ._semantics.block_masks import make_ring, positions_of_block, positions_of_blocks
from ._semantics.call import Arrays, Settings
from ._semantics.dropout import with_place
from ._semantics.errors import describe, did_you_mean
from ._semantics.positions import saturated_sum
from ._shapes import as_4d
from ._warnings import warn_of_shapes

Strategy = Literal["ring", "all_to_all", "all_gather"]
SequenceOrder = Literal["balanced"]
DEFAULT_STRATEGY: Strategy = "ring"


class Devices(NamedTuple):
    """Those of the mesh axis over which the sequence is split: how many, which place this one has, in which order."""

    axis_name: Any
    size: int
    rank: jax.Array
    order: SequenceOrder | None

    def gather(self, x: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(x, self.axis_name, axis=axis, tiled=True)

    def exchange(self, x: jax.Array, split: int, concatenate: int) -> jax.Array:
        return lax.all_to_all(x, self.axis_name, split, concatenate, tiled=True)

    def part(self, x: jax.Array, axis: int) -> jax.Array:
        """Of an axis that has all of it, what is this device's."""
        length = x.shape[axis] // self.size
        return lax.dynamic_slice_in_dim(x, self.rank * length, length, axis)


def context_parallel(
    arguments: dict[str, Any],
    *,
    axis_name: Any,
    strategy: Strategy | None,
    order: SequenceOrder | None,
    **asked: Any,
) -> Results:
    """The results for arguments of `context_parallel_attention`; `asked`: of `check`."""
    check_split(strategy, order)
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must be a mesh axis of the jax.shard_map around this call, got {axis_name!r}"
        ) from None
    T, S = (as_4d(arguments[name], name).shape[1] for name in ("query", "key"))
    shape = np.shape(arguments["query"])
    if size == 1:
        return attention(*check(**arguments, **asked), shape)
    if arguments["mask"] is not None:  # before it gets rank 4
        B, _, N, _ = as_4d(arguments["query"], "query").shape
        warn_of_shapes(shape, np.shape(arguments["mask"]), B, size * T, size * S, N)
    devices = Devices(axis_name, size, lax.axis_index(axis_name), order)
    if order is not None:
        _check_order(arguments, T, S)
    for name in ("bias", "mask"):
        if arguments[name] is not None:
            arguments[name] = _rows_of_device(name, as_4d(arguments[name], name), T, S, devices)
    for name in ("key_value_segment_ids", "key_value_positions"):
        if arguments[name] is not None:
            arguments[name] = devices.gather(jnp.asarray(arguments[name]), -1)
    settings, arrays = check(**arguments, **asked, blocks=size)
    strategy = strategy or DEFAULT_STRATEGY
    if order is not None and strategy != "ring":
        arrays = _with_positions(settings, arrays, devices)
    return _STRATEGIES[strategy](settings, arrays, devices, shape)


def check_split(strategy: Any, order: Any) -> None:
    if not (order is None or (isinstance(order, str) and order == "balanced")):
        raise ValueError(
            f"order must be None or 'balanced', which is that of balanced_order, got {describe(order)}: of any other "
            "order pass query_positions and key_value_positions"
        )
    if strategy is not None and not (isinstance(strategy, str) and strategy in _STRATEGIES):
        advice = did_you_mean(strategy, _STRATEGIES)
        raise ValueError(f"strategy must be one of {(None, *_STRATEGIES)}, got {describe(strategy)}{advice}")


def _check_order(arguments: dict[str, Any], T: int, S: int) -> None:
    given = [name for name in ("query_positions", "key_value_positions") if arguments[name] is not None]
    if given:
        raise ValueError(f"order='balanced' says where tokens stand, got {given[0]} beside it: leave one of them out")
    lengths = [name for name in ("query_seq_lengths", "key_value_seq_lengths") if arguments[name] is not None]
    if lengths:
        raise ValueError(
            f"{lengths[0]} cannot say in order='balanced' which tokens are padding, as it does not stand at the end: "
            "give padding a negative id in query_segment_ids and key_value_segment_ids"
        )
    if T % 2 or S % 2:
        raise ValueError(f"order='balanced' needs two equal parts on each device, got {T} query rows and {S} keys")


def _with_positions(settings: Settings, arrays: Arrays, devices: Devices) -> Arrays:
    """The positions that the balanced order means, as arguments."""
    (B, T, *_), S = arrays.query.shape, arrays.key.shape[1]
    rows = positions_of_block(devices.rank, devices.size, T, is_balanced=True)
    shift = jnp.int32(settings.static_offset) if arrays.query_offset is None else arrays.query_offset[:, None]
    keys = positions_of_blocks(devices.size, S, is_balanced=True)
    return arrays._replace(
        query_positions=jnp.broadcast_to(saturated_sum(rows[None], shift), (B, T)),
        key_value_positions=jnp.broadcast_to(keys[None], (B, devices.size * S)),
        query_offset=None,
    )


def _rows_of_device(name: str, x: jax.Array, T: int, S: int, devices: Devices) -> jax.Array:
    """A bias or mask, of the rows of this device and of all keys; each of the two may broadcast."""
    (rows, keys), size = x.shape[2:], devices.size
    if S == 1 == keys:
        raise ValueError(
            f"{name} must have the keys of all devices where each has one, got {x.shape}: gather it along its last "
            f"axis, or broadcast it to the {size} keys"
        )
    if keys == S and rows == size * T:
        return devices.exchange(x, 2, 3)
    if keys == S and rows == 1:
        return devices.gather(x, 3)
    if keys == S:
        raise ValueError(
            f"{name} must have all keys beside the rows of a device, (B, N, {T}, {size * S}), or all rows beside its "
            f"keys, (B, N, {size * T}, {S}), got {x.shape}: leave one of its last two axes unsharded"
        )
    return devices.part(x, 2) if rows == size * T else x


def _ring(settings: Settings, arrays: Arrays, devices: Devices, shape: tuple[int, ...]) -> Results:
    T, S, size = arrays.query.shape[1], arrays.key.shape[1], devices.size
    is_balanced = devices.order is not None
    mesh_axes = dict(jax.sharding.get_abstract_mesh().shape)
    ring = make_ring(settings, arrays, (T, S), devices.axis_name, mesh_axes, size, is_balanced=is_balanced)
    return _over_devices(attention(settings._replace(ring=ring), arrays, shape), devices)


def _all_gather(settings: Settings, arrays: Arrays, devices: Devices, shape: tuple[int, ...]) -> Results:
    T, S = arrays.query.shape[1], devices.size * arrays.key.shape[1]
    offset, first_row = arrays.query_offset, devices.rank * T
    has_reach = settings.is_causal or settings.static_window is not None or arrays.traced_window is not None
    has_reach |= arrays.mod_args is not None
    if has_reach and arrays.query_positions is None:
        offset = saturated_sum(jnp.int32(settings.static_offset) if offset is None else offset, first_row)
        offset = jnp.broadcast_to(offset, arrays.query.shape[:1])
        settings = settings._replace(static_offset=0)
    dropout, dropout_key = settings.dropout, arrays.dropout_key
    if dropout is not None and dropout_key is not None:
        settings = settings._replace(dropout=replace(dropout, lengths=(devices.size * T, S)))
        dropout_key = with_place(dropout_key, first_row, jnp.zeros_like(first_row))
    arrays = arrays._replace(
        key=devices.gather(arrays.key, 1),
        value=devices.gather(arrays.value, 1),
        query_lengths=rows_of_length(arrays.query_lengths, devices.rank, T),
        query_offset=offset,
        dropout_key=dropout_key,
    )
    return _over_devices(attention(settings, arrays, shape), devices)


def _over_devices(results: Results, devices: Devices) -> Results:
    largest = results.max_logits
    return results._replace(max_logits=None if largest is None else lax.pmax(largest, devices.axis_name))


def _all_to_all(settings: Settings, arrays: Arrays, devices: Devices, shape: tuple[int, ...]) -> Results:
    (_, T, N, _), K, size = arrays.query.shape, arrays.key.shape[2], devices.size
    if N % size != 0 or (K % size != 0 and size % K != 0):
        raise ValueError(
            f"strategy='all_to_all' gives each of the {size} devices equally many heads, got {N} query heads and {K} "
            "key/value heads: take strategy='ring'"
        )

    def heads(x: jax.Array) -> jax.Array:
        return devices.exchange(x, 2, 1)

    def term(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        if x.shape[2] == T:
            return devices.exchange(x, 1, 2) if x.shape[1] > 1 else devices.gather(x, 2)
        return devices.part(x, 1) if x.shape[1] > 1 else x

    key, value = (x if K % size == 0 else jnp.repeat(x, size // K, 2) for x in (arrays.key, arrays.value))
    whole = {
        name: devices.gather(x, 1)
        for name in ("query_segment_ids", "query_positions")
        if (x := getattr(arrays, name)) is not None
    }
    head_index, sinks, head_number = arrays.head_index, arrays.sinks, arrays.head_number
    arrays = arrays._replace(
        query=heads(arrays.query),
        key=heads(key),
        value=heads(value),
        bias=term(arrays.bias),
        mask=term(arrays.mask),
        sinks=None if sinks is None else devices.part(sinks, 0),
        head_number=None if head_number is None else devices.part(head_number, 0),
        head_index=head_index if head_index is None or head_index.shape[1] == 1 else devices.part(head_index, 1),
        **whole,
    )
    out, lse, max_logits = attention(settings, arrays, arrays.query.shape)
    return Results(
        devices.exchange(out, 1, 2).reshape(*shape[:-1], out.shape[-1]),
        None if lse is None else devices.exchange(lse, 1, 2).reshape(shape[:-1]),
        None if max_logits is None else _of_all_heads(max_logits, devices),
    )


def _of_all_heads(largest: jax.Array, devices: Devices) -> jax.Array:
    """As `all_gather`, whose result JAX does not know to be alike everywhere."""
    heads = len(largest)
    whole = jnp.full(heads * devices.size, -jnp.inf, largest.dtype)
    return lax.pmax(lax.dynamic_update_slice_in_dim(whole, largest, devices.rank * heads, 0), devices.axis_name)


_STRATEGIES: dict[str, Callable[[Settings, Arrays, Devices, tuple[int, ...]], Results]] = {
    "ring": _ring,
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
}
