"""Tile geometry: shapes of arrays, shape of a tile, and which key/value tiles a query tile visits."""

import math
from dataclasses import dataclass, replace
from typing import Any

from ..._semantics.sizes import Sizes, static_size
from . import quirks
from .limits import Limits


@dataclass(frozen=True)
class TileShape:
    """A tile holds some batch rows, some key/value heads with their groups, block_q rows, block_kv columns.

    `follows_band`: a row of tiles is one tile, which starts at the first key of its first row; otherwise tiles start at
    multiples of their size. `fuses_softmax`: XLA:CPU makes one kernel of a plain softmax and its products.
    `merges_lead`: batch rows and heads are one axis inside a tile. `joins_heads`: keys and values are read as they lie,
    (S, K * H), in products for all heads at once. `is_sharded`: XLA splits its batch rows and heads over devices. Its
    groups then are an axis: XLA would gather one that is sharded to merge it with the rows.
    """

    batch: tuple[Any, ...]
    heads: int
    block_q: int
    block_kv: int
    follows_band: bool = False
    fuses_softmax: bool = False
    merges_lead: bool = False
    joins_heads: bool = False
    is_sharded: bool = False

    def holds_whole_heads(self, sizes: Sizes) -> bool:
        """Whether it is all rows and keys of several heads: it is empty only if all of their batch rows are padding."""
        return (self.block_q, self.block_kv) == (sizes.T, sizes.S) and static_size(self.batch) * self.heads > 1


@dataclass(frozen=True)
class AcceleratorForm:
    """What decides a tile's shape on an accelerator, beside the sizes.

    Attributes:
      varies_in_batch: every batch row has its own intervals (lengths), so that other tiles are empty in each.
      splits_rows: take at least two key/value tiles; inside that loop XLA fuses more into the products.
      reads_keys: the query rows are so few that reading the keys is what costs.
      keeps_batch: take all batch rows at once, over which a result is summed.
    """

    varies_in_batch: bool = False
    splits_rows: bool = False
    reads_keys: bool = False
    keeps_batch: bool = False


