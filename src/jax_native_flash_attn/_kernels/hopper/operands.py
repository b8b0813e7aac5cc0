"""What the Mosaic GPU kernels read: operands laid out for TMA, tiles of them in global and in shared memory.

Nothing is copied, but for float32 (`_tf32_operands`), where lengths are multiples of 8 or `Loads` takes any, and where
rows of bias and mask are multiples of 32 bytes. Bias and boolean mask keep the axes in which they broadcast. With both
T and S they come tile by tile with the keys, through shared memory; with one of them they are a vector.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._semantics.call import Config, Inputs
from .device.pallas import (
    Loads,
    broadcast_index,
    iota,
    load,
    matrix_buffer,
    pad_axis,
    pl,
    plgpu,
    round_up,
    swizzle_bytes,
)
from .masks import interval_operands

# Added to the logits of keys that a mask of keys excludes: see `device/logits.py`.
MASKED = -(2.0**125)


@dataclass(frozen=True)
class Operands:
    """Arrays of a call by name; `tiled` and `columns` name score-like ones: matrices, and vectors along the keys."""

    arrays: dict[str, jax.Array]
    tiled: tuple[str, ...]
    transposed: tuple[str, ...]  # of those, the ones that are (..., S, T)
    columns: tuple[str, ...]


def prepare(
    config: Config, inputs: Inputs, block_rows: int, block_kv: int, loads: Loads, *, transposes_mask: bool = False
) -> Operands:
    """`transposes_mask`: the mask's tiles are read transposed, which cannot be done with bytes: it is copied so."""
    z, mask = inputs.sizes, inputs.mask
    T, S = round_up(z.T, loads.multiple), round_up(z.S, loads.multiple)
    is_float32 = inputs.query.dtype == jnp.float32
    if is_float32:
        inputs = _tf32_operands(inputs)
    arrays = {
        "query": pad_axis(inputs.query, -3, T),
        "key": pad_axis(inputs.key, -3, S),
        "value": pad_axis(inputs.value, -1, round_up(S, 64)) if is_float32 else pad_axis(inputs.value, -3, S),
        "scale": inputs.scale,
        **({} if is_cut(config, inputs) else interval_operands(mask, z.T, z.S, block_rows, block_kv)),
    }
    tiled, columns = [], []
    for name, x in (("bias", inputs.bias), ("allowed", mask.allowed)):
        if x is None:
            continue
        if name == "allowed":
            x = jnp.where(x, jnp.float32(0.0), MASKED) if x.shape[-2] == 1 else x.astype(jnp.int8)
        elif x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            x = x.astype(jnp.float32)
        if x.shape[-2] == 1:
            x = jnp.broadcast_to(x, (*x.shape[:-1], z.S))
            x = pad_axis(x[..., 0, :], -1, round_up(z.S, block_kv))
            name = f"{name}_columns"
            columns.append(name)
        elif x.shape[-1] == 1:
            x = pad_axis(x[..., 0], -1, round_up(z.T, block_rows))
            name = f"{name}_rows"
        else:
            if transposes_mask and name == "allowed":
                x = jnp.swapaxes(x, -1, -2)
            *_, rows, width = x.shape
            aligned = width if swizzle_bytes(width, x.dtype) else round_up(width, 64)
            x = pad_axis(pad_axis(x, -2, round_up(rows, 8)), -1, aligned)
            tiled.append(name)
        arrays[name] = x
    if mask.key_value_length is not None:
        arrays["length"] = mask.key_value_length
    if config.dropout is not None and inputs.dropout_key is not None and inputs.head_index is not None:
        arrays |= {"dropout_key": inputs.dropout_key, "head_index": inputs.head_index}
    return Operands(arrays, tuple(tiled), ("allowed",) if transposes_mask else (), tuple(columns))


def is_cut(config: Config, inputs: Inputs) -> bool:
    """Whether kernels compute the rows' intervals from `key_value_length`. A bias would count in dead rows."""
    return config.band.is_cut and inputs.bias is None and inputs.mask.allowed is None


def starts_with_bias(inputs: Inputs) -> bool:
    """Whether the forward's products are added to the bias: `TileLogits.start`."""
    bias = inputs.bias
    return bias is not None and 1 not in bias.shape[-2:] and inputs.query.dtype == jnp.bfloat16


def score_bytes(inputs: Inputs) -> int:
    """Of one score of the bias and mask that come tile by tile, in shared memory."""
    return sum(1 if x.dtype == bool else _float_bytes(x) for x in _scores(inputs) if 1 not in x.shape[-2:])


