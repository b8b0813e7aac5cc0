"""Warnings of calls that are legal, and give what `jax.nn` gives, but are hardly meant so."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

_FLAG = "JAX_NATIVE_FLASH_ATTN_WARNINGS"
_BETWEEN = tuple(str(Path(module).parent) + os.sep for module in (__file__, str(jax.__file__)))


class AttentionWarning(UserWarning):
    """A call of attention that is legal, with the result of `jax.nn`, but is hardly meant so (docs/guides/warnings.md).

    Python shows each once for each line that calls. The environment variable `JAX_NATIVE_FLASH_ATTN_WARNINGS=0` turns
    them off, and so does `warnings.filterwarnings("ignore", category=AttentionWarning)`.

    Raises:
      ValueError: where one is due, for another value of the variable than 0 and 1.

    Examples:
      >>> import warnings
      >>> import jax.numpy as jnp
      >>> from jax_native_flash_attn import AttentionWarning, flash_attention
      >>> query, key = jnp.ones((1, 2, 8, 32)), jnp.ones((1, 64, 8, 32))
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     out = flash_attention(query, key, key, is_causal=True)  # sees two of 64 keys
      >>> caught[0].category is AttentionWarning
      True
    """


def warn_of_causal(rows: int, keys: int) -> None:
    """Of `is_causal`, where nothing says at which positions queries or keys stand."""
    if 0 < rows < keys:
        _warn(
            f"is_causal=True with T = {rows} < S = {keys} lets query t attend keys s <= t, the first keys alone. Of "
            "queries that are the last tokens, as in decoding, pass query_offset=S - T, or how many keys come before "
            "them; query_offset=0 if this is meant"
        )


def warn_of_positions(**given: Any) -> None:
    """Of what says where rows and keys stand, where nothing goes by that."""
    names = " and ".join(name for name, x in given.items() if x is not None)
    _warn(
        f"{names} without is_causal=True, local_window_size, score_mod or mask_mod changes nothing, as nothing else "
        "goes by positions: add the one that is meant; without one leave positions and offsets out"
    )


def warn_of_dropout(rng: Any) -> None:
    """Of a key where nothing says at which rate weights are dropped."""
    if rng is not None:
        _warn(
            "dropout_rng without dropout_rate drops nothing: pass dropout_rate, such as 0.1; dropout_rate=0.0 or "
            "deterministic=True if no dropout is meant"
        )


def warn_of_window(window: tuple[Any, Any] | None, *, is_causal: bool) -> None:
    """Of a static window without a key."""
    if window is None or not all(isinstance(side, int) for side in window):
        return
    left, right = window
    if left + (min(right, 0) if is_causal else right) < 0:
        beside = " beside is_causal=True" if is_causal else ""
        _warn(
            f"local_window_size={window}{beside} leaves all queries without keys: each row is then the mean of value, "
            "or 0 with sinks. A side without a limit is S, not -1; no window is None"
        )


def warn_of_lengths(query_lengths: Any, T: int, key_value_lengths: Any, S: int) -> None:
    """Of lengths that no sequence has. Those on a device are not looked at: reading them would wait for it."""
    for name, lengths, limit in ("query", query_lengths, T), ("key_value", key_value_lengths, S):
        if lengths is None or isinstance(lengths, jax.Array):
            continue
        outside = [int(n) for n in np.ravel(lengths) if not 0 <= n <= limit]
        if outside:
            _warn(
                f"{name}_seq_lengths has lengths outside of 0 to {limit}, got {outside[0]}, which is taken for "
                f"{min(max(outside[0], 0), limit)}: give how many tokens of each row count, from its start"
            )


def warn_of_shapes(query: tuple[int, ...], mask: tuple[int, ...], B: int, T: int, S: int, N: int) -> None:
    """Of axes that are not read as may have been meant, by shapes as they were given."""
    if len(query) < 3:
        _warn(
            f"query of shape {query} is read as heads at one position, (1, 1, N, H): for one head of T positions pass "
            "query, key and value with an axis of heads, x[:, None, :]; query[None, None] if this is meant"
        )
    if mask == (B, S) and B == T > 1:
        _warn(
            f"mask of shape {mask} is read as (T, S), one for all batch rows, as B = T = {B}. Of one of the keys of "
            "each batch row pass mask[:, None, None, :]; mask[None, None] if rows of queries are meant"
        )
    if len(mask) == 3 and mask[0] == B == N > 1:
        _warn(
            f"mask of shape {mask} is read as (N, T, S), one for each head, as B = N = {B}. Of one for each batch "
            "row pass mask[:, None]; mask[None] if heads are meant"
        )


def _warn(message: str) -> None:
    """At the line that called the package, be it through a transformation of JAX."""
    flag = os.environ.get(_FLAG, "1")
    if flag not in ("0", "1"):
        raise ValueError(f"{_FLAG} must be 0 or 1, got {flag!r}: 0 is for no warnings")
    if flag == "0":
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AttentionWarning, stacklevel=level)