def choose_tile(
    sizes: Sizes,
    platform: str,
    limits: Limits,
    *,
    block_q: int | None,
    block_kv: int | None,
    is_banded: bool,
    is_masked: bool,
    is_elementwise: bool,
    has_documents: bool,
    has_ids: bool,
    has_all_keys: bool,
    band_width: int | None,
    key_stop: int,
    fuses_softmax: bool,
    joins_heads: bool,
    is_derivative: bool,
    has_16_bits: bool,
    converts: bool,
    collects_rounded: bool,
    all_heads: bool,
    form: AcceleratorForm,
) -> TileShape:
    """The one place where tile shapes are chosen; `benchmarks/tune_tiles.py` made the measurements.

    Args:
      sizes: axis sizes of the call.
      platform: 'cpu' or anything else.
      limits: see `Limits`.
      block_q, block_kv: what the caller asked for, or None.
      is_banded: whether rows attend an interval of the keys only; smaller tiles then skip more.
      is_masked: whether that, or a boolean mask, may leave tiles empty.
      is_elementwise: whether a bias, boolean mask or dropout changes single scores.
      has_documents: whether a boolean mask leaves few blocks of rows and keys; yet smaller tiles skip yet more.
      has_ids: whether segment ids leave parts of the keys, of lengths that only data tell.
      has_all_keys: whether masks leave hardly a key out, whatever they could.
      band_width: keys of a row, where nothing but a narrow static band bounds them.
      key_stop: no row attends keys from here on.
      fuses_softmax: whether XLA:CPU can make one kernel of the call: a softmax, perhaps masked, between two products.
      joins_heads: whether the kernel can take products for all heads at once.
      is_derivative: whether the kernel is a derivative, or makes what one needs: XLA then shares work between the two.
      has_16_bits: whether products take 16-bit operands.
      converts: whether products take operands of another dtype than the call's.
      collects_rounded: whether loops collect results of 16 bits as such.
      all_heads: ask for all batch rows and heads at once (reverse mode through a kernel: slicing one head out of an
        array would make its transpose touch the whole array for every tile).
      form: what else decides on an accelerator.
    """
    band_tile = _band_tile(sizes, platform, limits, block_q, band_width, all_heads)
    if band_tile is not None and block_kv is None:
        return band_tile
    heads = max(1, static_size(sizes.batch) * sizes.K * sizes.G)
    num_keys = min(sizes.S, max(1, key_stop))
    is_decoding = sizes.group_rows <= limits.few_rows and num_keys > 1024
    if platform != "cpu":
        tile = _accelerator_tile(sizes, limits, block_q, block_kv, num_keys, is_banded, form)
        return replace(tile, batch=sizes.batch) if all_heads else tile
    # Derivatives have the keys of each head copied anyway.
    joins_heads &= is_decoding and not is_derivative and _cpu_joined_rows(has_16_bits) >= sizes.T * sizes.N
    shared = limits.cpu_shared_derivative if is_derivative else limits.cpu_shared_forward
    if not all_heads:
        # Large products are the fastest: one head at a time, square if possible. Where masks may leave tiles empty,
        # smaller ones skip more; of four heads, their products are as fast.
        is_small = is_masked and sizes.N >= 4 and (has_ids or min(sizes.T, num_keys) < 8192)
        side = 512 if is_small else 1024
        if has_documents and min(sizes.T, num_keys) <= 2048:
            side = 256
        columns = min(4096, max(side, side**2 // sizes.group_rows))
        rows = max(1, min(4096, max(side, side**2 // num_keys)) // sizes.G)
        if is_small:
            rows = max(rows, min(side, shared // (side * sizes.G)))
        if not (is_derivative or is_masked or is_elementwise):
            columns = max(columns, 2 * side)
        if is_decoding:
            columns = min(4096, max(1024, limits.cpu_keys // (sizes.K * sizes.H)))
            if is_masked and not is_derivative:
                # Of short caches too, a part is skipped.
                columns = min(columns, max(512 if joins_heads else 2048, num_keys // 4))
    else:
        side = _square(limits.cpu_reverse // heads)
        rows, columns = side, side
        whole_rows = max(1, limits.cpu_reverse // heads) // max(1, sizes.S)
        if not is_banded and whole_rows >= min(128, sizes.T):
            rows, columns = min(2048, 1 << (whole_rows.bit_length() - 1)), sizes.S
    is_asked = block_q is not None or block_kv is not None
    block_q = balanced_block(sizes.T, block_q or rows)
    block_kv = balanced_block(num_keys, block_kv or columns)
    if all_heads:
        return TileShape(sizes.batch, sizes.K, block_q, block_kv)
    if has_16_bits and sizes.has_few_scores and not (is_asked or joins_heads) and num_keys == sizes.S:
        # In loops XLA collects results of 16 bits, and before JAX 0.11 reads operands, in 32 bits as a whole: more than
        # what a tile saves. Where keys are what is large, small tiles of them stay in a core's cache.
        reads_whole = quirks.CPU_CONVERTS_BEFORE_LOOPS or (is_derivative and not is_decoding)
        if reads_whole or sizes.group_rows >= sizes.S:
            return TileShape(sizes.batch, sizes.K, sizes.T, sizes.S, merges_lead=True)
    if is_decoding:
        if not joins_heads:
            return _with_heads(sizes, block_q, block_kv, limits.cpu_keys // (block_kv * sizes.H))
        skips = is_masked and not has_all_keys
        if not (is_asked or converts) and _reads_whole(sizes, limits, skips, has_16_bits):
            return TileShape(sizes.batch, sizes.K, sizes.T, sizes.S, merges_lead=True, joins_heads=True)
        batch = (1,) * len(sizes.batch)
        return TileShape(batch, sizes.K, block_q, block_kv, merges_lead=True, joins_heads=True)
    per_head = max(1, sizes.G * block_q * block_kv)
    is_whole = block_q == sizes.T and block_kv == sizes.S and not sizes.has_few_scores
    if fuses_softmax and is_whole and per_head <= 1 << 16:
        return replace(_with_heads(sizes, block_q, block_kv, limits.cpu_fused // per_head), fuses_softmax=True)
    operands = max(1, (sizes.G * block_q + block_kv) * sizes.H)
    limit = min(shared // per_head, limits.cpu_operands // operands)
    forward_whole = limits.cpu_whole_16_bits if has_16_bits else limits.cpu_whole_forward
    whole = limits.cpu_whole_derivative if is_derivative else forward_whole
    if collects_rounded and is_masked and sizes.has_few_scores:
        # Operands of a whole problem are all in 32 bits at once, those of a loop never.
        whole = limits.cpu_whole_forward
    if heads // sizes.G * operands <= whole and heads // sizes.G * per_head <= limits.cpu_whole_scores:
        limit = heads
    return _with_heads(sizes, block_q, block_kv, limit)


def _cpu_joined_rows(has_16_bits: bool) -> int:
    """Query rows of all heads, up to which each times the keys of all heads takes less than copying keys by head."""
    if not has_16_bits:
        return 8
    if quirks.cpu_multiplies_bfloat16():
        return 64
    return 32 if quirks.CPU_CONVERTS_BEFORE_LOOPS else 0


def _reads_whole(sizes: Sizes, limits: Limits, skips: bool, has_16_bits: bool) -> bool:
    """Whether one tile of all keys is worth more than the tiles that are skipped."""
    heads = static_size(sizes.batch) * sizes.K
    if heads * sizes.G * sizes.T * sizes.S > (4 if has_16_bits else 1) * limits.cpu_whole_scores:
        return False
    if has_16_bits and quirks.CPU_CONVERTS_BEFORE_LOOPS:
        return True
    # Slices of keys and values are copies.
    return not skips and (has_16_bits or heads * sizes.S * sizes.H <= limits.cpu_whole_keys)


def _accelerator_tile(
    sizes: Sizes,
    limits: Limits,
    block_q: int | None,
    block_kv: int | None,
    num_keys: int,
    is_banded: bool,
    form: AcceleratorForm,
) -> TileShape:
    """Kernel launches and bandwidth decide: all heads, and batch rows unless each has its own empty tiles."""
    batch = tuple(n if isinstance(n, int) else 1 for n in sizes.batch)
    if form.varies_in_batch and not form.reads_keys:
        least = sizes.N * min(sizes.T, 2048) * min(num_keys, 1024)
        batch = _batch_within(sizes.batch, limits.accelerator_least // least)
    elif not (is_banded or form.keeps_batch or form.reads_keys):
        batch = _batch_within(sizes.batch, limits.accelerator_scores // max(1, sizes.N * sizes.T * num_keys))
    per_head = max(1, limits.accelerator_scores // max(1, math.prod(batch) * sizes.N))
    rows = columns = _square(per_head)
    whole_rows = per_head // num_keys
    if form.reads_keys:
        rows, columns = sizes.T, num_keys
        if is_banded:
            columns = max(1024, limits.accelerator_keys // (math.prod(batch) * sizes.K * sizes.H))
    elif form.varies_in_batch:
        columns = min(columns, 1024)
        rows = min(4096, max(rows, per_head // columns))
    elif not is_banded and whole_rows >= min(128, sizes.T):
        # No online softmax, which saves a pass over the scores; the tiles that a band leaves out are worth more.
        rows = sizes.T if whole_rows >= sizes.T else min(2048, 1 << (whole_rows.bit_length() - 1))
        columns = num_keys
        if form.splits_rows:
            rows, columns = min(4096, 2 * rows), -(-num_keys // 2)
    block_q, block_kv = balanced_block(sizes.T, block_q or rows), balanced_block(num_keys, block_kv or columns)
    return TileShape(batch, sizes.K, block_q, block_kv)


def _square(elements: int) -> int:
    return min(2048, max(128, 1 << (math.isqrt(max(1, elements)).bit_length() - 1)))


def _band_tile(
    sizes: Sizes, platform: str, limits: Limits, block_q: int | None, width: int | None, all_heads: bool
) -> TileShape | None:
    """All the keys of some rows in one tile, if that is less than half of S: softmax needs no correction then."""
    if width is None or width > limits.widest_band:
        return None
    rows = limits.cpu_band_rows if platform == "cpu" else limits.accelerator_band_rows
    block_q = balanced_block(sizes.T, block_q or max(1, rows // sizes.G))
    block_kv = -(-(block_q + width - 1) // 64) * 64
    if 2 * block_kv > sizes.S:
        return None
    if platform == "cpu" and not all_heads:
        tile = _with_heads(sizes, block_q, block_kv, limits.cpu_shared_forward // (sizes.G * block_q * block_kv))
        return replace(tile, follows_band=True)
    limit = limits.cpu_reverse if platform == "cpu" else limits.accelerator_scores
    if static_size(sizes.batch) * sizes.N * block_q * block_kv > limit:
        return None
    return TileShape(sizes.batch, sizes.K, block_q, block_kv, follows_band=True)


def _with_heads(sizes: Sizes, block_q: int, block_kv: int, limit: int) -> TileShape:
    """As many key/value heads in a tile as `limit` allows, then batch rows from the innermost batch axis outwards."""
    heads = largest_divisor(sizes.K, limit)
    batch = _batch_within(sizes.batch, limit // heads if heads == sizes.K else 1)
    return TileShape(batch, heads, block_q, block_kv, merges_lead=True)


def _batch_within(batch: tuple[Any, ...], limit: int) -> tuple[int, ...]:
    """As many batch rows as `limit` allows, from the innermost batch axis outwards."""
    taken, is_full, rows = 1, True, []
    for n in reversed(batch):
        rows.append(largest_divisor(n, limit // taken) if is_full and isinstance(n, int) else 1)
        taken, is_full = taken * rows[-1], is_full and rows[-1] == n
    return tuple(reversed(rows))


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return max(d for d in range(1, max(1, min(n, limit)) + 1) if n % d == 0)


def balanced_block(length: int, block: int) -> int:
    """At most about `block`, such that blocks of equal size cover `length` with little overlap.

    Up to an eighth more is better than one block more.

    A length that the block does not divide (a prime, say) is cut into as many blocks of nearly equal size; the last
    one then overlaps the one before by a few rows, which the tile's owner rule ignores.
    """
    if length <= block:
        return max(1, length)
    if length % block == 0:
        return block
    count = -(-8 * length // (9 * block))
    even = -(-length // count)
    granule = 16 if block % 16 == 0 else 1
    return min(-(-even // granule) * granule, length)
