"""The operands of a call, laid out for TMA, and the shared memory that their tiles take.

Nothing is copied, but for float32 (`tf32.py`), where lengths are multiples of 8 or `TmaLoad` takes any, and
where rows of bias and mask are multiples of 32 bytes. Bias and boolean mask keep the axes in which they broadcast. With
both T and S they come tile by tile with the keys, through shared memory; with one of them they are a vector.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ...._semantics.call import Config, Inputs
from ...._semantics.masks import MaskOperands
from ..formula_builder import formulas
from ..formulas import Formula
from ..operands import MASKED, Dropout, Elements, LogitTerm, Operands, TermBuffers, TermKind
from ..pallas import TmaLoad, matrix_buffer, pad_axis, plgpu, round_up, swizzle_bytes
from .intervals import pad_rows, row_intervals
from .mask_bits import WORDS, pack_columns, pack_rows
from .mods import prepare_mods
from .tf32 import Products
from .tile_classes import are_whole, kernel_classes, with_classes, with_order


def prepare(
    config: Config,
    inputs: Inputs,
    block_rows: int,
    block_kv: int,
    tma: TmaLoad,
    value_tma: TmaLoad,
    *,
    products: Products | None = None,
    transposes_mask: bool = False,
    reads_intervals: bool = False,
    needs_slope: bool = False,
    reads_classes: bool = False,
) -> Operands:
    """For `tma` of query and key, and of value.

    `products`: query, key and value of float32. `transposes_mask`: the mask's tiles are read transposed, which cannot
    be done with bits: it is packed so. `reads_intervals`: those of rows that are moved, even if kernels could compute
    them. `needs_slope`: the derivative of a `score_mod`. `reads_classes`: those of tiles, in place of a list of them.
    """
    z, mask = inputs.sizes, inputs.mask
    query, key, value = products or Products(
        pad_axis(inputs.query, -3, round_up(z.T, tma.multiple)),
        pad_axis(inputs.key, -3, round_up(z.S, tma.multiple)),
        pad_axis(inputs.value, -3, round_up(z.S, value_tma.multiple)),
    )
    # Kernels compute those of a complete band. But a bias would count in the rows of a batch row of length 0.
    shift = None if reads_intervals else mask.shift
    is_computed = config.band.is_complete and (inputs.bias is None if mask.shift is None else shift is not None)
    bias_term = None if inputs.bias is None else prepare_bias(inputs.bias, z.T, z.S, block_rows, block_kv)
    allowed, mask_term, skips_empty = mask.allowed, None, False
    if allowed is not None:
        mask_term = _mask_term(allowed, z.T, z.S, block_rows, block_kv, transposes=transposes_mask)
        skips_empty = mask_term.kind is TermKind.TILED and not transposes_mask
    intervals = None
    if not is_computed:
        intervals = row_intervals(mask, z.T, z.S, block_rows, block_kv, skips_empty=skips_empty)
    if intervals is not None and mask.tile_classes is not None:
        classes = kernel_classes(config, mask, z.T, z.S, block_rows, block_kv)
        intervals = replace(intervals, is_whole=are_whole(intervals, z.T, z.S, block_rows))
        intervals = (with_classes if reads_classes else with_order)(intervals, classes)
    dropout = None
    if config.dropout is not None and inputs.dropout_key is not None and inputs.head_index is not None:
        dropout = Dropout(inputs.dropout_key, inputs.head_index)
    return Operands(
        query=query,
        key=key,
        value=value,
        scale=inputs.scale,
        intervals=intervals,
        elements=_elements(mask, z.T, z.S, block_rows, block_kv),
        bias=bias_term,
        mask=mask_term,
        length=mask.key_value_length,
        dropout=dropout,
        shift=shift,
        mods=prepare_mods(config, inputs, block_rows, block_kv, needs_slope=needs_slope),
        has_dead_rows=shift is not None and mask.dead is not None,
    )


def _elements(mask: MaskOperands, T: int, S: int, block_rows: int, block_kv: int) -> Elements | None:
    if mask.is_exact is None:
        return None

    def rows(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else pad_rows(x[..., 0], T, block_rows)

    def keys(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else pad_axis(x[..., 0, :], -1, round_up(S, block_kv))

    return Elements(
        is_exact=mask.is_exact.min()[None],
        query_ids=rows(mask.query_ids),
        key_ids=keys(mask.key_ids),
        lowest_position=rows(mask.lowest_position),
        highest_position=rows(mask.highest_position),
        key_positions=keys(mask.key_positions),
    )


def prepare_bias(bias: jax.Array, T: int, S: int, block_rows: int, block_kv: int) -> LogitTerm:
    """A bias, or a tangent of one."""
    if bias.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        bias = bias.astype(jnp.float32)
    return _term(bias, T, S, block_rows, block_kv)


def kind_of(x: jax.Array) -> TermKind:
    """Of a bias or mask (..., T or 1, S or 1)."""
    *_, rows, columns = x.shape
    return TermKind.COLUMNS if rows == 1 else TermKind.ROWS if columns == 1 else TermKind.TILED


def _mask_term(allowed: jax.Array, T: int, S: int, block_rows: int, block_kv: int, *, transposes: bool) -> LogitTerm:
    kind = kind_of(allowed)
    if kind is TermKind.COLUMNS:
        return _term(jnp.where(allowed, jnp.float32(0.0), MASKED), T, S, block_rows, block_kv)
    if kind is TermKind.ROWS:
        return _term(allowed.astype(jnp.int8), T, S, block_rows, block_kv)
    packed = pack_columns(allowed, block_rows) if transposes else pack_rows(allowed, block_kv)
    return LogitTerm(pad_axis(packed, -3, round_up(packed.shape[-3], 8)), kind, transposes)


def _term(x: jax.Array, T: int, S: int, block_rows: int, block_kv: int) -> LogitTerm:
    """Padded to whole blocks, or, of a matrix, to what TMA takes."""
    kind = kind_of(x)
    if kind is TermKind.COLUMNS:
        x = jnp.broadcast_to(x, (*x.shape[:-1], S))
        x = pad_axis(x[..., 0, :], -1, round_up(S, block_kv))
    elif kind is TermKind.ROWS:
        x = pad_axis(x[..., 0], -1, round_up(T, block_rows))
    else:
        *_, rows, width = x.shape
        aligned = width if swizzle_bytes(width, x.dtype) else round_up(width, 64)
        x = pad_axis(pad_axis(x, -2, round_up(rows, 8)), -1, aligned)
    return LogitTerm(x, kind, is_transposed=False)


def starts_with_addend(config: Config, inputs: Inputs) -> bool:
    """Whether the forward's products are added to what is to be added to scores: `start_products`."""
    bias, z = inputs.bias, inputs.sizes
    if inputs.query.dtype != jnp.bfloat16 or config.logits_soft_cap is not None:
        return False
    if config.score_mod is None:
        return bias is not None and kind_of(bias) is TermKind.TILED
    formula = formulas(config, z.T, z.S, needs_slope=False)["score_mod"]
    return isinstance(formula, Formula) and formula.addend is not None


