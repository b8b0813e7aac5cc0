"""What every kernel reads of one tile: its logits, their derivative, and its dropout. Nothing else computes them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.call import Config, Inputs, batch_of, sum_to
from ..._semantics.numerics import accumulation_dtype, bias_floor, lowest
from ..protocol import Target
from .access import ColumnTile, RowTile
from .forms import Forms
from .loops import Nest, TileMask
from .quirks import CPU_FUSES_SOFTMAX, exp_polynomial, in_row_major_layout, product_dtype
from .shapes import choose_tile


class Tiles:
    """Reads the tiles of one call, for a target and one kernel's tile shape."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        target: Target,
        *,
        further: Mapping[str, Any] | None = None,
        is_bounded: bool = False,
        assumes_finite: bool = False,
        has_documents: bool = False,
        summed_over_batch: bool = False,
        rounds_weights: bool = True,
    ):
        """Args, beside the call's:

        further: other operands of the kernel; None for the forward kernel.
        is_bounded: whether bounds of the logits are known (see `family.py`).
        assumes_finite: whether what is not finite may reach results that it should not, even from padding.
        has_documents: whether a boolean mask over rows and keys leaves little, in blocks.
        summed_over_batch: whether a result of T * S elements is summed over batch rows.
        rounds_weights: whether weights and their cotangents may be kept in the dtype of products.
        """
        self.config, self.inputs = config, inputs
        sizes = inputs.sizes
        self.sizes = replace(sizes, batch=jnp.broadcast_shapes(sizes.batch, batch_of(further or {})))
        self.accumulate = accumulation_dtype(inputs.query.dtype)
        self.platform = target.platform
        has_few_products = self.sizes.has_few_products
        self.product = product_dtype(inputs.query.dtype, target.platform, has_few_products=has_few_products)
        # XLA:CPU (0.12 and before) fails at run time on a bfloat16 product into which it folded a transpose. Reverse
        # mode through a kernel makes such products of all.
        self.transposed_product = self.accumulate if target.platform == "cpu" else self.product
        self.product = self.transposed_product if target.is_reversed else self.product
        # By default, accelerators round float32 too.
        self.rounds_operands = self.product != self.accumulate or target.platform != "cpu"
        # float16 has too few exponents for a cotangent.
        rounds_weights &= self.product == jnp.bfloat16
        self.stored_dtype = self.product if rounds_weights else self.accumulate
        # Whether a loop may write its results in the dtype of the call: on CPU, XLA before JAX 0.12 converts all of an
        # array of bfloat16 whenever a tile of it is written.
        self.collects_rounded = target.platform != "cpu" or inputs.query.dtype == jnp.float16
        mask = inputs.mask
        forms = Forms(
            self.sizes,
            target,
            is_forward=further is None,
            has_mask=mask.allowed is not None,
            has_bias_or_dropout=inputs.bias is not None or config.dropout is not None,
            needs_lse=config.needs_lse,
            is_bounded=is_bounded,
            summed_over_batch=summed_over_batch,
        )
        is_banded = forms.is_banded(config.band, mask)
        is_masked = is_banded or mask.allowed is not None
        fuses_softmax = CPU_FUSES_SOFTMAX and (assumes_finite or not is_masked)
        tile = choose_tile(
            self.sizes,
            target.platform,
            block_q=config.block_q,
            block_kv=config.block_kv,
            is_banded=is_banded,
            is_masked=is_masked,
            is_elementwise=forms.is_elementwise,
            has_documents=has_documents and mask.allowed is not None and 1 not in mask.allowed.shape[-2:],
            band_width=config.band.width if mask.key_start is None else None,
            key_stop=int(config.band.intervals(sizes.T, sizes.S)[1].max()) if mask.key_start is None else sizes.S,
            fuses_softmax=fuses_softmax and not (config.needs_lse or config.dropout) and inputs.bias is None,
            # A cache that `vmap` shares would be copied for each of its rows.
            joins_heads=assumes_finite and all(x.shape[:-3] == self.sizes.batch for x in (inputs.key, inputs.value)),
            is_derivative=further is not None or config.needs_lse,
            has_16_bits=self.product.itemsize == 2,
            converts=self.product != inputs.query.dtype,
            collects_rounded=self.collects_rounded,
            all_heads=target.is_reversed or target.is_sharded,
            form=forms.tile_form(mask),
        )
        tile = replace(tile, is_sharded=target.is_sharded)
        never_skips = forms.is_active or tile.holds_whole_heads(self.sizes)
        self.nest = Nest(self.sizes, tile, config.band, mask, target.is_reversed, never_skips)
        self.fuses_tiles, self.sums_values = forms.is_active, forms.sums_values
        self.fixes_layouts, self.passes_weights = forms.fixes_layouts(tile), forms.passes_weights(tile)
        self.makes_softmax_again, self.normalizes = forms.makes_softmax_again(self.nest), forms.normalizes(self.nest)
        # Weights as small as bounds make them need the exponents of float32.
        self.may_be_bounded = forms.may_be_bounded(tile) and self.product != jnp.float16
        # Where nothing but logits is made of keys, the mask removes what padding holds.
        self.cleans_keys = not (forms.is_active and forms.is_forward)
        # Nothing but the forward kernel makes 'out', and that writes every element once.
        rounds_out = config.rounds_out and (forms.is_active or (target.platform == "cpu" and self.collects_rounded))
        self.out_dtype = inputs.query.dtype if rounds_out else self.accumulate
        # Transposing few scores takes less than transposing query and keys.
        self.transposes_weights = target.platform == "cpu" and self.sizes.has_few_scores
        # Else XLA:CPU makes query in 32 bits, which the product for the gradient of key alone reads, long before that.
        converts_late = self.product != self.transposed_product and self.transposes_weights
        self.converts_late = converts_late and self.nest.visits_one_key_tile
        # There, a row of weights is also less to divide by its sum than a row of out.
        self.normalizes |= self.transposes_weights and self.nest.visits_one_key_tile
        # XLA:CPU makes a softmax of its own beside a product, but not of one head in a loop.
        is_loop = len(self.nest.row_shape) == 1 and not self.nest.visits_one_key_tile
        takes_polynomial = is_loop and target.platform == "cpu" and self.accumulate == jnp.float32
        self.exp = exp_polynomial if takes_polynomial else jnp.exp

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
        if self.platform == "cpu" and self.nest.num_query_tiles == 1:
            written_once |= {"key": (*z.batch, z.S, z.K, z.H), "value": (*z.batch, z.S, z.K, z.D)}
        once = written_once.get(name) == like.shape or self.visits_once(name, like.shape)
        return jnp.zeros(like.shape, like.dtype if once and self.collects_rounded else self.accumulate)

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
            self.fuses_tiles
            and name == "bias"
            and shape[-3:] == (z.N, z.T, z.S)
            and z.T % tile.block_q == 0
            and (tile.batch, tile.heads, tile.block_kv) == (z.batch, z.K, z.S)
        )

    def zeros(self, *shape: int) -> jax.Array:
        return jnp.zeros(shape, self.accumulate)

    def einsum(self, subscripts: str, *operands: jax.Array, dtype: Any = None) -> jax.Array:
        """Product of tiles in `dtype`, by default that of products, accumulated in accumulation dtype."""
        return jnp.einsum(
            subscripts,
            *(x.astype(dtype or self.product) for x in operands),
            precision=self.config.precision,
            preferred_element_type=self.accumulate,
        )

    def joined(self, x: jax.Array) -> jax.Array:
        """(lead..., rows, s or 1) -> (any, rows, s or 1): XLA's products have one batch axis, and fuse only such."""
        if not self.fuses_tiles:
            return x
        return jnp.broadcast_to(x, (*self.nest.row_shape[:-1], *x.shape[-2:])).reshape(-1, *x.shape[-2:])

    def split(self, x: jax.Array) -> jax.Array:
        """The inverse of `joined`, of a tile."""
        return x.reshape(*self.nest.row_shape[:-1], *x.shape[-2:]) if self.fuses_tiles else x

    def stored(self, x: jax.Array) -> jax.Array:
        """A tile of weights or their cotangents, in the form in which it is written once for all that read it.

        XLA fuses what makes it into the product that it is made of, if that ends where several read it; the barrier
        keeps it from undoing the rounding, and from making it again for each.
        """
        return jax.lax.optimization_barrier(x.astype(self.stored_dtype)) if self.fuses_tiles else x

    def query(self, at: RowTile) -> jax.Array:
        query = self.inputs.query
        return self.nest.query_slice(in_row_major_layout(query) if self.fixes_layouts else query, at)

    def key(self, at: RowTile, columns: ColumnTile, mask: TileMask | None) -> jax.Array:
        return self._without_padding(self.inputs.key, at, columns, mask if self.cleans_keys else None)

    def value(self, at: RowTile, columns: ColumnTile, mask: TileMask | None) -> jax.Array:
        return self._without_padding(self.inputs.value, at, columns, mask)

    def _without_padding(self, x: jax.Array, at: RowTile, columns: ColumnTile, mask: TileMask | None) -> jax.Array:
        """NaN or inf in padding would survive a weight of zero (0 * NaN). Full tiles hold no padding."""
        length, z = self.inputs.mask.key_value_length, self.nest.tile
        # Before the axes move: XLA:GPU then reads full tiles and this one in the same layout, and copies neither.
        x = self.nest.key_window(x, at, columns)
        if self.fuses_tiles and self.fixes_layouts:
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
        early = self.product == self.accumulate
        if early:
            query = query.astype(self.product) * multiplier
        scores = self.scores(query, key)
        return scores if early else scores * multiplier

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
        if not self.sums_values:
            return self.einsum("...rs,...sd->...rd", weights, value)
        value = value.astype(self.accumulate)
        rows = [(weights[..., row, :, None] * value).sum(-2) for row in range(weights.shape[-2])]
        return jnp.stack(jax.lax.optimization_barrier(rows), -2)  # stacked at once, they would be one slow kernel

    def bias(self, x: jax.Array, at: RowTile, columns: ColumnTile) -> jax.Array:
        """A tile of a score-like array, (lead..., rows, block_kv), axes of size 1 kept."""
        return self.nest.score_slice(x, at, columns).astype(self.accumulate)

    def logits(
        self, query: jax.Array, key: jax.Array, at: RowTile, columns: ColumnTile, mask: TileMask | None
    ) -> jax.Array:
        """Logits of one tile, (lead..., rows, block_kv)."""
        logits = self.products(query, key, self.scale(at))
        if self.inputs.bias is None and mask is None:
            return logits
        if self.inputs.bias is not None:
            bias = self.bias(self.inputs.bias, at, columns)
            logits += jnp.maximum(bias, bias_floor(self.accumulate))
        if mask is None:
            return logits
        if self.nest.tile.fuses_softmax:
            # A minimum is fused where a choice is not, but hands NaN on. All keys of a dead row get equal logits.
            return jnp.minimum(logits, jnp.where(mask.live, jnp.inf, lowest(self.accumulate)))
        if mask.dead is not None:
            logits = jnp.where(mask.dead, 0, logits)
        return jnp.where(mask.allowed, logits, lowest(self.accumulate))

    def changes_products(self, mask: TileMask | None) -> bool:
        """Whether logits are more than a product, in a loop on CPU: XLA (0.12) would make that for each reader."""
        is_product = mask is None and self.inputs.bias is None and self.product == self.accumulate
        return self.platform == "cpu" and not (is_product or self.nest.visits_one_key_tile)

    def logits_tangent(self, products: jax.Array | None, bias: jax.Array | None, mask: TileMask | None) -> jax.Array:
        """Tangent of the logits, from those of the products, as rows, and of the bias tile."""
        if bias is None:
            assert products is not None
            return self.through_mask(products, mask)
        total = bias if products is None else products + bias
        return self.through_mask(jnp.broadcast_to(total, (*self.nest.row_shape, self.nest.tile.block_kv)), mask)

    def through_mask(self, x: jax.Array, mask: TileMask | None) -> jax.Array:
        """Derivative of the masking in `logits`, which is its own transpose; (lead..., rows, block_kv)."""
        if mask is None:
            return x
        return jnp.where(mask.live, x, 0)

    def live_rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """Zero the dead rows of a tile, (lead..., rows, any), where `through_mask` does not.

        It need not, as a masked weight is 0, unless its row is dead; and XLA would not fuse it into a product.
        """
        dead = self.inputs.mask.dead
        if dead is None or not self.fuses_tiles:
            return x
        return jnp.where(self.nest.row_slice(dead, at)[..., None], 0, x)

    def rows(self, x: jax.Array, at: RowTile) -> jax.Array:
        """(batch..., N, T), broadcast in no axis but the batch's -> (lead..., rows, 1)"""
        return self.nest.row_slice(x, at)[..., None]

    def keep(self, at: RowTile, columns: ColumnTile) -> jax.Array | None:
        """Which weights of the tile, (lead..., rows, block_kv), dropout keeps; None without dropout."""
        dropout, key, heads = self.config.dropout, self.inputs.dropout_key, self.inputs.head_index
        if dropout is None or key is None or heads is None:
            return None
        key = self.nest.slice(key, (*at.batch, 0), (*self.nest.tile.batch, 2))
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
        return jnp.where(keep, weights.astype(self.accumulate) * self.config.dropout.rescaling, 0)
