"""Attention by an online softmax over key/value tiles, and the notation of all kernels.

For one head; sums run over the keys s of row t, z are the logits, c = keep / (1 - rate) is dropout:

    z_ts = scale * q_t . k_s + bias_ts          lse_t = log sum_s exp z_ts
    p_ts = exp(z_ts - lse_t)                    out_t = sum_s c_ts p_ts v_s

The online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682;
FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 1. The derivatives (`tangent.py`, `cotangent.py`) recompute p
from lse, so that no T x S array is ever stored, and need no online softmax.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.numerics import lowest
from .access import ColumnTile, RowTile
from .masked_tiles import TileMask
from .tiles import Tiles


class OnlineSoftmax(NamedTuple):
    """Running softmax of some rows: weighted sum of values, sum of weights, and the largest logit."""

    numerator: jax.Array
    denominator: jax.Array
    max_so_far: jax.Array


class Bound(NamedTuple):
    """What is subtracted from the logits in place of the largest so far, a scalar; see `family.py`.

    Attributes:
      value: a bound of their absolute values.
      holds: whether it may be subtracted, known at run time; None if it is known to.
    """

    value: jax.Array
    holds: jax.Array | None = None


def forward(tiles: Tiles, bound: Bound | None = None) -> tuple[jax.Array, ...]:
    """out (batch..., T, N, D) and, if needed, lse and max_logits (batch..., N, T), in accumulation dtype.

    (The derivatives need out unrounded: delta is a difference of nearly equal sums.)
    """
    nest, sizes = tiles.nest, tiles.sizes
    lowest_logit = jnp.asarray(lowest(tiles.plan.accumulate), tiles.plan.accumulate)
    first_max = lowest_logit if bound is None else bound.value
    if bound is not None and bound.holds is not None:
        first_max = jnp.where(bound.holds, first_max, lowest_logit)

    def row_tile(at: RowTile, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query = tiles.query(at)

        rows = nest.row_shape
        empty = OnlineSoftmax(
            tiles.zeros(*rows, sizes.D),
            tiles.zeros(*rows, 1),
            jnp.broadcast_to(first_max, (*rows, 1)),
        )

        def key_tile(columns: ColumnTile, mask: TileMask | None, state: OnlineSoftmax | None) -> OnlineSoftmax:
            key, value = tiles.key(at, columns, mask), tiles.value(at, columns, mask)
            unmasked = tiles.changed(tiles.sums(query, key, at, columns), at, columns)
            logits = tiles.masked(unmasked, mask)
            if bound is not None and bound.holds is None:
                assert state is not None
                weights = tiles.split(tiles.stored(tiles.exp(tiles.joined(logits) - tiles.joined(state.max_so_far))))
                return OnlineSoftmax(
                    state.numerator + tiles.weighted(weights, value),
                    state.denominator + weights.astype(tiles.plan.accumulate).sum(-1, keepdims=True),
                    state.max_so_far,
                )
            # Beside a bound nothing but the exponential reads masked logits: that and the mask are then one kernel.
            if tiles.changes_products(mask if bound is None else None):
                logits = lax.optimization_barrier(logits)
            if bound is None:
                new_max = logits.max(-1, keepdims=True)
                new_max = new_max if state is None else jnp.maximum(state.max_so_far, new_max)
            else:
                assert state is not None

                def larger(unmasked: jax.Array, max_so_far: jax.Array) -> jax.Array:
                    # Masked inside, or XLA would write what is masked, for this alone.
                    found = tiles.masked(unmasked, None if mask is None else nest.tile_mask(at, columns))
                    return jnp.maximum(max_so_far, found.max(-1, keepdims=True))

                new_max = lax.cond(bound.holds, lambda _, so_far: so_far, larger, unmasked, state.max_so_far)
            new_max = lax.stop_gradient(new_max)  # out and lse do not depend on what is subtracted
            weights = tiles.exp(logits - new_max)
            denominator = weights.sum(-1, keepdims=True)
            if tiles.plan.normalizes:
                weights /= denominator
            dropped = tiles.drop(weights, tiles.keep(at, columns))
            numerator = tiles.weighted(dropped, value)
            if state is not None:
                correction = jnp.exp(state.max_so_far - new_max)
                numerator += state.numerator * correction
                denominator += state.denominator * correction
            # To full size, where only a batched dropout key, say, has an axis that `vmap` added.
            return OnlineSoftmax(
                *(
                    jnp.broadcast_to(x, like.shape)
                    for x, like in zip((numerator, denominator, new_max), empty, strict=True)
                )
            )

        # A single tile of keys is an ordinary softmax; there is no state to correct.
        state = nest.columns(at, key_tile, None if nest.visits_one_key_tile and bound is None else empty)
        denominator = state.denominator
        if tiles.inputs.mask.key_start is not None:
            # Padded rows may have visited no tile at all.
            denominator = jnp.where(denominator == 0, 1, denominator)
        out = state.numerator if tiles.plan.normalizes else state.numerator / denominator
        lse = state.max_so_far + jnp.log(denominator)
        if tiles.inputs.sinks is None and tiles.inputs.mask.query_ids is not None:
            has_key = tiles.has_interval(at)
            out, lse = jnp.where(has_key, out, 0), jnp.where(has_key, lse, 0)
        if tiles.inputs.sinks is not None:
            sinks = tiles.sinks(at)
            out *= jax.nn.sigmoid(lse - sinks)
            lse = jnp.logaddexp(lse, sinks)
        written = (nest.write_query(results[0], out, at, add=False),)
        rows = [lse] if tiles.config.needs_lse else []
        rows += [tiles.visible_maximum(state.max_so_far, at)] if tiles.config.needs_max_logits else []
        rows = [jnp.broadcast_to(x, (*nest.row_shape, 1))[..., 0] for x in rows]
        return written + tuple(
            nest.write_row(result, x, at, add=False) for result, x in zip(results[1:], rows, strict=True)
        )

    return nest.rows(row_tile, zeros(tiles))


def zeros(tiles: Tiles) -> tuple[jax.Array, ...]:
    """Where the results of `forward` are collected."""
    z = tiles.sizes
    num_rows = tiles.config.needs_lse + tiles.config.needs_max_logits
    rows = tuple(tiles.zeros(*z.batch, z.N, z.T) for _ in range(num_rows))
    return jnp.zeros((*z.batch, z.T, z.N, z.D), tiles.plan.out_dtype), *rows
