"""The block of another device where tokens are in the order of `balanced_order` and causality is the only mask.

Each device has two halves of rows and of keys, one of the beginning of the sequence and one of its end. Of the block of
a device before it, it attends the first half of keys, by all rows. Of a later one, it attends all keys, by the second
half of rows. Either are two pairs of halves without a mask: as a batch of two they are one call, the same program on
all devices, which kernels take that cannot take a mask by rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._kernels.protocol import LinearPass
from .._semantics.call import Call
from .._semantics.masks import MaskOperands
from .ring import Visit, row_axis


def can_halve(call: Call) -> bool:
    """Whether visits of other blocks are of halves, and nothing but query, key and value is."""
    ring, others = call.config.ring, (call.inputs.bias, call.inputs.dropout_key, call.inputs.mods)
    return ring is not None and ring.has_halves and all(x is None for x in others)


def in_halves(call: Call, given: LinearPass, visit: Visit) -> "Halves | None":
    """The visit of a cotangent, where that is of halves and all arrays have the same batch axes."""
    inputs = call.inputs
    if visit.is_own or not can_halve(call):
        return None
    wanted = {name: getattr(inputs, name).shape for name in ("key", "query", "value")}
    cotangents = {name: x.shape for name, x in {"out": given.out, "lse": given.lse}.items() if name in given.operands}
    is_alike = {name: x.shape for name, x in given.wanted.items()} == wanted
    is_alike &= {name: x.shape for name, x in given.operands.items()} == cotangents
    return Halves(visit, visit.rank > visit.source) if is_alike else None


class Halves(NamedTuple):
    """A visit as such a batch: (0 or 1, 0) and (1, 0 or 1) of rows and keys, in front of other batch axes.

    Attributes:
      visit: the visit.
      is_before: whether the block stands before the device's.
    """

    visit: Visit
    is_before: Any

    def call(self, call: Call) -> Call:
        inputs, blocks = call.inputs, self.visit.blocks
        keys = {name: self._keys(blocks[name]) for name in ("key", "value")}
        query, scale = self.rows("query", inputs.query), inputs.scale[None]
        return Call(self.visit.config(call), inputs._replace(query=query, scale=scale, mask=MaskOperands(), **keys))

    def rows(self, name: str, x: jax.Array) -> jax.Array:
        """Those of both pairs, of an array of this name."""
        axis = row_axis(name)
        assert axis is not None
        return _chosen(x, axis, [jnp.where(self.is_before, 0, 1), 1])

    def _keys(self, x: jax.Array) -> jax.Array:
        return _chosen(x, -3, [0, jnp.where(self.is_before, 0, 1)])

    def type(self, name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """See `Visit.type`."""
        shape, axis = list(x.shape), row_axis(name)
        axis = -3 if axis is None else axis
        shape[axis] //= 2
        return jax.ShapeDtypeStruct((2, *shape), x.dtype)

    def add_rows(self, name: str, whole: jax.Array, part: jax.Array) -> jax.Array:
        axis = row_axis(name)
        assert axis is not None
        first, second = jnp.split(whole, 2, axis)
        here, there = self._apart(part[0])
        return lax.concatenate([first + here, second + part[1] + there], whole.ndim + axis)

    def of_keys(self, part: jax.Array) -> jax.Array:
        """A gradient of the block's keys or values."""
        here, there = self._apart(part[1])
        return lax.concatenate([part[0] + here, there], part.ndim - 4)

    def _apart(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What x adds to the first half, and to the second."""
        return jnp.where(self.is_before, x, 0), jnp.where(self.is_before, 0, x)


def _chosen(x: jax.Array, axis: int, numbers: list[Any]) -> jax.Array:
    """Some halves along an axis, stacked. A gather: XLA:GPU copies it twice as fast as it stacks what `where` gives."""
    axis %= x.ndim
    halves = x.reshape(*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
    return jnp.moveaxis(halves, axis, 0).at[jnp.stack(numbers)].get(mode="promise_in_bounds")
