"""Conversions of single arguments; each error names the argument, what was given and what is accepted."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._semantics.constant_masks import hidden
from ._semantics.errors import describe, refuse_traced
from ._semantics.numerics import bias_floor
from ._semantics.positions import clip_window_side
from ._shapes import Axes, as_4d, as_array, check_broadcastable

LARGEST = int(np.iinfo(np.int32).max)


def as_bias(bias: Any, axes: Axes) -> jax.Array:
    given = as_array(bias, "bias")
    bias = as_4d(given, "bias")
    if jnp.issubdtype(bias.dtype, jnp.complexfloating):
        raise TypeError(f"bias must be real, got {bias.dtype}")
    if bias.dtype == jnp.bool_:
        raise ValueError("bias must hold numbers, which are added, got dtype bool: pass what may be attended as mask=")
    check_broadcastable(bias, "bias", axes, given.shape)
    return bias


def as_mask(mask: Any, axes: Axes, *, is_staged: bool) -> Any:
    """A NumPy array if the mask is known while a program is recorded, of which it would be a constant."""
    is_known = isinstance(mask, np.ndarray | jax.Array) and not isinstance(mask, Tracer)
    is_known = is_known and (isinstance(mask, np.ndarray) or mask.is_fully_addressable)
    asarray = np.asarray if is_staged and is_known else jnp.asarray
    given = as_array(mask, "mask", asarray)
    mask = as_4d(given, "mask", asarray)
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must have dtype bool, got {mask.dtype}: an additive mask is a bias; "
            "of 0 and 1 pass mask.astype(bool)"
        )
    check_broadcastable(mask, "mask", axes, given.shape)
    return mask


def as_integers(x: Any, name: str, axes: Axes, letters: str, *, hides: bool = False) -> jax.Array | None:
    """int32 of the axes with those letters, from any integers; what is outside of int32 becomes its nearest number.

    Ids and positions that are known must lie inside. `hides` a constant from XLA, which would compute what follows from
    it while it compiles.
    """
    if x is None:
        return None
    is_known = not isinstance(x, Tracer)
    if is_known and len(letters) > 1:
        _check_int32(x, name)
    x = jnp.asarray(x)
    given = x.shape
    if x.ndim == 1 < len(letters) and axes.B == 1:
        x = x[None]
    if x.shape != axes.sizes(letters):
        without_batch = axes.is_unbatched and len(letters) > 1
        expected = letters[1:] if without_batch else letters
        trailing = "," if len(expected) == 1 else ""
        sizes = axes.sizes(expected)
        hint = f": for the same in all batch rows pass jnp.full({sizes}, ...)" if given == () else ""
        if x.shape == axes.if_transposed().sizes(letters):
            hint = axes.layout_hint()
        raise ValueError(f"{name} must have shape ({', '.join(expected)}{trailing}) = {sizes}, got {given}{hint}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, got dtype {x.dtype}: cast it with x.astype(jnp.int32)")
    x = as_int32(x)
    return hidden(x) if hides and is_known else x


def _check_int32(x: Any, name: str) -> None:
    """That no known number is beyond int32: JAX may wrap it, and equal ends would make one document of two."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return
    wide = x if hasattr(x, "dtype") else np.asarray(x)
    if not jnp.issubdtype(wide.dtype, jnp.integer) or np.can_cast(wide.dtype, np.int32):
        return
    outside = (values := np.asarray(wide))[(values > LARGEST) | (values < -LARGEST - 1)]
    if outside.size:
        raise ValueError(f"{name} must lie within int32, got {outside[0]}: number documents and tokens from 0")


