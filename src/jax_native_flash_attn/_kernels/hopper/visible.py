"""Launch of the kernel that finds visible keys, and what the library asks of `find_visible`, of its results."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..._semantics.masks import Band, MaskOperands
from ..._semantics.visible import Visible, rows_with_a_key, with_intervals
from .device import visible as visible_kernel
from .host.visible_plan import PADDED, VisibleOuts, VisiblePlan
from .pallas import launch


def find_visible(
    mask: MaskOperands,
    T: int,
    S: int,
    padded: jax.Array | None,
    has_dead_rows: bool | None,
    band: Band | None = None,
    *,
    interpret: Any = None,
) -> Visible:
    """See `_semantics.visible.find_visible`. Where there is no further mask, XLA adds nothing that kernels read.

    Rows that are padding have no key here, whatever the masks leave them.
    """
    if padded is not None:
        mask, band = with_intervals(mask, T, S, band), None
        assert mask.key_start is not None
        mask = mask._replace(key_start=jnp.where(padded, PADDED, mask.key_start))
    plan = VisiblePlan.make(mask, T, S, band, marks_dead=bool(has_dead_rows))
    found: VisibleOuts = launch(
        functools.partial(visible_kernel.kernel, plan),
        plan.operands(mask),
        out_types=plan.out_types(),
        scratch=(),
        grid=plan.grid,
        warpgroups=1,
        interpret=interpret,
    )
    start, stop, is_exact = found.start[..., :T], found.stop[..., :T], found.is_sorted
    if is_exact.size > 1:
        is_exact = jnp.broadcast_to(is_exact.min(), is_exact.shape)
    is_exact = is_exact[..., None]
    has_key = (start >= 0) & (start < stop)
    if mask.allowed is not None:
        lead = jnp.broadcast_shapes(has_key.shape[:-1], mask.allowed.shape[:-2])
        # Of keys that are not sorted, others lie between, which the mask may leave too.
        matches = mask.matches()
        assert matches is not None
        has_key &= rows_with_a_key(start, stop, mask.allowed & matches, is_banded=True)
        has_key = jnp.broadcast_to(has_key, (*lead, T))
    of_rows = () if has_dead_rows is None else (found.start, found.stop, found.bounds)
    return Visible(jnp.maximum(start, 0), stop, has_key, is_exact, *of_rows)
