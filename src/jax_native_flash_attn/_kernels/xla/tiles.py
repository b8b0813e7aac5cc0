"""What every kernel reads of one tile: its logits, their derivative, and its dropout. Nothing else computes them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Call, sum_to
from ..._semantics.numerics import bias_floor, lowest
from .access import ColumnTile, RowTile
from .masked_tiles import TileMask
from .mods import ScoreMod
from .plan import Plan
from .quirks import exp_polynomial, in_row_major_layout


class Tiles:
    """Reads the tiles of one call, as planned."""

    def __init__(self, call: Call, plan: Plan):
        self.config, self.inputs = call
        self.plan, self.sizes, self.nest = plan, plan.sizes, plan.loops(call)
        self.exp = exp_polynomial if plan.takes_polynomial else jnp.exp
        self.score_mod = ScoreMod.of(self.nest, call)

    def zeros_for(self, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Where a kernel collects a result: in accumulation dtype if an element gets more than one contribution."""
        z = self.sizes
        if self.nest.tile.is_sharded:
            return self.zeros(*self._shape_on_shards(name, like.shape))
        written_once = {
            "out": (*z.batch, z.T, z.N, z.D),
            "lse": (*z.batch, z.N, z.T),
            "query": (*z.batch, z.T, z.N, z.H),
            "bias": (*z.batch, z.N, z.T, z.S),
        }
        if self.plan.platform == "cpu" and self.nest.num_query_tiles == 1:
            written_once |= {"key": (*z.batch, z.S, z.K, z.H), "value": (*z.batch, z.S, z.K, z.D)}
        once = written_once.get(name) == like.shape or self.visits_once(name, like.shape)
        return jnp.zeros(like.shape, like.dtype if once and self.plan.collects_rounded else self.plan.accumulate)

    def _shape_on_shards(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """With a batch row and a query head for each contribution, so that devices add theirs once, behind the loops.

        Not of a bias over T and S: nothing else has T * S elements, so that each tile of it is summed at once.
        """
        z = self.sizes
        if name in ("key", "value"):
            return (*z.batch, z.S, z.N, shape[-1])
        if name == "scale":
            return (*z.batch, z.N)
        if name == "bias":
            return shape if min(shape[-2:]) > 1 else (*z.batch, z.N, *shape[-2:])
        return shape

    def summed(self, name: str, x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        """A result as it was collected, see `zeros_for`, in its own shape and dtype."""
        if self.nest.tile.is_sharded:
            if name in ("key", "value"):
                x = x.reshape(*x.shape[:-2], self.sizes.K, self.sizes.G, x.shape[-1]).sum(-2)
            if name == "scale":
                x = x.sum(-1)
        return sum_to(x, like)

    def visits_once(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a result like the bias, summed over batch rows, gets all of each element from one tile."""
        z, tile = self.sizes, self.nest.tile
        return (
            self.plan.fuses_tiles
            and name == "bias"
            and shape[-3:] == (z.N, z.T, z.S)
            and z.T % tile.block_q == 0
            and (tile.batch, tile.heads, tile.block_kv) == (z.batch, z.K, z.S)
        )

    def zeros(self, *shape: int) -> jax.Array:
        return jnp.zeros(shape, self.plan.accumulate)

    def einsum(self, subscripts: str, *operands: jax.Array, dtype: Any = None) -> jax.Array:
        """Product of tiles in `dtype`, by default that of products, accumulated in accumulation dtype."""
        return jnp.einsum(
            subscripts,
            *(x.astype(dtype or self.plan.product) for x in operands),
            precision=self.config.precision,
            preferred_element_type=self.plan.accumulate,
        )

    def joined(self, x: jax.Array) -> jax.Array:
        """(lead..., rows, s or 1) -> (any, rows, s or 1): XLA's products have one batch axis, and fuse only such."""
        if not self.plan.fuses_tiles:
            return x
        return jnp.broadcast_to(x, (*self.nest.row_shape[:-1], *x.shape[-2:])).reshape(-1, *x.shape[-2:])

    def split(self, x: jax.Array) -> jax.Array:
        """The inverse of `joined`, of a tile."""
        return x.reshape(*self.nest.row_shape[:-1], *x.shape[-2:]) if self.plan.fuses_tiles else x

    def stored(self, x: jax.Array) -> jax.Array:
        """A tile of weights or their cotangents, in the form in which it is written once for all that read it.

        XLA fuses what makes it into the product that it is made of, if that ends where several read it; the barrier
        keeps it from undoing the rounding, and from making it again for each.
        """
        return jax.lax.optimization_barrier(x.astype(self.plan.stored_dtype)) if self.plan.fuses_tiles else x

    def query(self, at: RowTile) -> jax.Array:
        query = self.inputs.query
        return self.nest.query_slice(in_row_major_layout(query) if self.plan.fixes_layouts else query, at)

    def key(self, at: RowTile, columns: ColumnTile, mask: TileMask | None) -> jax.Array:
        return self._without_padding(self.inputs.key, at, columns, mask if self.plan.cleans_keys else None)

    def value(self, at: RowTile, columns: ColumnTile, mask: TileMask | None) -> jax.Array:
        return self._without_padding(self.inputs.value, at, columns, mask)

    def _without_padding(self, x: jax.Array, at: RowTile, columns: ColumnTile, mask: TileMask | None) -> jax.Array:
        """NaN or inf in padding would survive a weight of zero (0 * NaN). Full tiles hold no padding."""
        length, z = self.inputs.mask.key_value_length, self.nest.tile
        # Before the axes move: XLA:GPU then reads full tiles and this one in the same layout, and copies neither.
        x = self.nest.key_window(x, at, columns)
        if self.plan.fuses_tiles and self.plan.fixes_layouts:
            x = in_row_major_layout(x)
        if mask is not None and length is not None and not z.joins_heads:
            position = self.nest.column_positions(columns).reshape((1,) * (x.ndim - 3) + (-1, 1, 1))
            padded = position >= self.nest.slice(length, at.batch, z.batch)[..., None, None, None]
            x = jnp.where(padded & ~jnp.isfinite(x), 0, x)
        return x.reshape(-1, z.block_kv, z.heads * x.shape[-1]) if z.joins_heads else self.nest.key_rows(x)

    def scale(self, at: RowTile) -> jax.Array:
        """(lead..., 1, 1), to multiply a tile."""
        return self.nest.batch_slice(self.inputs.scale, at)

    def products(self, query: jax.Array, key: jax.Array, multiplier: jax.Array) -> jax.Array:
        """multiplier * query @ key: (lead..., rows, H), (lead..., s, H) -> (lead..., rows, s)."""
        # The multiplier goes to the smaller operand, unless that would round it to 16 bits.
        early = self.plan.product == self.plan.accumulate
        if early:
            query = query.astype(self.plan.product) * multiplier
        return self.scores(query, key) if early else self.scores(query, key) * multiplier

    def scores(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """query @ key, which XLA finds to be a part of `products` where that multiplies its result."""
        if not self.nest.tile.joins_heads:
            return self.einsum("...rh,...sh->...rs", query, key)
        # Each row, with zeros in place of the other heads, times the keys of all heads.
        query = jnp.broadcast_to(query, (*self.nest.row_shape, query.shape[-1]))
        query = query.reshape(key.shape[0], self.sizes.K, -1, query.shape[-1])
        own = jnp.eye(self.sizes.K, dtype=bool)[:, None, :, None]
        rows = jnp.where(own, query[..., None, :], 0).reshape(query.shape[0], -1, key.shape[-1])
        return self.einsum("brh,bsh->brs", rows, key).reshape(*self.nest.row_shape, -1)

    def weighted(self, weights: jax.Array, value: jax.Array) -> jax.Array:
        """weights @ value: (lead..., rows, s), (lead..., s, D) -> (lead..., rows, D)"""
        if self.nest.tile.joins_heads:
            K, D = self.sizes.K, self.sizes.D
            product = self.einsum("brs,bsd->brd", weights.reshape(value.shape[0], -1, weights.shape[-1]), value)
            own = jnp.einsum("bkrkd->bkrd", product.reshape(value.shape[0], K, -1, K, D))
            return own.reshape(*self.nest.row_shape, D)
        if not self.plan.sums_values:
            return self.einsum("...rs,...sd->...rd", weights, value)
        value = value.astype(self.plan.accumulate)
        rows = [(weights[..., row, :, None] * value).sum(-2) for row in range(weights.shape[-2])]
        return jnp.stack(jax.lax.optimization_barrier(rows), -2)  # stacked at once, they would be one slow kernel

    def bias(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """A tile of a score-like array, (lead..., rows, block_kv), axes of size 1 kept."""
        return self.nest.score_slice(x, at, columns).astype(self.plan.accumulate)

    def sums(self, query: jax.Array, key: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """Products and bias of one tile, (lead..., rows, block_kv): logits, but for `changed` and `masked`."""
        logits = self.products(query, key, self.scale(at))
        if self.inputs.bias is not None:
            bias = self.bias(self.inputs.bias, at, columns)
            logits += jnp.maximum(bias, bias_floor(self.plan.accumulate))
        return logits

    def changed(self, sums: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """Logits of one tile, but for `masked`."""
        logits = sums if self.score_mod is None else self.score_mod.score(sums, at, columns)
        if self.config.logits_soft_cap is not None:
            logits = self.config.logits_soft_cap * jnp.tanh(logits / self.config.logits_soft_cap)
        return logits

    def masked(self, logits: jax.Array, mask: TileMask | None) -> jax.Array:
        """Logits of one tile, once they are known, for a softmax."""
        if mask is None:
            return logits
        if self.nest.tile.fuses_softmax:
            # A minimum is fused where a choice is not, but hands NaN on. All keys of a dead row get equal logits.
            return jnp.minimum(logits, jnp.where(mask.live, jnp.inf, lowest(self.plan.accumulate)))
        if mask.dead is not None:
            logits = jnp.where(mask.dead, 0, logits)
        return jnp.where(mask.allowed, logits, lowest(self.plan.accumulate))

    def changes_products(self, mask: TileMask | None) -> bool:
        """Whether logits are more than a product, in a loop on CPU: XLA (0.12) would make that for each reader."""
        is_product = mask is None and self.inputs.bias is None and self.config.adds_bias
        is_product &= self.plan.product == self.plan.accumulate
        return self.plan.platform == "cpu" and not (is_product or self.nest.visits_one_key_tile)

    def through_cap(self, x: jax.Array, logits: jax.Array) -> jax.Array:
        """Derivative of the soft cap, its own transpose, at capped logits; zero where a mask is in their place."""
        cap = self.config.logits_soft_cap
        if cap is None:
            return x
        slope = 1 - jnp.square(jnp.clip(logits / cap, -1, 1))
        return (x.astype(slope.dtype) * slope).astype(x.dtype)

    def changed_tangent(
        self,
        sums: jax.Array,
        tangents: Mapping[str, jax.Array],
        logits: jax.Array,
        dsums: jax.Array | None,
        at: RowTile,
        columns: ColumnTile,
    ) -> jax.Array | None:
        """Tangent of `changed`, from that of its operand and, among all tangents, those of a score_mod's arguments."""
        if self.score_mod is not None:
            dsums = self.score_mod.tangent(sums, dsums, tangents, at, columns)
        return None if dsums is None else self.through_cap(dsums, logits)

    def changed_cotangent(
        self,
        sums: jax.Array,
        logits: jax.Array,
        dlogits: jax.Array,
        results: Mapping[str, jax.Array],
        at: RowTile,
        columns: ColumnTile,
    ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """The transpose of `changed_tangent`: and what it adds to those of the results that are of a score_mod."""
        dlogits = self.through_cap(dlogits, logits)
        if self.score_mod is None:
            return dlogits, results
        return self.score_mod.cotangent(sums, dlogits, results, at, columns)

    def through_mask(self, x: jax.Array, mask: TileMask | None) -> jax.Array:
        """Derivative of the masking in `logits`, which is its own transpose; (lead..., rows, block_kv)."""
        if mask is None:
            return x
        return jnp.where(mask.live, x, 0)

    def live_rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """`visible_rows`, where `through_mask` is not applied.

        It need not, as a masked weight is 0, unless its row is dead; and XLA would not fuse it into a product.
        """
        return self.visible_rows(x, at) if self.plan.fuses_tiles else x

    def visible_rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """Zero the dead rows of a tile, (lead..., rows, any)."""
        dead = self.inputs.mask.dead
        return x if dead is None else jnp.where(self.nest.row_slice(dead, at)[..., None], 0, x)

    def sinks(self, at: RowTile) -> jax.Array:
        """(lead..., rows, 1)"""
        assert self.inputs.sinks is not None
        return self.rows(self.inputs.sinks[..., None], at)

    def has_interval(self, at: RowTile) -> jax.Array:
        """Which rows, (lead..., rows, 1), are not padding."""
        mask = self.inputs.mask
        assert mask.key_start is not None
        assert mask.key_stop is not None
        return self.rows(mask.key_start, at) < self.rows(mask.key_stop, at)

    def visible_maximum(self, maximum: jax.Array, at: RowTile) -> jax.Array:
        """The largest logit of each row, (lead..., rows, 1), or -inf where no key is visible."""
        has_key = maximum > lowest(self.plan.accumulate) / 2
        if self.inputs.mask.dead is not None:
            has_key &= ~self.rows(self.inputs.mask.dead, at)
        return jnp.where(has_key, maximum, -jnp.inf)

    def rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., N, T), broadcast in no axis but the batch's -> (lead..., rows, 1)"""
        return self.nest.row_slice(x, at)[..., None]

    def keep(self, at: RowTile, columns: ColumnTile) -> jax.Array | None:
        """Which weights of the tile, (lead..., rows, block_kv), dropout keeps; None without dropout."""
        dropout, key, heads = self.config.dropout, self.inputs.dropout_key, self.inputs.head_index
        if dropout is None or key is None or heads is None:
            return None
        key = self.nest.slice(key, (*at.batch, 0), (*self.nest.tile.batch, key.shape[-1]))
        keep = dropout.keep_tile(
            key[..., None, None, :],
            self.nest.head_slice(heads, at),
            self.nest.row_positions(at),
            self.nest.column_positions(columns),
            self.sizes.T,
            self.sizes.S,
        )
        return self.nest.inside(keep)

    def drop(self, weights: jax.Array, keep: jax.Array | None) -> jax.Array:
        """Weights (probabilities, or what multiplies them) after dropout; kept ones are rescaled."""
        if keep is None or self.config.dropout is None:
            return weights
        return jnp.where(keep, weights.astype(self.plan.accumulate) * self.config.dropout.rescaling, 0)
