"""From a checked call to the kernels and back: the steps of one call, in order."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._autodiff import taylor
from ._autodiff.primitives import flash_attention_core, flash_attention_p, linear_kernel_p
from ._autodiff.visible import find_visible
from ._semantics.block_masks import make_block_masks, numbers_of_blocks
from ._semantics.call import Arrays, Call, Config, Inputs, ModOperands, Settings
from ._semantics.dense import NAME as DENSE
from ._semantics.dense import dense_attention
from ._semantics.join_masks import is_query_row, make_mask
from ._semantics.numerics import DEAD_ROW_LSE, accumulation_dtype
from ._semantics.operands import OPERANDS
from ._semantics.positions import Order, places
from ._semantics.tile_masks import MaskMod, Tiles, elements_of
from ._sharding.explicit import over_explicit_axes


class Results(NamedTuple):
    """Of a call: out (B, T, N, D); lse (B, T, N) and max_logits (B, N, T), in accumulation dtype, or None."""

    out: jax.Array
    lse: jax.Array | None = None
    max_logits: jax.Array | None = None


def attention(settings: Settings, arrays: Arrays, shape: tuple[int, ...]) -> Results:
    """out and lse, (..., T, N), with leading axes as in `shape`, that of query as it was given; both differentiable.

    max_logits, (N,), has no gradient.
    """
    taylor.register(flash_attention_p, linear_kernel_p)
    with jax.named_scope("flash_attention"):
        results = over_explicit_axes(_attend, settings, arrays)
        if settings.is_staged:
            # For `checkify`, which looks for NaN behind the operations that it knows, so not behind our primitives, and
            # has no registry. XLA removes the product; its derivatives check tangents and cotangents.
            results = jax.tree.map(lambda x: x * 1, results)
        out, lse, max_logits = results
        out = out.reshape(*shape[:-1], out.shape[-1])
        lse = None if lse is None else lse.reshape(shape[:-1])
        if max_logits is not None:
            max_logits = jax.lax.stop_gradient(max_logits.max((0, 2), initial=-jnp.inf).astype(jnp.float32))
        return Results(out, lse, max_logits)


def _attend(settings: Settings, arrays: Arrays) -> Results:
    query, sinks = arrays.query, arrays.sinks
    B, T, N, _ = query.shape
    S, D = arrays.key.shape[1], arrays.value.shape[-1]
    if 0 in (B, T, N, S):
        dtype = accumulation_dtype(query.dtype)
        lse = jnp.full((B, T, N), -jnp.inf, dtype)
        lse = lse if sinks is None else jnp.broadcast_to(sinks.astype(dtype), lse.shape)
        max_logits = jnp.full((B, N, T), -jnp.inf, dtype)
        return Results(
            jnp.zeros((B, T, N, D), query.dtype),
            lse if settings.needs_lse else None,
            max_logits if settings.needs_max_logits else None,
        )
    if settings.implementation == DENSE:
        if settings.ring is not None:
            raise NotImplementedError(
                f"implementation='dense' has no ring, got a sequence that is split over {settings.ring.axis_name!r}: "
                "take strategy='all_gather', or gather what explicit axes split with jax.sharding.reshard"
            )
        out, lse, max_logits = dense_attention(settings, arrays)
        return Results(out, lse if settings.needs_lse else None, max_logits if settings.needs_max_logits else None)
    if settings.ring is not None:
        rank = jax.lax.axis_index(settings.ring.axis_name)
        arrays = arrays._replace(query_lengths=rows_of_length(arrays.query_lengths, rank, T))
    call, is_row, in_length = prepare(settings, arrays)
    out, lse, max_logits = flash_attention_core(*call)
    out = out[..., :D]
    # Padding by ids is finite, and kernels do with it.
    if in_length is not None:
        out = jnp.where(in_length[..., None, None], out, 0)
    if lse is not None:
        if call.inputs.mask.dead is not None:
            lse = jnp.where(call.inputs.mask.dead, DEAD_ROW_LSE, lse)
        lse = jnp.moveaxis(lse, 1, 2)
        if is_row is not None:
            lse = jnp.where(is_row[..., None], lse, DEAD_ROW_LSE)
    return Results(out, lse, max_logits)


def rows_of_length(lengths: jax.Array | None, block: jax.Array, T: int) -> jax.Array | None:
    """What lengths of all rows are of those of one block of T."""
    return None if lengths is None else jnp.clip(lengths - block * T, 0, T)


class Prepared(NamedTuple):
    """What kernels get; which rows (B, T) are not padding; and which are not past `query_seq_lengths` (None: all)."""

    call: Call
    is_row: jax.Array | None
    in_length: jax.Array | None


def prepare(settings: Settings, arrays: Arrays) -> Prepared:
    """All masks as one, and operands as kernels expect them; of the shards of arrays as well."""
    query, key, value = arrays.query, arrays.key, arrays.value
    T, S = query.shape[1], key.shape[1]
    order = Order(
        arrays.query_segment_ids,
        arrays.key_value_segment_ids,
        arrays.query_positions,
        arrays.key_value_positions,
        arrays.query_offset,
    )
    masks: dict[str, Any] = {
        "is_causal": settings.is_causal,
        "static_window": settings.static_window,
        "static_band": settings.static_band,
        "traced_window": arrays.traced_window,
        "query_lengths": arrays.query_lengths,
        "key_value_lengths": arrays.key_value_lengths,
        "allowed": arrays.mask,
        "static_offset": settings.static_offset,
        "order": order,
        "find_visible": functools.partial(find_visible, implementation=settings.implementation),
        "has_dead_rows": arrays.sinks is None,
        "mask_mod": None,
    }
    mods, ring = None, settings.ring
    blocks: dict[str, Any] = {}
    if ring is not None:
        rank = jax.lax.axis_index(ring.axis_name)
        blocks = {"size": ring.size, "rank": rank, "is_balanced": ring.is_balanced}
    if arrays.mod_args is not None:
        if ring is None:
            numbers = order.numbers(*places(T, S), settings.static_offset)
        else:
            numbers = numbers_of_blocks(T, S, order=order, static_offset=settings.static_offset, **blocks)
        mods = _mod_operands(arrays, *numbers)
        if settings.mask_mod is not None:
            masks["mask_mod"] = _mask_mod(settings, arrays, mods)
    if ring is None or ring.window is not None:
        band, mask = make_mask(T, S, **masks)
    else:
        band, mask = make_block_masks(T, S, **blocks, **masks)
    is_row = is_query_row(T, arrays.query_lengths, arrays.query_segment_ids)
    in_length = is_query_row(T, arrays.query_lengths, None)
    if in_length is not None:
        # Padded rows may hold NaN, and their cotangents are zero: the two must not meet.
        query = jnp.where(in_length[..., None, None], query, 0)
    # Without a head dimension, logits are bias and masks alone, as with one dimension of zeros.
    query, key, value = (jnp.pad(x, ((0, 0),) * 3 + ((0, 1),)) if x.shape[-1] == 0 else x for x in (query, key, value))
    scale = arrays.scale.astype(accumulation_dtype(query.dtype))
    sinks = None if arrays.sinks is None else arrays.sinks.astype(scale.dtype)
    changed = arrays._replace(query=query, key=key, value=value, scale=scale, sinks=sinks)
    given: dict[str, Any] = {
        name: _with_batch_axis(name, x) for name, x in changed._asdict().items() if name in Inputs._fields
    }
    given |= {"mask": mask, "mods": mods}
    inputs = Inputs(**given)
    config = Config(
        band,
        settings.dropout,
        settings.block_q,
        settings.block_kv,
        settings.precision,
        settings.needs_lse,
        settings.needs_max_logits,
        settings.logits_soft_cap,
        settings.implementation,
        rounds_out=True,
        ring=ring,
        static_scale=settings.static_scale,
        has_band_intervals=ring is None and all(x is None for x in (arrays.traced_window, *masks["order"])),
        score_mod=settings.score_mod,
        mask_mod=settings.mask_mod,
        mask_block=settings.mask_block,
        first_row=settings.static_offset if mods is not None and not _moves(order) else None,
    )
    return Prepared(Call(config, inputs), is_row, in_length)


def _moves(order: Order) -> bool:
    """Whether rows and keys are numbered by arrays."""
    return order.has_positions or order.query_offset is not None


def _mask_mod(settings: Settings, arrays: Arrays, mods: ModOperands) -> MaskMod:
    assert settings.mask_mod is not None
    assert arrays.batch_number is not None
    assert arrays.head_number is not None
    known = None
    if arrays.tile_classes is not None and arrays.row_has_key is not None:
        known = Tiles(arrays.tile_classes, arrays.row_has_key)
    elements = elements_of(
        settings.mask_mod,
        (arrays.batch_number, arrays.head_number, mods.query_number, mods.key_number),
        arrays.mod_args,
    )
    return MaskMod(elements, settings.mask_block, known)


def _mod_operands(arrays: Arrays, rows: jax.Array, keys: jax.Array) -> ModOperands:
    """With the numbers of rows and keys."""
    assert arrays.mod_args is not None
    assert arrays.batch_number is not None
    assert arrays.head_number is not None
    args = {name: x[None] for name, x in arrays.mod_args.items()}
    return ModOperands(arrays.batch_number, arrays.head_number[None], rows, keys, args)


def _with_batch_axis(name: str, x: jax.Array | None) -> Any:
    """The axes that `OPERANDS` says: what a call has once, for all batch rows, gets one of size 1 in front."""
    return x if x is None or x.ndim == len(OPERANDS[name].axes) else x[None]
