"""The cotangent (VJP) of attention: its tangent (`tangent.py`) transposed (FlashAttention-2, algorithm 2).

For cotangents do_t of out and dl_t of lse, in the notation of `forward.py`,

    delta_t = do_t . out_t - dl_t
    dz_ts = p_ts (c_ts do_t . v_s - delta_t)    dv_s = sum_t c_ts p_ts do_t
    dq_t = scale * sum_s dz_ts k_s              dk_s = scale * sum_t dz_ts q_t
    dscale = sum_ts dz_ts q_t . k_s             dbias_ts = dz_ts
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .access import ColumnTile, RowTile
from .masked_tiles import TileMask
from .tiles import Tiles


class RowMoments(NamedTuple):
    """Sums over the keys of some rows, for the gradient of scale; each (lead..., rows, 1).

    dscale = sum_t q_t . (sum_s dz_ts k_s) is at hand, but terms of both signs cancel, and what rounding did to out is,
    in delta, the same for a whole row. Hence, with x_ts = q_t . k_s,

        dscale = sum_t (sum_s dz_ts (x_ts - m_t) / P_t + dl_t m_t)  where  m_t = sum_s p_ts x_ts / P_t

    and P_t = sum_s p_ts; the same, as P_t is 1 and the dz of a row add up to dl_t. A dead row has no dz, and what dl_t
    it has, in derivatives of derivatives, is of no account. With a sink of weight p_t, P_t is p_t + sum_s p_ts, and the
    dz of a row add up to dl_t + p_t delta_t. With a soft cap x_ts is multiplied by its derivative. The error of delta,
    times p_ts, drops out, as does that of lse (the sum of rounded weights, where logits have bounds), by which all of a
    row is multiplied.

    Where products do not round their operands, sum_s dz_ts x_ts is what is at hand, and `dz_x` is None. P_t and m_t
    then have no derivative: P_t is 1 but for single roundings, and m_t drops out, whatever it is.

    Likewise for the gradient of a bias without keys, inside a soft cap, with x = 1.
    """

    dz_x: jax.Array | None
    dz: jax.Array
    p_x: jax.Array
    p: jax.Array

    @classmethod
    def zeros(cls, zeros: jax.Array, has_dz_x: bool) -> "RowMoments":
        """`has_dz_x`: whether `dz_x` is at hand."""
        return cls(None if has_dz_x else zeros, zeros, zeros, zeros)

    def with_tile(self, dz: jax.Array, p: jax.Array, x: jax.Array) -> "RowMoments":
        dz_x = self.dz_x
        if dz_x is None:
            p, x = lax.stop_gradient((p, x))
        else:
            dz_x += (dz * x).sum(-1, keepdims=True)
        pairs = (self.dz, dz), (self.p_x, p * x), (self.p, p)
        return RowMoments(dz_x, *(total + term.sum(-1, keepdims=True) for total, term in pairs))

    def gradient(
        self,
        dlse: jax.Array,
        delta: jax.Array,
        sink: jax.Array | None,
        exact: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Of each row, for the cotangents of lse, delta, and the weights of a sink.

        `exact`: what `dz_x` would be, and by what the x of the other moments were multiplied.
        """
        dz_x, p_x, p = self.dz_x, self.p_x, self.p if sink is None else self.p + sink
        p = jnp.where(p == 0, 1, p)  # Padded rows may have visited no tile at all.
        if exact is not None:
            (dz_x, scale), p = exact, lax.stop_gradient(p)
            has_scale = jnp.abs(scale) >= jnp.finfo(scale.dtype).tiny
            p_x = jnp.where(has_scale, p_x / jnp.where(has_scale, scale, 1), 0)
        assert dz_x is not None
        mean = p_x / p
        dlse = dlse if sink is None else dlse + sink / p * delta
        return (dz_x - self.dz * mean) / p + dlse * mean


