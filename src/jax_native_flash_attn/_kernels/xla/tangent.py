"""The tangent (JVP) of attention: its four equations (`forward.py`) differentiated.

dz_ts = scale * (dq_t . k_s + q_t . dk_s) + dscale * q_t . k_s + dbias_ts
dlse_t = sum_s p_ts dz_ts
dout_t = sum_s c_ts p_ts dz_ts v_s - dlse_t out_t + sum_s c_ts p_ts dv_s
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .access import ColumnTile, RowTile
from .masked_tiles import TileMask
from .tiles import Tiles


class TangentState(NamedTuple):
    """Sums over the keys of some rows: both tangents, and the weights, where these are needed."""

    dout: jax.Array
    dlse: jax.Array
    share: jax.Array | None


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
    has_all_keys, changes_logits = tiles.config.has_all_keys, any(name != "value" for name in tangents)
    # Where all keys of a row are in one tile, dlse is known before the product with the values. What is rounded for it
    # is then p (dz - dlse), which is small where the dz of a row are much alike, and out is not needed.
    is_centered = nest.has_one_key_tile and has_all_keys
    # The weights are made of a rounded lse, so that the p of a row are all too large, or all too small.
    has_shares = changes_logits and (not tiles.plan.rounds_operands if has_all_keys else "share" in results)

    def row_tile(at: RowTile, results: dict[str, jax.Array]) -> dict[str, jax.Array]:
        query, row_lse = tiles.query(at), tiles.rows(lse, at)

        def mean(dlse: jax.Array, share: jax.Array | None) -> jax.Array:
            """The mean dz of each row, of all of its keys: their sum, divided by that of the weights."""
            if share is None or not has_all_keys:
                return dlse
            if tiles.inputs.sinks is not None:
                share += tiles.exp(tiles.sinks(at) - row_lse)
            if tiles.inputs.mask.key_start is not None:
                share = jnp.where(share == 0, 1, share)  # padded rows may have visited no tile at all
            return dlse / lax.stop_gradient(share)  # which is 1 but for roundings

        def sums_tangent(key: jax.Array, columns: ColumnTile) -> jax.Array | None:
            """Of products and bias; None if no tangent reaches them."""
            pairs = []
            if "query" in tangents:
                pairs.append((nest.query_slice(tangents["query"], at), key, tiles.scale(at)))
            if "scale" in tangents:
                pairs.append((query, key, nest.batch_slice(tangents["scale"], at)))
            if "key" in tangents:
                pairs.append((query, nest.key_slice(tangents["key"], at, columns), tiles.scale(at)))
            terms = _products(tiles, pairs)
            if "bias" in tangents:
                terms.append(tiles.bias(tangents["bias"], at, columns))
            return sum(terms[1:], terms[0]) if terms else None

        def key_tile(columns: ColumnTile, mask: TileMask | None, state: TangentState) -> TangentState:
            dout, dlse, share = state
            keep = tiles.keep(at, columns)
            key = tiles.key(at, columns, mask)
            scores = tiles.sums(query, key, at, columns)
            logits = tiles.masked(tiles.changed(scores, at, columns), mask)
            weights = tiles.exp(logits - row_lse)
            dlogits = tiles.changed_tangent(scores, tangents, logits, sums_tangent(key, columns), at, columns)
            if dlogits is not None:
                dlogits = tiles.through_mask(jnp.broadcast_to(dlogits, (*rows, nest.tile.block_kv)), mask)
                dweights = weights * dlogits
                dlse += dweights.sum(-1, keepdims=True)
                if share is not None:
                    share += weights.sum(-1, keepdims=True)
                if is_centered:
                    dweights -= weights * mean(dlse, share)
                value = tiles.value(at, columns, mask)
                dropped = tiles.drop(dweights, keep)
                dout += tiles.einsum("...rs,...sd->...rd", dropped, value)
            if "value" in tangents:
                dvalue = nest.key_slice(tangents["value"], at, columns)
                dropped = tiles.drop(weights, keep)
                dout += tiles.einsum("...rs,...sd->...rd", dropped, dvalue)
            return TangentState(dout, dlse, share)

        rows = nest.row_shape
        none = tiles.zeros(*rows, 1)
        empty = TangentState(tiles.zeros(*rows, sizes.D), none, none if has_shares else None)
        dout, dlse, share = nest.columns(at, key_tile, empty)
        if "out" in results:
            if not is_centered:
                dout -= dlse * nest.query_slice(out, at).astype(tiles.plan.accumulate)
            dout = nest.owned_rows(dout, at)
            results["out"] = nest.write_query(results["out"], dout, at, add=True)
        of_rows = {"lse": mean(dlse, share), "share": none if share is None else share}
        for name, x in of_rows.items():
            if name in results:
                results[name] = nest.write_row(results[name], nest.owned_rows(x, at)[..., 0], at, add=True)
        return results

    zeros = {name: tiles.zeros_for(name, like) for name, like in results.items()}
    sums = nest.rows(lambda at, sums: row_tile(at, dict(sums)), zeros)
    return {name: tiles.summed(name, sums[name], like) for name, like in results.items()}


def _products(tiles: Tiles, pairs: list[tuple[jax.Array, jax.Array, jax.Array]]) -> list[jax.Array]:
    """`Tiles.products` of (query, key, multiplier), to be added up; as few as these make.

    Where nothing is rounded, those of one key are one product, of a sum of queries. Two keys then are one, side by side
    along H: what a product takes is mostly to write it, and to add another to it.
    """
    if tiles.plan.rounds_operands:
        return [tiles.products(*pair) for pair in pairs]
    queries: list[jax.Array] = []
    keys: list[jax.Array] = []
    for query, key, multiplier in pairs:
        scaled = query.astype(tiles.plan.product) * multiplier
        if keys and keys[-1] is key:
            queries[-1] += scaled
        else:
            queries.append(scaled)
            keys.append(key)
    # With other axes in front, which `vmap` added to some of them, the others would be repeated.
    if len(keys) > 1 and len({x.shape[:-2] for x in (*queries, *keys)}) == 1:
        queries = [jnp.concatenate(queries, -1)]
        keys = [jnp.concatenate([x.astype(tiles.plan.product) for x in keys], -1)]
    return [tiles.scores(query, key) for query, key in zip(queries, keys, strict=True)]
