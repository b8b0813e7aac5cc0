"""Where rows and keys stand: windows, offsets and positions, which may be traced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .masks import Band


class Reach(NamedTuple):
    """How far a row attends, in positions before and behind its own; None: without end."""

    left: Any | None
    right: Any | None

    def causal(self) -> "Reach":
        """Not behind its own position."""
        if self.right is None or isinstance(self.right, int):
            return Reach(self.left, min(0, self.right or 0))
        return Reach(self.left, jnp.minimum(self.right, 0))


def reach_of(*, is_causal: bool, static_window: tuple[int, int] | None, traced_window: Any | None) -> Reach:
    """What a window, if there is one, and causality leave."""
    reach = Reach(*(static_window or (None, None))) if traced_window is None else Reach(*traced_window)
    return reach.causal() if is_causal else reach


class Order(NamedTuple):
    """What ids and positions say: arrays (B, T) and (B, S) int32, or None, and a shift (B,) of the rows' positions."""

    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    query_offset: jax.Array | None = None

    @property
    def has_positions(self) -> bool:
        return self.query_positions is not None or self.key_positions is not None

    def numbers(self, rows: jax.Array, keys: jax.Array, static_offset: int) -> tuple[jax.Array, jax.Array]:
        """Where each row and each key stands, (B or 1, T) and (B or 1, S), given their places, (T,) and (S,)."""
        shift = jnp.int32(static_offset) if self.query_offset is None else self.query_offset[:, None]
        return (
            saturated_sum(shift, rows[None, :]) if self.query_positions is None else self.query_positions,
            keys[None, :] if self.key_positions is None else self.key_positions,
        )


def moving_band(reach: Reach) -> Band | None:
    """The complete band of a reach whose rows an offset moves; None where numbers that int32 holds do not say it."""
    largest = jnp.iinfo(jnp.int32).max
    if not all(side is None or (isinstance(side, int) and abs(side) <= largest) for side in reach):
        return None
    lower, upper = None if reach.left is None else -reach.left, reach.right
    is_empty = lower is not None and upper is not None and lower > upper
    return None if is_empty else Band(lower, upper, is_complete=True)


def clip_window_side(side: Any, lowest: int, highest: int) -> jax.Array:
    """A side of a traced window, cut off where it changes nothing any more; int32, from any integer dtype."""
    if not isinstance(side, int):
        # In its own dtype, which may be narrower than int32 or wider, signed or not.
        bounds = jnp.iinfo(side.dtype)
        side = jnp.clip(side, max(lowest, int(bounds.min)), min(highest, int(bounds.max)))
    else:
        side = min(max(side, lowest), highest)
    return jnp.asarray(side, jnp.int32)


def cut(
    start: jax.Array, stop: jax.Array, rows: jax.Array, reach: Reach, offset: Any, static_offset: int, T: int, S: int
) -> tuple[jax.Array, jax.Array]:
    """Intervals, cut where the reach of the rows ends, which are moved by an offset."""
    shift = jnp.int32(static_offset) if offset is None else offset[:, None, None]
    if reach.left is not None:
        start = jnp.maximum(start, jnp.clip(saturated_sum(shift, -reach.left), -T, S) + rows)
    if reach.right is not None:
        stop = jnp.minimum(stop, jnp.clip(saturated_sum(shift, reach.right), -T, S) + rows + 1)
    return start, stop


def position_bounds(T: int, S: int, order: Order, reach: Reach, static_offset: int) -> dict[str, jax.Array]:
    """Of `MaskOperands`, those of the fields on positions that say something."""
    position, keys = order.numbers(*places(T, S), static_offset)
    bounds = {}
    if reach.left is not None:
        bounds["lowest_position"] = of_rows(saturated_sum(position, -reach.left))
    if reach.right is not None:
        bounds["highest_position"] = of_rows(saturated_sum(position, reach.right))
    return bounds | {"key_positions": of_keys(keys)} if bounds else {}


def places(T: int, S: int) -> tuple[jax.Array, jax.Array]:
    """Of rows and of keys, (T,) and (S,)."""
    return jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)


def of_rows(x: jax.Array) -> jax.Array:
    return x[:, None, :, None]


def of_keys(x: jax.Array) -> jax.Array:
    return x[:, None, None, :]


def saturated_sum(x: jax.Array, y: Any) -> jax.Array:
    """x + y in int32, or the end of its range that it passes."""
    info = jnp.iinfo(jnp.int32)
    y = jnp.asarray(min(max(y, int(info.min)), int(info.max)) if isinstance(y, int) else y, jnp.int32)
    room = jnp.where(y > 0, info.max - jnp.maximum(y, 0), info.min - jnp.minimum(y, 0))
    return jnp.where(y > 0, jnp.minimum(x, room), jnp.maximum(x, room)) + y
