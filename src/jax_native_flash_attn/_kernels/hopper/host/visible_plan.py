"""What the kernel that finds visible keys reads, and what a call of it takes.

A block of threads has `ROWS` rows, and goes through chunks of `VisiblePlan.chunk` keys. `CHUNKS` of these are a part:
of as many chunks it looks at once which may hold a key of one of its rows.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...._semantics.masks import ROWS_OF_BOUNDS, Band, MaskOperands, rows_in_blocks
from ..pallas import round_up
from .intervals import pad_rows

ROWS = ROWS_OF_BOUNDS
CHUNKS = 64  # rows of a matrix in registers
# The key_start of rows that are padding. A stop cannot tell: offsets and lengths may leave a row a negative one.
PADDED = np.iinfo(np.int32).max
_LARGEST_CHUNK = 128
_PAIRS = 4096  # of neighbours that are compared at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisibleOperands:
    """Ids and positions; None where a call has none.

    Attributes:
      key_start, key_stop: (batch..., N or 1, T), what other masks leave, if `VisiblePlan.band` does not say it; the
        start of padding is `PADDED`.
      query_ids, lowest_position, highest_position: (batch..., 1, T), padded to whole blocks, as the former.
      key_ids, key_positions: (batch..., 1, S), padded to whole parts by repeating the last one.
      id_chunks, position_chunks: the same, (batch..., 1, chunks, keys of a chunk).
    """

    key_start: Any | None
    key_stop: Any | None
    query_ids: Any | None
    lowest_position: Any | None
    highest_position: Any | None
    key_ids: Any | None
    key_positions: Any | None
    id_chunks: Any | None
    position_chunks: Any | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisibleOuts:
    """Those of `MaskOperands` on rows; and, for each batch row of the keys, whether these are sorted, as int32."""

    start: Any
    stop: Any
    bounds: Any
    is_sorted: Any


@dataclass(frozen=True)
class VisiblePlan:
    """`lead`: (batch..., N or 1) of the results; `key_lead`: of ids and positions of keys."""

    T: int
    S: int
    band: Band | None
    lead: tuple[int, ...]
    key_lead: tuple[int, ...]
    marks_dead: bool

    @classmethod
    def make(cls, mask: MaskOperands, T: int, S: int, band: Band | None, *, marks_dead: bool) -> "VisiblePlan":
        intervals = [x.shape[:-1] for x in (mask.key_start, mask.key_stop) if x is not None]
        of_rows = [x.shape[:-2] for x in (mask.query_ids, mask.lowest_position, mask.highest_position) if x is not None]
        of_keys = [x.shape[:-2] for x in (mask.key_ids, mask.key_positions) if x is not None]
        key_lead = jnp.broadcast_shapes(*of_keys)
        return cls(T, S, band, jnp.broadcast_shapes(*intervals, key_lead, *of_rows), key_lead, marks_dead)

    @property
    def parts(self) -> int:
        """Of the keys."""
        return -(-self.S // (CHUNKS * _LARGEST_CHUNK))

    @property
    def chunk(self) -> int:
        """Keys of a chunk, a multiple of eight, such that as few as can be are missing from the last part."""
        return round_up(-(-self.S // (CHUNKS * self.parts)), 8)

    @property
    def padded_S(self) -> int:
        return CHUNKS * self.parts * self.chunk

    @property
    def pairs(self) -> int:
        """How many neighbours are compared at once."""
        return min(_PAIRS, (self.padded_S - 1) // 128 * 128)

    @property
    def blocks(self) -> int:
        return rows_in_blocks(self.T) // ROWS

    @property
    def last_block(self) -> int:
        """With a row of the call."""
        return -(-self.T // ROWS) - 1

    @property
    def checks(self) -> int:
        """Blocks of threads that find out whether keys are sorted; they come first."""
        return math.prod(self.key_lead)

    @property
    def grid(self) -> dict[str, int]:
        return {"block": self.checks + math.prod(self.lead) * self.blocks}

    def operands(self, mask: MaskOperands) -> VisibleOperands:
        """The start of padding is `PADDED` in `mask`."""

        def rows(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else pad_rows(x[..., 0], self.T, ROWS)

        def keys(x: jax.Array | None) -> jax.Array | None:
            if x is None:
                return None
            x = x[..., 0, :]
            missing = self.padded_S - x.shape[-1]
            return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge") if missing else x

        def chunks(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else x.reshape(*x.shape[:-1], -1, self.chunk)

        key_ids, key_positions = keys(mask.key_ids), keys(mask.key_positions)
        return VisibleOperands(
            key_start=None if mask.key_start is None else pad_rows(mask.key_start, self.T, ROWS),
            key_stop=None if mask.key_stop is None else pad_rows(mask.key_stop, self.T, ROWS),
            query_ids=rows(mask.query_ids),
            lowest_position=rows(mask.lowest_position),
            highest_position=rows(mask.highest_position),
            key_ids=key_ids,
            key_positions=key_positions,
            id_chunks=chunks(key_ids),
            position_chunks=chunks(key_positions),
        )

    def out_types(self) -> VisibleOuts:
        def integers(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        rows = integers(*self.lead, self.blocks * ROWS)
        return VisibleOuts(rows, rows, integers(*self.lead, self.blocks, 4), integers(*self.key_lead))
