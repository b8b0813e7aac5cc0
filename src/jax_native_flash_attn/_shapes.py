"""Shapes of a call, checked; errors speak of them as they were given."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._semantics.errors import describe


class Axes(NamedTuple):
    """Sizes of a call, and whether its arrays were given without a batch."""

    B: int
    T: int
    N: int
    H: int
    S: int
    K: int
    is_unbatched: bool

    def sizes(self, letters: str) -> tuple[int, ...]:
        return tuple(getattr(self, letter) for letter in letters)

    def if_transposed(self) -> "Axes":
        """If query, key and value were (B, N, T, H)."""
        return self._replace(T=self.N, N=self.T, S=self.K, K=self.S)

    def layout_hint(self) -> str:
        """For an error of a call whose shapes are right in the other layout, with fewer heads than keys."""
        other = self.if_transposed()
        if not 0 < other.K < other.S or other.N % other.K != 0:
            return ""
        letters = "(N, T, H)" if self.is_unbatched else "(B, N, T, H)"
        return f". If query, key and value are {letters}, as in PyTorch, transpose each with x.swapaxes(-3, -2)"


def as_array(x: Any, name: str, asarray: Callable[[Any], Any] = jnp.asarray) -> Any:
    refusal = TypeError(f"{name} must be an array of numbers, got {describe(x)}")
    if isinstance(x, str):  # of which JAX tries to make a number
        raise refusal
    try:
        return asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise refusal from error


def as_4d(x: Any, name: str, asarray: Callable[[Any], Any] = jnp.asarray) -> Any:
    """An array of rank 4, with axes of size 1 put in front as `jax.nn` does."""
    if x is None:
        raise ValueError(f"{name} must be an array, got None")
    x = as_array(x, name, asarray)
    if x.ndim > 4:
        raise ValueError(f"{name} must have at most 4 dimensions, got shape {x.shape}: take jax.vmap for more")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def as_query_key_value(
    query: Any, key: Any, value: Any, *, blocks: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array, Axes]:
    """Of rank 4. Key and value are one block of `blocks`; `Axes.S` is the length of all."""
    arrays: dict[str, Any] = {"query": query, "key": key, "value": value}
    arrays = {name: None if x is None else as_array(x, name) for name, x in arrays.items()}
    query, key, value = (as_4d(x, name) for name, x in arrays.items())
    _check_dtypes(query, key, value)
    is_unbatched = all(x.ndim == 3 for x in arrays.values())
    (B, T, N, H), (_, S, K, _) = query.shape, key.shape
    axes = Axes(B, T, N, H, S, K, is_unbatched)

    def given(name: str) -> str:
        return as_given(arrays[name].shape, is_unbatched)

    batch = "" if is_unbatched else "batch size, "
    if key.shape != (B, S, K, H):
        raise ValueError(
            f"key must have query's {batch.replace(',', ' and')}head dimension, "
            f"{_named('BSKH', (B, 'S', 'K', H), is_unbatched)}, got {given('key')} beside query {given('query')}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        is_other_layout = value.shape[:-1] == (B, K, S)
        raise ValueError(
            f"value must have key's {batch}length and heads, {_named('BSKD', (B, S, K, 'D'), is_unbatched)}, got "
            f"{given('value')}{': one of the two is transposed' if is_other_layout else ''}"
        )
    if K == 0 or N % K != 0:
        raise ValueError(
            f"the number of query heads must be a multiple of key's {K} heads, got {N}, with query {given('query')} "
            f"and key {given('key')} read as {'(T, N, H)' if is_unbatched else '(B, T, N, H)'}{axes.layout_hint()}"
        )
    return query, key, value, axes._replace(S=blocks * S)


_FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def _check_dtypes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if query.dtype.name not in _FLOAT_DTYPES:
        raise ValueError(f"query must have a dtype of {', '.join(_FLOAT_DTYPES)}, got {query.dtype}: cast it")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not all(isinstance(n, int) for n in x.shape[1:]):
            raise NotImplementedError(f"{name} must have static axes but for the batch (in an export), got {x.shape}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}: cast one of them")


def check_broadcastable(x: jax.Array, name: str, axes: Axes, given: Sequence[int]) -> None:
    """Bias and mask: each axis 1 or full. A wrong head axis is a ValueError (the reference asserts)."""
    shape = axes.sizes("BNTS")
    wrong = [letter for letter, n, full in zip("BNTS", x.shape, shape, strict=True) if n not in (1, full)]
    if not wrong:
        return
    is_unbatched = axes.is_unbatched and len(given) < 4
    raise (ValueError if wrong[0] == "N" else TypeError)(
        f"{name} must be broadcastable to {_named('BNTS', shape, is_unbatched)}, got "
        f"{as_given(given, is_unbatched)} (axis {wrong[0]}){_broadcast_hint(x.shape, name, axes, tuple(given))}"
    )


def _broadcast_hint(shape: tuple[int, ...], name: str, axes: Axes, given: tuple[int, ...]) -> str:
    if given == axes.sizes("BS"):
        lengths = ", or key_value_seq_lengths" if name == "mask" else ""
        return f": for one of (B, S) pass {name}[:, None, None, :]{lengths}"
    if given == axes.sizes("BTS"):
        return f": for one of (B, T, S) pass {name}[:, None]"
    if 1 < shape[1] == axes.K < axes.N:
        return f": for one of key's {axes.K} heads pass jnp.repeat({name}, {axes.N // axes.K}, axis=-3)"
    other = axes.if_transposed().sizes("BNTS")
    return axes.layout_hint() if all(n in (1, full) for n, full in zip(shape, other, strict=True)) else ""


def as_given(given: Sequence[int], is_unbatched: bool) -> str:
    """A shape, and as what it was read, if axes were put in front of it."""
    shape = tuple(given)
    rank = 3 if is_unbatched else 4
    return f"{shape}" if len(shape) >= rank else f"{shape}, read as {(1,) * (rank - len(shape)) + shape}"


def _named(letters: str, sizes: Sequence[Any], is_unbatched: bool) -> str:
    """What each axis of a shape is, such as (B, S, K, H) = (2, S, K, 64)."""
    first = 1 if is_unbatched else 0
    return f"({', '.join(letters[first:])}) = ({', '.join(map(str, sizes[first:]))})"
