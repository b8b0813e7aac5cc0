"""Block shapes, and those of the forward kernel: one table per chip generation, by `benchmarks/tune_mosaic.py`."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..._semantics.sizes import Sizes, static_size
from .addition_order import AdditionOrder

SHARED_MEMORY = 227 * 1024  # bytes that one block may use on Hopper
RESERVED = 3 * 1024  # for barriers, the compiler and, in the backward, vectors


class Chip(NamedTuple):
    """What of a GPU decides: compute capability and number of multiprocessors. By default an H100 or H200."""

    capability: str = "9.0"
    cores: int = 132


@dataclass(frozen=True)
class Blocks:
    """Shape of one block's work.

    Attributes:
      block_q: query rows of one compute warpgroup, a multiple of 64.
      block_kv: keys of one tile, a multiple of 64.
      stages: tiles of keys and values in shared memory at once.
      warpgroups: how many compute, each with its own rows; one more loads.
      weights_in_shared: whether the softmax weights reach the second product through shared memory, not registers.
      persistent: whether a block goes through several items of work, so that loads of the next overlap the last.
      takes_turns: whether the warpgroups issue their products in turn, so that they do not all compute softmax at once.
      splits: of the keys; each is an item of its own, and the results are merged.
      cost: of a row and key, beside other shapes for the same kind of call; as measured.
    """

    block_q: int
    block_kv: int
    stages: int
    warpgroups: int
    weights_in_shared: bool = False
    persistent: bool = False
    takes_turns: bool = False
    splits: int = 1
    cost: float = 1.0

    @property
    def rows(self) -> int:
        return self.block_q * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread: of the compute warpgroups, and of the one that loads."""
        return {1: (240, 24), 2: (240, 24), 3: (160, 24), 4: (112, 24)}[self.warpgroups]


class BackwardBlocks(NamedTuple):
    """Of the kernels for the gradients of query, of key and value, and of a bias, if there is one.

    `fused`: how one kernel makes the first three, where all are wanted; None where it does not.
    """

    dquery: Blocks
    dkey_dvalue: Blocks
    dbias: Blocks | None
    fused: AdditionOrder | None = None


_FEW_ROWS, _PLAIN, _UNMASKED = "few rows", "plain", "plain, with no mask but lengths or bits"
_SCORES, _SHORT_SCORES = "bias or mask over T and S", "likewise, with short T"
_BIAS = "bias over T and S that products start with"
_FLOAT32 = "float32"

# Of the forward kernel. By compute capability, then kind of call and largest head dimension of value, as accumulators
# and scores share the registers: shapes in order of preference; the first whose buffers fit is taken, if need be of a
# larger dimension or the next kind. Of `_TIMED` kinds, among those that fit the one that takes the least time, by the
# cost of its rounds of items: more warpgroups hide more, and leave more idle at the end.
_FORWARD: dict[str, dict[tuple[str, int], tuple[Blocks, ...]]] = {
    "9.0": {
        (_FEW_ROWS, 128): (Blocks(64, 128, 3, 1), Blocks(64, 64, 3, 1), Blocks(64, 64, 2, 1)),
        (_FEW_ROWS, 256): (Blocks(64, 64, 2, 1),),
        (_PLAIN, 64): (Blocks(64, 128, 3, 2, persistent=True),),
        (_UNMASKED, 64): (
            Blocks(64, 128, 3, 2, persistent=True),
            Blocks(64, 64, 4, 4, persistent=True, cost=0.94),
        ),
        # The last two are for keys of more columns than 192.
        (_PLAIN, 128): (
            Blocks(64, 128, 2, 2, persistent=True),
            Blocks(64, 128, 2, 2),
            Blocks(64, 64, 3, 2),
            Blocks(64, 64, 2, 2),
        ),
        (_PLAIN, 256): (Blocks(64, 64, 2, 2, weights_in_shared=True),),
        (_BIAS, 64): (
            Blocks(64, 128, 3, 3, persistent=True, takes_turns=True, cost=0.90),
            Blocks(64, 128, 2, 3, persistent=True, takes_turns=True, cost=0.90),
            Blocks(64, 64, 3, 4, persistent=True, cost=0.94),
            Blocks(64, 64, 2, 4, persistent=True, cost=0.94),
            Blocks(64, 128, 2, 2, persistent=True, takes_turns=True),
        ),
        (_SHORT_SCORES, 64): (
            Blocks(64, 64, 3, 3, persistent=True, takes_turns=True),
            Blocks(64, 64, 2, 3, persistent=True, takes_turns=True),
            Blocks(64, 64, 2, 2, persistent=True, takes_turns=True),
        ),
        (_SCORES, 128): (
            Blocks(64, 128, 2, 2, persistent=True, takes_turns=True),
            Blocks(64, 128, 2, 2, takes_turns=True),
            Blocks(64, 64, 2, 2, persistent=True, takes_turns=True),
            Blocks(64, 64, 2, 2, takes_turns=True),
            Blocks(64, 64, 2, 1),
        ),
        (_SCORES, 256): (
            Blocks(64, 64, 2, 2, weights_in_shared=True),
            Blocks(64, 64, 2, 2),
            Blocks(64, 64, 2, 1),
            Blocks(64, 64, 1, 1),
        ),
        (_FLOAT32, 64): (Blocks(64, 64, 3, 2, weights_in_shared=True), Blocks(64, 64, 2, 2, weights_in_shared=True)),
        (_FLOAT32, 128): (Blocks(64, 64, 2, 2, weights_in_shared=True), Blocks(64, 64, 1, 2, weights_in_shared=True)),
    },
}
_TIMED = {_UNMASKED, _BIAS}
_DEFAULT = "9.0"  # for a chip that nobody has measured
_FEW, _SHORT = 64, 1024  # query rows
_LEAST_TILES = 8  # of a split: its beginning and its end cost about two
_MERGE_TILES = 3  # what merging costs, in tiles


