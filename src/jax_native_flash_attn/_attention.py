"""From a checked call to the kernels and back: the steps of one call, in order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._autodiff import taylor
from ._autodiff.primitives import flash_attention_core, flash_attention_p, linear_kernel_p
from ._semantics.call import OPERANDS, Arrays, Call, Config, Inputs, Settings
from ._semantics.masks import make_mask
from ._semantics.numerics import DEAD_ROW_LSE, accumulation_dtype
from ._sharding.explicit import over_explicit_axes


def attention(settings: Settings, arrays: Arrays, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """out, of `shape`, and, if needed, lse, (..., T, N), in accumulation dtype; both differentiable.

    `shape` is that of query as it was given.
    """
    taylor.register(flash_attention_p, linear_kernel_p)
    with jax.named_scope("flash_attention"):
        results = over_explicit_axes(lambda arrays: _attend(settings, arrays), arrays, needs_lse=settings.needs_lse)
        if settings.is_staged:
            # For `checkify`, which looks for NaN behind the operations that it knows, so not behind our primitives, and
            # has no registry. XLA removes the product; its derivatives check tangents and cotangents.
            results = [x * 1 for x in results]
        return tuple(x.reshape(like) for x, like in zip(results, (shape, shape[:-1]), strict=False))


def _attend(settings: Settings, arrays: Arrays) -> tuple[jax.Array, ...]:
    """out (B, T, N, H) and, if needed, lse (B, T, N) in accumulation dtype."""
    query = arrays.query
    B, T, N, H = query.shape
    if 0 in (B, T, N, arrays.key.shape[1]):
        lse = jnp.full((B, T, N), -jnp.inf, accumulation_dtype(query.dtype))
        return (jnp.zeros_like(query), lse)[: 2 if settings.needs_lse else 1]
    call, is_row = prepare(settings, arrays)
    out, *lses = flash_attention_core(*call)
    out = out if H > 0 else out[..., :0]
    if is_row is not None:
        out = jnp.where(is_row[..., None, None], out, 0)
    if not settings.needs_lse:
        return (out,)
    (lse,) = lses
    if call.inputs.mask.dead is not None:
        lse = jnp.where(call.inputs.mask.dead, DEAD_ROW_LSE, lse)
    lse = jnp.moveaxis(lse, 1, 2)
    if is_row is not None:
        lse = jnp.where(is_row[..., None], lse, DEAD_ROW_LSE)
    return out, lse


class Prepared(NamedTuple):
    """What kernels get, and which rows (B, T) are not padding (None: all)."""

    call: Call
    is_row: jax.Array | None


def prepare(settings: Settings, arrays: Arrays) -> Prepared:
    """All masks as one, and operands as kernels expect them; of the shards of arrays as well."""
    query, key, value = arrays.query, arrays.key, arrays.value
    T, S = query.shape[1], key.shape[1]
    band, mask = make_mask(
        T,
        S,
        is_causal=settings.is_causal,
        static_window=settings.static_window,
        static_band=settings.static_band,
        traced_window=arrays.traced_window,
        query_lengths=arrays.query_lengths,
        key_value_lengths=arrays.key_value_lengths,
        allowed=arrays.mask,
    )
    is_row = None
    if arrays.query_lengths is not None:
        # Padded rows may hold NaN, and their cotangents are zero: the two must not meet.
        is_row = jnp.arange(T, dtype=jnp.int32)[None, :] < arrays.query_lengths[:, None]
        query = jnp.where(is_row[..., None, None], query, 0)
    if query.shape[-1] == 0:
        # Logits are bias and masks alone, as with one dimension of zeros.
        query, key, value = (jnp.pad(x, ((0, 0),) * 3 + ((0, 1),)) for x in (query, key, value))
    scale = arrays.scale.astype(accumulation_dtype(query.dtype))
    changed = arrays._replace(query=query, key=key, value=value, scale=scale)
    given: dict[str, Any] = {
        name: _with_batch_axis(name, x) for name, x in changed._asdict().items() if name in Inputs._fields
    }
    given["mask"] = mask
    inputs = Inputs(**given)
    config = Config(
        band,
        settings.dropout,
        settings.block_q,
        settings.block_kv,
        settings.precision,
        settings.needs_lse,
        settings.implementation,
        rounds_out=True,
    )
    return Prepared(Call(config, inputs), is_row)


def _with_batch_axis(name: str, x: jax.Array | None) -> Any:
    """The axes that `OPERANDS` says: what a call has once, for all batch rows, gets one of size 1 in front."""
    return x if x is None or x.ndim == len(OPERANDS[name].axes) else x[None]
