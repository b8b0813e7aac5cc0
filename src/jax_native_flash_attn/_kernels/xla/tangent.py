"""The tangent (JVP) of attention: its four equations (`forward.py`) differentiated.

dz_ts = scale * (dq_t . k_s + q_t . dk_s) + dscale * q_t . k_s + dbias_ts
dlse_t = sum_s p_ts dz_ts
dout_t = sum_s c_ts p_ts dz_ts v_s - dlse_t out_t + sum_s c_ts p_ts dv_s
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .access import ColumnTile, RowTile
from .masked_tiles import TileMask
from .tiles import Tiles


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
    is_centered = tiles.plan.rounds_operands and nest.visits_one_key_tile and tiles.config.has_all_keys

    def row_tile(at: RowTile, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
        query, row_lse = tiles.query(at), tiles.rows(lse, at)

        def sums_tangent(key: jax.Array, columns: ColumnTile) -> jax.Array | None:
            """Of products and bias; None if no tangent reaches them."""
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
            if "bias" in tangents:
                terms.append(tiles.bias(tangents["bias"], at, columns))
            return sum(terms[1:], terms[0]) if terms else None

        def key_tile(
            columns: ColumnTile, mask: TileMask | None, state: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            dout, dlse = state
            keep = tiles.keep(at, columns)
            key = tiles.key(at, columns, mask)
            scores = tiles.sums(query, key, at, columns)
            logits = tiles.masked(tiles.changed(scores, at, columns), mask)
            weights = tiles.exp(logits - row_lse)
            dlogits = tiles.changed_tangent(scores, tangents, logits, sums_tangent(key, columns), at, columns)
            if dlogits is not None:
                dlogits = tiles.through_mask(jnp.broadcast_to(dlogits, (*rows, nest.tile.block_kv)), mask)
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
