"""A call: as its arguments were checked, and as kernels get it; and what is known of each array by its name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .dropout import Dropout
from .masks import Band, MaskOperands
from .mods import Program
from .operands import LAYOUTS
from .sizes import Sizes
from .tile_masks import BLOCK

MOST_UNROLLED = 4  # visits of a ring: up to so many, each has its own text in the program


@dataclass(frozen=True)
class Ring:
    """Keys that are split over the devices of a mesh axis, in `size` blocks of equal length, as query rows are.

    Attributes:
      axis_name: the mesh axis, or several as one; manual where the call is.
      distances: which blocks a device visits, its own, 0, first: with distance d that of the device d places before it.
      mesh_order: the same axes in the order of the mesh, and its numbers of the places of the ring; see `mesh_order`.
      is_balanced: whether rows and keys are in the order of `balanced_order`, which masks then see through.
      has_whole_masks: whether band and intervals are still those of all keys, of the rows of a device, and classes of
        tiles those of all rows.
      window: how many keys before its own a row attends, where that and causality are all that masks say, and tokens
        stand in order: `meeting` then knows what is attended of a block. Otherwise intervals say so.
      has_halves: whether tokens are in the order of `balanced_order`, and causality is all that masks say: another
        device then attends halves of a block, as `in_halves` knows. Intervals say so, too.
    """

    axis_name: Any
    size: int
    distances: tuple[int, ...]
    mesh_order: tuple[Any, tuple[int, ...]] | None = None
    is_balanced: bool = False
    has_whole_masks: bool = False
    window: int | None = None
    has_halves: bool = False

    def meeting(self, distance: int, length: int) -> "Meeting | None":
        """Of the rows of a device and the keys `distance` places before it, `length` each; None if that is all."""
        if self.window is None or distance == 0:
            return None
        met = min(length, self.window - (distance - 1) * length)
        lower = distance * length - self.window - (length - met)
        return Meeting(met, Band(lower) if lower > 1 - met else Band())

    def most_rows_met(self, length: int) -> int:
        """How many of a device's rows attend keys of other blocks; all, where no meeting is known."""
        met = [self.meeting(distance, length) for distance in self.distances[1:]]
        return max((length if x is None else x.length for x in met), default=length)


class Meeting(NamedTuple):
    """The first `length` rows of a device and as many last keys of a block, which `band` leaves to each other."""

    length: int
    band: Band


def mesh_order(axis_name: Any, mesh_axes: Mapping[Any, int]) -> tuple[Any, tuple[int, ...]] | None:
    """Axes in the order of the mesh, which `lax.ppermute` needs, and the number there of each place in their own order.

    Args:
      axis_name: a mesh axis, or a tuple of several, outermost first, as `lax.axis_index` and shardings count.
      mesh_axes: sizes of all axes, in the order of the mesh.

    Returns:
      None where the two orders are one.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    ordered = tuple(name for name in mesh_axes if name in names)
    if names == ordered or set(names) != set(ordered):
        return None
    numbers = np.arange(math.prod(mesh_axes[name] for name in names)).reshape([mesh_axes[name] for name in ordered])
    return ordered, tuple(int(x) for x in numbers.transpose([ordered.index(name) for name in names]).reshape(-1))


class Settings(NamedTuple):
    """What is static in a checked call.

    `static_band` is what a constant mask was, if it was a band; `static_offset` an offset that is a Python number.
    `ring` says that key and value are one of its blocks; all other arrays with a key axis have that of all of them.
    """

    is_causal: bool
    static_window: tuple[int, int] | None
    static_band: Band
    static_offset: int
    logits_soft_cap: float | None
    dropout: Dropout | None
    block_q: int | None
    block_kv: int | None
    precision: Any
    needs_lse: bool
    needs_max_logits: bool
    implementation: str | None
    is_staged: bool
    ring: Ring | None = None
    static_scale: float | None = None
    score_mod: Program | None = None
    mask_mod: Program | None = None
    mask_block: int = BLOCK


class Arrays(NamedTuple):
    """The arrays of a checked call, named as in `OPERANDS`; None where the call has none.

    query, key, value, bias and mask have rank 4; scale, traced_window (2,) and sinks (N,) are not batched; `head_index`
    numbers the heads for dropout, or is (1, 1) where all share a mask. What is given to `score_mod` and `mask_mod`, and
    what they capture, has names that say its rank; `batch_number` and `head_number` are what they get as indices.
    `tile_classes` and `row_has_key` are a `TiledMask`'s.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    traced_window: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_value_lengths: jax.Array | None = None
    query_segment_ids: jax.Array | None = None
    key_value_segment_ids: jax.Array | None = None
    query_positions: jax.Array | None = None
    key_value_positions: jax.Array | None = None
    query_offset: jax.Array | None = None
    sinks: jax.Array | None = None
    dropout_key: jax.Array | None = None
    head_index: jax.Array | None = None
    batch_number: jax.Array | None = None
    head_number: jax.Array | None = None
    mod_args: Mapping[str, jax.Array] | None = None
    tile_classes: jax.Array | None = None
    row_has_key: jax.Array | None = None


