"""Attention over parts of the keys, merged: for split decoding, and for parts that users make themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._semantics.errors import describe
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
      TypeError: no lists of real arrays.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import flash_attention_with_lse, merge_attention
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 64, 8, 32))
      >>> halves = slice(0, 32), slice(32, 64)
      >>> parts = [flash_attention_with_lse(query, key[:, half], value[:, half]) for half in halves]
      >>> out, lse = merge_attention(*zip(*parts))  # as of all 64 keys
      >>> out.shape, lse.shape
      ((2, 64, 8, 32), (2, 64, 8))
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        _check_parts(name, parts)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be equally many and at least one, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs must have one shape, (..., T, N, H), and lses that shape without the last axis, got "
                f"{[x.shape for x in outs]} and {[x.shape for x in lses]}{_order_hint(outs, lses)}"
            )
    out, lse = merge(outs, lses)
    return out.astype(outs[0].dtype), lse


def _check_parts(name: str, parts: Any) -> None:
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise TypeError(
            f"{name} must be a list of arrays, one for each part, got {describe(parts)}: of one part "
            f"pass [{name[:-1]}], of a stack of parts list({name})"
        )
    for part in parts:
        if not isinstance(part, np.ndarray | jax.Array):
            raise TypeError(
                f"{name} must hold arrays, got {describe(part)}: pass merge_attention([out, ...], [lse, ...]), "
                "of pairs merge_attention(*zip(*pairs))"
            )
        if not jnp.issubdtype(part.dtype, jnp.floating):
            raise TypeError(f"{name} must hold real numbers, got {describe(part)}")


def _order_hint(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> str:
    if outs[0].shape == lses[0].shape[:-1]:
        return ": outs come first"
    if len(outs) == 2 and outs[1].shape == outs[0].shape[:-1]:
        return ": pass merge_attention([out, ...], [lse, ...]), of pairs merge_attention(*zip(*pairs))"
    lse = lses[0].shape
    if (*lse[:-2], *lse[:-3:-1]) == outs[0].shape[:-1]:
        return ": transpose lse, from (..., N, T), with lse.swapaxes(-2, -1)"
    return ""
