"""What all items of the tangent kernel share, and the rows of one item that one warpgroup computes.

The pipeline is drawn in `tangent.py`; `TangentBuffers` says what the barriers are for.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...._semantics.numerics import LOG2E
from ..host.tangent_plan import TangentBuffers, TangentOuts, TangentPlan
from ..operands import TangentOperands
from ..pallas import ROW, Views, broadcast_index, columns_of, load, pl, plgpu, store, zeros
from ..scheduler import Item
from .backward import softmax_weights
from .context import KernelContext, shared_fields
from .logits import TileLogits
from .overlap import THREAD_COLUMNS, fold_columns
from .terms import TileTerms
from .transfers import Ring, Terms, by_first_warpgroup, clean_padding, query_slice, row_slice

_LEAST_WEIGHT = 1e-30  # of a row's part of a tile, from which a mean is made
NO_MEAN = -3e38  # of a row without any weight so far


@dataclass(frozen=True)
class TangentContext(KernelContext):
    """`dterms` has the bias' tangent; `result` is shared memory through which the tangent of out leaves, if it does."""

    plan: TangentPlan
    tangent_operands: TangentOperands
    dterms: Terms
    outs: TangentOuts
    buffers: TangentBuffers
    query: Views
    dquery: Views | None
    result: Any | None
    key: Views
    dkey: Views | None
    value: Views | None
    dvalue: Views | None
    key_ring: Ring
    value_ring: Ring

    @classmethod
    def of(
        cls, plan: TangentPlan, operands: TangentOperands, outs: TangentOuts, buffers: TangentBuffers
    ) -> "TangentContext":
        views, result = list(buffers.rows), buffers.out
        if plan.shares_buffer:
            (result,) = views.pop()
        query, *dquery = (Views(*x) for x in zip(views[0], views[-1], strict=True))
        stages = plan.blocks.stages

        def tiles(buffer: Any, tma: Any) -> Views | None:
            return None if buffer is None else tma.views(buffer)

        return cls(
            **shared_fields(plan, operands.forward, buffers.terms),
            plan=plan,
            tangent_operands=operands,
            dterms=Terms.make(operands.tangents, buffers.dterms),
            outs=outs,
            buffers=buffers,
            query=query,
            dquery=dquery[0] if dquery else None,
            result=result,
            key=plan.tma.views(buffers.key),
            dkey=tiles(buffers.dkey, plan.tma),
            value=tiles(buffers.value, plan.value_tma),
            dvalue=tiles(buffers.dvalue, plan.value_tma),
            key_ring=Ring(stages, buffers.key_ready, buffers.key_free),
            value_ring=Ring(stages, buffers.value_ready, buffers.value_free),
        )

    @property
    def has_products(self) -> bool:
        """Whether the tangent of the logits has products of its own."""
        return self.dquery is not None or self.dkey is not None

    @property
    def is_centered(self) -> bool:
        """See `TangentRows.mean`."""
        return self.tangent_operands.has_dlogits and self.config.has_all_keys

    @property
    def excludes_anywhere(self) -> bool:
        """Whether any tile may have no weight in some row, by its bias, a mask or ids."""
        return self.terms.bias is not None or self.terms.mask is not None or self.intervals.elements is not None

    @property
    def moves_reference(self) -> bool:
        """Whether rows may have no weight in the tile that is visited first."""
        return self.is_centered and (self.excludes_anywhere or self.intervals.has_many_edges(self.blocks.rows))