def column_bytes(inputs: Inputs) -> int:
    """Likewise, of those that are vectors along the keys; a mask is added, in float32."""
    return sum(4 if x.dtype == bool else _float_bytes(x) for x in _scores(inputs) if x.shape[-2] == 1)


def _scores(inputs: Inputs) -> list[jax.Array]:
    return [x for x in (inputs.bias, inputs.mask.allowed) if x is not None]


def _float_bytes(x: jax.Array) -> int:
    return min(4, np.dtype(x.dtype).itemsize)


def _tf32_operands(inputs: Inputs) -> Inputs:
    """Keys and values rounded to what the tensor cores multiply (they cut off further bits); values (..., K, D, S).

    wgmma transposes tiles of 16-bit elements only. The kernel rounds queries.
    """
    key, value = (lax.reduce_precision(x, 8, 10) for x in (inputs.key, inputs.value))
    length = inputs.mask.key_value_length
    if length is not None:
        position = lax.broadcasted_iota(jnp.int32, (*(1,) * length.ndim, value.shape[-3], 1, 1), length.ndim)
        in_length = position < length[..., None, None, None]
        value = jnp.where(in_length | jnp.isfinite(value), value, 0.0)  # as `clean_padding`
    return inputs._replace(key=key, value=jnp.moveaxis(value, -3, -1))


def score_buffers(operands: Operands, slots: tuple[int, ...], block_rows: int, block_kv: int) -> list[Any]:
    """Shared memory for the tiles of bias and mask."""

    def buffer(name: str) -> Any:
        x, tile = operands.arrays[name], (block_rows, block_kv)
        tile = tile[::-1] if name in operands.transposed else tile
        return matrix_buffer(*slots, *tile, dtype=x.dtype, swizzle=swizzle_bytes(x.shape[-1], x.dtype, tile[-1]))

    return [buffer(name) for name in operands.tiled]


def column_buffers(operands: Operands, stages: int, block_kv: int) -> list[Any]:
    """Shared memory for parts of the vectors along the keys; where there is none, they are read from global memory."""
    return [plgpu.SMEM((stages, block_kv), operands.arrays[name].dtype) for name in operands.columns]


def clean_padding(buffer: Any, tile: Any, length: Any) -> None:
    """Zero the NaN and inf of keys or values in shared memory from `length` on: 0 * NaN is NaN."""
    count, head_dim = buffer.shape
    shape = (64, head_dim)
    for part in range(count // 64):
        some = buffer.at[pl.ds(part * 64, 64)]
        x = load(some, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        position = iota(shape, 0) + (tile * count + part * 64)
        is_number = jnp.abs(x) <= float(jnp.finfo(jnp.float32).max)
        some[...] = jnp.where((position < length) | is_number, x, 0.0).astype(buffer.dtype)


def score_slice(
    ref: Any, head: tuple, row: Any, rows: int, tile: Any, columns: int, *, transposed: bool = False
) -> Any:
    """A tile of a score-like array in global memory."""
    index = pl.ds(row, rows), pl.ds(tile * columns, columns)
    return ref.at[(*broadcast_index(head, ref.shape[:-2]), *(index[::-1] if transposed else index))]


def column_slice(ref: Any, head: tuple, tile: Any, columns: int) -> Any:
    """Part of a vector along the keys in global memory."""
    return ref.at[(*broadcast_index(head, ref.shape[:-1]), pl.ds(tile * columns, columns))]


def query_slice(ref: Any, head: tuple, row: Any, rows: int) -> Any:
    *batch, n = head
    return ref.at[(*broadcast_index(batch, ref.shape[:-3]), pl.ds(row, rows), n)]


def value_slice(ref: Any, head: tuple, group: int, tile: Any, columns: int) -> Any:
    """As `key_slice`; of float32 values, (D, columns)."""
    if ref.dtype != jnp.float32:
        return key_slice(ref, head, group, tile, columns)
    *batch, n = head
    kv_head = lax.div(n, jnp.int32(group)) if ref.shape[-3] > 1 else 0
    return ref.at[
        (*broadcast_index(batch, ref.shape[:-3]), kv_head, pl.ds(0, ref.shape[-2]), pl.ds(tile * columns, columns))
    ]


def key_slice(ref: Any, head: tuple, group: int, tile: Any, columns: int) -> Any:
    *batch, n = head
    kv_head = lax.div(n, jnp.int32(group)) if ref.shape[-2] > 1 else 0
    return ref.at[(*broadcast_index(batch, ref.shape[:-3]), pl.ds(tile * columns, columns), kv_head)]
