"""Checks of the public arguments; each error names the argument, what was given and what is accepted.

Where `jax.nn.dot_product_attention` raises, the type of the error is the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._semantics.call import Arrays, Settings
from ._semantics.dropout import check_dropout, head_indices, make_dropout, threefry_words
from ._semantics.masks import Band, clip_window_side, hide_constant_mask


def check(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    *,
    scale: Any,
    is_causal: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: Any,
    dropout_rate: Any,
    dropout_rng: Any,
    deterministic: Any,
    block_q: Any,
    block_kv: Any,
    precision: Any,
    needs_lse: bool,
    implementation: str | None = None,
) -> tuple[Settings, Arrays]:
    """The one place that knows the public names; see `flash_attention`."""
    is_causal = as_static_bool(is_causal, "is_causal")
    blocks = as_block(block_q, "block_q"), as_block(block_kv, "block_kv")
    if as_static_bool(deterministic, "deterministic"):
        dropout_rate = 0.0
    check_dropout(dropout_rate, dropout_rng)
    precision = as_precision(precision)
    query, key, value = (as_4d(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    check_query_key_value(query, key, value)
    B, T, N, H = query.shape
    S = key.shape[1]
    bias = None if bias is None else as_bias(bias, (B, N, T, S))
    window = as_window(local_window_size)
    query_lengths = as_lengths(query_seq_lengths, "query_seq_lengths", B)
    key_value_lengths = as_lengths(key_value_seq_lengths, "key_value_seq_lengths", B)
    scalar_scale = as_scale(scale, H)
    # A number becomes a tracer where what follows is recorded for a compiler. Elsewhere nothing is analysed.
    is_staged = isinstance(scalar_scale if scale is None else jnp.asarray(0.0), Tracer)
    mask = None if mask is None else as_mask(mask, (B, N, T, S), is_staged=is_staged)
    band = Band()
    if isinstance(mask, np.ndarray):
        mask, band = hide_constant_mask(mask, T, S)
    dropout, dropout_key, head_index = None, None, None
    if dropout_rate > 0:
        dropout, dropout_key = make_dropout(dropout_rate), threefry_words(dropout_rng)
        head_index = head_indices(B, N)
    static_window, traced_window = window, None
    if window is not None and not all(isinstance(side, int) for side in window):
        left, right = clip_window_side(window[0], -S, T), clip_window_side(window[1], -T, S)
        static_window, traced_window = None, jnp.stack([left, right])
    settings = Settings(
        is_causal, static_window, band, dropout, *blocks, precision, needs_lse, implementation, is_staged
    )
    arrays = Arrays(
        query=query,
        key=key,
        value=value,
        scale=scalar_scale,
        bias=bias,
        mask=mask,
        traced_window=traced_window,
        query_lengths=query_lengths,
        key_value_lengths=key_value_lengths,
        dropout_key=dropout_key,
        head_index=head_index,
    )
    return settings, arrays


_FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def as_4d(x: Any, name: str, asarray: Callable[[Any], Any] = jnp.asarray) -> Any:
    """An array of rank 4, with axes of size 1 put in front as `jax.nn` does."""
    if x is None:
        raise ValueError(f"{name} must be an array, got None")
    x = asarray(x)
    if x.ndim > 4:
        raise ValueError(f"{name} must have at most 4 dimensions, got shape {x.shape}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def check_query_key_value(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    B, _, N, H = query.shape
    _, S, K, _ = key.shape
    if query.dtype.name not in _FLOAT_DTYPES:
        raise ValueError(f"query must have a dtype of {', '.join(_FLOAT_DTYPES)}, got {query.dtype}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not all(isinstance(n, int) for n in x.shape[1:]):
            raise NotImplementedError(f"{name} must have static axes but for the batch (in an export), got {x.shape}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
    if key.shape != (B, S, K, H):
        raise ValueError(
            f"key must have query's batch size and head dimension, (B, S, K, H) = ({B}, S, K, {H}), got {key.shape}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {key.shape}, got {value.shape}")
    if K == 0 or N % K != 0:
        raise ValueError(f"the number of query heads must be a multiple of key's {K} heads, got {N}")


def check_broadcastable(x: jax.Array, name: str, shape: tuple[int, int, int, int]) -> None:
    """Bias and mask: each axis 1 or full. A wrong head axis is a ValueError (the reference asserts)."""
    for axis, letter in enumerate("BNTS"):
        if x.shape[axis] not in (1, shape[axis]):
            error = ValueError if letter == "N" else TypeError
            raise error(f"{name} must be broadcastable to (B, N, T, S) = {shape}, got {x.shape} (axis {letter})")


def as_bias(bias: Any, shape: tuple[int, int, int, int]) -> jax.Array:
    bias = as_4d(bias, "bias")
    if jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise TypeError(f"bias must be real, got {bias.dtype}")
    check_broadcastable(bias, "bias", shape)
    return bias


def as_mask(mask: Any, shape: tuple[int, int, int, int], *, is_staged: bool) -> Any:
    """A NumPy array if the mask is known while a program is recorded, of which it would be a constant."""
    is_known = isinstance(mask, np.ndarray | jax.Array) and not isinstance(mask, Tracer)
    is_known = is_known and (isinstance(mask, np.ndarray) or mask.is_fully_addressable)
    mask = as_4d(mask, "mask", np.asarray if is_staged and is_known else jnp.asarray)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must have dtype bool, got {mask.dtype} (an additive mask is a bias)")
    check_broadcastable(mask, "mask", shape)
    return mask


def as_lengths(lengths: Any, name: str, batch: int) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must have shape (B,) = ({batch},), got {lengths.shape}")
    if lengths.dtype != jnp.int32:
        raise ValueError(f"{name} must have dtype int32, got {lengths.dtype}")
    return lengths


def as_window(window: Any) -> tuple[Any, Any] | None:
    """(left, right), Python integers where they are static."""
    if window is None:
        return None
    if _is_scalar_integer(window):
        window = (window, window)
    if not isinstance(window, tuple | list | np.ndarray | jax.Array):
        raise TypeError(f"local_window_size must be an integer or a pair of integers, got {window!r}")
    if len(window) != 2:
        raise ValueError(f"local_window_size must be an integer or a pair (left, right), got {window!r}")
    for side in window:
        if not _is_scalar_integer(side):
            raise TypeError(f"local_window_size must hold integers, got {window!r}")
    return tuple(int(side) if isinstance(side, int | np.integer) else side for side in window)  # pyright: ignore[reportReturnType]


def _is_scalar_integer(x: Any) -> bool:
    if isinstance(x, np.ndarray | jax.Array):
        return x.ndim == 0 and bool(jnp.issubdtype(x.dtype, jnp.integer))
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def as_scale(scale: Any, head_dim: int) -> jax.Array:
    """Scalar; 1 / sqrt(H) by default."""
    if scale is None:
        return jnp.asarray(1 / np.sqrt(max(head_dim, 1)))
    if isinstance(scale, str) or np.iscomplexobj(scale):
        raise ValueError(f"scale must be a real number, got {scale!r}")
    scale = jnp.asarray(scale)
    if scale.size != 1:
        raise ValueError(f"scale must be a scalar, got shape {scale.shape}")
    return scale.reshape(())


def as_precision(precision: Any) -> Any:
    """As JAX spells it in a product: None, a pair of `jax.lax.Precision`, or an algorithm.

    The context's default is read here, at trace time, as an einsum would.
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return _canonical_precision(tuple(precision) if isinstance(precision, list) else precision)
    except (ValueError, TypeError) as error:
        raise ValueError(f"precision must be what JAX takes as such, got {precision!r}. JAX says: {error}") from None


@functools.lru_cache(maxsize=64)
def _canonical_precision(precision: Any) -> Any:
    """By JAX itself, so that this knows no names."""
    x = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision))(x, x)
    return jaxpr.jaxpr.eqns[0].params["precision"]


def as_static_bool(x: Any, name: str) -> bool:
    """Also of None, integers and arrays with one of these, as `jax.nn` asks only whether they are true."""
    if isinstance(x, Tracer):
        raise TypeError(
            f"{name} must be static, got a traced value: name it in static_argnames of jax.jit, "
            f"or bind it beforehand with functools.partial(..., {name}=True)"
        )
    if isinstance(x, np.ndarray | jax.Array) and x.ndim == 0 and x.dtype.kind in "bi":
        x = x.item()
    if not (x is None or isinstance(x, int | np.integer | np.bool_)):
        raise TypeError(f"{name} must be a bool, got {x!r}")
    return bool(x)


def as_block(block: Any, name: str) -> int | None:
    if block is None:
        return None
    if not isinstance(block, int | np.integer) or isinstance(block, bool):
        raise TypeError(f"{name} must be an int or None, got {block!r}")
    if block < 1:
        raise ValueError(f"{name} must be at least 1, got {block}")
    return int(block)
