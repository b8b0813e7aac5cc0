"""What a copy of float32 rows takes, rounded and transposed: shapes of its results and shared memory."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..pallas import matrix_buffer, plgpu, round_up
from .tf32 import SWIZZLE

ROWS = 64  # of a tile


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TurnOuts:
    """Copies of (batch..., rows, heads, columns).

    Attributes:
      rows: likewise, with a multiple of eight rows.
      columns: (batch..., heads, columns, rows), or None, with whole tiles of rows; of each eight of these, 2 t and
        2 t + 1 are at t and t + 4 (`device/tf32.py`).
    """

    rows: Any
    columns: Any | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TurnBuffers:
    rows: Any
    columns: Any | None
    ready: Any


@dataclass(frozen=True)
class TurnPlan:
    """Of an array (batch..., rows, heads, columns)."""

    batch: tuple[int, ...]
    rows: int
    heads: int
    columns: int
    needs_columns: bool

    @property
    def grid(self) -> dict[str, int]:
        return {"tile": math.prod(self.tiles)}

    @property
    def tiles(self) -> tuple[int, ...]:
        """(batch..., heads, tiles of rows)"""
        return (*self.batch, self.heads, -(-self.rows // ROWS))

    def at(self, row: Any) -> Any:
        """See `TmaStore.at`."""
        return row if self.rows % 8 == 0 else jnp.minimum(row, 2**30 + 1)

    def out_types(self) -> TurnOuts:
        rows = jax.ShapeDtypeStruct((*self.batch, round_up(self.rows, 8), self.heads, self.columns), jnp.float32)
        columns = (*self.batch, self.heads, self.columns, round_up(self.rows, ROWS))
        return TurnOuts(rows, jax.ShapeDtypeStruct(columns, jnp.float32) if self.needs_columns else None)

    def buffers(self) -> TurnBuffers:
        columns = matrix_buffer(self.columns, ROWS, dtype=jnp.float32, swizzle=SWIZZLE)
        return TurnBuffers(
            rows=plgpu.SMEM((ROWS, self.columns), jnp.float32),
            columns=columns if self.needs_columns else None,
            ready=plgpu.Barrier(),
        )