class CotangentState(NamedTuple):
    """What the tiles of some rows add to: the gradient of query, without scale; moments by result; the results."""

    dquery: jax.Array | None
    moments: dict[str, RowMoments]
    results: dict[str, jax.Array]


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
    needs_logits = any(name != "value" for name in results)
    has_row_bias = "bias" in results and results["bias"].shape[-1] == 1 and tiles.config.has_all_keys
    row_sums = (["bias"] if has_row_bias else []) + (["scale"] if "scale" in results else [])
    # The gradient of scale is at hand in that of query, unless a product has rounded it.
    has_dscale = "scale" in results and not tiles.plan.rounds_operands
    needs_query = "query" in results or has_dscale
    has_out = "out" in cotangents
    # Where all keys of a row are in one tile, delta can be had from the weights instead of from out.
    has_whole_rows = has_out and "lse" not in cotangents and nest.visits_one_key_tile and tiles.inputs.sinks is None
    has_whole_rows &= tiles.plan.transposes_weights and tiles.config.has_all_keys
    # A product is fast on CPU only if its left operand contracts its last axis. For the gradients of key and value,
    # either the weights are transposed, or the row operands and, in the end, the results: (batch..., K, H, S).
    zeros = {name: tiles.zeros_for(name, like) for name, like in results.items()}
    transposed = [name for name in ("key", "value") if name in results and not tiles.plan.transposes_weights]
    zeros |= {name: jnp.moveaxis(zeros[name], -3, -1) for name in transposed}

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
        sink = None if tiles.inputs.sinks is None else tiles.exp(tiles.sinks(at) - row_lse)
        row_delta, row_lse, delta = delta, tiles.joined(row_lse), tiles.joined(delta)
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
            scores = tiles.sums(query, key, at, columns)
            logits = tiles.masked(tiles.changed(scores, at, columns), mask)
            weights = _weights(tiles, tiles.joined(logits), row_lse)
            if "value" in results and has_out:
                dropped = tiles.split(tiles.drop(weights, keep))
                results["value"] = _add_key_product(
                    tiles, results["value"], key_operands["value"], dropped, at, columns
                )
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
                tile = dlogits, tiles.split(weights), scores, logits
                moments = _with_tile(tiles, moments, tile, query, key, at, columns)
            dlogits, changed = tiles.changed_cotangent(scores, logits, dlogits, results, at, columns)
            results.update(changed)
            if "key" in results:
                rows = key_operands["key"]
                if tiles.plan.converts_late:
                    late_query, dlogits = lax.optimization_barrier((query, dlogits))
                    rows = scaled(late_query)
                results["key"] = _add_key_product(tiles, results["key"], rows, dlogits, at, columns)
            if "bias" in results and "bias" not in row_sums:
                add = not tiles.visits_once("bias", results["bias"].shape)
                dbias = dlogits.astype(tiles.plan.accumulate)
                results["bias"] = nest.write_score(results["bias"], dbias, at, columns, add=add)
            if dquery is not None:
                dquery += tiles.einsum("...rs,...sh->...rh", dlogits, key)
            return CotangentState(dquery, moments, results)

        dquery = tiles.zeros(*rows, sizes.H) if needs_query else None
        moments = {name: RowMoments.zeros(tiles.zeros(*rows, 1), name == "scale" and has_dscale) for name in row_sums}
        dquery, moments, results = nest.columns(at, key_tile, CotangentState(dquery, moments, results))
        exact = {"scale": _exact_moment(tiles, dquery, query, at)} if has_dscale else {}
        of_rows = tiles.visible_rows(dlse, at), row_delta, sink
        sums = {name: x.gradient(*of_rows, exact.get(name)) for name, x in moments.items()}
        return _write_rows(tiles, at, results, dquery, sums)

    sums = nest.rows(lambda at, sums: row_tile(at, dict(sums)), zeros)
    sums |= {name: jnp.moveaxis(sums[name], -1, -3) for name in transposed}
    return {name: tiles.summed(name, sums[name], like) for name, like in results.items()}


def _with_tile(
    tiles: Tiles,
    moments: dict[str, RowMoments],
    tile: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    query: jax.Array,
    key: jax.Array,
    at: RowTile,
    columns: ColumnTile,
) -> dict[str, RowMoments]:
    """Moments with those of a tile: cotangents of its logits, weights, sums and logits."""
    dlogits, weights, scores, logits = tile
    dz, p = (x.astype(tiles.plan.accumulate) for x in (dlogits, weights))
    found = {}
    for name, moment in moments.items():
        if name == "bias":
            x = jnp.ones_like(logits)
        else:
            x = tiles.products(query, key, tiles.scale(at)) if moment.dz_x is None else tiles.scores(query, key)
        x = tiles.changed_tangent(scores, {}, logits, x, at, columns)
        assert x is not None
        found[name] = moment.with_tile(dz, p, x)
    return found


def _exact_moment(tiles: Tiles, dquery: jax.Array | None, query: jax.Array, at: RowTile) -> tuple[jax.Array, jax.Array]:
    """`exact` of `RowMoments.gradient`, for scale."""
    assert dquery is not None
    dz_x = (dquery * query.astype(tiles.plan.accumulate)).sum(-1, keepdims=True)
    return dz_x, tiles.scale(at).astype(tiles.plan.accumulate)


def _write_rows(
    tiles: Tiles,
    at: RowTile,
    results: dict[str, jax.Array],
    dquery: jax.Array | None,
    sums: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """The results of some rows; `sums` by name, of each row."""
    nest, results = tiles.nest, dict(results)
    if dquery is not None and "query" in results:
        z, like = nest.sizes, results["query"]
        is_written_once = like.shape == (*z.batch, z.T, z.N, z.H) and z.T % nest.tile.block_q == 0
        results["query"] = nest.write_query(like, dquery * tiles.scale(at), at, add=not is_written_once)
    if "bias" in sums:
        results["bias"] = nest.write_row(results["bias"][..., 0], sums["bias"][..., 0], at, add=True)[..., None]
    if "scale" in results:
        results["scale"] = nest.add_batch(results["scale"], sums["scale"].sum((-1, -2)), at)
    return results


def _weights(tiles: Tiles, logits: jax.Array, lse: jax.Array) -> jax.Array:
    """p of a tile, as `Tiles.joined`."""
    if tiles.plan.makes_softmax_again:
        weights = tiles.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
    else:
        weights = tiles.exp(logits - lse)
    return tiles.stored(weights)


def _add_key_product(
    tiles: Tiles, result: jax.Array, rows: jax.Array, weights: jax.Array, at: RowTile, columns: ColumnTile
) -> jax.Array:
    """weights^T @ rows onto a result; rows are transposed if the result is."""
    dtype = tiles.plan.transposed_product
    if tiles.plan.transposes_weights:
        return tiles.nest.add_key(result, tiles.einsum("...rs,...rh->...sh", weights, rows, dtype=dtype), at, columns)
    product = tiles.einsum("...hr,...rs->...hs", rows, weights, dtype=dtype)
    return tiles.nest.add_key_transposed(result, product, at, columns)
