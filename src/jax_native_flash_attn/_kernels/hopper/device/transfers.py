"""Tiles of operands in global memory, what leads from there to shared memory, and clean padding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..operands import LogitTerm, Operands, TermBuffers, TermKind
from ..pallas import TmaLoad, Views, broadcast_index, iota, load, pl, plgpu


def query_slice(ref: Any, head: tuple, row: Any, rows: int) -> Any:
    *batch, n = head
    return ref.at[(*broadcast_index(batch, ref.shape[:-3]), pl.ds(row, rows), n)]


def row_slice(ref: Any, head: tuple, row: Any, rows: int) -> Any:
    """Of a vector along the query rows, such as lse."""
    return ref.at[(*broadcast_index(head, ref.shape[:-1]), pl.ds(row, rows))]


def key_slice(ref: Any, head: tuple, group: int, tile: Any, columns: int) -> Any:
    *batch, n = head
    kv_head = lax.div(n, jnp.int32(group)) if ref.shape[-2] > 1 else 0
    return ref.at[(*broadcast_index(batch, ref.shape[:-3]), pl.ds(tile * columns, columns), kv_head)]


def transposed_slice(ref: Any, head: tuple, group: int, row: Any, rows: int) -> Any:
    """Of what comes transposed, (columns, rows). `group`: query heads of one in `ref`."""
    *batch, n = head
    at = lax.div(n, jnp.int32(group)) if ref.shape[-3] > 1 else 0
    return ref.at[(*broadcast_index(batch, ref.shape[:-3]), at, pl.ds(0, ref.shape[-2]), pl.ds(row, rows))]


@dataclass(frozen=True)
class Transposed:
    """An operand that a kernel reads transposed: in global memory, and the slots of its tiles."""

    ref: Any
    slots: Views

    @classmethod
    def of(cls, ref: Any | None, tma: TmaLoad, buffer: Any | None) -> "Transposed | None":
        return None if ref is None or buffer is None else cls(ref, tma.views(buffer))

    def tile(self, slot: Any) -> Any:
        return self.slots.tiles.at[slot]

    def copy_tile(self, head: tuple, group: int, row: Any, rows: int, slot: Any, ready: Any) -> None:
        """Start copying so many rows, as columns. `group`: query heads of one head of the operand."""
        some = transposed_slice(self.ref, head, group, row, rows)
        plgpu.copy_gmem_to_smem(some, self.slots.loaded.at[slot], ready)


@dataclass(frozen=True)
class TermRefs:
    """A bias or mask in a kernel: in global memory, and the slots of its tiles if it comes with the keys."""

    term: LogitTerm
    buffer: Any | None

    @property
    def is_bits(self) -> bool:
        return self.term.array.dtype == jnp.int32

    def copy_tile(self, head: tuple, row: Any, rows: int, tile: Any, columns: int, slot: Any, ready: Any) -> None:
        """Start copying a tile, or its part of a vector along the keys, into a slot of the buffer."""
        assert self.buffer is not None
        ref, keys = self.term.array, pl.ds(tile * columns, columns)
        if self.term.kind is TermKind.COLUMNS:
            some = ref.at[(*broadcast_index(head, ref.shape[:-1]), keys)]
        elif self.is_bits:
            index = (keys, lax.div(row, jnp.int32(rows))) if self.term.is_transposed else (pl.ds(row, rows), tile)
            some = ref.at[(*broadcast_index(head, ref.shape[:-3]), *index)]
        else:
            some = ref.at[(*broadcast_index(head, ref.shape[:-2]), pl.ds(row, rows), keys)]
        plgpu.copy_gmem_to_smem(some, self.buffer.at[slot], ready)


@dataclass(frozen=True)
class Terms:
    """The terms that a kernel adds to the logits, or masks them with."""

    bias: TermRefs | None
    mask: TermRefs | None

    @classmethod
    def make(cls, operands: Operands, buffers: TermBuffers) -> "Terms":
        def refs(term: LogitTerm | None, tiles: Any, columns: Any) -> TermRefs | None:
            if term is None:
                return None
            return TermRefs(term, tiles if term.kind is TermKind.TILED else columns)

        return cls(
            refs(operands.bias, buffers.bias_tiles, buffers.bias_columns),
            refs(operands.mask, buffers.mask_tiles, buffers.mask_columns),
        )

    @property
    def tiled(self) -> tuple[TermRefs, ...]:
        return self._of(TermKind.TILED)

    @property
    def streamed(self) -> tuple[TermRefs, ...]:
        """Those that come with the keys."""
        return (*self.tiled, *(x for x in self._of(TermKind.COLUMNS) if x.buffer is not None))

    def _of(self, kind: TermKind) -> tuple[TermRefs, ...]:
        return tuple(x for x in (self.bias, self.mask) if x is not None and x.term.kind is kind)


@dataclass(frozen=True)
class Ring:
    """Slots of shared memory that one warpgroup loads and others use, over and over; n counts the tiles of a worker.

    Attributes:
      ready: completed by TMA: the data are there.
      free: completed by all that use a slot: it may be loaded again.
    """

    slots: int
    ready: Any
    free: Any

    def slot(self, n: Any) -> Any:
        return lax.rem(n, jnp.int32(self.slots))

    def wait_until_free(self, n: Any, slot: Any) -> None:
        """Before tile n is loaded into its slot."""
        pl.when(n >= self.slots)(lambda: plgpu.barrier_wait(self.free.at[slot]))

    def wait_until_ready(self, slot: Any) -> None:
        plgpu.barrier_wait(self.ready.at[slot])

    def release(self, slot: Any) -> None:
        plgpu.barrier_arrive(self.free.at[slot])


def by_first_warpgroup(wg: Any, done: Any, work: Callable[[], None]) -> None:
    """Have compute warpgroup 0 change shared memory while the others wait; `done` is a barrier that it completes."""

    @pl.when(wg == 0)
    def _first() -> None:
        work()
        plgpu.commit_smem()
        plgpu.barrier_arrive(done)

    plgpu.barrier_wait(done)


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
