"""A ring of devices around which blocks of key and value travel (Ring Attention, Liu et al. 2023, arXiv:2310.01889).

A device visits its own block first, or, for some gradients, last. A block that is visited is on its way to the next
device meanwhile: the two do not depend on each other. Memory is that of two blocks beside the operands, however many
devices there are: more than a few are visited in a loop.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .._semantics.call import MOST_UNROLLED, Call, Config, Inputs, Meeting, ModOperands, Ring
from .._semantics.dropout import with_place
from .._semantics.masks import Band, MaskOperands
from .._semantics.operands import LAYOUTS
from .._semantics.sizes import Sizes
from .collectives import axis_index, shift


class Visit(NamedTuple):
    """A block of keys at a device: which place of the ring the device has, whose block it is, what of it travels.

    Attributes:
      hop: over how many places it came in the last step.
      is_own: whether it is the device's own.
      meeting: of which rows and keys the visit is, and what mask they have, if that is known; see `Ring.meeting`. Only
        these keys have travelled.
      is_before: with a meeting, whether the block stands before the device's, and not at the end of the sequence.
      is_last: whether no other block comes after it.
    """

    rank: Any
    source: Any
    blocks: Mapping[str, Any]
    hop: int = 0
    is_own: bool = False
    meeting: Meeting | None = None
    is_before: Any = True
    is_last: bool = False

    def call(self, call: Call) -> Call:
        """The call of the keys of this block alone."""
        return Call(self.config(call), self.inputs(call))

    def config(self, call: Call) -> Config:
        config, z = call.config, call.sizes
        assert config.ring is not None
        dropout, size = config.dropout, config.ring.size
        if dropout is not None:
            dropout = replace(dropout, lengths=(size * z.T, size * z.S))
        band = config.band if self.is_own else Band() if self.meeting is None else self.meeting.band
        return replace(config, band=band, dropout=dropout, has_all_keys=False, ring=None, first_row=None)

    def inputs(self, call: Call) -> Inputs:
        inputs, z, dropout_key, mods = call.inputs, call.sizes, call.inputs.dropout_key, call.inputs.mods
        if dropout_key is not None:
            dropout_key = with_place(dropout_key, self.rank * z.T, self.first_key(z.S))
        return inputs._replace(
            query=self.rows("query", inputs.query),
            key=self.blocks["key"],
            value=self.blocks["value"],
            bias=None if inputs.bias is None else self.rows("bias", self.keys(inputs.bias, z.S)),
            mask=MaskOperands() if self.config(call).band != Band() else self._mask(inputs.mask, z, call.config),
            dropout_key=dropout_key,
            mods=None if mods is None else self._mods(mods, z),
        )

    def _mods(self, mods: ModOperands, z: Sizes) -> ModOperands:
        return mods._replace(
            query_number=self.rows("query_number", mods.query_number), key_number=self.keys(mods.key_number, z.S)
        )

    def _mask(self, mask: MaskOperands, z: Sizes, config: Config) -> MaskOperands:
        per_row, per_key = ("key_start", "key_stop"), ("allowed", "key_ids", "key_positions")
        lengths = {"is_exact": 1, "tile_classes": -(-z.S // config.mask_block)}
        lengths |= dict.fromkeys(per_row, z.T) | dict.fromkeys(per_key, z.S)
        given = {name: x for name, x in mask._asdict().items() if x is not None}
        changed = {name: self.keys(given[name], length) for name, length in lengths.items() if name in given}
        if mask.key_value_length is not None:
            changed["key_value_length"] = jnp.clip(mask.key_value_length - self.source * z.S, 0, z.S)
        return mask.without_rows()._replace(**changed)

    def first_key(self, length: int) -> Any:
        """The number of the first one visited, of blocks of this length."""
        return self.source * length + (0 if self.meeting is None else length - self.meeting.length)

    def keys(self, x: jax.Array, length: int) -> jax.Array:
        """What belongs to the keys visited, of an array whose last axis has that of all blocks, or broadcasts."""
        if x.shape[-1] == 1:
            return x
        count = length if self.meeting is None else self.meeting.length
        return lax.dynamic_slice_in_dim(x, self.first_key(length), count, -1)

    def rows(self, name: str, x: jax.Array) -> jax.Array:
        """Those that are visited, of an array of this name."""
        axis = row_axis(name)
        if self.meeting is None or axis is None or x.shape[axis] == 1:
            return x
        return lax.slice_in_dim(x, 0, self.meeting.length, axis=axis)

    def type(self, name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Of an array of this name, what the visit has of it; `x` has the rows of a device, the keys of a block."""
        if self.meeting is None:
            return x
        shape = list(x.shape)
        for axis in (row_axis(name), _axis(name, "S")):
            if axis is not None and shape[axis] > 1:
                shape[axis] = self.meeting.length
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    def known(self, x: jax.Array, otherwise: float = 0.0) -> jax.Array:
        """A result of the visit, where there is such a block before."""
        return x if self.meeting is None else jnp.where(self.is_before, x, otherwise)

    def with_rows(self, name: str, whole: jax.Array, part: jax.Array) -> jax.Array:
        """An array of all rows with other numbers in those that are visited."""
        axis = row_axis(name)
        if whole.shape == part.shape or axis is None:
            return part
        return lax.dynamic_update_slice_in_dim(whole, part, 0, whole.ndim + axis)

    def add_rows(self, name: str, whole: jax.Array, part: jax.Array) -> jax.Array:
        return self.with_rows(name, whole, part + self.rows(name, whole))

    def of_keys(self, part: jax.Array) -> jax.Array:
        """A gradient of the keys or values that are visited."""
        return part


