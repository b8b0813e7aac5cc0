"""FlashAttention in pure JAX: a drop-in replacement for `jax.nn.dot_product_attention`."""

from . import mods as mods
from ._api import flash_attention, flash_attention_with_lse
from ._context_parallel import balanced_order, context_parallel_attention, context_parallel_attention_with_lse
from ._explain import explain
from ._explanation import ContextExplanation, Explanation, PassExplanation
from ._merge import merge_attention
from ._semantics.dropout import dropout_keep_mask
from ._warnings import AttentionWarning

__all__ = [
    "AttentionWarning",
    "ContextExplanation",
    "Explanation",
    "PassExplanation",
    "balanced_order",
    "context_parallel_attention",
    "context_parallel_attention_with_lse",
    "dropout_keep_mask",
    "explain",
    "flash_attention",
    "flash_attention_with_lse",
    "merge_attention",
]
__version__ = "0.1.0"
