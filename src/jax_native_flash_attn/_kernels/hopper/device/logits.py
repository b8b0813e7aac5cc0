"""Base-2 logits of a tile from its products: scale, bias, masks and dropout, with the meaning of `Tiles.logits`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.numerics import LN2, LOG2E, lowest
from ..operands import LogitTerm, TermKind
from ..pallas import COLUMN, ROW, broadcast_index, columns_of, iota, load, pl, plgpu, spread
from .context import KernelContext
from .mod_reads import Place
from .mods import TileMods
from .overlap import where_allowed, widened
from .terms import RowVectors, TileTerms
from .transfers import TermRefs
from .units import Unit, split_scale

# Biases are clipped at the first; `MASKED` is below, also with a bias; the second stands in place of logits that a mask
# of rows and keys excludes. All are finite in base 2.
_FLOOR, _OUTSIDE = -(2.0**124), -(2.0**126)


class TileLogits:
    """Logits of tiles of one head, in the registers of one warpgroup: (block_q, block_kv), or transposed."""

    def __init__(
        self,
        context: KernelContext,
        head: tuple,
        *,
        row_in_block: Any = 0,
        transposed: bool = False,
        scale: Any = None,
        starts_with_addend: bool = False,
        scales_cap: bool = False,
        scalars: Any = None,
    ):
        """`row_in_block` is where this warpgroup's rows start in the buffers (or, transposed, the number of its tile),
        `head` the index (batch..., N).

        `scale`, and `scalars` of `read_scalars`, are read here unless they were before. With `scales_cap` the tangents
        of `changed` come multiplied.
        """
        self.context, self.config, self.intervals = context, context.config, context.intervals
        self.terms, self.head, self.row_in_block = context.terms, head, row_in_block
        self.block_q, self.block_kv = block_q, block_kv = context.blocks.block_q, context.blocks.block_kv
        self.is_transposed, self.q_axis = transposed, int(transposed)
        self.shape = (block_kv, block_q) if transposed else (block_q, block_kv)
        self.q_layout, self.kv_layout = (COLUMN, ROW) if transposed else (ROW, COLUMN)
        ref = context.operands.scale
        self.scale = ref[broadcast_index(head[:-1], ref.shape)] if scale is None else scale
        mask = self.terms.mask
        self.has_terms = self.terms.bias is not None or mask is not None or self.config.score_mod is not None
        # A mask of keys is added.
        self.adds_mask = mask is not None and mask.term.kind is TermKind.COLUMNS
        self.scales_cap = scales_cap
        mods, layouts = context.operands.mods, (self.q_layout, self.kv_layout)
        self.mods = None if mods is None else TileMods(mods, head, self.shape, self.q_axis, layouts, scalars)
        self.starts_with_addend = starts_with_addend
        # With such a start, what queries are to be multiplied by, and the unit that logits then come in.
        self.power, self.unit = None, Unit()
        if self.starts_with_addend:
            # What else is computed of an addend takes the division in.
            is_loaded = self.config.score_mod is None and not self.adds_mask
            self.power, self.unit = split_scale(self.scale, into_power=is_loaded)

    def rows(self, row: Any, *, late: bool = False, is_whole: Any = None) -> RowVectors:
        """Of the rows from `row` on; `late` loads intervals only in tiles that need a mask.

        `is_whole`: as of `Intervals`, if it was read before.
        """
        bias, mask = self.row_vector(self.terms.bias, row), self.row_vector(self.terms.mask, row)
        if self.mods is not None and not self.is_transposed:  # along the columns, vectors take many registers
            self.mods.load_rows(row)
        load = functools.partial(self.intervals.rows, self.head, row, self.block_q, self.q_layout)
        is_whole = self.intervals.is_whole(self.head, row) if is_whole is None else is_whole
        return RowVectors(row, load if late else load(), bias, mask, is_whole)

    def row_vector(self, refs: TermRefs | None, row: Any) -> jax.Array | None:
        """Of the rows from `row` on, of a term that varies in these alone."""
        if refs is None or refs.term.kind is not TermKind.ROWS:
            return None
        return self._vector(refs.term, row, self.block_q, self.q_layout)

    def of_rows(self, x: jax.Array) -> jax.Array:
        """A value for each query row, in the shape of a tile."""
        return spread(x, self.shape, self.q_axis)

    def _vector(self, term: LogitTerm, start: Any, count: int, layout: Any) -> jax.Array:
        ref = term.array
        index = (*broadcast_index(self.head, ref.shape[:-1]), pl.ds(start, count))
        return load(ref.at[index], layout=layout)

    def term(self, refs: TermRefs | None, row_vector: jax.Array | None, tile: Any, slot: Any) -> jax.Array | None:
        """A tile of bias or mask, in registers."""
        if refs is None:
            return None
        if row_vector is not None:
            return self.of_rows(row_vector)
        if refs.term.kind is TermKind.COLUMNS:
            if refs.buffer is None:
                x = self._vector(refs.term, tile * self.block_kv, self.block_kv, self.kv_layout)
            else:
                x = load(refs.buffer.at[slot], layout=self.kv_layout)
            return spread(x, self.shape, 1 - self.q_axis)
        assert refs.buffer is not None
        if self.is_transposed:  # a tile of its own for each warpgroup
            buffer = refs.buffer.at[slot, self.row_in_block]
            if not refs.is_bits:
                return plgpu.layout_cast(load(buffer.T, layout=plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)
        else:
            buffer = refs.buffer.at[slot, pl.ds(self.row_in_block, self.block_q)]
        return load(buffer, layout=plgpu.Layout.WGMMA, optimized=not refs.is_bits)

    def tile_terms(self, rows: RowVectors, tile: Any, slot: Any = None, *, masked: bool = True) -> TileTerms:
        """Bias and mask of a tile; of a mask over rows and keys, its bits. `masked`: whether it may need a mask."""
        bias = self.term(self.terms.bias, rows.bias, tile, slot)
        mask = self.term(self.terms.mask, rows.mask, tile, slot)
        read = () if self.mods is None else self.mods.read_keys(self.place(rows, tile), masked=masked)
        return TileTerms(mask, bias, read)

    def tile_terms_before_products(self, rows: RowVectors, tile: Any, slot: Any, *, masked: bool = True) -> TileTerms:
        """As `tile_terms`, read before the next products are issued: behind them, the softmax would wait for it."""
        terms = self.tile_terms(rows, tile, slot, masked=masked)
        # The barrier has no lowering for bytes.
        is_late = terms.mask is not None and terms.mask.dtype == jnp.int8
        early = terms._replace(mask=None) if is_late else terms
        if early.mask is None and early.bias is None and not early.read:
            return terms
        early = lax.optimization_barrier(early)
        return early._replace(mask=terms.mask) if is_late else early

    def place(self, rows: RowVectors, tile: Any, read: tuple[jax.Array, ...] = ()) -> Place:
        return Place(rows.row, tile * self.block_kv, read)

    def __call__(
        self,
        products: jax.Array,
        terms: TileTerms,
        rows: RowVectors,
        tile: Any,
        multiplier: Any,
        masked: Any,
        then: Callable[[Any, Any], Any],
    ) -> Any:
        """`then(x, factor)`, where the base-2 logits are x * factor; factor is None for 1.

        With bias, mask or `score_mod`, x is in base e and factor LOG2E: what is added then needs no scaling, and base 2
        comes with the subtraction of the maximum (see `to_base_2`). If the products have started with an addend, x is
        in `unit`, and factor without meaning.

        Products, terms and multiplier (of the products, in base 2) are as `changed` returned them. `masked` is True,
        False, or a scalar known at run time; `then` is part of what is chosen by it. (A pipeline of
        one loop whose step branches is faster than one of a loop for each kind of tile: the compiler keeps the products
        of several from overlapping.)
        """
        in_mask = terms.mask

        def full(products: jax.Array) -> tuple[Any, Any]:
            """In a tile that all rows' intervals cover, which has no dead row."""
            if not self.has_terms:
                return products, multiplier
            x = products if self.starts_with_addend else products * (multiplier * LN2)
            addends = [] if terms.bias is None else [self.clipped(terms.bias)]
            addends += [in_mask] if self.adds_mask and in_mask is not None else []
            if addends:
                x = x + functools.reduce(jnp.add, addends)
            return (x if self.adds_mask or in_mask is None else where_allowed(in_mask, x, _OUTSIDE)), LOG2E

        def edge(products: jax.Array, *, compares: bool = False, is_whole: bool = False) -> tuple[Any, Any]:
            """`compares` ids and positions, element by element; `is_whole`: see `Intervals`."""
            x, factor = full(products)
            outside = _OUTSIDE
            if not self.has_terms:
                x, factor, outside = x * self._apart(factor), None, lowest(jnp.float32)
            if self.config.mask_mod is not None and self.mods is not None:
                # Else the compiler would compare what was read before, in front of the products, and keep all results.
                read = lax.optimization_barrier(terms.read) if terms.read else ()
                x = jnp.where(self.mods.mask(self.place(rows, tile, read)), x, outside)
                if is_whole:
                    S, key = self.context.sizes.S, iota(self.shape, 1 - self.q_axis) + tile * self.block_kv
                    return (jnp.where(key < S, x, outside) if S % self.block_kv else x), factor
                x = lax.optimization_barrier(x)  # or vectors of this and those behind would be in registers at once
            pair = rows.pair()
            allowed = self.intervals.allowed(pair, self.head, rows.row, tile * self.block_kv, self.shape, self.q_axis)
            dead = self.intervals.dead(pair, self.head, rows.row, self.shape, self.q_axis)
            elements = [in_mask == 0] if self.adds_mask and in_mask is not None else []
            if compares:
                layouts = self.kv_layout, self.q_layout
                column = tile * self.block_kv
                elements.append(self.intervals.matches(self.head, rows.row, column, self.shape, self.q_axis, layouts))
            for x_allowed in elements:
                allowed = allowed & (x_allowed if dead is None else x_allowed | dead)
            if dead is not None:
                x = jnp.where(dead, 0.0, x)
            return jnp.where(allowed, x, outside), factor

        def masked_tile(products: jax.Array) -> Any:
            if rows.is_whole is None:
                return usual_tile(products)
            return lax.cond(
                rows.is_whole,
                lambda p: lax.optimization_barrier(then(*edge(p, is_whole=True))),
                lambda p: lax.optimization_barrier(usual_tile(p)),
                products,
            )

        def usual_tile(products: jax.Array) -> Any:
            if self.intervals.elements is None:
                return then(*edge(products))
            return lax.cond(
                self.intervals.decides_elements,
                lambda p: lax.optimization_barrier(then(*edge(p, compares=True))),
                lambda p: then(*edge(p)),
                products,
            )

        if isinstance(masked, bool):
            return masked_tile(products) if masked else then(*full(products))
        # The barrier keeps what both kinds of tile do last in the branch, where it is fused with what comes before.
        return lax.cond(masked, lambda p: lax.optimization_barrier(masked_tile(p)), lambda p: then(*full(p)), products)

    def _apart(self, factor: Any) -> jax.Array:
        """The same numbers, one for each row of the tile; to the compiler, others.

        It would take a product that both kinds of tile compute out of the branch, and out of a fused multiply-add.
        """
        rows = plgpu.layout_cast(jnp.full((self.shape[0],), factor, jnp.float32), ROW)
        return columns_of(lax.optimization_barrier(rows), self.shape)

    @property
    def floor(self) -> Any:
        """At which biases are clipped."""
        return (0.5 * _FLOOR) * self.unit.ceiling if self.starts_with_addend else _FLOOR

    def clipped(self, bias: jax.Array) -> jax.Array:
        """In float32. A bfloat16 bias is clipped before, two elements at a time.

        What it is divided by is above half the ceiling: so is the floor then.
        """
        floor = self.floor
        if bias.dtype == jnp.bfloat16:
            return widened(jnp.maximum(bias, jnp.asarray(floor, jnp.bfloat16)))
        return jnp.maximum(bias.astype(jnp.float32), floor)

    def through_mask(self, x: jax.Array, rows: RowVectors, tile: Any, masked: Any) -> jax.Array:
        """Cotangents of logits: zero in dead rows, whose logits are constant.

        Masked ones have no weight, and so are zero but for NaN in padding (0 * NaN).
        """
        if not self.intervals.has_constant_logits:
            return x

        def edge(x: jax.Array) -> jax.Array:
            pair = rows.pair()
            dead = self.intervals.dead(pair, self.head, rows.row, self.shape, self.q_axis)
            if self.intervals.has_length:
                column = tile * self.block_kv
                allowed = self.intervals.allowed(pair, self.head, rows.row, column, self.shape, self.q_axis)
                x = jnp.where(allowed, x, 0.0)
            return x if dead is None else jnp.where(dead, 0.0, x)

        if rows.is_whole is not None:
            masked = jnp.logical_and(masked, jnp.logical_not(rows.is_whole))
        if isinstance(masked, bool):
            return edge(x) if masked else x
        return lax.cond(masked, edge, lambda x: x, x)

    def drop(self, weights: jax.Array, row: Any, tile: Any) -> jax.Array:
        """Weights (or what multiplies them) that dropout keeps, not yet rescaled; the others zero."""
        dropout = self.config.dropout
        if dropout is None:
            return weights
        operands = self.context.operands.dropout
        assert operands is not None
        key, head = operands.key, operands.head_index
        at = broadcast_index(self.head[:-1], key.shape[:-1])
        rows = plgpu.broadcasted_iota(jnp.int32, (self.block_q,), 0, layout=self.q_layout) + row
        positions = iota(self.shape, 1 - self.q_axis) + tile * self.block_kv
        keep = dropout.keep_elements(
            [key[(*at, i)] for i in range(key.shape[-1])],
            head[broadcast_index(self.head, head.shape)],
            rows.astype(jnp.uint32),
            positions.astype(jnp.uint32),
            self.of_rows,
            self.context.sizes.T,
            self.context.sizes.S,
        )
        return jnp.where(keep, weights, 0.0)

    @property
    def rescaling(self) -> float:
        return 1.0 if self.config.dropout is None else self.config.dropout.rescaling
