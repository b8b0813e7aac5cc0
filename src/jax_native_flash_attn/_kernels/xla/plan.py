"""How a pass of a call runs in pure JAX: tile shape, dtypes, and which of several equal forms. One frozen value."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._semantics.call import Call
from ..._semantics.numerics import accumulation_dtype
from ..._semantics.sizes import Sizes
from ..protocol import Target
from .forms import Forms
from .limits import Limits
from .loops import Nest
from .quirks import CPU_FUSES_SOFTMAX, product_dtype
from .shapes import TileShape, choose_tile, largest_divisor


@dataclass(frozen=True)
class Plan:
    """Made by `make_plan`; `Tiles` and the kernels read it.

    Attributes:
      sizes: axis sizes, those of all operands of the pass.
      platform: 'cpu' or anything else.
      tile: its shape.
      static_trip_counts: loops have them, and checkpointed steps, for reverse mode in linear memory.
      never_skips_rows: a single key/value tile is visited even if it may be empty (its rows then are of no account).
      accumulate: dtype of logits, softmax and accumulators.
      product, transposed_product: dtypes of the operands of products, the latter of those with a transposed one.
      stored_dtype: of weights and their cotangents, where several products read them.
      out_dtype: of out, as the loops collect it.
      rounds_operands: products round their operands.
      collects_rounded: loops may collect results in the dtype of the call.
      fuses_tiles: the form that XLA:GPU fuses best.
      sums_values: multiply and sum in place of the product with the values.
      fixes_layouts: the kernel says in which layout XLA keeps an operand.
      passes_weights: weights enter a computation of their own, skipped where cotangents are zero.
      makes_softmax_again: the cotangent needs no log-sum-exp.
      normalizes: weights are divided by their sum before the product with the values.
      may_be_bounded: a kernel that subtracts bounds of the logits is worth having beside this one.
      cleans_keys: what is not finite in padding is removed from keys, too.
      transposes_weights: for the gradients of key and value, the weights are transposed, and not query and key.
      converts_late: the query is converted for the gradient of key inside the loop.
      takes_polynomial: exp is a polynomial of our own.
    """

    sizes: Sizes
    platform: str
    tile: TileShape
    static_trip_counts: bool
    never_skips_rows: bool
    accumulate: np.dtype
    product: np.dtype
    transposed_product: np.dtype
    stored_dtype: np.dtype
    out_dtype: np.dtype
    rounds_operands: bool
    collects_rounded: bool
    fuses_tiles: bool
    sums_values: bool
    fixes_layouts: bool
    passes_weights: bool
    makes_softmax_again: bool
    normalizes: bool
    may_be_bounded: bool
    cleans_keys: bool
    transposes_weights: bool
    converts_late: bool
    takes_polynomial: bool

    def __str__(self) -> str:
        tile = self.tile
        flags = [field.name for x in (self, tile) for field in fields(x) if getattr(x, field.name) is True]
        return (
            f"{tile.block_q} x {tile.block_kv} tiles of batch rows {tile.batch} and {tile.heads} key/value heads, "
            f"products in {self.product}, accumulated in {self.accumulate}; {', '.join(flags) or 'no special form'}"
        )

    def loops(self, call: Call) -> Nest:
        """The loops over the tiles of a call."""
        (config, inputs), loops = call, (self.static_trip_counts, self.never_skips_rows)
        by_indices = {"mask_mod": config.mask_mod, "mods": inputs.mods, "mask_block": config.mask_block}
        return Nest(self.sizes, self.tile, config.band, inputs.mask, *loops, **by_indices)


def make_plan(
    call: Call,
    target: Target,
    limits: Limits,
    *,
    further: tuple[Any, ...] | None = None,
    is_bounded: bool = False,
    assumes_finite: bool = False,
    has_documents: bool = False,
    has_all_keys: bool = False,
    summed_over_batch: bool = False,
    rounds_weights: bool = True,
) -> Plan:
    """The one place where a pass is planned; of arrays the types suffice.

    Args:
      call, target: what is computed, and where.
      limits: the sizes at which a pass takes another tile or form.
      further: batch axes of the other operands of the kernel; None for the forward kernel.
      is_bounded: whether bounds of the logits are known (see `family.py`).
      assumes_finite: whether what is not finite may reach results that it should not, even from padding.
      has_documents: whether a boolean mask over rows and keys leaves little, in blocks.
      has_all_keys: whether masks leave hardly a key out, whatever they could.
      summed_over_batch: whether a result of T * S elements is summed over batch rows.
      rounds_weights: whether weights and their cotangents may be kept in the dtype of products.
    """
    config, inputs = call
    mask, dtype, is_cpu = inputs.mask, np.dtype(inputs.query.dtype), target.platform == "cpu"
    sizes = inputs.sizes
    sizes = replace(sizes, batch=jnp.broadcast_shapes(sizes.batch, further or ()))
    accumulate = accumulation_dtype(dtype)
    product = product_dtype(dtype, target.platform, has_few_products=sizes.has_few_products)
    # XLA:CPU (0.12 and before) fails at run time on a bfloat16 product into which it folded a transpose. Reverse mode
    # through a kernel makes such products of all.
    transposed_product = accumulate if is_cpu else product
    product = transposed_product if target.is_reversed else product
    # On CPU, XLA before JAX 0.12 converts all of an array of bfloat16 whenever a tile of it is written.
    collects_rounded = not is_cpu or dtype == jnp.float16
    forms = Forms(
        sizes,
        target,
        limits,
        is_forward=further is None,
        has_mask=mask.allowed is not None,
        has_bias_or_dropout=_changes_scores(call),
        needs_lse=config.needs_lse,
        is_bounded=is_bounded,
        summed_over_batch=summed_over_batch,
        has_all_keys=config.has_all_keys,
    )
    is_banded = forms.is_banded(config.band, mask)
    is_masked = is_banded or mask.allowed is not None
    fuses_softmax = CPU_FUSES_SOFTMAX and (assumes_finite or not is_masked)
    tile = choose_tile(
        sizes,
        target.platform,
        limits,
        block_q=config.block_q,
        block_kv=config.block_kv,
        is_banded=is_banded,
        is_masked=is_masked,
        is_elementwise=forms.is_elementwise,
        has_documents=has_documents and mask.allowed is not None and 1 not in mask.allowed.shape[-2:],
        has_ids=mask.query_ids is not None,
        has_all_keys=has_all_keys,
        band_width=config.band.width if mask.key_start is None else None,
        key_stop=int(config.band.intervals(sizes.T, sizes.S)[1].max()) if mask.key_start is None else sizes.S,
        fuses_softmax=fuses_softmax and not _is_more_than_softmax(call),
        # A cache that `vmap` shares would be copied for each of its rows.
        joins_heads=assumes_finite and all(x.shape[:-3] == sizes.batch for x in (inputs.key, inputs.value)),
        is_derivative=further is not None or config.needs_lse,
        has_16_bits=product.itemsize == 2,
        converts=product != dtype,
        collects_rounded=collects_rounded,
        all_heads=target.is_reversed or target.is_sharded,
        form=forms.tile_form(mask),
    )
    if limits.heads is not None:
        tile = replace(tile, batch=(1,) * len(tile.batch), heads=largest_divisor(sizes.K, limits.heads))
    tile = replace(tile, is_sharded=target.is_sharded)
    never_skips_rows = forms.is_active or tile.holds_whole_heads(sizes)
    loops = Nest(sizes, tile, config.band, mask, target.is_reversed, never_skips_rows)
    has_one_tile = loops.visits_one_key_tile
    # Nothing but the forward kernel makes 'out', and that writes every element once.
    rounds_out = config.rounds_out and (forms.is_active or (is_cpu and collects_rounded))
    # Transposing few scores takes less than transposing query and keys.
    transposes_weights = is_cpu and sizes.has_few_scores
    # XLA:CPU makes a softmax of its own beside a product, but not of one head in a loop.
    is_loop = len(loops.row_shape) == 1 and not has_one_tile
    return Plan(
        sizes=sizes,
        platform=target.platform,
        tile=tile,
        static_trip_counts=target.is_reversed,
        never_skips_rows=never_skips_rows,
        accumulate=accumulate,
        product=product,
        transposed_product=transposed_product,
        # float16 has too few exponents for a cotangent.
        stored_dtype=product if rounds_weights and product == jnp.bfloat16 else accumulate,
        out_dtype=dtype if rounds_out else accumulate,
        # By default, accelerators round float32 too.
        rounds_operands=product != accumulate or not is_cpu,
        collects_rounded=collects_rounded,
        fuses_tiles=forms.is_active,
        sums_values=forms.sums_values,
        fixes_layouts=forms.fixes_layouts(tile),
        passes_weights=forms.passes_weights(tile),
        makes_softmax_again=forms.makes_softmax_again(loops) and inputs.sinks is None and mask.query_ids is None,
        # A row of weights is also less to divide by its sum than a row of out, where scores are few.
        normalizes=forms.normalizes(loops) or (transposes_weights and has_one_tile),
        # Weights as small as bounds make them need the exponents of float32.
        may_be_bounded=forms.may_be_bounded(tile, is_fused=fuses_softmax and has_one_tile) and product != jnp.float16,
        # Where nothing but logits is made of keys, the mask removes what padding holds.
        cleans_keys=not (forms.is_active and forms.is_forward),
        transposes_weights=transposes_weights,
        # Else XLA:CPU makes query in 32 bits, which the product for the gradient of key alone reads, long before that.
        converts_late=product != transposed_product and transposes_weights and has_one_tile,
        takes_polynomial=is_loop and is_cpu and accumulate == jnp.float32,
    )


def _is_more_than_softmax(call: Call) -> bool:
    """Whether a call is more than a softmax, perhaps masked, between two products."""
    config, inputs = call
    return config.needs_lse or config.needs_max_logits or inputs.sinks is not None or _changes_scores(call)


def _changes_scores(call: Call) -> bool:
    config, inputs = call
    return any(x is not None for x in (inputs.bias, inputs.mods, config.dropout, config.logits_soft_cap))
