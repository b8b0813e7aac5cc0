"""Tile shapes of the TPU kernels, by chip generation: see docs/measurements/tpu.md."""

from dataclasses import dataclass
from typing import NamedTuple

from ..._semantics.sizes import Sizes

LANES = 128
_STREAMED_BYTES = 1 << 21  # of what a step reads along the axis of its loop; twice that, as the next is read meanwhile
_MOST_STREAMED = 4096  # keys, or query rows
_WORTH_A_CHECK = 2048  # keys of a step, of which it is checked that they needed no maximum


@dataclass(frozen=True)
class Blocks:
    """Shape of one step's work.

    Attributes:
      resident: query rows (keys, in the kernel for the gradients of key and value) that stay for all of a loop.
      tile: keys (query rows) of one tile.
      streamed: of those, how many a step reads; a multiple of `tile`.
      unit: of the resident rows, how many are computed together; fewer need fewer registers.
      unrolled: how many tiles stand side by side in the loop; half as many where some have a mask, as those that are
        left go one by one.
      part: in the kernel for the gradient of query, of how many keys of a tile the first two products are computed
        together; None: of all.
      tries_without_maximum: of the forward: whether a step first goes without the maximum of rows.
    """

    resident: int
    tile: int
    streamed: int
    unit: int
    unrolled: int = 2
    part: int | None = None
    tries_without_maximum: bool = False


class _Most(NamedTuple):
    """The largest of each; see `Blocks`."""

    resident: int
    tile: int
    unit: int
    unrolled: int
    part: int | None = None
    tries_without_maximum: bool = False


# By size of the matrix units and kernel: fewest bundles for a score of those tried, and of nearly equal ones the fewest
# spills.
_OF_128 = {
    "forward": _Most(512, 512, 256, 4),
    "dquery": _Most(512, 512, 128, 4),
    "dkey_dvalue": _Most(512, 512, 128, 4),
}
_OF_256 = {
    "forward": _Most(512, 256, 512, 8, tries_without_maximum=True),
    "dquery": _Most(512, 512, 512, 4, part=256),
    "dkey_dvalue": _Most(512, 256, 512, 8),
}
_LARGEST = {
    "v4": dict.fromkeys(_OF_128, _Most(512, 256, 256, 8)),  # larger units spill more there
    "v5": _OF_128,
    "v7": {**_OF_256, "dquery": _Most(512, 512, 512, 8)},
}
_SMALLER = _Most(256, 256, 256, 4)  # with large operands


def choose_blocks(sizes: Sizes, which: str, *, itemsize: int, term_bytes: int, generation: str) -> Blocks:
    """Blocks of a kernel.

    Args:
      sizes: axis sizes of the call.
      which: 'forward', 'dquery', 'dkey_dvalue' or 'dbias'.
      itemsize: bytes of an element of query.
      term_bytes: of one score, of bias and mask over T and S.
      generation: as of `support.generation_here`.
    """
    table = _LARGEST.get(generation, _OF_256)
    most = table["dquery" if which == "dbias" else which]
    if max(sizes.H, sizes.D) > LANES or itemsize == 4 or term_bytes:
        most = _SMALLER
    lengths = (sizes.S, sizes.T) if which == "dkey_dvalue" else (sizes.T, sizes.S)
    # (A length of whole registers: what lies behind the last row is computed, and not written.)
    whole = [-(-n // LANES) * LANES for n in lengths]
    resident, tile = min(most.resident, whole[0]), min(most.tile, whole[1])
    if which == "dbias":
        return Blocks(resident, tile, tile, resident)
    row_bytes = (sizes.H + sizes.D) * itemsize + resident * term_bytes
    tiles = max(1, min(_MOST_STREAMED // tile, _STREAMED_BYTES // (tile * row_bytes)))
    tiles = _divisor(-(-lengths[1] // tile), tiles)
    unit = most.unit if resident % most.unit == 0 else resident
    tries = most.tries_without_maximum and tile * tiles >= _WORTH_A_CHECK
    part = most.part if most.part is not None and tile % most.part == 0 else None
    return Blocks(resident, tile, tile * tiles, unit, _divisor(tiles, most.unrolled), part, tries)


def _divisor(number: int, most: int) -> int:
    """The largest up to `most` that divides `number`, unless that is less than half of what could be."""
    most = min(number, most)
    return next((n for n in range(most, most // 2, -1) if number % n == 0), most)