def as_int32(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.int32 else clip_window_side(x, -LARGEST - 1, LARGEST)


def as_offset(offset: Any, batch: int) -> tuple[int, jax.Array | None]:
    """A Python number, or an array (B,) or, for all batch rows, (1,)."""
    if offset is None:
        return 0, None
    if isinstance(offset, int | np.integer) and not isinstance(offset, bool):
        return min(max(int(offset), -LARGEST), LARGEST), None
    if not isinstance(offset, np.ndarray | jax.Array) or not jnp.issubdtype(offset.dtype, jnp.integer):
        raise TypeError(f"query_offset must be an integer, an array (B,) of integers or None, got {describe(offset)}")
    if offset.shape not in ((), (batch,)):
        raise ValueError(f"query_offset must be a scalar or have shape (B,) = ({batch},), got {offset.shape}")
    return 0, as_int32(jnp.asarray(offset).reshape(-1))


def as_soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    refuse_traced(cap, "logits_soft_cap")
    if isinstance(cap, bool) or not isinstance(cap, int | float | np.integer | np.floating):
        raise TypeError(f"logits_soft_cap must be a Python number (static) or None, got {describe(cap)}")
    if not 0 < cap < np.inf:
        raise ValueError(f"logits_soft_cap must be positive and finite, got {cap}: None is for no cap")
    return float(cap)


def as_sinks(sinks: Any, heads: int) -> jax.Array | None:
    if sinks is None:
        return None
    sinks = as_array(sinks, "sinks")
    if sinks.shape != (heads,):
        raise ValueError(f"sinks must have a number for each query head, shape (N,) = ({heads},), got {sinks.shape}")
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must be real, got dtype {sinks.dtype}")
    # As low as a masked logit, a sink would not be told from those.
    return jnp.maximum(sinks, max(bias_floor(jnp.float32), float(jnp.finfo(sinks.dtype).min)))


def as_window(window: Any) -> tuple[Any, Any] | None:
    """(left, right), Python integers where they are static."""
    if window is None:
        return None
    if _is_scalar_integer(window):
        window = (window, window)
    if not isinstance(window, tuple | list | np.ndarray | jax.Array):
        raise TypeError(f"local_window_size must be an integer or a pair of integers, got {describe(window)}")
    if len(window) != 2:
        raise ValueError(f"local_window_size must be an integer or a pair (left, right), got {describe(window)}")
    for side in window:
        if not _is_scalar_integer(side):
            raise TypeError(
                f"local_window_size must hold integers, got {describe(window)}: a side without a limit is S"
            )
    return tuple(int(side) if isinstance(side, int | np.integer) else side for side in window)  # pyright: ignore[reportReturnType]


def static_or_traced(
    window: tuple[Any, Any] | None, T: int, S: int, *, moves: bool
) -> tuple[tuple[int, int] | None, jax.Array | None]:
    """A window as one that is static, or as one that is traced, (2,) int32; `moves`: whether rows or keys do."""
    if window is None or all(isinstance(side, int) for side in window):
        return window, None
    limits = ((-LARGEST, LARGEST),) * 2 if moves else ((-S, T), (-T, S))
    return None, jnp.stack([clip_window_side(side, *ends) for side, ends in zip(window, limits, strict=True)])


def _is_scalar_integer(x: Any) -> bool:
    if isinstance(x, np.ndarray | jax.Array):
        return x.ndim == 0 and bool(jnp.issubdtype(x.dtype, jnp.integer))
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def as_scale(scale: Any, head_dim: int) -> jax.Array:
    """Scalar; 1 / sqrt(H) by default."""
    if scale is None:
        return jnp.asarray(1 / np.sqrt(max(head_dim, 1)))
    if isinstance(scale, str) or np.iscomplexobj(scale):
        raise ValueError(f"scale must be a real number, or None for 1 / sqrt(H), got {describe(scale)}")
    scale = jnp.asarray(scale)
    if scale.size != 1:
        raise ValueError(f"scale must be a scalar, got shape {scale.shape}: multiply query by one that varies")
    return scale.reshape(())


def as_static_scale(scale: Any, query: jax.Array) -> float | None:
    """A scale that is a number, for kernels that take no other; of 16-bit calls, as there are none for others."""
    if query.dtype.itemsize != 2 or not (scale is None or isinstance(scale, int | float | np.integer | np.floating)):
        return None
    return float(1 / np.sqrt(max(query.shape[-1], 1)) if scale is None else scale)


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
    refuse_traced(x, name)
    if isinstance(x, np.ndarray | jax.Array) and x.ndim == 0 and x.dtype.kind in "bi":
        x = x.item()
    if not (x is None or isinstance(x, int | np.integer | np.bool_)):
        raise TypeError(f"{name} must be a bool, got {describe(x)}")
    return bool(x)


def as_block(block: Any, name: str) -> int | None:
    return None if block is None else as_count(block, name, "an int or None")


def as_count(x: Any, name: str, accepted: str = "an int", one: str = "") -> int:
    """`one` says what 1 means."""
    refuse_traced(x, name)
    if not isinstance(x, int | np.integer) or isinstance(x, bool):
        raise TypeError(f"{name} must be {accepted}, got {describe(x)}{one}")
    if x < 1:
        raise ValueError(f"{name} must be at least 1, got {x}{one}")
    return int(x)
