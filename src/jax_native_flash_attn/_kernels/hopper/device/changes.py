"""What the products of a tile start with, and what comes between them and its masks: `score_mod`, and the soft cap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...._semantics.numerics import LN2, LOG2E
from ..pallas import iota, zeros
from .logits import TileLogits
from .soft_cap import Prepared, prepare, soft_cap, tangents
from .terms import RowVectors, TileTerms


class Changed(NamedTuple):
    """What `TileLogits` takes: products, or tangents of a soft cap; the terms left; what brings them to base 2.

    `slope`: the derivative of `score_mod`, of kernels that need it; None for 1.
    """

    products: jax.Array
    terms: TileTerms
    multiplier: Any
    slope: jax.Array | None


def start_products(logits: TileLogits, terms: TileTerms, rows: RowVectors, tile: Any) -> tuple[jax.Array, TileTerms]:
    """What the products of a tile are added to, and the terms that are left to be added behind.

    What is added to scores, where `starts_with_addend`, be it loaded or computed: no register then holds it while the
    products are made, and less is left to do between them and the exponentials. It is divided by the unit.
    """
    if not logits.starts_with_addend:
        return zeros(*logits.shape), terms
    if logits.adds_mask:
        assert terms.mask is not None
        return _added(logits, terms, rows, tile) + terms.mask, terms._replace(mask=None, bias=None)
    left = terms._replace(bias=None)
    if logits.config.score_mod is not None:
        return _added(logits, terms, rows, tile), left
    assert terms.bias is not None
    return lax.cond(
        logits.unit.size == 1.0, logits.clipped, lambda x: _divided(logits, logits.clipped(x)), terms.bias
    ), left


def _added(
    logits: TileLogits,
    terms: TileTerms,
    rows: RowVectors,
    tile: Any,
    then: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """`then` of what is added to scores, in their unit: the bias, and a `score_mod` that does no more than that."""
    mods, place = logits.mods, logits.place(rows, tile, terms.read)
    loaded = None if terms.bias is None else _divided(logits, logits.clipped(terms.bias))
    if mods is None or not mods.adds:
        assert loaded is not None
        return then(loaded)
    factor = 1.0 / logits.unit.size if logits.starts_with_addend else None
    floor = _divided(logits, logits.floor)
    if loaded is None:
        return mods.added(place, then, factor, floor)
    return mods.added(place, lambda x: then(jnp.maximum(x + loaded, floor)), factor)


def _divided(logits: TileLogits, x: Any) -> Any:
    """By the unit."""
    return x * (1.0 / logits.unit.size) if logits.starts_with_addend else x


def changed(
    logits: TileLogits, products: Any, terms: TileTerms, rows: RowVectors, tile: Any, multiplier: Any
) -> Changed:
    """Of a tile, whose products, `prepared` or not, come to base 2 by the multiplier; the same, if there is neither."""
    config, slope, mods = logits.config, None, logits.mods
    if config.score_mod is not None and mods is not None and not logits.starts_with_addend:
        if mods.adds:
            given, to_base_e = products, multiplier * LN2
            products = _added(logits, terms, rows, tile, lambda x: given * to_base_e + x)
        else:
            scores, slope = mods.score(
                _scores(logits, products, terms.bias, multiplier), logits.place(rows, tile, terms.read)
            )
            products = logits.clipped(scores)
        T, axis = logits.context.sizes.T, logits.q_axis
        if logits.is_transposed and T % logits.block_q:  # rows that are none have no mask, and 0 for their score
            products = jnp.where(iota(logits.shape, axis) < T - rows.row, products, 0.0)
        terms, multiplier = terms._replace(bias=None), LOG2E
    cap = config.logits_soft_cap
    if cap is None:
        return Changed(products, terms, multiplier, slope)
    if terms.bias is not None:
        products, multiplier = _scores(logits, products, terms.bias, multiplier), LOG2E
    size = _size(logits, cap)
    capped = (
        tangents(products) if isinstance(products, Prepared) else soft_cap(products, multiplier * (LN2 / cap), size)
    )
    return Changed(capped, terms._replace(bias=None), cap * LOG2E / size, slope)


def prepared(logits: TileLogits, products: jax.Array, multiplier: Any) -> Prepared:
    """Products that come to base 2 by the multiplier, with the branches of the soft cap behind them: see `prepare`."""
    cap = logits.config.logits_soft_cap
    assert cap is not None
    return prepare(products, multiplier * (LN2 / cap), _size(logits, cap))


def _size(logits: TileLogits, cap: float) -> float:
    """By what the tangents of a soft cap come multiplied."""
    return 1.0 if not logits.scales_cap else cap if logits.has_terms else cap * LOG2E


def _scores(logits: TileLogits, products: jax.Array, bias: jax.Array | None, multiplier: Any) -> jax.Array:
    """Of products that come to base 2 by the multiplier: in base e, and with the bias."""
    scores = products * (multiplier * LN2)
    return scores if bias is None else scores + logits.clipped(bias)
