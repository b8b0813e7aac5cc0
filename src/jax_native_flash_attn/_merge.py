"""Attention over parts of the keys, merged: for split decoding, and for parts that users make themselves."""

from collections.abc import Sequence

import jax

from ._semantics.merging import merge


def merge_attention(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    With w_i = exp(lse_i): out = sum_i w_i out_i / sum_i w_i and lse = log sum_i w_i (FlashAttention, Dao et al. 2022,
    arXiv:2205.14135, section 3.1). Equal, values and gradients, to attention over all keys at once; a row without keys
    in any part gives the mean of the parts' means.

    A sink must count once: pass `sinks` to the call for one part alone, and none to the others.

    Args:
      outs: partial results, each (..., T, N, H), as `flash_attention_with_lse` gives them.
      lses: their log-sum-exps, each (..., T, N).

    Returns:
      out, in the dtype of the partial ones, and lse; can be merged further.

    Raises:
      ValueError: no parts, unequal numbers of them, or shapes that do not belong together.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many and at least one, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs must have one shape and lses that shape without the last axis, got {out.shape} and {lse.shape} "
                f"beside {outs[0].shape}"
            )
    out, lse = merge(outs, lses)
    return out.astype(outs[0].dtype), lse