def forward_blocks(
    sizes: Sizes,
    term_bytes: int,
    *,
    column_bytes: int,
    has_dropout: bool,
    itemsize: int,
    chip: Chip,
    is_masked: bool = True,
    starts_with_addend: bool = False,
    has_bits_alone: bool = False,
) -> Blocks:
    """Block shape of the forward kernel.

    Args:
      sizes: axis sizes of the call.
      term_bytes: of one score of bias and mask in shared memory, where these come tile by tile.
      column_bytes: likewise, of vectors along the keys, for each key.
      has_dropout: whether there is dropout.
      itemsize: bytes of an element of query, 4 for float32.
      chip: what it runs on.
      is_masked: whether more tiles of a row than its last can need a mask, but for one of bits.
      starts_with_addend: whether products start with a bias over T and S, or with what a `score_mod` adds.
      has_bits_alone: whether a mask, as bits, is all that has both T and S.
    """
    table = _FORWARD.get(chip.capability, _FORWARD[_DEFAULT])
    kinds = [_SHORT_SCORES, _SCORES] if term_bytes else [_PLAIN]
    if has_bits_alone:
        kinds = [_PLAIN, _SCORES]  # the latter where buffers of the former do not fit
    if sizes.T <= _FEW:
        kinds = [_FEW_ROWS]
    if sizes.T > _FEW and max(sizes.H, sizes.D) <= 64 and not has_dropout:
        kinds = [_BIAS] if starts_with_addend and term_bytes == 2 else kinds  # no float32, no mask over T and S
        kinds = [_UNMASKED] if kinds[0] == _PLAIN and (has_bits_alone or not is_masked) else kinds
    if itemsize == 4:
        kinds = [_FLOAT32]
    if sizes.T > _SHORT and _SHORT_SCORES in kinds:
        kinds.remove(_SHORT_SCORES)
    rows = [(kinds.index(kind), limit, kind) for kind, limit in table if kind in kinds and limit >= sizes.D]
    room = SHARED_MEMORY - RESERVED

    def fitting(candidates: tuple[Blocks, ...]) -> list[Blocks]:
        if has_dropout:
            # The random bits need as many registers as the scores.
            candidates = tuple(replace(x, block_kv=64) for x in candidates)
        return [x for x in candidates if shared_bytes(x, sizes, term_bytes, column_bytes, itemsize) <= room]

    kind, fits = next((kind, fits) for _, limit, kind in sorted(rows) if (fits := fitting(table[kind, limit])))

    def duration(x: Blocks) -> float:
        items = max(1, static_size(sizes.batch)) * sizes.N * -(-sizes.T // x.rows)
        return -(-items // chip.cores) * x.rows * x.cost

    if kind in _TIMED:
        fits.sort(key=duration)
    blocks = fits[0]
    items = max(1, static_size(sizes.batch)) * sizes.N * -(-sizes.T // blocks.rows)
    return replace(blocks, splits=_splits(items, -(-sizes.S // blocks.block_kv), chip.cores))


def _splits(items: int, tiles: int, cores: int) -> int:
    """Splits of the keys that keep all multiprocessors busy, where there are fewer items than those."""

    def duration(splits: int) -> int:
        """In tiles."""
        rounds = -(-items * splits // cores)
        return rounds * (-(-tiles // splits) + 2) + (_MERGE_TILES if splits > 1 else 0)

    # At most four rounds: partial results then take a few MiB, whatever the lengths.
    return min(range(1, max(1, min(tiles // _LEAST_TILES, 4 * cores // items)) + 1), key=duration)


def shared_bytes(blocks: Blocks, sizes: Sizes, term_bytes: int, column_bytes: int, itemsize: int) -> int:
    """Shared memory of the forward kernel, but for barriers."""
    H, D = sizes.H, sizes.D
    query_and_out = itemsize * blocks.rows * (H + D if blocks.persistent else max(H, D))
    tile = blocks.block_kv * (itemsize * (H + D) + blocks.rows * term_bytes + column_bytes)
    weights = itemsize * blocks.rows * blocks.block_kv if blocks.weights_in_shared else 0
    lse = 4 * blocks.rows if itemsize < 4 else 0
    return query_and_out + blocks.stages * tile + weights + lse
