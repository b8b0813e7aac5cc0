"""A ring of devices around which blocks of key and value travel (Ring Attention, Liu et al. 2023, arXiv:2310.01889).

A device visits its own block first. A block that is visited is on its way to the next device meanwhile: the two do not
depend on each other. Memory is that of two blocks beside the operands, however many devices there are: more than a few
are visited in a loop.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .._semantics.call import Call, Config, Inputs, Ring
from .._semantics.dropout import with_place
from .._semantics.masks import Band, MaskOperands
from .._semantics.sizes import Sizes
from .collectives import axis_index, shift

# Up to so many blocks, each has its own text in the program.
_UNROLLED = 4


class Visit(NamedTuple):
    """A block of keys at a device: which place of the ring the device has, whose block it is, what of it travels.

    Attributes:
      hop: over how many places it came in the last step.
      is_own: whether it is the device's own.
    """

    rank: Any
    source: Any
    blocks: Mapping[str, Any]
    hop: int = 0
    is_own: bool = False

    def call(self, call: Call) -> Call:
        """The call of the keys of this block alone."""
        return Call(self.config(call), self.inputs(call))

    def config(self, call: Call) -> Config:
        config, z = call.config, call.sizes
        assert config.ring is not None
        dropout, size = config.dropout, config.ring.size
        if dropout is not None:
            dropout = replace(dropout, lengths=(size * z.T, size * z.S))
        band = config.band if self.is_own else Band()
        return replace(config, band=band, dropout=dropout, has_all_keys=False, ring=None)

    def inputs(self, call: Call) -> Inputs:
        inputs, z, dropout_key = call.inputs, call.sizes, call.inputs.dropout_key
        if dropout_key is not None:
            dropout_key = with_place(dropout_key, self.rank * z.T, self.source * z.S)
        return inputs._replace(
            key=self.blocks["key"],
            value=self.blocks["value"],
            bias=None if inputs.bias is None else self.keys(inputs.bias, z.S),
            mask=MaskOperands() if self.config(call).band != Band() else self._mask(inputs.mask, z),
            dropout_key=dropout_key,
        )

    def _mask(self, mask: MaskOperands, z: Sizes) -> MaskOperands:
        per_row, per_key = ("key_start", "key_stop"), ("allowed", "key_ids", "key_positions")
        lengths = {"is_exact": 1} | dict.fromkeys(per_row, z.T) | dict.fromkeys(per_key, z.S)
        given = {name: x for name, x in mask._asdict().items() if x is not None}
        changed = {name: self.keys(given[name], length) for name, length in lengths.items() if name in given}
        if mask.key_value_length is not None:
            changed["key_value_length"] = jnp.clip(mask.key_value_length - self.source * z.S, 0, z.S)
        return mask._replace(**changed)

    def keys(self, x: jax.Array, length: int) -> jax.Array:
        """What belongs to this block, of an array whose last axis has that of all blocks, or broadcasts."""
        return x if x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, self.source * length, length, -1)


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

    def at(distance: Any, blocks: Mapping[str, jax.Array], hop: int) -> Visit:
        return Visit(rank, (rank - distance) % ring.size, blocks, hop)

    def visited(state: State, at: Visit, hop: int) -> tuple[State, Mapping[str, jax.Array]]:
        """The state after a visit, and the next block, which is not looked at before that: XLA would wait for it."""
        following = shift(at.blocks, ring, hop)
        return lax.optimization_barrier((visit(state, at), following))

    own = Visit(rank, rank, blocks, is_own=True)
    if len(distances) == 1:
        return visit(state, own)
    state, blocks = visited(state, own, hops[0])
    following = [*hops[1:], 0]
    loops = len(distances) > _UNROLLED and len(set(hops)) == 1
    apart = 2 if loops else len(distances) - 1
    for distance, hop, next_hop in zip(distances[1:apart], hops, following, strict=False):
        state, blocks = visited(state, at(distance, blocks, hop), next_hop)
    if loops:

        def body(carry: tuple, distance: jax.Array) -> tuple[tuple, None]:
            state, blocks = carry
            return visited(state, at(distance, blocks, hops[0]), hops[0]), None

        (state, blocks), _ = lax.scan(body, (state, blocks), jnp.asarray(distances[2:-1], jnp.int32))
    return visit(state, at(distances[-1], blocks, hops[-1]))
