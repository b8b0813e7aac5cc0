"""Functions for `score_mod` and `mask_mod`, what is known of a mask beforehand, and pictures of masks.

Each is elementwise and can be called on arrays that broadcast. Each is one value, however often it is made: functions
are module-level ones, and what has settings is a frozen dataclass, compared by these. So `jax.jit` compiles once for
it, also where it is a static argument.
"""

from .._semantics.tile_masks import TiledMask
from .functions import (
    Dilated,
    Neighbourhood,
    SlidingWindow,
    SoftCap,
    T5RelativeBias,
    alibi,
    alibi_slopes,
    causal,
    document,
    prefix_lm,
    tree,
    tree_ancestors,
)
from .tiles import make_tile_mask, visualize_mask

__all__ = [
    "Dilated",
    "Neighbourhood",
    "SlidingWindow",
    "SoftCap",
    "T5RelativeBias",
    "TiledMask",
    "alibi",
    "alibi_slopes",
    "causal",
    "document",
    "make_tile_mask",
    "prefix_lm",
    "tree",
    "tree_ancestors",
    "visualize_mask",
]
