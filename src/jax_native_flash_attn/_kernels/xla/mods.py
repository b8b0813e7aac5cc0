"""Functions of scores and of indices, for a tile; their derivatives are JAX's own, of the functions themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, ModOperands
from ..._semantics.mods import Program, args_of
from ..._semantics.numerics import bias_floor
from ..._semantics.operands import LAYOUTS
from .access import ColumnTile, RowTile, TileAccess


@dataclass(frozen=True)
class TileMod:
    """A program on the axes of a tile: (batch..., heads, block_q, G, block_kv), as its rows are ordered.

    Attributes:
      access: axes of a tile.
      program: what is evaluated.
      operands: what it reads.
    """

    access: TileAccess
    program: Program
    operands: ModOperands

    @property
    def _args(self) -> dict[str, jax.Array]:
        return args_of(self.program, self.operands.args)

    def _in_order(self, x: jax.Array) -> jax.Array:
        """(batch..., heads, G, block_q, block_kv) -> as rows are ordered, and back."""
        return x if self.access.tile.is_sharded else jnp.swapaxes(x, -3, -2)

    def _indices(self, at: RowTile, columns: ColumnTile) -> list[jax.Array]:
        """Batch, head, row and key numbers, with axes of size 1; 0 for what the program does not read."""
        access, tile, mods = self.access, self.access.tile, self.operands
        ends = (1,) * 4
        batch = access.slice(mods.batch_number, at.batch, tile.batch)
        head = access.head_slice(mods.head_number, at)
        rows = access.slice(mods.query_number, (*at.batch, at.row), (*tile.batch, tile.block_q))
        keys = access.slice(mods.key_number, (*at.batch, columns.column), (*tile.batch, tile.block_kv))
        found = [
            batch.reshape(*batch.shape, *ends),
            self._in_order(head[..., None, None]),
            self._in_order(rows[..., None, None, :, None]),
            keys[..., None, None, None, :],
        ]
        none = jnp.zeros((1,) * found[0].ndim, jnp.int32)
        return [x if is_used else none for x, is_used in zip(found, self.program.uses, strict=True)]

    def _arg(self, name: str, x: jax.Array, at: RowTile, full: tuple[bool, ...] | None = None) -> jax.Array:
        """An argument, or what is shaped like one, with axes of size 1 for those of a tile; `full`: batch axes."""
        batch, own = self.access.tile.batch, x.shape[x.ndim - len(LAYOUTS[name]) :]
        x = self.access.slice(x, (*at.batch, *(0,) * len(own)), (*batch, *own))
        if full is not None:
            x = jnp.broadcast_to(
                x, (*(n if flag else m for n, m, flag in zip(batch, x.shape, full, strict=False)), *own)
            )
        return x.reshape(*x.shape[: len(batch)], *(1,) * 4, *own)

    def mask(self, at: RowTile, columns: ColumnTile) -> jax.Array:
        """What a program without a score gives for a tile, (lead..., rows, block_kv); axes may have size 1."""
        args = [self._arg(name, x, at) for name, x in self._args.items()]
        found = self.program(self._indices(at, columns), args)
        return self.access.inside(self._in_order(found))

    def _outside(self, x: jax.Array) -> jax.Array:
        """A tile, (lead..., rows, block_kv), on the program's axes."""
        access, tile = self.access, self.access.tile
        x = jnp.broadcast_to(x, (*access.row_shape, tile.block_kv))
        inner = (access.sizes.G, tile.block_q) if tile.is_sharded else (tile.block_q, access.sizes.G)
        return x.reshape(*tile.batch, tile.heads, *inner, tile.block_kv)

    def _inside(self, x: jax.Array) -> jax.Array:
        """The inverse of `_outside`."""
        return x.reshape(*self.access.row_shape, self.access.tile.block_kv)


@dataclass(frozen=True)
class ScoreMod(TileMod):
    """Scores and their tangents and cotangents are tiles, (lead..., rows, block_kv)."""

    @classmethod
    def of(cls, access: TileAccess, call: Call) -> "ScoreMod | None":
        program, operands = call.config.score_mod, call.inputs.mods
        return None if program is None or operands is None else cls(access, program, operands)

    def _apply(self, score: jax.Array, args: Mapping[str, jax.Array], indices: list[jax.Array]) -> jax.Array:
        result = self.program((self._outside(score), *indices), list(args.values()))
        return self._inside(result)

    def _args_at(self, at: RowTile) -> dict[str, jax.Array]:
        return {name: self._arg(name, x, at) for name, x in self._args.items()}

    def score(self, score: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """What becomes of the scores of a tile. -inf is a score like that of a bias of -inf."""
        result = self._apply(score, self._args_at(at), self._indices(at, columns))
        return jnp.maximum(result, bias_floor(result.dtype))

    def tangent(
        self,
        score: jax.Array,
        dscore: jax.Array | None,
        tangents: Mapping[str, jax.Array],
        at: RowTile,
        columns: ColumnTile,
    ) -> jax.Array | None:
        """Of `score`, of those of the tangents that are its own; None if there is none."""
        indices, args = self._indices(at, columns), self._args_at(at)
        dargs = {name: self._arg(name, x, at) for name, x in tangents.items() if name in args}
        if dscore is None and not dargs:
            return None
        for name, x in dargs.items():
            shape = jnp.broadcast_shapes(args[name].shape, x.shape)
            args[name], dargs[name] = jnp.broadcast_to(args[name], shape), jnp.broadcast_to(x, shape)
        dscore = jnp.zeros_like(score) if dscore is None else dscore
        shape = jnp.broadcast_shapes(score.shape, dscore.shape)
        score, dscore = jnp.broadcast_to(score, shape), jnp.broadcast_to(dscore, shape).astype(score.dtype)
        dargs = {name: x.astype(args[name].dtype) for name, x in dargs.items()}

        def function(score: jax.Array, varying: dict[str, jax.Array]) -> jax.Array:
            return self._apply(score, args | varying, indices)

        return jax.jvp(function, (score, {name: args[name] for name in dargs}), (dscore, dargs))[1]

    def cotangent(
        self,
        score: jax.Array,
        dresult: jax.Array,
        results: Mapping[str, jax.Array],
        at: RowTile,
        columns: ColumnTile,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """That of the scores; and, of the results, those for its arguments with what this tile adds."""
        indices, args, n = self._indices(at, columns), self._args_at(at), len(self.access.tile.batch)
        wanted = {name: x for name, x in results.items() if name in args}
        # One for each batch row, where they are not to be added up.
        for name, x in wanted.items():
            full = tuple(size != 1 for size in x.shape[:n])
            args[name] = self._arg(name, self._args[name], at, full)

        def function(score: jax.Array, varying: dict[str, jax.Array]) -> jax.Array:
            return self._apply(score, args | varying, indices)

        result, pull = jax.vjp(function, score, {name: args[name] for name in wanted})
        dscore, dargs = pull(dresult.astype(result.dtype))
        dscore = dscore.astype(dresult.dtype)
        return dscore, {
            name: self.access.add_arg(wanted[name], x.reshape(*x.shape[:n], *x.shape[n + 4 :]), at)
            for name, x in dargs.items()
        }
