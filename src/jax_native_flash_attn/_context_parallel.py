"""The public functions for sequences that are split over devices."""

from __future__ import annotations

import inspect
from typing import Any, Unpack

import jax
import numpy as np
from jax.typing import ArrayLike

from ._api import flash_attention_with_lse
from ._convert import as_count, as_static_bool
from ._implementations import Implementation, own_implementation
from ._keywords import unexpected_keyword
from ._options import Options
from ._strategies import SequenceOrder, Strategy, context_parallel

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(flash_attention_with_lse).parameters.items()
    if name not in ("implementation", "return_max_logits")
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
    implementation: Implementation | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """`flash_attention` of a sequence that is split over devices (context parallelism), inside `jax.shard_map`.

    Each of the n devices of the mesh axis has T rows of query and S of key and value, in the order of the axis, and
    gets what `flash_attention` of all n * T rows and n * S keys gives for its own: with each argument and derivative,
    `vmap`, and the same dropout mask.

    Args:
      query, key, value: as of `flash_attention`, of this device.
      bias, mask: broadcastable to (B, N, n * T, n * S). Of the last two axes one may be split: (B, N, T, n * S), or
        (B, N, n * T, S), or (B, N, 1, S).
      axis_name: the mesh axis over which the sequence is split, or a tuple of several. With one device, or where heads
        and batch alone are split, this is `flash_attention`.
      strategy: who sends what.
        'ring': key and value travel from device to device, each time while the ones before are attended (Ring
        Attention, Liu et al. 2023, arXiv:2310.01889). Memory of floats is O(T + S), in gradients too.
        'all_to_all': heads are exchanged for the sequence, and back (DeepSpeed Ulysses, Jacobs et al. 2023,
        arXiv:2309.14509). n divides N, and divides K or is a multiple of it.
        'all_gather': key and value of all devices are gathered.
        None is 'ring'.
      order: None: tokens stand in their order, or as `query_positions` and `key_value_positions` say. 'balanced': they
        stand in that of `balanced_order`, so that causal attention is the same work for every device; `is_causal`,
        `local_window_size` and `query_offset` then go by where tokens stood before; all else goes by where they stand.
        It needs even T and S, and no lengths: padding has a negative segment id. It is for 'ring': the others compare
        every element.
      implementation: as of `flash_attention`, but for 'cudnn'; 'dense' has no ring.
      options: all others of `flash_attention`. `query_segment_ids` and `query_positions` (B, T) and
        `key_value_segment_ids` and `key_value_positions` (B, S) are of this device. `query_seq_lengths`,
        `key_value_seq_lengths` and `query_offset` are of the whole sequence; so are the weights that dropout keeps,
        which a token has by its place, and the indices that `score_mod` and `mask_mod` get. Their arguments are alike
        on all devices, and whole. In balanced order these indices are where tokens stood before.

    Returns:
      (B, T, N, D), of query's dtype: the rows of this device.

    Raises:
      ValueError: as `flash_attention`; no such mesh axis; heads or lengths that do not divide; an unknown strategy or
        order; positions beside an order; a bias or mask with both axes split.
      TypeError: as `flash_attention`.
      NotImplementedError: implementation='cudnn'; in a ring, implementation='dense'.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import balanced_order, context_parallel_attention
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",))
      >>> spec = jax.sharding.PartitionSpec(None, "sequence")
      >>> def attend(query, key, value):  # of the tokens of one device
      ...     return context_parallel_attention(
      ...         query, key, value, is_causal=True, axis_name="sequence", order="balanced"
      ...     )
      >>> attention = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
      >>> order = balanced_order(64, mesh.size)  # once, where the data is loaded
      >>> arrays = jax.random.normal(jax.random.key(0), (3, 2, 64, 8, 32))[:, :, order]
      >>> sharding = jax.sharding.NamedSharding(mesh, spec)
      >>> attention(*(jax.device_put(x, sharding) for x in arrays)).shape
      (2, 64, 8, 32)
    """
    arguments = _arguments("context_parallel_attention", (query, key, value, bias, mask), options)
    split: dict[str, Any] = {"axis_name": axis_name, "strategy": strategy, "order": order}
    own = own_implementation(implementation)
    return context_parallel(arguments, **split, needs_lse=False, implementation=own).out


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
    implementation: Implementation | None = None,
    return_max_logits: bool = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, ...]:
    """As `context_parallel_attention`, and the log-sum-exp of the logits, both differentiable in every mode.

    Args:
      return_max_logits: also return the largest logit of each head, over all devices of the axis. All other arguments
        are as of `context_parallel_attention`.

    Returns:
      out and lse, as `flash_attention_with_lse` gives them, of the rows of this device; and, with
      `return_max_logits`, (N,) float32, alike on all of them.

    Raises:
      ValueError, TypeError, NotImplementedError: as `context_parallel_attention`.

    Examples:
      >>> import jax
      >>> from jax_native_flash_attn import context_parallel_attention_with_lse
      >>> mesh = jax.make_mesh((jax.device_count(),), ("sequence",))
      >>> spec = jax.sharding.PartitionSpec(None, "sequence")
      >>> def attend(query, key, value):
      ...     return context_parallel_attention_with_lse(query, key, value, axis_name="sequence")
      >>> attention = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
      >>> sharding = jax.sharding.NamedSharding(mesh, spec)
      >>> arrays = jax.random.normal(jax.random.key(0), (3, 2, 64, 8, 32))
      >>> out, lse = attention(*(jax.device_put(x, sharding) for x in arrays))
      >>> out.shape, lse.shape
      ((2, 64, 8, 32), (2, 64, 8))
    """
    arguments = _arguments("context_parallel_attention_with_lse", (query, key, value, bias, mask), options)
    split: dict[str, Any] = {"axis_name": axis_name, "strategy": strategy, "order": order}
    largest = as_static_bool(return_max_logits, "return_max_logits")
    own = own_implementation(implementation)
    results = context_parallel(arguments, **split, needs_lse=True, needs_max_logits=largest, implementation=own)
    return tuple(x for x in results if x is not None)


