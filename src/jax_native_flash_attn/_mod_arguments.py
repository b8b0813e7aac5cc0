"""`score_mod` and `mask_mod`, as they are given: traced, and with the arrays that they read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ._semantics.mods import trace_mod
from ._semantics.tile_masks import TiledMask
from ._shapes import Axes


def as_mods(
    given: dict[str, tuple[Any, Any]], score_dtype: DTypeLike, axes: Axes, *, moves_rows: bool, blocks: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and arrays of a call.

    Args:
      given: each function and its further arguments, by the name of the public argument.
      score_dtype: of the scores.
      axes: of the call; its T is that of one of `blocks`.
      moves_rows: whether the call has positions or an offset.
    """
    settings: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for name, (function, args_of) in given.items():
        if function is None:
            if jax.tree.leaves(args_of):
                raise ValueError(f"{name}_args are further arguments of {name}, got them and {name}=None")
            continue
        if isinstance(function, TiledMask):
            if name == "score_mod":
                raise TypeError("score_mod must be a function, got what make_tile_mask gives: pass it as mask_mod")
            _check_tiled(function, args_of, axes._replace(T=blocks * axes.T), moves_rows=moves_rows)
            settings["mask_block"] = function.block
            if blocks == 1:  # otherwise each device finds the tiles of what it attends
                arrays |= {"tile_classes": function.classes, "row_has_key": function.has_key}
            function, args_of = function.mask_mod, function.args
        settings[name], named = trace_mod(function, name, args_of, score_dtype if name == "score_mod" else None)
        args |= named
    if not settings:
        return {}, {}
    batch, heads = (jnp.arange(n, dtype=jnp.int32) for n in (axes.B, axes.N))
    return settings, arrays | {"batch_number": batch, "head_number": heads, "mod_args": args}


def _check_tiled(mask: TiledMask, args: Any, axes: Axes, *, moves_rows: bool) -> None:
    if jax.tree.leaves(args):
        raise ValueError("mask_mod_args are in what make_tile_mask gave, got others: give them to make_tile_mask")
    if moves_rows:
        raise ValueError(
            "mask_mod from make_tile_mask goes by places, got positions or an offset beside it: pass the function "
            "itself"
        )
    if mask.lengths != (axes.T, axes.S):
        raise ValueError(
            f"mask_mod was made by make_tile_mask for T, S = {mask.lengths}, got arrays of T, S = {(axes.T, axes.S)}"
        )
    lead = np.shape(mask.classes)[:2]
    if any(n not in (1, size) for n, size in zip(lead, (axes.B, axes.N), strict=True)):
        raise ValueError(
            f"mask_mod was made by make_tile_mask for batch, num_heads = {lead}, got arrays of {(axes.B, axes.N)}"
        )