@dataclass(frozen=True)
class Config:
    """The static part of a call.

    `implementation` is what the caller asked for. `rounds_out` asks for out in query's dtype; derivatives need it
    unrounded, in accumulation dtype, and with `adds_rounded` get it rounded too, behind the other results. In a tangent
    pass `rounds_out` says that out was asked for so: its tangent is then rounded in the end, and may be in the kernel.

    `has_all_keys`: whether out and lse, as residuals, are of no more keys than the call has.

    Of some kernels' interest: `static_scale`, the scale if it is a number, and query has 16 bits;
    `has_band_intervals`, whether intervals of rows with a key are those of the band, cut off at `key_value_length`, and
    there are no ids or positions; `differentiates_lse`, of a derivative, whether it is one of lse, too.

    Of functions of scores and indices: `first_row`, from which on rows are numbered, if keys are from 0 on, and both in
    order; None: as `ModOperands` says, as of any block of a ring. `differentiates_args`: of a derivative, whether it is
    one of arguments, too.

    With a `ring`, key and value are the block of this device, and `band` is the mask of that alone. All other operands
    with a key axis have the keys of all blocks, one after the other, and `tile_classes` their tiles; intervals and
    `is_exact` have one for each block, likewise, along T, unless `Ring.window` says it all.
    """

    band: Band
    dropout: Dropout | None
    block_q: int | None
    block_kv: int | None
    precision: Any
    needs_lse: bool
    needs_max_logits: bool = False
    logits_soft_cap: float | None = None
    implementation: str | None = None
    rounds_out: bool = False
    adds_rounded: bool = False
    has_all_keys: bool = True
    ring: Ring | None = None
    static_scale: float | None = None
    has_band_intervals: bool = False
    differentiates_lse: bool = False
    score_mod: Program | None = None
    mask_mod: Program | None = None
    mask_block: int = BLOCK
    first_row: int | None = None
    differentiates_args: bool = False

    @property
    def adds_bias(self) -> bool:
        """Whether a bias, once added, is changed no more: then its derivative is that of the logits."""
        return self.logits_soft_cap is None and self.score_mod is None


class ModOperands(NamedTuple):
    """What `score_mod` and `mask_mod` read; all int32 but the last.

    Attributes:
      batch_number: (batch...), of the call as a user made it; axes that `vmap` added have size 1.
      head_number: (batch..., N), from 0 to the number of all heads.
      query_number: (batch..., T), and key_number: (batch..., S): position, or index.
      args: (batch..., ...) each, by name; see `trace_mod`.
    """

    batch_number: jax.Array
    head_number: jax.Array
    query_number: jax.Array
    key_number: jax.Array
    args: Mapping[str, jax.Array]


class Inputs(NamedTuple):
    """The arrays of a call; any batch axis, and any axis of bias and mask, may have size 1 and then broadcasts.

    Attributes:
      query: (batch..., T, N, H).
      key, value: (batch..., S, K, H) and (batch..., S, K, D).
      scale: (batch...) multiplier of the products, in accumulation dtype.
      bias: (batch..., N, T, S) or None.
      mask: see `MaskOperands`.
      sinks: (batch..., N), a further logit of each head that is in the denominator alone, or None.
      dropout_key: (batch..., 2) uint32, or None without dropout; (batch..., 4) if rows and keys are part of those that
        `Dropout.lengths` says: then with the numbers of the first row and of the first key.
      head_index: (batch..., N) uint32, the number b * N + n of a head in the dropout mask, or None.
      mods: see `ModOperands`, or None without `score_mod` and `mask_mod`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    scale: jax.Array
    bias: jax.Array | None
    mask: MaskOperands
    sinks: jax.Array | None
    dropout_key: jax.Array | None
    head_index: jax.Array | None
    mods: ModOperands | None = None

    @property
    def sizes(self) -> Sizes:
        *_, T, N, H = self.query.shape
        *_, S, K, D = self.value.shape
        arrays = {name: x for name, x in _fields(self).items() if x is not None}
        return Sizes(batch_of(arrays), T, S, K, N // K, H, D)


class Call(NamedTuple):
    """A call as kernels get it. What is decided from it needs no more of the arrays than their types."""

    config: Config
    inputs: Inputs

    @property
    def sizes(self) -> Sizes:
        return self.inputs.sizes


def _fields(inputs: Inputs) -> dict[str, Any]:
    fields = inputs._asdict()
    mask: MaskOperands = fields.pop("mask")
    mods: ModOperands | None = fields.pop("mods")
    numbers = {} if mods is None else mods._asdict()
    args = numbers.pop("args", {})
    return fields | mask._asdict() | numbers | args


def field_names(structure: Any) -> tuple[str, ...]:
    """Names of the leaves of `Inputs` with this tree structure, in order."""
    positions = _fields(jax.tree.unflatten(structure, range(structure.num_leaves)))
    names = {position: name for name, position in positions.items() if position is not None}
    return tuple(names[i] for i in range(structure.num_leaves))


def batch_of(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """The batch axes that these arrays broadcast to."""
    return jnp.broadcast_shapes(*(x.shape[: x.ndim - len(LAYOUTS[name])] for name, x in arrays.items()))


def sum_to(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A result in its prescribed shape, summed over the axes that have size 1 there, and in its dtype."""
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, like.shape, strict=True)) if n != m)
    return (x.sum(axes, keepdims=True) if axes else x).astype(like.dtype)
