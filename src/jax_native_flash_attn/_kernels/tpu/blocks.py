"""Tile shapes of the TPU kernels, by chip generation: see docs/measurements/tpu.md."""

from dataclasses import dataclass

from ..._semantics.sizes import Sizes

LANES = 128
_STREAMED_BYTES = 1 << 20  # of what a step reads along the axis of its loop; twice that, as the next is read meanwhile
_MOST_TILES = 4  # of a step


@dataclass(frozen=True)
class Blocks:
    """Shape of one step's work.

    Attributes:
      resident: query rows (keys, in the kernel for the gradients of key and value) that stay for all of a loop.
      tile: keys (query rows) of one tile.
      streamed: of those, how many a step reads; a multiple of `tile`.
      unit: of the resident rows, how many are computed together; fewer need fewer registers.
      unrolled: how many tiles stand side by side in the loop.
    """

    resident: int
    tile: int
    streamed: int
    unit: int
    unrolled: int = 2


# Largest resident rows, tile and unit, by pass. Of v5e, smaller units cost nothing, and spill less.
_LARGEST = {
    "v5": {"forward": (512, 512, 256), "dquery": (512, 512, 256), "dkey_dvalue": (512, 512, 256)},
    "default": {"forward": (512, 512, 512), "dquery": (512, 512, 512), "dkey_dvalue": (512, 512, 512)},
}


def choose_blocks(sizes: Sizes, which: str, *, itemsize: int, term_bytes: int, generation: str) -> Blocks:
    """Blocks of a kernel.

    Args:
      sizes: axis sizes of the call.
      which: 'forward', 'dquery', 'dkey_dvalue' or 'dbias'.
      itemsize: bytes of an element of query.
      term_bytes: of one score, of bias and mask over T and S.
      generation: as of `support.generation`.
    """
    table = _LARGEST.get(generation, _LARGEST["default"])
    resident, tile, unit = table["dquery" if which == "dbias" else which]
    if max(sizes.H, sizes.D) > LANES or itemsize == 4 or term_bytes:
        resident = tile = unit = 256
    lengths = (sizes.S, sizes.T) if which == "dkey_dvalue" else (sizes.T, sizes.S)
    resident, tile = (min(most, -(-n // LANES) * LANES) for most, n in zip((resident, tile), lengths, strict=True))
    if which == "dbias":
        return Blocks(resident, tile, tile, resident)
    row_bytes = (sizes.H + sizes.D) * itemsize + resident * term_bytes
    tiles = max(1, min(_MOST_TILES, -(-lengths[1] // tile), _STREAMED_BYTES // (tile * row_bytes)))
    return Blocks(resident, tile, tile * tiles, min(unit, resident) if resident % unit == 0 else resident)
