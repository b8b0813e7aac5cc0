"""Logits of a tile, in base 2, with bias, soft cap and masks; its dropout.

One block is resident, and lies along the sublanes of a tile of scores; the other is streamed, along the lanes. Which of
the two are the query rows differs from kernel to kernel. A vector of the streamed ones is used as it comes. One of the
resident ones is spread over all lanes once, at the first step, so that no tile moves anything between lanes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.call import Call
from ...._semantics.numerics import LOG2E, bias_floor, lowest
from ..host.operands import Grid, Operand, Place
from ..pallas import LANES, pl, pltpu, repeated, spread

LOWEST = lowest(jnp.float32)  # the logit of a masked key, in base 2 already
_FLOOR = bias_floor(jnp.float32)


class At(NamedTuple):
    """Where a tile is.

    Attributes:
      unit: which of the resident block's rows, a slice of them.
      tile: which of the streamed ones, a slice of the step's.
      resident, streamed: numbers of their first, among all query rows, or keys.
      is_edge: whether there is a mask.
    """

    unit: Any
    tile: Any
    resident: Any
    streamed: Any
    is_edge: bool


class Logits(NamedTuple):
    """Of a tile: in base 2; the derivative of a soft cap, and which scores have one (None: all)."""

    logits: jax.Array
    slope: jax.Array | None
    visible: jax.Array | None


@dataclass(frozen=True)
class Scores:
    """What makes logits of products.

    Attributes:
      call: types suffice.
      grid: of the kernel.
      operands: types of what the kernel reads along T and S.
      scalar_operands: likewise, of scalars.
      sums_rows: whether rows past the last must be masked, as the kernel sums over rows.
      scalars, refs, vectors: references to scalars, blocks and, of vectors of the resident block, spread ones.
      place: of the step.
    """

    call: Call
    grid: Grid
    operands: Mapping[str, Operand]
    scalar_operands: Mapping[str, Operand]
    sums_rows: bool
    scalars: Mapping[str, Any]
    refs: Mapping[str, Any]
    vectors: Mapping[str, Any]
    place: Place

    def spread_vectors(self) -> None:
        for name, ref in self.vectors.items():
            ref[...] = spread(self.refs[name][...])

    def scalar(self, name: str, inner: Any = 0, size: int = 1) -> Any:
        return self.scalars[name][self.grid.own_row(self.place.batch, self.scalar_operands[name].batch) * size + inner]

    @property
    def scale(self) -> Any:
        return self.scalar("scale")

    def vector(self, name: str, at: At) -> jax.Array:
        """Of rows or keys, as broadcasts with a tile."""
        if name in self.vectors:
            return repeated(self.vectors[name][at.unit, :], at.tile.size)
        return self.refs[name][:, at.tile]

    def _term(self, name: str, at: At) -> jax.Array:
        if self.operands[name].axes != "bnts":
            return self.vector(name, at)
        dtype = jnp.int32 if name == "allowed" else jnp.float32
        if self.grid.streams_rows:
            return self.refs[name][at.tile, at.unit].astype(dtype).T
        return self.refs[name][at.unit, at.tile].astype(dtype)

    def rows_and_keys(self, at: At, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Numbers of the query row, and of the key, of each score."""
        resident = at.resident + lax.broadcasted_iota(jnp.int32, shape, 0)
        streamed = at.streamed + lax.broadcasted_iota(jnp.int32, shape, 1)
        return (streamed, resident) if self.grid.streams_rows else (resident, streamed)

    def logits(self, products: jax.Array, at: At) -> Logits:
        config = self.call.config
        x, slope = products * (self.scale * LOG2E), None
        if "bias" in self.operands:
            x = x + jnp.maximum(self._term("bias", at), _FLOOR) * LOG2E
        if config.logits_soft_cap is not None:
            cap = config.logits_soft_cap * LOG2E
            tangent = jnp.tanh(x * (1 / cap))
            x, slope = cap * tangent, 1 - tangent * tangent
        if not at.is_edge:
            return Logits(x, slope, None)
        visible = self._visible(at, x.shape)
        if visible is None:
            return Logits(x, slope, None)
        x = jnp.where(visible, x, LOWEST)
        if "dead" in self.operands:
            dead = self.vector("dead", at) != 0
            # They attend all keys alike, and no derivative goes through them.
            in_length = self._in_length(at, x.shape)
            zero = jnp.zeros_like(x) if in_length is None else jnp.where(in_length, 0.0, LOWEST)
            x = jnp.where(dead, zero, x)
            visible = visible & ~dead
        return Logits(x, slope, visible)

    def _in_length(self, at: At, shape: tuple[int, ...]) -> jax.Array | None:
        """Which scores are of streamed keys, or of rows that are summed, that there are; None: all."""
        rows, keys = self.rows_and_keys(at, shape)
        z, blocks, streams_rows = self.call.sizes, self.grid.blocks, self.grid.streams_rows
        terms = [keys < z.S] if z.S % blocks.tile and not streams_rows else []
        if self.sums_rows and z.T % (blocks.tile if streams_rows else blocks.resident):
            terms.append(rows < z.T)
        return _all(terms)

    def _visible(self, at: At, shape: tuple[int, ...]) -> jax.Array | None:
        rows, keys = self.rows_and_keys(at, shape)
        band, terms = self.call.config.band, []
        if "key_start" in self.operands:
            terms += [keys >= self.vector("key_start", at), keys < self.vector("key_stop", at)]
        else:
            terms += [] if band.lower is None else [keys - rows >= band.lower]
            terms += [] if band.upper is None else [keys - rows <= band.upper]
        in_length = self._in_length(at, shape)
        terms += [] if in_length is None else [in_length]
        if "query_ids" in self.operands:
            terms.append(self.vector("query_ids", at) == self.vector("key_ids", at))
        if "lowest_position" in self.operands:
            terms.append(self.vector("key_positions", at) >= self.vector("lowest_position", at))
        if "highest_position" in self.operands:
            terms.append(self.vector("key_positions", at) <= self.vector("highest_position", at))
        if "allowed" in self.operands:
            terms.append(self._term("allowed", at) != 0)
        return _all(terms)

    def keep(self, at: At, shape: tuple[int, ...]) -> jax.Array | None:
        """Which weights dropout keeps; None without it."""
        dropout, z = self.call.config.dropout, self.call.sizes
        if dropout is None:
            return None
        words = self.call.inputs.dropout_key
        assert words is not None
        count, heads = words.shape[-1], self.scalar_operands["head_index"].array.shape[-1]
        key = [self._word("dropout_key", i, count) for i in range(count)]
        head = self._word("head_index", self.place.head if heads > 1 else 0, heads)
        rows, keys = (x.astype(jnp.uint32) for x in self.rows_and_keys(at, shape))
        return dropout.keep_elements(key, jnp.full(shape, head), rows, keys, lambda x: x, z.T, z.S)

    def _word(self, name: str, inner: Any, size: int) -> Any:
        return self.scalar(name, inner, size).astype(jnp.uint32)

    def drop(self, weights: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Weights, or their derivative, that dropout keeps, rescaled."""
        dropout = self.call.config.dropout
        return weights if keep is None or dropout is None else jnp.where(keep, weights * dropout.rescaling, 0.0)

    def only_of_rows(self, weights: jax.Array, at: At) -> jax.Array:
        """0 behind the last row."""
        if self.call.sizes.T % self.grid.blocks.tile == 0:
            return weights
        rows, _ = self.rows_and_keys(at, weights.shape)
        return jnp.where(rows < self.call.sizes.T, weights, 0.0)

    def without_padding(self, x: jax.Array, at: At, *, is_key: bool) -> jax.Array:
        """Streamed keys or values (or rows) of an edge tile: 0 behind the last, and for NaN and infinities in padding.

        (A weight of 0 would not stop them. Other padding counts, in rows that attend all keys.)
        """
        if not at.is_edge:
            return x
        length = self.call.sizes.S if is_key else self.call.sizes.T
        number = at.streamed + lax.broadcasted_iota(jnp.int32, x.shape, 0)
        if length % self.grid.blocks.tile:
            x = jnp.where(number < length, x, jnp.zeros_like(x))
        if is_key and "key_value_length" in self.scalars:
            is_finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
            x = jnp.where((number < self.scalar("key_value_length")) | is_finite, x, jnp.zeros_like(x))
        return x


def _all(terms: list[jax.Array]) -> jax.Array | None:
    result = None
    for term in terms:
        result = term if result is None else result & term
    return result


def vector_buffers(operands: Mapping[str, Operand], grid: Grid) -> dict[str, Any]:
    """Scratch memory for vectors of the resident block, spread over lanes."""
    letter = "s" if grid.streams_rows else "t"
    return {
        name: pltpu.VMEM((grid.blocks.resident, LANES), x.array.dtype)
        for name, x in operands.items()
        if x.axes == f"bn-{letter}"
    }


def tile_of(grid: Grid, scores_place: Place, tile: Any, unit: int, *, is_edge: bool) -> At:
    """`unit` numbers the units of the resident block; `tile` is one of all, and in the step's block."""
    blocks, at = grid.blocks, scores_place
    resident = at.key_block if grid.streams_rows else at.row_block
    local = (tile - at.major * (blocks.streamed // blocks.tile)) * blocks.tile
    return At(
        pl.ds(unit * blocks.unit, blocks.unit),
        pl.ds(pl.multiple_of(local, blocks.tile), blocks.tile),
        resident * blocks.resident + unit * blocks.unit,
        tile * blocks.tile,
        is_edge,
    )


def parts_of(at: At, size: int | None) -> list[At]:
    """A tile, in parts of so many of the streamed ones."""
    if size is None:
        return [at]
    return [
        at._replace(tile=pl.ds(pl.multiple_of(at.tile.start + start, size), size), streamed=at.streamed + start)
        for start in range(0, at.tile.size, size)
    ]
