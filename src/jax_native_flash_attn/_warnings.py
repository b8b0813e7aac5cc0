"""Warnings of calls that are legal, and give what `jax.nn` gives, but are hardly meant so."""

import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

_FLAG = "JAX_NATIVE_FLASH_ATTN_WARNINGS"
_BETWEEN = tuple(str(Path(module).parent) + os.sep for module in (__file__, str(jax.__file__)))
# More heads than models have, of which 232 (Falcon 180B) are the most that we know, and as many key/value heads as the
# most (128). Models of 128 heads and more attend under a causal mask, a mask of padding or a bias.
_TOO_MANY_HEADS, _TOO_MANY_KEY_HEADS, _MANY_HEADS = 256, 128, 128
_MOST_VALUES = 2**24  # that are read: 64 MiB of float32
_looked_at: set[tuple[str, int, str]] = set()  # lines that called, and the argument whose values were read


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


def warn_of_lengths(name: str, given: Any, lengths: jax.Array | None, limit: int) -> None:
    """Of lengths that no sequence has, as they were given and as an array. Those on a device are read once a line."""
    if lengths is None:
        return
    is_on_host = isinstance(given, np.ndarray) or (
        isinstance(given, list | tuple) and all(isinstance(n, int | np.integer) for n in given)
    )
    known: Any = given if is_on_host or isinstance(given, jax.Array) else lengths
    line = None
    if not is_on_host and (line := _line_to_look(known, name)) is None:
        return
    outside = [int(n) for n in np.asarray(known) if not 0 <= n <= limit]
    if outside:
        _warn(
            f"{name} has lengths outside of 0 to {limit}, got {outside[0]}, which is taken for "
            f"{min(max(outside[0], 0), limit)}: give how many tokens of each row count, from its start"
        )
    if line is not None:
        _looked_at.add(line)


def warn_of_bias(given: Any, bias: jax.Array | None) -> None:
    """Of a mask in the place of a bias: rows of 0 and 1, with both. It is read once a line."""
    if bias is None or 1 in bias.shape[-2:]:
        return
    known: Any = given if isinstance(given, jax.Array | np.ndarray) else bias
    line = _line_to_look(known, "bias")
    if line is None:
        return
    values = np.asarray(known)
    # The first tell nearly any other bias.
    if _is_of_0_and_1(values.flat[:4096]) and _is_of_0_and_1(values) and values.min() < values.max():
        _warn(
            f"bias of shape {values.shape} holds 0 and 1 alone, which are added to the logits: no key is hidden. It "
            "looks like a mask: pass mask=bias.astype(bool); bias - 1, of the same softmax, if it is meant"
        )
    _looked_at.add(line)


def warn_of_layout(query: tuple[int, ...], key: tuple[int, ...], T: int, S: int, *, is_alone: bool) -> None:
    """Of (B, N, T, H) that is legal as (B, T, N, H), where it shows: as few tokens, of more heads than models have.

    `is_alone`: no mask, bias or the like says who attends whom. Without a batch, its rows may be folded into the heads.
    """
    if len(query) != 4 or len(key) != 4:
        return
    N, K = query[2], key[2]
    if not 1 < T <= N // 4 or S == 0:
        return
    is_too_many = N >= _TOO_MANY_HEADS and K >= _TOO_MANY_KEY_HEADS
    if T % S == 0 and (is_too_many or (is_alone and N == K >= _MANY_HEADS)):
        _warn(
            f"query of shape {query} and key of shape {key} are read as (B, T, N, H) and (B, S, K, H), {T} queries of "
            f"{N} heads. If query, key and value are (B, N, T, H), as in PyTorch, transpose each with "
            "x.swapaxes(-3, -2), and the output back; jax.vmap over the batch if it is meant"
        )
    elif (T, N) == (K, S) and (N >= _TOO_MANY_HEADS or (is_alone and N >= _MANY_HEADS)):
        _warn(
            f"query of shape {query} beside key of shape {key} is read as (B, T, N, H), {T} queries of {N} heads. If "
            "it alone is (B, N, T, H), as in PyTorch, transpose it with query.swapaxes(-3, -2), and the output back; "
            "jax.vmap over the batch if it is meant"
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


def _is_of_0_and_1(x: np.ndarray) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _line_to_look(x: Any, name: str) -> tuple[str, int, str] | None:
    """That of the call, if the values are at hand and no call of this line has had them read: reading may wait."""
    if isinstance(x, Tracer) or not 0 < x.size <= _MOST_VALUES or os.environ.get(_FLAG) == "0":
        return None
    if isinstance(x, jax.Array) and (x.is_deleted() or not x.is_fully_addressable):
        return None
    frame, _ = _caller()
    line = (frame.f_code.co_filename, frame.f_lineno, name)
    return None if line in _looked_at else line


def _caller() -> tuple[FrameType, int]:
    """What called the package, be it through a transformation of JAX; and how far up it is from who asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    return frame, level


def _warn(message: str) -> None:
    """At the line that called the package."""
    flag = os.environ.get(_FLAG, "1")
    if flag not in ("0", "1"):
        raise ValueError(f"{_FLAG} must be 0 or 1, got {flag!r}: 0 is for no warnings")
    if flag == "0":
        return
    warnings.warn(message, AttentionWarning, stacklevel=_caller()[1])
