"""What all items of the kernel for the gradients of key and value share, and one item: a block of keys.

The pipeline is drawn in `dkey_dvalue.py`; `KeyBuffers` says what the barriers are for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ...._semantics.tile_masks import FULL
from ..host.dkey_dvalue_plan import KeyBuffers, KeyGradients, KeyPlan
from ..operands import WHOLE, BackwardOperands, TransposedOperands
from ..pallas import COLUMN, ROW, Views, broadcast_index, pl, unravel
from .backward import BackwardContext
from .context import shared_fields
from .mod_reads import ModTile, Place, read_scalars
from .transfers import Ring, Transposed

Visit = tuple[Any, Any]  # a member of what shares the keys, and the number of one of its query tiles


@dataclass(frozen=True)
class KeyContext(BackwardContext):
    """`key_result`, `value_result`: shared memory through which the gradients leave."""

    plan: KeyPlan
    outs: KeyGradients
    buffers: KeyBuffers
    key: Views
    value: Views | None
    key_result: Any
    value_result: Any
    query: Views
    dout: Views | None
    transposed_query: Transposed | None
    transposed_dout: Transposed | None
    rows_ring: Ring

    @classmethod
    def of(cls, plan: KeyPlan, operands: BackwardOperands, outs: KeyGradients, buffers: KeyBuffers) -> "KeyContext":
        *key_views, key_result = buffers.key
        value, value_result = None, key_result
        if buffers.value is not None:
            *value_views, value_result = buffers.value
            value = Views(value_views[0], value_views[-1]) if plan.needs_dlogits else None
        forward, blocks = operands.forward, plan.blocks
        query_tiles, turned = operands.query_tiles, operands.transposed or TransposedOperands()
        return cls(
            **shared_fields(plan, forward, buffers.terms, query_tiles=query_tiles),
            row_operands=operands.rows,
            plan=plan,
            outs=outs,
            buffers=buffers,
            key=Views(key_views[0], key_views[-1]),
            value=value,
            key_result=key_result,
            value_result=value_result,
            query=plan.tma.views(buffers.query),
            dout=None if buffers.dout is None else plan.value_tma.views(buffers.dout),
            transposed_query=Transposed.of(turned.query, plan.transposed_tma, buffers.transposed_query),
            transposed_dout=Transposed.of(turned.dout, plan.transposed_tma, buffers.transposed_dout),
            rows_ring=Ring(blocks.stages, buffers.rows_ready, buffers.rows_free),
        )

    def for_each_block(self, body: Callable[["KeyBlock"], None]) -> None:
        """`body` for each item of this worker."""
        scheduler = self.plan.scheduler

        def run(k: Any, n: Any, count: Any) -> Any:
            head, block, _ = scheduler.item(n)
            item = KeyBlock.of(self, k, count, head, (scheduler.blocks - 1) - block)  # of keys, the others are longest
            body(item)
            return count + item.num_steps

        scheduler.for_each(lax.axis_index("worker"), run)


@dataclass(frozen=True)
class KeyBlock:
    """The k-th item of a worker: the number of a block of keys, and the query tiles that it visits.

    Attributes:
      count: tiles of the worker's items before; the ring of slots goes on from there.
      kv_batch, kv_head: of the keys.
      first: the first query tile of each member, `per_member` how many.
      num_steps: tiles of all members.
    """

    context: KeyContext
    k: Any
    count: Any
    kv_batch: tuple[Any, ...]
    kv_head: Any
    block: Any
    first: Any
    per_member: Any
    num_steps: Any

    @classmethod
    def of(cls, context: KeyContext, k: Any, count: Any, kv_index: tuple, block: Any) -> "KeyBlock":
        *batch_index, kv_head = kv_index
        kv_batch, plan = tuple(batch_index), context.plan
        first, stop = context.intervals.query_tiles_of(kv_batch, block, plan.blocks.block_q, plan.block_keys)
        per_member = jnp.maximum(stop - first, 0)
        num_steps = per_member * math.prod(plan.members)
        return cls(context, k, count, kv_batch, kv_head, block, first, per_member, num_steps)

    @property
    def first_visit(self) -> Visit:
        return jnp.int32(0), jnp.int32(0)

    def following(self, visit: Visit) -> Visit:
        """The next visit, counted on, as divisions take long; the last one follows itself."""
        member, n = visit[0], visit[1] + 1
        is_past, is_last = n >= self.per_member, member == math.prod(self.context.plan.members) - 1
        next_member = jnp.where(is_past & jnp.logical_not(is_last), member + 1, member)
        return next_member, jnp.where(is_past, jnp.where(is_last, visit[1], 0), n)

    def head_of(self, member: Any) -> tuple:
        """The query head, (batch..., N)."""
        plan = self.context.plan
        *index, g = unravel(member, plan.members)
        return (
            *(i if n > 1 else b for i, n, b in zip(index, plan.summed, self.kv_batch, strict=True)),
            self.kv_head * plan.sizes.G + g,
        )

    def listed(self, visit: Visit) -> Any | None:
        """The query tile of a visit, where those are listed."""
        tiles = self.context.intervals.query_tiles
        if tiles is None or tiles.order is None:
            return None
        return tiles.order[(*broadcast_index(self.kv_batch, tiles.order.shape[:-2]), self.block, self.first + visit[1])]

    def place_of(self, visit: Visit, listed: Any | None) -> tuple[tuple, Any]:
        """Query head and first row."""
        head, tile = self.head_of(visit[0]), self.first + visit[1] if listed is None else listed
        return head, tile * self.context.blocks.block_q

    def kind(self, visit: Visit, listed: Any | None) -> Any:
        """What `needs_mask` takes; traced masks are read from global memory, so a step ahead, and lists two."""
        plan, intervals, (head, row) = self.context.plan, self.context.intervals, self.place_of(visit, listed)
        tiles, block_q = intervals.query_tiles, plan.blocks.block_q
        if tiles is None or tiles.classes is None:
            return intervals.is_query_edge(head, row, self.block, block_q, plan.block_keys)
        index = broadcast_index(head, tiles.classes.shape[:-2])
        return tiles.classes[(*index, lax.div(row, jnp.int32(block_q)), self.block)]

    def needs_mask(self, kind: Any) -> tuple[Any, Any | None]:
        """Whether a tile needs a mask, and, of classes of tiles, whether none but a `mask_mod`."""
        tiles = self.context.intervals.query_tiles
        return (kind, None) if tiles is None or tiles.classes is None else (kind != FULL, kind == WHOLE)

    def mod_rows(self, head: tuple, row: Any) -> list[Any]:
        """What comes with the query rows, of what functions of scores and indices read."""
        plan, mods = self.context.plan, self.context.operands.mods
        if mods is None:
            return []
        shape = plan.blocks.block_kv, plan.blocks.block_q
        tile, place = ModTile(mods, head, shape, 1, (COLUMN, ROW), None), Place(row, jnp.int32(0))
        return [tile.source(formula, i, place)[0] for formula, i in plan.staged(mods)]

    def scalars(self, visit: Visit) -> tuple[Any, ...]:
        """What functions of scores and indices read once for a head; read from global memory, so a step ahead."""
        mods = self.context.operands.mods
        return () if mods is None else read_scalars(mods, self.head_of(visit[0]))

    def slot(self, i: Any) -> Any:
        """Of the query rows of step i."""
        return self.context.rows_ring.slot(self.count + i)

    def keys_of(self, ref: Any, w: Any, *, is_result: bool = False) -> Any:
        """Those of warpgroup w in global memory."""
        plan = self.context.plan
        first_key = self.block * plan.block_keys + w * plan.blocks.block_kv
        keys = pl.ds(plan.store.at(first_key) if is_result else first_key, plan.blocks.block_kv)
        kv_head = self.kv_head if ref.shape[-2] > 1 else 0
        return ref.at[(*broadcast_index(self.kv_batch, ref.shape[:-3]), keys, kv_head)]
