"""Which tiles a function of indices leaves empty, full or in part, found once, in memory for the tiles alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .masks import MaskOperands
from .mods import Program, args_of
from .sizes import static_size

EMPTY, PARTIAL, FULL = range(3)
BLOCK = 128  # rows and keys of a tile; kernels join several for theirs
_MOST_ELEMENTS = 1 << 22  # of a step, with which a GPU is busy; or one block of rows

Elements = Callable[[jax.Array, jax.Array], jax.Array]
"""From the places of some rows and keys, (t,) and (s,), what is allowed: (B or 1, N or 1, t, s)."""


class Tiles(NamedTuple):
    """Attributes:

    classes: (B or 1, N or 1, ceil(T / block), ceil(S / block)) int8: `EMPTY`, `PARTIAL` or `FULL`.
    has_key: (B or 1, N or 1, T) bool: whether a row may attend any key.
    """

    classes: jax.Array
    has_key: jax.Array


def find_tiles(elements: Elements, T: int, S: int, block: int = BLOCK) -> Tiles:
    """The classes of all tiles, some blocks of rows at a time."""

    def by(find: Callable[[Elements, int, int, int], tuple[jax.Array, jax.Array]]) -> Tiles:
        classes, has_key = (jnp.moveaxis(x, 0, -3) for x in find(elements, T, S, block))
        classes = classes.reshape(*classes.shape[:-3], -1, classes.shape[-1])
        return Tiles(classes[..., : -(-T // block), :], has_key.reshape(*has_key.shape[:-3], -1)[..., :T])

    return lax.platform_dependent(cpu=lambda: by(_by_rows), default=lambda: by(_by_counts))


def _by_rows(elements: Elements, T: int, S: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Of each step (steps, B or 1, N or 1, 1, tiles), and (steps, B or 1, N or 1, 1, rows): XLA:CPU vectorises that."""
    num_keys = -(-S // block)

    def of_rows(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = _of_block(elements, first, block, T, S, num_keys * block)
        tiles = (x.reshape(*x.shape[:-1], num_keys, block) for x in (found.any(-2), found.all(-2)))
        some, every = next(tiles).any(-1), next(tiles).all(-1)
        return _classes(some, every)[..., None, :], found.any(-1)[..., None, :]

    return lax.map(of_rows, jnp.arange(0, T, block, dtype=jnp.int32))


def _by_counts(elements: Elements, T: int, S: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Likewise, with several blocks of rows in a step: one kernel evaluates all elements, and writes sums of rows."""
    num_rows, num_keys = -(-T // block), -(-S // block)
    lead = jax.eval_shape(lambda: elements(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))).shape[:-2]
    most = _MOST_ELEMENTS // (static_size(lead) * block * num_keys * block)
    step = max(1, min(num_rows, most))

    def of_rows(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = _of_block(elements, first, step * block, T, S, num_keys * block)
        counts = found.reshape(*found.shape[:-1], num_keys, block).sum(-1, dtype=jnp.int32)
        tiles = counts.reshape(*counts.shape[:-2], step, block, num_keys).sum(-2)
        has_key = (counts > 0).any(-1)
        return _classes(tiles > 0, tiles == block * block), has_key.reshape(*has_key.shape[:-1], step, block)

    return lax.map(of_rows, jnp.arange(0, num_rows, step, dtype=jnp.int32) * block)


def _of_block(elements: Elements, first: jax.Array, rows: int, T: int, S: int, columns: int) -> jax.Array:
    """What is beyond the last repeats it, which changes neither 'any' nor 'all'."""
    at_rows, at_keys = (jnp.arange(n, dtype=jnp.int32) for n in (rows, columns))
    found = elements(jnp.minimum(first + at_rows, T - 1), jnp.minimum(at_keys, S - 1))
    return jnp.broadcast_to(found, (*found.shape[:-2], rows, columns))


def _classes(some: jax.Array, every: jax.Array) -> jax.Array:
    return jnp.where(every, FULL, jnp.where(some, PARTIAL, EMPTY)).astype(jnp.int8)


def regrouped(classes: jax.Array, block: int, axis: int, length: int, size: int) -> jax.Array:
    """Classes of tiles that have `size` in place of `block` rows or keys along an axis, from those that they meet."""
    if size == block:
        return classes
    first = jnp.arange(0, length, size, dtype=jnp.int32)
    most = max((min(x + size, length) - 1) // block - x // block for x in range(0, length, size)) + 1
    return _of_met(classes, block, axis, first, jnp.minimum(first + size, length) - 1, most)


def part(classes: jax.Array, block: int, axis: int, start: jax.Array, length: int) -> jax.Array:
    """Classes of the tiles of `length` rows or keys from `start` on, which they may cut."""
    first = start + jnp.arange(0, length, block, dtype=jnp.int32)
    return _of_met(classes, block, axis, first, jnp.minimum(first + block, start + length) - 1, 2)


def _of_met(classes: jax.Array, block: int, axis: int, first: jax.Array, last: jax.Array, most: int) -> jax.Array:
    """Of tiles with these first and last rows or keys, from those that they meet, at most so many."""
    met = jnp.minimum(first[:, None] // block + jnp.arange(most, dtype=jnp.int32)[None], last[:, None] // block)
    found = jnp.take(classes, met, classes.ndim + axis)
    within = found.ndim + axis
    least, largest = found.min(within), found.max(within)
    return jnp.where(least == FULL, FULL, jnp.where(largest == EMPTY, EMPTY, PARTIAL)).astype(jnp.int8)


def elements_of(program: Program, numbers: tuple[jax.Array, ...], args: Any) -> Elements:
    """Of a `mask_mod`.

    Args:
      numbers: of batch rows (B,), heads (N,), query rows (B or 1, T) and keys (B or 1, S), as the program gets them.
      args: by name.
    """
    batch, heads, rows, keys = numbers
    args = [x.reshape(1, 1, 1, 1, *x.shape) for x in args_of(program, args).values()]

    def elements(at_rows: jax.Array, at_keys: jax.Array) -> jax.Array:
        given = (
            batch[:, None, None, None],
            heads[None, :, None, None],
            rows[:, None, at_rows, None],
            keys[:, None, None, at_keys],
        )
        none = jnp.zeros((1, 1, 1, 1), jnp.int32)
        return program([x if flag else none for x, flag in zip(given, program.uses, strict=True)], args)

    return elements


def and_masks(elements: Elements, mask: MaskOperands) -> Elements:
    """What both leave; of a mask that has intervals."""
    start, stop = mask.key_start, mask.key_stop
    assert start is not None
    assert stop is not None

    def both(rows: jax.Array, keys: jax.Array) -> jax.Array:
        def some(x: jax.Array) -> jax.Array:
            x = x if x.shape[-2] == 1 else x[..., rows, :]
            return x if x.shape[-1] == 1 else x[..., keys]

        first, end = (x if x.shape[-1] == 1 else x[..., rows] for x in (start, stop))
        places = keys.reshape((1,) * first.ndim + (-1,))
        allowed = (places >= first[..., None]) & (places < end[..., None])
        others = (elements(rows, keys), None if mask.allowed is None else some(mask.allowed), mask.matches(some))
        return functools.reduce(jnp.logical_and, [x for x in others if x is not None], allowed)

    return both


class MaskMod(NamedTuple):
    """A `mask_mod` of a call: what it leaves, in tiles of which size, and which these are, if that is known."""

    elements: Elements
    block: int = BLOCK
    known: Tiles | None = None

    def from_key(self, first: jax.Array) -> "MaskMod":
        """Of the keys from that place on, whose tiles are not known."""
        return MaskMod(lambda rows, keys: self.elements(rows, first + keys), self.block)

    def tiles(self, T: int, S: int) -> Tiles:
        return find_tiles(self.elements, T, S, self.block) if self.known is None else self.known


@dataclass(frozen=True)
class TiledMask:
    """A `mask_mod` whose tiles have been classified, for any number of calls; made by `make_tile_mask`.

    Its arrays are leaves of a pytree, so that it can be handed to jitted functions.

    Attributes:
      classes: (B or 1, N or 1, ceil(T / block), ceil(S / block)) int8: 0 for an empty tile, 1 in part, 2 full.
      has_key: (B or 1, N or 1, T) bool: whether a row may attend any key.
      args: further arguments of the function.
      mask_mod: the function.
      lengths: T and S.
      block: rows and keys of a tile.
    """

    classes: jax.Array
    has_key: jax.Array
    args: tuple[Any, ...]
    mask_mod: Callable[..., Any]
    lengths: tuple[int, int]
    block: int


jax.tree_util.register_dataclass(
    TiledMask, data_fields=["classes", "has_key", "args"], meta_fields=["mask_mod", "lengths", "block"]
)
