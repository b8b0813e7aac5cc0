"""The public functions for sequences that are split over devices."""

import inspect
from typing import Any, Unpack

import jax
import numpy as np
from jax.typing import ArrayLike

from ._api import flash_attention_with_lse
from ._options import Options
from ._strategies import SequenceOrder, Strategy, context_parallel

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(flash_attention_with_lse).parameters.items()
    if name != "return_max_logits"
}


def context_parallel_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    axis_name: Any,
    strategy: Strategy | None = None,
    order: SequenceOrder | None = None,
    implementation: str | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """X"""
    arguments = _arguments("context_parallel_attention", (query, key, value, bias, mask), options)
    split: dict[str, Any] = {"axis_name": axis_name, "strategy": strategy, "order": order}
    return context_parallel(arguments, **split, needs_lse=False, implementation=implementation).out


def context_parallel_attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    axis_name: Any,
    strategy: Strategy | None = None,
    order: SequenceOrder | None = None,
    return_max_logits: bool = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, ...]:
    """X"""
    arguments = _arguments("context_parallel_attention_with_lse", (query, key, value, bias, mask), options)
    split: dict[str, Any] = {"axis_name": axis_name, "strategy": strategy, "order": order}
    results = context_parallel(arguments, **split, needs_lse=True, needs_max_logits=return_max_logits)
    return tuple(x for x in results if x is not None)


def _arguments(function: str, arrays: tuple, options: Options) -> dict[str, Any]:
    unknown = [name for name in options if name not in _DEFAULTS]
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    return _DEFAULTS | dict(zip(("query", "key", "value", "bias", "mask"), arrays, strict=True)) | options


def balanced_order(length: int, devices: int, *, inverse: bool = False) -> np.ndarray:
    """The order of tokens in which causal attention is equal work for all devices: zig-zag.

    Of `2 * devices` equal parts of a sequence, device i gets part i and part `2 * devices - 1 - i`. Permute the tokens
    once, where they are loaded, and pass the result as `query_positions` and `key_value_positions`:

        order = balanced_order(T, devices)
        tokens, labels = tokens[:, order], labels[:, order]
        positions = jnp.broadcast_to(order, tokens.shape)

    Args:
      length: of the sequence, a multiple of `2 * devices`.
      devices: over how many it is split.
      inverse: give the order that undoes the other: `x[:, order][:, inverse]` is x.

    Returns:
      (length,) int32: which token stands at each place.

    Raises:
      ValueError: for a length that does not divide into equal parts.
    """
    if devices < 1 or length % (2 * devices) != 0:
        raise ValueError(f"length must be a multiple of 2 * devices = {2 * devices}, got {length}: pad the sequence")
    parts = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    order = np.concatenate([parts[[i, -1 - i]].reshape(-1) for i in range(devices)])
    return np.argsort(order).astype(np.int32) if inverse else order
