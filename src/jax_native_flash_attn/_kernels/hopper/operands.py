"""What the kernels read, by name: arrays where XLA prepares them (`host/`), references to these in `device/`.

A field is None where a call has no such operand. The order of the fields is that of a kernel's parameters.
"""

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import jax

from .formulas import Formula, Kind

# Added to the logits of keys that a mask of keys excludes: see `device/logits.py`.
MASKED = -(2.0**125)
# The class of a tile in part of which the rows may attend all keys, but for what a `mask_mod` says.
WHOLE = 3


class TermKind(Enum):
    """In which of the axes T and S a term of the logits varies, and so how it comes."""

    TILED = auto()  # in both: tile by tile with the keys, through shared memory; a mask as bits (`host/mask_bits.py`)
    COLUMNS = auto()  # in S alone or in neither: a vector along the keys
    ROWS = auto()  # in T alone: a vector along the query rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitTerm:
    """A bias, or a boolean mask, with the batch axes and N in front, in which it may broadcast.

    A mask is words of bits, along the rows alone int8, and along the keys alone what is added to the logits.
    `is_transposed`: tiles are (S, T), which only bits can be.
    """

    array: Any
    kind: TermKind = field(metadata={"static": True})
    is_transposed: bool = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowIntervals:
    """Traced intervals of keys: of each row, (..., T), and the tiles of each block of rows, (..., blocks, 4).

    A row without any key has `DEAD` as its key_start. With `tile_order`, (..., blocks, tiles), ranges are of places in
    that; with `tile_classes`, likewise, as of `tile_masks.Tiles` or `WHOLE`, they have no meaning. With either,
    `is_whole`, (..., blocks), is not 0 where all rows of a block may attend all keys, but for what a `mask_mod` says.

    In place of tile ranges there may be `row_bounds`, as of `MaskOperands`, which the kernel makes them of.
    """

    key_start: Any
    key_stop: Any
    tile_ranges: Any | None
    tile_order: Any | None = None
    tile_classes: Any | None = None
    is_whole: Any | None = None
    row_bounds: Any | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Elements:
    """What decides of single elements, where the intervals of rows hold keys that ids or positions exclude.

    Attributes:
      is_exact: (1,) int32, 0 if that is so anywhere.
      query_ids, lowest_position, highest_position: (batch..., 1, T), padded to whole blocks.
      key_ids, key_positions: (batch..., 1, S), likewise.
    """

    is_exact: Any
    query_ids: Any | None
    key_ids: Any | None
    lowest_position: Any | None
    highest_position: Any | None
    key_positions: Any | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    key: Any
    head_index: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mods:
    """What is evaluated of a `score_mod` and a `mask_mod`, and what that reads.

    Attributes:
      batch_number: (batch...); head_number: (batch..., N).
      query_number, key_number: (batch..., T) and (batch..., S), to whole blocks; None for `first_row`, and 0, on.
      arrays: those of the formulas' reads, of the score's first: (batch..., axes at one index..., rows or keys).
      score, mask: the formulas.
    """

    batch_number: Any
    head_number: Any
    query_number: Any | None
    key_number: Any | None
    arrays: tuple[Any, ...]
    score: Formula | None = field(metadata={"static": True})
    mask: Formula | None = field(metadata={"static": True})
    first_row: int = field(metadata={"static": True})

    @property
    def formulas(self) -> list[tuple[Formula, int]]:
        """Each with the number of its first array."""
        first = 0 if self.score is None else len(self.score.reads)
        return [(x, i) for x, i in ((self.score, 0), (self.mask, first)) if x is not None]

    def vectors(self, kind: Kind) -> list[tuple[Formula, int]]:
        """The vectors along rows or keys that are read, those of the score's formula first."""
        numbers = self.query_number if kind is Kind.ROWS else self.key_number
        ops = ("read",) if numbers is None else ("read", "query_index", "key_index")
        found = [(x, i) for x, _ in self.formulas for i in x.needed]
        return [(x, i) for x, i in found if x.nodes[i].kind is kind and x.nodes[i].op in ops]

    def array(self, formula: Formula, i: int) -> Any:
        """In which one of these is."""
        op = formula.nodes[i].op
        if op != "read":
            return self.query_number if op == "query_index" else self.key_number
        (first,) = (first for x, first in self.formulas if x is formula)
        return self.arrays[first + formula.reads.index(i)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """The operands of a forward call, laid out for TMA.

    Attributes:
      query: (batch..., T, N, H).
      key: (batch..., S, K, H).
      value: (batch..., S, K, D); in float32, of the forward, (batch..., K, D, S).
      scale: (batch...).
      length: (batch...), the `key_value_length`.
      shift: (batch...), what the rows of the band are moved by, or None; `has_dead_rows`: whether rows that have no key
        then attend all.
      sinks: of the forward; (batch..., N, 1), or (batch..., N, T) padded to whole blocks.
      mods: of functions of scores and indices.
    """

    query: Any
    key: Any
    value: Any
    scale: Any
    intervals: RowIntervals | None
    elements: Elements | None
    bias: LogitTerm | None
    mask: LogitTerm | None
    length: Any | None
    dropout: Dropout | None
    sinks: Any | None = None
    shift: Any | None = None
    mods: Mods | None = None
    has_dead_rows: bool = field(default=False, metadata={"static": True})

    @property
    def tiled(self) -> tuple[LogitTerm, ...]:
        return self._terms(TermKind.TILED)

    @property
    def columns(self) -> tuple[LogitTerm, ...]:
        return self._terms(TermKind.COLUMNS)

    def _terms(self, kind: TermKind) -> tuple[LogitTerm, ...]:
        return tuple(x for x in (self.bias, self.mask) if x is not None and x.kind is kind)

    def without_tile_ranges(self) -> "Operands":
        """For a kernel that goes through query tiles."""
        intervals = self.intervals
        return (
            self
            if intervals is None
            else replace(self, intervals=RowIntervals(intervals.key_start, intervals.key_stop, None))
        )

    @property
    def is_cut(self) -> bool:
        """Whether the intervals that kernels compute, those of the band, are cut off at the length of the keys."""
        return self.length is not None and self.intervals is None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowOperands:
    """What a backward kernel reads of each query row, beside the query.

    Attributes:
      dout: (batch..., T, N, D).
      lse, delta: (batch..., N, T) in float32, padded to whole blocks.
      scales_lse: whether the kernel is to bring lse to base 2.
    """

    dout: Any
    lse: Any
    delta: Any
    scales_lse: bool = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedOperands:
    """What a backward kernel reads also with rows innermost: (batch..., heads, H or D, rows), see `host/tf32.py`."""

    query: Any | None = None
    key: Any | None = None
    dout: Any | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QueryTiles:
    """Which query tiles a block of keys meets: see `query_tiles` and, with `order`, `query_tiles_of_classes`."""

    firsts: Any | None = None
    ends: Any | None = None
    bounds: Any | None = None
    row_bounds: Any | None = None
    longest: Any | None = None
    order: Any | None = None
    classes: Any | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BackwardOperands:
    """`query_tiles`: of the kernel for keys and values, where masks are traced. `transposed`: in float32."""

    forward: Operands
    rows: RowOperands
    query_tiles: QueryTiles | None = None
    transposed: TransposedOperands | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TangentOperands:
    """What the tangent kernel reads.

    Attributes:
      forward: the operands of the call.
      tangents: of these, those that are tangents of query, key, value, scale and bias, each in its field; the others,
        and what has no tangent, are None.
      out: (batch..., T, N, D) in float32, padded to whole blocks.
      lse: (batch..., N, T) in float32, likewise.
      scales_lse: as in `RowOperands`.
    """

    forward: Operands
    tangents: Operands
    out: Any | None
    lse: Any
    scales_lse: bool = field(metadata={"static": True})

    @property
    def tiled(self) -> tuple[LogitTerm, ...]:
        return (*self.forward.tiled, *self.tangents.tiled)

    @property
    def has_dlogits(self) -> bool:
        """Whether the logits have a tangent."""
        x = self.tangents
        return any(tangent is not None for tangent in (x.query, x.key, x.scale, x.bias))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TermBuffers:
    """Shared memory of the terms that come with the keys: slots of tiles, and of parts of vectors along the keys."""

    bias_tiles: Any | None = None
    mask_tiles: Any | None = None
    bias_columns: Any | None = None
    mask_columns: Any | None = None
