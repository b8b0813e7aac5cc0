"""The three kernels: attention, its tangent, and the transpose of its tangent.

Notation, for one head; sums run over the keys s of row t, z are the logits, c = keep / (1 - rate) is dropout:

    z_ts = scale * q_t . k_s + bias_ts          lse_t = log sum_s exp z_ts
    p_ts = exp(z_ts - lse_t)                    out_t = sum_s c_ts p_ts v_s

Forward: online softmax over the key/value tiles (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and
Staats 2021, arXiv:2112.05682; FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 1).

Tangent: differentiating the four equations above,

    dz_ts = scale * (dq_t . k_s + q_t . dk_s) + dscale * q_t . k_s + dbias_ts
    dlse_t = sum_s p_ts dz_ts
    dout_t = sum_s c_ts p_ts dz_ts v_s - dlse_t out_t + sum_s c_ts p_ts dv_s

Cotangent (the same linear map, transposed; FlashAttention-2, algorithm 2): for cotangents do_t of out and dl_t of lse,

    delta_t = do_t . out_t - dl_t
    dz_ts = p_ts (c_ts do_t . v_s - delta_t)    dv_s = sum_t c_ts p_ts do_t
    dq_t = scale * sum_s dz_ts k_s              dk_s = scale * sum_t dz_ts q_t
    dscale = sum_ts dz_ts q_t . k_s             dbias_ts = dz_ts

Both recompute p from lse, so that no T x S array is ever stored, and need no online softmax.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..._semantics.numerics import lowest
from .access import ColumnTile, RowTile
from .loops import TileMask
from .tiles import Tiles


class OnlineSoftmax(NamedTuple):
    """Running softmax of some rows: weighted sum of values, sum of weights, and the largest logit."""

    numerator: jax.Array
    denominator: jax.Array
    max_so_far: jax.Array


class CotangentState(NamedTuple):
    """What the tiles of some rows add to: the gradient of query, without scale; sums for that of scale; the results."""

    dquery: jax.Array | None
    moments: tuple[jax.Array, ...]
    results: dict[str, jax.Array]


def forward(tiles: Tiles, bounds: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """out (batch..., T, N, D) and, if needed, lse (batch..., N, T), in accumulation dtype.

    (The derivatives need out unrounded: delta is a difference of nearly equal sums.)
    `bounds`: what is subtracted from the logits in place of the largest so far; see `family.py`.
    """
    nest, sizes = tiles.nest, tiles.sizes

    def row_tile(at: RowTile, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        query = tiles.query(at)

        rows = nest.row_shape
        empty = OnlineSoftmax(
            tiles.zeros(*rows, sizes.D),
            tiles.zeros(*rows, 1),
            jnp.full((*rows, 1), lowest(tiles.plan.accumulate), tiles.plan.accumulate)
            if bounds is None
            else tiles.rows(bounds, at),
        )

        def key_tile(columns: ColumnTile, mask: TileMask | None, state: OnlineSoftmax | None) -> OnlineSoftmax:
            key, value = tiles.key(at, columns, mask), tiles.value(at, columns, mask)
            logits = tiles.logits(query, key, at, columns, mask)
            if bounds is not None:
                assert state is not None
                weights = tiles.split(tiles.stored(tiles.exp(tiles.joined(logits) - tiles.joined(state.max_so_far))))
                return OnlineSoftmax(
                    state.numerator + tiles.weighted(weights, value),
                    state.denominator + weights.astype(tiles.plan.accumulate).sum(-1, keepdims=True),
                    state.max_so_far,
                )
            if tiles.changes_products(mask):
                logits = lax.optimization_barrier(logits)
            new_max = logits.max(-1, keepdims=True)
            if state is not None:
                new_max = jnp.maximum(state.max_so_far, new_max)
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
        state = nest.columns(at, key_tile, None if nest.visits_one_key_tile and bounds is None else empty)
        denominator = state.denominator
        if tiles.inputs.mask.key_start is not None:
            # Padded rows may have visited no tile at all.
            denominator = jnp.where(denominator == 0, 1, denominator)
        out = state.numerator if tiles.plan.normalizes else state.numerator / denominator
        written = (nest.write_query(results[0], out, at, add=False),)
        if tiles.config.needs_lse:
            lse = state.max_so_far + jnp.log(denominator)
            written += (nest.write_row(results[1], lse[..., 0], at, add=False),)
        return written

    results = (jnp.zeros((*sizes.batch, sizes.T, sizes.N, sizes.D), tiles.plan.out_dtype),)
    if tiles.config.needs_lse:
        results += (tiles.zeros(*sizes.batch, sizes.N, sizes.T),)
    return nest.rows(row_tile, results)


def tangent(
    tiles: Tiles,
    out: jax.Array,
    lse: jax.Array,
    tangents: Mapping[str, jax.Array],
    results: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """The tangents of 'out' and/or 'lse', given those of some of `Inputs`' floats.

    An axis of size 1 in `results` is summed over.
    """
    nest, sizes = tiles.nest, tiles.sizes
    # Where all keys of a row are in one tile, dlse is known before the product with the values. What is rounded for it
    # is then p (dz - dlse), which is small where the dz of a row are much alike, and out is not needed.
    is_centered = tiles.plan.rounds_operands and nest.visits_one_key_tile

    def row_tile(at: RowTile, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
        query, row_lse = tiles.query(at), tiles.rows(lse, at)

        def logits_tangent(key: jax.Array, columns: ColumnTile, mask: TileMask | None) -> jax.Array | None:
            """dz; None if no tangent reaches the logits."""
            terms = []
            if "query" in tangents:
                dquery = nest.query_slice(tangents["query"], at)
                terms.append(tiles.products(dquery, key, tiles.scale(at)))
            if "key" in tangents:
                dkey = nest.key_slice(tangents["key"], at, columns)
                terms.append(tiles.products(query, dkey, tiles.scale(at)))
            if "scale" in tangents:
                dscale = nest.batch_slice(tangents["scale"], at)
                terms.append(tiles.products(query, key, dscale))
            products = sum(terms[1:], terms[0]) if terms else None
            bias = tiles.bias(tangents["bias"], at, columns) if "bias" in tangents else None
            return None if products is None and bias is None else tiles.logits_tangent(products, bias, mask)

        def key_tile(
            columns: ColumnTile, mask: TileMask | None, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            dout, dlse = state
            keep = tiles.keep(at, columns)
            key = tiles.key(at, columns, mask)
            weights = tiles.exp(tiles.logits(query, key, at, columns, mask) - row_lse)
            dlogits = logits_tangent(key, columns, mask)
            if dlogits is not None:
                dweights = weights * dlogits
                row_dlse = dweights.sum(-1, keepdims=True)
                dlse += row_dlse
                if is_centered:
                    dweights -= weights * row_dlse
                value = tiles.value(at, columns, mask)
                dropped = tiles.drop(dweights, keep)
                dout += tiles.einsum("...rs,...sd->...rd", dropped, value)
            if "value" in tangents:
                dvalue = nest.key_slice(tangents["value"], at, columns)
                dropped = tiles.drop(weights, keep)
                dout += tiles.einsum("...rs,...sd->...rd", dropped, dvalue)
            return dout, dlse

        rows = nest.row_shape
        dout, dlse = nest.columns(at, key_tile, (tiles.zeros(*rows, sizes.D), tiles.zeros(*rows, 1)))
        if "out" in results:
            if not is_centered:
                dout -= dlse * nest.query_slice(out, at).astype(tiles.plan.accumulate)
            dout = nest.owned_rows(dout, at)
            results["out"] = nest.write_query(results["out"], dout, at, add=True)
        if "lse" in results:
            dlse = nest.owned_rows(dlse, at)
            results["lse"] = nest.write_row(results["lse"], dlse[..., 0], at, add=True)
        return results

    zeros = {name: tiles.zeros_for(name, like) for name, like in results.items()}
    sums = nest.rows(lambda at, sums: row_tile(at, dict(sums)), zeros)
    return {name: tiles.summed(name, sums[name], like) for name, like in results.items()}


def cotangent(
    tiles: Tiles,
    out: jax.Array,
    lse: jax.Array,
    cotangents: Mapping[str, jax.Array],
    results: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """The cotangents of some of `Inputs`' floats, given those of 'out' and/or 'lse'.

    An axis of size 1 in `results` is summed over.
    """
    nest, sizes = tiles.nest, tiles.sizes
    needs_logits = any(name in results for name in ("query", "key", "scale", "bias"))
    # dscale = sum_t q_t . (sum_s dz_ts k_s) is at hand, but where products round their operands it is noise: terms of
    # both signs cancel, and what rounding did to out is, in delta, the same for a whole row. There, with x = q_t . k_s,
    #     dscale = sum_t (sum_s dz_ts (x_ts - m_t) / P_t + dl_t m_t)  where  m_t = sum_s p_ts x_ts / P_t
    # and P_t = sum_s p_ts;
    # the same, as P_t is 1 and the dz of a row add up to dl_t (a dead row has neither, since its lse is a constant to
    # the caller); and the error of delta, times p_ts, drops out, as does that of lse (the sum of rounded weights, where
    # logits have bounds), by which all of a row is multiplied.
    uses_moments = "scale" in results and tiles.plan.rounds_operands
    needs_query = "query" in results or ("scale" in results and not uses_moments)
    has_out = "out" in cotangents
    # Where all keys of a row are in one tile, delta can be had from the weights instead of from out.
    has_whole_rows = has_out and "lse" not in cotangents and nest.visits_one_key_tile and tiles.plan.transposes_weights
    # A product is fast on CPU only if its left operand contracts its last axis. For the gradients of key and value,
    # either the weights are transposed, or the row operands and, in the end, the results: (batch..., K, H, S).
    zeros = {name: tiles.zeros_for(name, like) for name, like in results.items()}
    transposed = [name for name in ("key", "value") if name in results and not tiles.plan.transposes_weights]
    zeros |= {name: jnp.moveaxis(zeros[name], -3, -1) for name in transposed}

    def add_key_product(
        result: jax.Array, rows: jax.Array, weights: jax.Array, at: RowTile, columns: ColumnTile
    ) -> jax.Array:
        """weights^T @ rows onto a result; rows are transposed if the result is."""
        dtype = tiles.plan.transposed_product
        if tiles.plan.transposes_weights:
            return nest.add_key(result, tiles.einsum("...rs,...rh->...sh", weights, rows, dtype=dtype), at, columns)
        product = tiles.einsum("...hr,...rs->...hs", rows, weights, dtype=dtype)
        return nest.add_key_transposed(result, product, at, columns)

    def row_tile(at: RowTile, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
        query, row_lse = tiles.query(at), tiles.rows(lse, at)
        rows = nest.row_shape
        # Rows that the tile before owns get cotangents of zero, and so contribute nothing anywhere.
        delta = tiles.zeros(*rows, 1)
        dout = tiles.zeros(*rows, sizes.D)
        if has_out:
            dout = nest.owned_rows(nest.query_slice(cotangents["out"], at), at)
            dout = dout.astype(tiles.plan.accumulate)
        if has_out and not has_whole_rows:
            delta += (dout * nest.query_slice(out, at).astype(tiles.plan.accumulate)).sum(-1, keepdims=True)
        dlse = tiles.zeros(*rows, 1)
        if "lse" in cotangents:
            dlse += nest.owned_rows(tiles.rows(cotangents["lse"], at), at).astype(tiles.plan.accumulate)
            delta -= dlse
        live_dout, delta = tiles.live_rows(dout, at), tiles.live_rows(delta, at)
        row_lse, delta = tiles.joined(row_lse), tiles.joined(delta)
        has_cotangents = (live_dout != 0).any() | (delta != 0).any() if tiles.plan.passes_weights else False
        live_dout = live_dout.astype(tiles.plan.product)

        def scaled(query: jax.Array) -> jax.Array:
            return query.astype(tiles.plan.accumulate) * tiles.scale(at)

        key_operands = {"key": scaled(query), "value": dout}
        if not tiles.plan.transposes_weights:
            key_operands = {name: jnp.swapaxes(x, -1, -2) for name, x in key_operands.items()}
        key_operands = {name: x.astype(tiles.plan.transposed_product) for name, x in key_operands.items()}

        def key_tile(columns: ColumnTile, mask: TileMask | None, state: CotangentState) -> CotangentState:
            dquery, moments, results = state.dquery, state.moments, dict(state.results)
            keep = tiles.keep(at, columns)
            keep = None if keep is None else tiles.joined(keep)
            key = tiles.key(at, columns, mask)
            logits = tiles.joined(tiles.logits(query, key, at, columns, mask))
            if tiles.plan.makes_softmax_again:
                weights = tiles.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
            else:
                weights = tiles.exp(logits - row_lse)
            weights = tiles.stored(weights)
            if "value" in results and has_out:
                dropped = tiles.split(tiles.drop(weights, keep))
                results["value"] = add_key_product(results["value"], key_operands["value"], dropped, at, columns)
            if not needs_logits:
                return CotangentState(dquery, moments, results)

            def logits_cotangent(weights: jax.Array) -> jax.Array:
                dlogits = -delta
                if has_out:
                    value = tiles.value(at, columns, mask)
                    dweights = tiles.joined(tiles.einsum("...rd,...sd->...rs", live_dout, value))
                    dweights = tiles.drop(dweights, keep)
                    dlogits = dweights - ((weights * dweights).sum(-1, keepdims=True) if has_whole_rows else delta)
                dlogits = weights * dlogits.astype(weights.dtype)
                return tiles.stored(dlogits) if tiles.plan.fuses_tiles else tiles.through_mask(dlogits, mask)

            if tiles.plan.passes_weights:
                # XLA fuses into a product only what enters its computation as a parameter: hence one of its own.
                is_needed = has_cotangents | ~jnp.isfinite(tiles.value(at, columns, mask)).all()
                dlogits = lax.cond(is_needed, logits_cotangent, lambda weights: 0 * weights, weights)
            else:
                dlogits = logits_cotangent(weights)
            dlogits = tiles.split(dlogits)
            if moments:
                dz, scores = dlogits.astype(tiles.plan.accumulate), tiles.scores(query, key)
                p = tiles.split(weights).astype(tiles.plan.accumulate)
                terms = dz * scores, dz, p * scores, p
                moments = tuple(sum_ + x.sum(-1, keepdims=True) for sum_, x in zip(moments, terms, strict=True))
            if "key" in results:
                rows = key_operands["key"]
                if tiles.plan.converts_late:
                    late_query, dlogits = lax.optimization_barrier((query, dlogits))
                    rows = scaled(late_query)
                results["key"] = add_key_product(results["key"], rows, dlogits, at, columns)
            if "bias" in results:
                add = not tiles.visits_once("bias", results["bias"].shape)
                dbias = dlogits.astype(tiles.plan.accumulate)
                results["bias"] = nest.write_score(results["bias"], dbias, at, columns, add=add)
            if dquery is not None:
                dquery += tiles.einsum("...rs,...sh->...rh", dlogits, key)
            return CotangentState(dquery, moments, results)

        dquery = tiles.zeros(*rows, sizes.H) if needs_query else None
        moments = (tiles.zeros(*rows, 1),) * 4 if uses_moments else ()
        dquery, moments, results = nest.columns(at, key_tile, CotangentState(dquery, moments, results))
        if dquery is not None and "query" in results:
            results["query"] = nest.write_query(results["query"], dquery * tiles.scale(at), at, add=True)
        if "scale" in results:
            if moments:
                dz_scores, dz, p_scores, p = moments
                p = jnp.where(p == 0, 1, p)  # Padded rows may have visited no tile at all.
                mean = p_scores / p
                terms = (dz_scores - dz * mean) / p + dlse * mean
            else:
                assert dquery is not None
                terms = dquery * query.astype(tiles.plan.accumulate)
            dscale = terms.sum((-1, -2))
            results["scale"] = nest.add_batch(results["scale"], dscale, at)
        return results

    sums = nest.rows(lambda at, sums: row_tile(at, dict(sums)), zeros)
    sums |= {name: jnp.moveaxis(sums[name], -1, -3) for name in transposed}
    return {name: tiles.summed(name, sums[name], like) for name, like in results.items()}