def _arguments(function: str, arrays: tuple, options: Options) -> dict[str, Any]:
    if not _DEFAULTS.keys() >= options.keys():
        raise unexpected_keyword(function, options, _DEFAULTS)
    return _DEFAULTS | dict(zip(("query", "key", "value", "bias", "mask"), arrays, strict=True)) | options


def balanced_order(length: int, devices: int, *, inverse: bool = False) -> np.ndarray:
    """The order of tokens in which causal attention is equal work for all devices: zig-zag.

    Of `2 * devices` equal parts of a sequence, device i gets part i and part `2 * devices - 1 - i`. Permute the tokens
    once, where they are loaded, and say `order='balanced'` to `context_parallel_attention`. What else goes by position,
    such as rotary embeddings, takes them from here: `jnp.broadcast_to(order, tokens.shape)`.

    Args:
      length: of the sequence, a multiple of `2 * devices`.
      devices: over how many it is split.
      inverse: give the order that undoes the other: `x[:, order][:, inverse]` is x.

    Returns:
      (length,) int32: which token stands at each place.

    Raises:
      ValueError: a length that does not divide into equal parts; a length or number of devices below 1.
      TypeError: one that is no int.

    Examples:
      >>> from jax_native_flash_attn import balanced_order
      >>> order = balanced_order(8, 2)
      >>> print(order)
      [0 1 6 7 2 3 4 5]
      >>> print(order[balanced_order(8, 2, inverse=True)])
      [0 1 2 3 4 5 6 7]
    """
    length, devices = as_count(length, "length"), as_count(devices, "devices")
    if length % (2 * devices) != 0:
        raise ValueError(f"length must be a multiple of 2 * devices = {2 * devices}, got {length}: pad the sequence")
    parts = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    order = np.concatenate([parts[[i, -1 - i]].reshape(-1) for i in range(devices)])
    return np.argsort(order).astype(np.int32) if inverse else order