def has_bits_alone(inputs: Inputs) -> bool:
    """Whether the bits of a mask, and nothing else, come tile by tile."""
    return [x.dtype for x in _terms(inputs) if kind_of(x) is TermKind.TILED] == [bool]


def term_bytes(inputs: Inputs) -> int:
    """Bytes that one score takes in shared memory, of the bias and mask that come tile by tile.

    Bits, with what they leave empty in short rows, count as one.
    """
    tiled = [x for x in _terms(inputs) if kind_of(x) is TermKind.TILED]
    return sum(1 if x.dtype == bool else _float_bytes(x) for x in tiled)


def column_bytes(inputs: Inputs) -> int:
    """Likewise, of those that are vectors along the keys, for each key; a mask is added, in float32."""
    columns = [x for x in _terms(inputs) if kind_of(x) is TermKind.COLUMNS]
    return sum(4 if x.dtype == bool else _float_bytes(x) for x in columns)


def _terms(inputs: Inputs) -> list[jax.Array]:
    return [x for x in (inputs.bias, inputs.mask.allowed) if x is not None]


def _float_bytes(x: jax.Array) -> int:
    return min(4, np.dtype(x.dtype).itemsize)


def term_buffers(
    operands: Operands, slots: tuple[int, ...], block_rows: int, block_kv: int, *, with_columns: bool = False
) -> TermBuffers:
    """Shared memory for the tiles of bias and mask and, if wanted, for parts of those that are vectors along the keys.

    Vectors without a buffer are read from global memory.
    """

    def tiles(term: LogitTerm | None) -> object:
        if term is None or term.kind is not TermKind.TILED:
            return None
        dtype = term.array.dtype
        if term is operands.mask:
            return plgpu.SMEM((*slots, block_kv if term.is_transposed else block_rows, WORDS), dtype)
        tile = block_rows, block_kv
        return matrix_buffer(*slots, *tile, dtype=dtype, swizzle=swizzle_bytes(term.array.shape[-1], dtype, tile[-1]))

    def columns(term: LogitTerm | None) -> object:
        if term is None or term.kind is not TermKind.COLUMNS or not with_columns:
            return None
        return plgpu.SMEM((*slots, block_kv), term.array.dtype)

    bias, mask = operands.bias, operands.mask
    return TermBuffers(tiles(bias), tiles(mask), columns(bias), columns(mask))
