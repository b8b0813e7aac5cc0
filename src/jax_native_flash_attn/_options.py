"""Types of the optional arguments, and the neutral values of those that `jax.nn` lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

import jax
from jax.lax import PrecisionLike
from jax.typing import ArrayLike

# (left, right), or one integer for both.
WindowLike: TypeAlias = ArrayLike | Sequence[ArrayLike]


# (score, batch, head, query_index, key_index, *args) -> score, and the same without a score -> bool.
ScoreMod: TypeAlias = Callable[..., Any]
MaskMod: TypeAlias = Callable[..., Any]


class Options(TypedDict, total=False):
    """Of `flash_attention` and `flash_attention_with_lse`."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: WindowLike | None
    dropout_rate: float | None
    dropout_rng: jax.Array | None
    deterministic: bool
    block_q: int | None
    block_kv: int | None
    precision: PrecisionLike
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    query_positions: ArrayLike | None
    key_value_positions: ArrayLike | None
    query_offset: ArrayLike | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    broadcast_dropout: bool
    score_mod: ScoreMod | None
    score_mod_args: tuple[Any, ...]
    mask_mod: MaskMod | None
    mask_mod_args: tuple[Any, ...]


# With the values that ask for nothing.
EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "dropout_rate": (None, 0.0),
    "block_q": (None,),
    "block_kv": (None,),
    "precision": (None,),
    "query_segment_ids": (None,),
    "key_value_segment_ids": (None,),
    "query_positions": (None,),
    "key_value_positions": (None,),
    "query_offset": (None, 0),
    "logits_soft_cap": (None,),
    "sinks": (None,),
    "broadcast_dropout": (False,),
    "score_mod": (None,),
    "score_mod_args": ((),),
    "mask_mod": (None,),
    "mask_mod_args": ((),),
}
