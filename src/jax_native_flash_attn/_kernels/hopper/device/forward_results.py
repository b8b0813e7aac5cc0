"""The results of one item of the forward kernel, from the numerator of its output and the state of its softmax."""

from typing import Any

import jax.numpy as jnp

from ...._semantics.numerics import LN2, LOG2E, lowest
from ..pallas import columns_of
from .forward_context import Rows
from .logits import TileLogits
from .units import NO_KEY, from_base_2

_LOWEST = lowest(jnp.float32)


def write(rows: Rows, acc: Any, top: Any, total: Any) -> None:
    """Start writing them. `acc`: numerator; `top`: maxima, in base 2; `total`: sums, of each thread's columns."""
    context, logits = rows.context, rows.logits
    total = total.sum(axis=1)
    factor, sink = logits.rescaling / total, rows.sink()
    if sink is not None:
        # The share of the keys.
        factor = factor / (1.0 + jnp.exp2((sink - _lse(logits, top, total)) * LOG2E))
    out = acc * columns_of(factor, acc.shape)
    lse = _lse(logits, top, total)
    if sink is not None:
        larger, smaller = jnp.maximum(lse, sink), jnp.minimum(lse, sink)
        lse = larger + jnp.log2(1.0 + jnp.exp2((smaller - larger) * LOG2E)) * LN2
    # With a fixed top, sums alone tell. Else this is compared with the top.
    sign, no_key = (total, 0.0) if context.plan.has_fixed_top else (top, NO_KEY * logits.unit.ceiling)
    if context.blocks.splits > 1:
        lse = jnp.where((sign > no_key) & jnp.logical_not(rows.item.is_empty), lse, _LOWEST)
    elif context.intervals.has_empty_rows:
        # Their weights are those of masked logits.
        out = jnp.where(columns_of(sign, acc.shape) > no_key, out, 0.0)
        lse = jnp.where(sign > no_key, lse, 0.0 if sink is None else sink)
    rows.write(out, lse, _largest(rows, top) if context.plan.needs_max_logits else None)


def _lse(logits: TileLogits, top: Any, total: Any) -> Any:
    """Of the keys."""
    return _top_logit(logits, top) + jnp.log2(total) * LN2


def _top_logit(logits: TileLogits, top: Any) -> Any:
    return from_base_2(top, logits.unit) if logits.has_terms else top * LN2


def _largest(rows: Rows, top: Any) -> Any:
    """The largest visible logit of each row; -inf where no key is visible, as in dead rows."""
    logits, intervals = rows.logits, rows.context.intervals
    has_key = top > NO_KEY * logits.unit.ceiling
    if rows.context.blocks.splits > 1:
        has_key = has_key & jnp.logical_not(rows.item.is_empty)
    if (rows_with_key := intervals.have_keys(rows.item.head, rows.row, rows.shape[0])) is not None:
        has_key = has_key & rows_with_key
    return jnp.where(has_key, _top_logit(logits, top), -jnp.inf)
