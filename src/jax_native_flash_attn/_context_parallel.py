"""The public functions for sequences that are split over devices."""

import inspect
from typing import Any, Unpack

import jax
from jax.typing import ArrayLike

from ._api import flash_attention_with_lse
from ._options import Options
from ._strategies import Strategy, context_parallel

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
    implementation: str | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """X"""
    arguments = _arguments("context_parallel_attention", (query, key, value, bias, mask), options)
    return context_parallel(arguments, axis_name, strategy, needs_lse=False, implementation=implementation).out


def context_parallel_attention_with_lse(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    axis_name: Any,
    strategy: Strategy | None = None,
    return_max_logits: bool = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, ...]:
    """X"""
    arguments = _arguments("context_parallel_attention_with_lse", (query, key, value, bias, mask), options)
    results = context_parallel(arguments, axis_name, strategy, needs_lse=True, needs_max_logits=return_max_logits)
    return tuple(x for x in results if x is not None)


def _arguments(function: str, arrays: tuple, options: Options) -> dict[str, Any]:
    unknown = [name for name in options if name not in _DEFAULTS]
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    return _DEFAULTS | dict(zip(("query", "key", "value", "bias", "mask"), arrays, strict=True)) | options