class TangentRows:
    """The rows of the k-th item that one warpgroup computes."""

    def __init__(self, context: TangentContext, k: Any, item: Item):
        blocks, wg, operands = context.blocks, context.wg, context.tangent_operands
        self.context, self.item, self.num_tiles = context, item, item.num_tiles
        self.shape = blocks.block_q, blocks.block_kv
        self.row = item.block * blocks.rows + wg * blocks.block_q
        self.logits = TileLogits(context, item.head, row_in_block=wg * blocks.block_q)
        self.vectors = self.logits.rows(self.row)
        self.bias_rows = self.logits.row_vector(context.dterms.bias, self.row)
        lse = load(row_slice(operands.lse, item.head, self.row, blocks.block_q), layout=ROW)
        self.lse = lse * LOG2E if operands.scales_lse else lse
        dscale = operands.tangents.scale
        self.dscale = None if dscale is None else dscale[broadcast_index(item.head[:-1], dscale.shape)]
        self.buffer = context.plan.scheduler.buffer(k, wg, blocks.warpgroups)
        # Of the weights, whose sum is not 1 with sinks, and of p dz; in each thread.
        num_sums = operands.has_dlogits + (context.is_centered and context.plan.has_sinks)
        self.no_sums = (zeros(blocks.block_q, THREAD_COLUMNS),) * num_sums

    def slot(self, i: Any) -> Any:
        """Of keys and of values."""
        return self.context.key_ring.slot(self.item.count + i)

    def wait_for_values(self, i: Any) -> None:
        """Values of tile i and their tangent, without NaN in padding."""
        context, tile, slot = self.context, self.item.tile(i), self.slot(i)
        context.value_ring.wait_until_ready(slot)
        if not context.intervals.has_length:
            return
        length = context.intervals.length(self.item.head)

        def work() -> None:
            for views in (context.value, context.dvalue):
                if views is not None:
                    clean_padding(views.tiles.at[slot], tile, length)

        is_padded = (tile + 1) * context.blocks.block_kv > length
        pl.when(is_padded)(lambda: by_first_warpgroup(context.wg, context.buffers.padding_clean.at[slot], work))

    def no_products(self) -> tuple[jax.Array, ...]:
        """What the products of a tile are added to: q . k, and, if they are needed, dq . k + q . dk."""
        return (zeros(*self.shape),) * (1 + self.context.has_products)

    def issue(self, refs: tuple, buffer: Any, slot: Any) -> int:
        """The products of a tile of keys, and how many come behind the first; `buffer` is that of these rows."""
        context = self.context
        key, query = context.key.tiles.at[slot].transpose((1, 0)), context.query.tiles.at[buffer]
        plgpu.wgmma(refs[0], query, key)
        if context.dquery is not None:
            plgpu.wgmma(refs[1], context.dquery.tiles.at[buffer], key)
        if context.dkey is not None:
            plgpu.wgmma(refs[1], query, context.dkey.tiles.at[slot].transpose((1, 0)))
        return (context.dquery is not None) + (context.dkey is not None)

    def add(self, acc_ref: Any, operands: tuple, slot: Any) -> int:
        """The products with values, which give the tangent of out, and how many they are."""
        context = self.context
        values = [x for x in (context.value, context.dvalue) if x is not None]
        for x, views in zip(operands, values, strict=True):
            plgpu.wgmma(acc_ref, x, views.tiles.at[slot])
        return len(values)

    def weights(self, products: jax.Array, terms: TileTerms, i: Any, masked: Any) -> Any:
        return softmax_weights(self.logits, products, terms, self.vectors, self.item.tile(i), self.lse, masked)

    def dlogits(self, products: tuple[jax.Array, ...], i: Any, slot: Any, masked: Any) -> jax.Array:
        """The tangent of the logits, inside a soft cap."""
        logits, tile, terms = self.logits, self.item.tile(i), []
        dbias = logits.term(self.context.dterms.bias, self.bias_rows, tile, slot)
        if self.context.has_products:
            terms.append(products[1] * logits.scale)
        if self.dscale is not None:
            terms.append(products[0] * self.dscale)
        if dbias is not None:
            terms.append(dbias.astype(jnp.float32))
        return logits.through_mask(sum(terms[1:], terms[0]), self.vectors, tile, masked)

    def mean(self, weights: Any, dx: jax.Array) -> jax.Array:
        """The mean dz of each row over a tile, `NO_MEAN` where it has no weight there.

        That over the first tile with any weight is subtracted from all dz of a row. Otherwise p dz would be large, and
        its rounding, where the dz of a row are large beside their differences.
        """
        p, dz = (fold_columns(x, jnp.add).sum(axis=1) for x in (weights.p, weights.through * dx))
        return jnp.where(p > _LEAST_WEIGHT, dz / p, NO_MEAN)

    def operands(
        self, weights: Any, dx: jax.Array | None, means: jax.Array | None, i: Any, sums: tuple
    ) -> tuple[tuple, tuple]:
        """The left operands of `add`, and the sums with those of this tile."""
        logits, tile, parts, reference = self.logits, self.item.tile(i), [], _or_zero(means)
        if dx is not None:
            if reference is None:
                change = weights.through * dx
            elif weights.through is weights.p:
                change = weights.p * (dx - logits.of_rows(reference))
            else:
                change = weights.through * dx - weights.p * logits.of_rows(reference)
            added = (change, weights.p)[: len(sums)]
            sums = tuple(x + fold_columns(y, jnp.add) for x, y in zip(sums, added, strict=True))
            parts.append(change)
        if self.context.dvalue is not None:
            parts.append(weights.p)
        return tuple(logits.drop(x, self.row, tile).astype(self.context.dtype) for x in parts), sums

    def write(self, acc: jax.Array, means: jax.Array | None, sums: tuple) -> None:
        """Start writing the results."""
        reference = _or_zero(means)
        context, plan, item, outs = self.context, self.context.plan, self.item, self.context.outs
        block_q, operands = context.blocks.block_q, context.tangent_operands
        dout = acc * self.logits.rescaling
        if operands.has_dlogits:
            dlse, *weight = (x.sum(axis=1) for x in sums)
            factor = -dlse
            if reference is not None:
                mean = reference * weight[0] if weight else reference
                dlse, factor = dlse + mean, reference - dlse - mean
            out = load(query_slice(operands.out, item.head, self.row, block_q), layout=plgpu.Layout.WGMMA)
            dout = dout + out * columns_of(factor, out.shape)
            store(row_slice(outs.lse, item.head, self.row, block_q), dlse)
        if plan.is_wide:
            store(query_slice(outs.out, item.head, self.row, block_q), dout)
        else:
            assert context.result is not None
            result = context.result.at[self.buffer]
            store(result, dout.astype(plan.out_dtype))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result, query_slice(outs.out, item.head, plan.store.at(self.row), block_q))
        if not plan.scheduler.is_single:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(context.buffers.rows_free.at[self.buffer])


def _or_zero(means: jax.Array | None) -> jax.Array | None:
    return None if means is None else jnp.where(means > NO_MEAN, means, 0.0)
