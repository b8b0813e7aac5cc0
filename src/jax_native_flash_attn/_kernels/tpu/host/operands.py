"""Arrays as kernels read them, by name, and the block of each that a step of the grid gets.

Query, key and value come with heads in front of rows, (batch, heads, rows, columns), as a block must be whole in the
last two axes. XLA transposes them where they are made. Batch axes are one axis here, and broadcast as before. What
varies by query row or by key alone is a vector along the last axis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Call
from ..blocks import Blocks
from ..pallas import pl


class Operand(NamedTuple):
    """An array (batch, ...) whose first axis stands for those of `batch`; a letter for each axis: see `Grid.spec`."""

    array: jax.Array
    axes: str
    batch: tuple[int, ...]


class Place(NamedTuple):
    """Of a step: batch row, query head, block of query rows and block of keys; `major` counts streamed blocks."""

    batch: Any
    head: Any
    row_block: Any
    key_block: Any
    major: Any


@dataclass(frozen=True)
class Grid:
    """The steps of a kernel, and what each reads.

    The axes are batch rows, heads, resident blocks, and streamed blocks; where rows are streamed, heads are those of
    keys, and the query heads of a group stand before the streamed blocks.

    Attributes:
      batch: sizes of the batch axes.
      heads, group: N and G.
      resident: number of resident blocks.
      steps: of streamed blocks; those of a resident block are the first of these.
      blocks: their shape.
      ranges: batch axes of the tile ranges.
      streams_rows: whether query rows are streamed, past resident keys.
    """

    batch: tuple[int, ...]
    heads: int
    group: int
    resident: int
    steps: int
    blocks: Blocks
    ranges: tuple[int, ...]
    streams_rows: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        batch = math.prod(self.batch)
        if self.streams_rows:
            return batch, self.heads // self.group, self.resident, self.group, self.steps
        return batch, self.heads, self.resident, self.steps

    @property
    def parallel(self) -> int:
        return 3

    def own_row(self, batch_row: Any, own: tuple[int, ...]) -> Any:
        """The row of an array with batch axes `own`, which may broadcast, of one of all batch rows."""
        if own == self.batch or math.prod(own) == 1:
            return batch_row if own == self.batch else 0
        index, stride = 0, 1
        for size, n in zip(reversed(self.batch), reversed(own), strict=True):
            at = lax.rem(batch_row, jnp.int32(size))
            batch_row = lax.div(batch_row, jnp.int32(size))
            index, stride = (index, stride) if n == 1 else (index + at * stride, stride * n)
        return index

    def range_of(self, ranges: Any, batch_row: Any, block: Any) -> tuple[Any, ...]:
        """First, first full, end of the full, and end of the tiles of a resident block."""
        at = (self.own_row(batch_row, self.ranges) * self.resident + block) * 4
        return tuple(ranges[at + i] for i in range(4))

    def place(self, ids: tuple[Any, ...], ranges: Any) -> Place:
        """Past the last streamed block that has tiles it stays there, so that nothing is read again."""
        batch, head, block, *others = ids
        first, _, _, stop = self.range_of(ranges, batch, block)
        tiles = jnp.int32(self.blocks.streamed // self.blocks.tile)
        first_major = lax.div(first, tiles)
        major = first_major + others[-1]
        streamed = jnp.minimum(major, jnp.maximum(lax.div(stop - 1, tiles), first_major))
        if self.streams_rows:
            # (No tile at all: the range may then begin behind the last row.)
            return Place(batch, head * self.group + others[0], streamed, block, major)
        return Place(batch, head, block, streamed, major)

    def spec(self, x: Operand) -> Any:
        """b batch rows, n query heads, k key heads, t query rows, s keys, whole axes are -. Heads may broadcast."""
        rows, keys = self.blocks.resident, self.blocks.streamed
        sizes = {"t": keys, "s": rows} if self.streams_rows else {"t": rows, "s": keys}
        shape = tuple(
            None if letter in "bnk" else sizes.get(letter, n) for letter, n in zip(x.axes, x.array.shape, strict=True)
        )

        def index(*ids_and_scalars: Any) -> tuple[Any, ...]:
            count = len(self.sizes)
            at = self.place(ids_and_scalars[:count], ids_and_scalars[count])
            where = {
                "b": self.own_row(at.batch, x.batch),
                "n": at.head,
                "k": lax.div(at.head, jnp.int32(self.group)),
                "t": at.row_block,
                "s": at.key_block,
            }
            return tuple(
                where[letter] if letter in where and (n > 1 or letter not in "nk") else 0
                for letter, n in zip(x.axes, x.array.shape, strict=True)
            )

        return pl.BlockSpec(shape, index)


def with_heads_first(x: jax.Array, axes: str) -> Operand:
    """(batch..., rows, heads, columns)"""
    return flat(jnp.swapaxes(x, -2, -3), axes)


def flat(x: jax.Array, axes: str) -> Operand:
    """Of an array with several batch axes in place of that of `axes`."""
    own = x.shape[: x.ndim - len(axes) + 1]
    return Operand(x.reshape(-1, *x.shape[len(own) :]), axes, own)


def unflat(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    return x.reshape(*batch, *x.shape[1:])


class Masks(NamedTuple):
    """What kernels read beside query, key and value, by name."""

    operands: dict[str, Operand]
    scalars: dict[str, Operand]


def of_masks(call: Call) -> Masks:
    """Bias, masks, scale and dropout of a call."""
    config, inputs = call
    mask, z = inputs.mask, inputs.sizes
    operands: dict[str, Operand] = {}
    for name in ("key_start", "key_stop", "dead"):
        if (x := getattr(mask, name)) is not None:
            x = jnp.broadcast_to(x, (*x.shape[:-1], z.T)).astype(jnp.int32)
            operands[name] = flat(x[..., None, :], "bn-t")
    if mask.is_exact is not None:
        for name in ("query_ids", "lowest_position", "highest_position"):
            if (x := getattr(mask, name)) is not None:
                operands[name] = flat(jnp.swapaxes(x, -1, -2), "bn-t")
        for name in ("key_ids", "key_positions"):
            if (x := getattr(mask, name)) is not None:
                operands[name] = flat(x, "bn-s")
    if inputs.bias is not None:
        bias = inputs.bias if inputs.bias.dtype == jnp.bfloat16 else inputs.bias.astype(jnp.float32)
        operands["bias"] = _term(bias, z.S)
    if mask.allowed is not None:
        # Bytes, where there are many.
        is_matrix = min(mask.allowed.shape[-2:]) > 1
        operands["allowed"] = _term(mask.allowed.astype(jnp.int8 if is_matrix else jnp.int32), z.S)
    scalars = {"scale": flat(inputs.scale, "b")}
    if mask.key_value_length is not None:
        scalars["key_value_length"] = flat(mask.key_value_length, "b")
    if config.dropout is not None and inputs.dropout_key is not None and inputs.head_index is not None:
        # As int32, which scalar memory holds.
        key, heads = (lax.bitcast_convert_type(x, jnp.int32) for x in (inputs.dropout_key, inputs.head_index))
        scalars |= {"dropout_key": flat(key, "b-"), "head_index": flat(heads, "bn")}
    return Masks(operands, scalars)


def _term(x: jax.Array, S: int) -> Operand:
    """A bias or boolean mask (batch..., N or 1, T or 1, S or 1)."""
    *_, rows, keys = x.shape
    if rows > 1 and keys > 1:
        return flat(x, "bnts")
    if x.dtype == jnp.bfloat16:
        x = x.astype(jnp.float32)
    if rows > 1:
        return flat(jnp.swapaxes(x, -1, -2), "bn-t")
    return flat(jnp.broadcast_to(x, (*x.shape[:-1], S)), "bn-s")


def term_bytes(call: Call) -> int:
    """Of one score, of bias and mask over T and S."""
    terms = call.inputs.bias, call.inputs.mask.allowed
    return sum(
        1 if x.dtype == jnp.bool_ else min(4, x.dtype.itemsize)
        for x in terms
        if x is not None and min(x.shape[-2:]) > 1
    )


def scalar_vectors(scalars: Mapping[str, Operand]) -> dict[str, jax.Array]:
    return {name: x.array.reshape(-1) for name, x in scalars.items()}