def _axis(name: str, letter: str) -> int | None:
    """The number of an axis, from the end; None if arrays of this name lack it."""
    layout = LAYOUTS[name]
    return layout.index(letter) - len(layout) if letter in layout else None


def row_axis(name: str) -> int | None:
    return _axis(name, "T")


def last_keys(x: jax.Array, count: int) -> jax.Array:
    """Of key, value or a derivative, (..., S, heads, H or D)."""
    return x if x.shape[-3] == count else lax.slice_in_dim(x, x.shape[-3] - count, x.shape[-3], axis=-3)


def add_to_last_keys(whole: jax.Array, part: jax.Array) -> jax.Array:
    return whole + part if whole.shape == part.shape else whole.at[..., -part.shape[-3] :, :, :].add(part)


State = TypeVar("State")


def go_around(
    ring: Ring,
    blocks: Mapping[str, jax.Array],
    state: State,
    visit: Callable[[State, Visit], State],
) -> State:
    """`state = visit(state, block)` for the own block, and then for each that the ring brings.

    All visits but the own and the first that comes after give back what they get, with other numbers.
    """
    rank, distances = axis_index(ring), ring.distances
    hops = [b - a for a, b in itertools.pairwise(distances)]
    length = blocks["key"].shape[-3]

    def at(distance: Any, blocks: Mapping[str, jax.Array], hop: int) -> Visit:
        meeting = ring.meeting(distance, length)
        return Visit(rank, (rank - distance) % ring.size, blocks, hop, meeting=meeting, is_before=rank >= distance)

    def visited(state: State, at: Visit, hop: int, following: Any) -> tuple[State, Mapping[str, jax.Array]]:
        """The state after a visit, and the block at the distance `following`.

        That is not looked at before the visit is over: XLA would wait for it.
        """
        meeting, sent = ring.meeting(following, length), at.blocks
        if meeting is not None:
            sent = {name: last_keys(x, meeting.length) for name, x in sent.items()}
        return lax.optimization_barrier((visit(state, at), shift(sent, ring, hop)))

    own = Visit(rank, rank, blocks, is_own=True)
    if len(distances) == 1:
        return visit(state, own)
    state, blocks = visited(state, own, hops[0], distances[1])
    loops = len(distances) > MOST_UNROLLED and len(set(hops)) == 1
    apart = 2 if loops else len(distances) - 1
    for i in range(1, apart):
        state, blocks = visited(state, at(distances[i], blocks, hops[i - 1]), hops[i], distances[i + 1])
    if loops:

        def body(carry: tuple, distance: jax.Array) -> tuple[tuple, None]:
            state, blocks = carry
            return visited(state, at(distance, blocks, hops[0]), hops[0], distance + hops[0]), None

        (state, blocks), _ = lax.scan(body, (state, blocks), jnp.asarray(distances[2:-1], jnp.int32))
    return visit(state, at(distances[-1], blocks, hops[-1])._replace(is_last=True))
