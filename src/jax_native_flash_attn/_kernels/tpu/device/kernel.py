"""What all kernels are made of: operands, the steps of a grid, and the frame of a step around its tiles."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ...._semantics.call import Call
from ..blocks import Blocks
from ..host.operands import Grid, Operand, of_masks, scalar_vectors
from ..host.ranges import has_edges, key_tiles, most_steps, occupied_tiles, query_tiles
from ..pallas import launch, pl, pltpu
from .logits import At, Scores, tile_of, vector_buffers
from .visits import for_each_tile


@dataclass(frozen=True)
class Step:
    """One step: what makes its logits, the blocks it reads and writes, and memory that lasts.

    Attributes:
      scores: also the place, and the references to inputs.
      outs, scratch: references by name.
    """

    scores: Scores
    outs: Mapping[str, Any]
    scratch: Mapping[str, Any]

    @property
    def refs(self) -> Mapping[str, Any]:
        return self.scores.refs


@dataclass(frozen=True)
class Attempt:
    """A cheaper way to visit the tiles of a step, which its results may turn out not to allow.

    Attributes:
      tile: for each tile and unit.
      save: before them.
      holds: whether the results are right.
      undo: where they are not: back to what was saved; `undo(step, is_first)`, at the first step of a resident block.
      finish: behind the last step, if all were right.
    """

    tile: Callable[[Step, At], None]
    save: Callable[[Step], None]
    holds: Callable[[Step], Any]
    undo: Callable[[Step, Any], None]
    finish: Callable[[Step], None]


@dataclass(frozen=True)
class Kernel:
    """A kernel over resident blocks, each of which meets tiles of the other axis.

    Attributes:
      call: of the kernel's arrays, with the batch axes of all of them in `batch`.
      blocks: shape of a step's work.
      operands: what it reads beside masks.
      streams_rows: whether keys are resident.
      interpret: as of `pallas_call`.
      scalars: further ones.
    """

    call: Call
    batch: tuple[int, ...]
    blocks: Blocks
    operands: Mapping[str, Operand]
    interpret: Any
    streams_rows: bool = False
    scalars: Mapping[str, Operand] | None = None

    def run(
        self,
        *,
        begin: Callable[[Step], None],
        tile: Callable[[Step, At], None],
        end: Callable[[Step], None],
        outputs: Mapping[str, tuple[Any, str]],
        scratch: Mapping[str, Any],
        attempt: Attempt | None = None,
    ) -> dict[str, jax.Array]:
        """Results by name; `outputs` are types and the letters of their axes.

        For each resident block `begin` runs once, then `tile` for each tile and unit, then `end`. An attempt comes
        before: each step is tried so, up to the first where it fails. That one and those after it take `tile`.
        """
        call, blocks, z = self.call, self.blocks, self.call.sizes
        masks = of_masks(call)
        operands = {**self.operands, **masks.operands}
        scalars = {**masks.scalars, **(self.scalars or {})}
        ranges = query_tiles(call, blocks) if self.streams_rows else key_tiles(call, blocks)
        grid = Grid(
            batch=self.batch,
            heads=z.N,
            group=z.G,
            resident=ranges.shape[-2],
            steps=most_steps(call, blocks, over_rows=self.streams_rows),
            blocks=blocks,
            ranges=ranges.shape[:-2],
            streams_rows=self.streams_rows,
        )
        is_masked = has_edges(call, blocks, streams_rows=self.streams_rows)
        tiles = {
            "has_full": call.inputs.mask.allowed is None,
            "has_edges": is_masked,
            "is_whole": not is_masked and (z.T if self.streams_rows else z.S) % blocks.streamed == 0,
        }
        occupied = occupied_tiles(call, blocks, streams_rows=self.streams_rows)
        axes = range(len(grid.sizes))
        vectors = vector_buffers(operands, grid)
        types = Call(call.config, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call.inputs))

        def body(scalar_refs: Any, refs: Any, outs: Any, buffers: Any) -> None:
            ids = tuple(pl.program_id(i) for i in axes)
            range_refs = scalar_refs["ranges"]
            place = grid.place(ids, range_refs)
            spread = {name: buffers[name] for name in vectors}
            scores = Scores(types, grid, operands, scalars, self.streams_rows, scalar_refs, refs, spread, place)
            step = Step(scores, outs, {name: buffers[name] for name in scratch})
            is_first, is_last = ids[3] == 0, ids[3] == grid.sizes[3] - 1
            for i in axes[4:]:
                is_first, is_last = is_first & (ids[i] == 0), is_last & (ids[i] == grid.sizes[i] - 1)

            @pl.when(ids[-1] == 0)
            def _spread() -> None:
                # Of each query head, which a vector may differ in.
                scores.spread_vectors()

            @pl.when(is_first)
            def _begin() -> None:
                begin(step)

            per_step = blocks.streamed // blocks.tile
            own_range = grid.range_of(range_refs, ids[0], ids[2])

            def visit(tile: Callable[[Step, At], None]) -> None:
                def all_units(number: Any, is_edge: bool) -> None:
                    for unit in range(blocks.resident // blocks.unit):
                        tile(step, tile_of(grid, place, number, unit, is_edge=is_edge))

                def each(number: Any, is_edge: bool) -> None:
                    if occupied is None:
                        return all_units(number, is_edge)
                    row = grid.own_row(ids[0], occupied.shape[:-2]) * grid.resident + ids[2]
                    is_occupied = scalar_refs["occupied"][row * occupied.shape[-1] + number] != 0
                    pl.when(is_occupied)(lambda: all_units(number, is_edge))
                    return None

                for_each_tile(own_range, place.major * per_step, per_step, blocks.unrolled, each, **tiles)

            if attempt is None:
                visit(tile)
            else:
                has_tiles = place.major * per_step < own_range[3]
                _try(attempt, step, buffers["has_failed"], is_first, has_tiles, visit)

                pl.when(buffers["has_failed"][0] != 0)(functools.partial(visit, tile))
                pl.when(is_last & (buffers["has_failed"][0] == 0))(functools.partial(attempt.finish, step))

            @pl.when(is_last)
            def _end() -> None:
                end(step)

        return launch(
            body,
            scalars={
                "ranges": ranges.reshape(-1),
                **({} if occupied is None else {"occupied": occupied.reshape(-1)}),
                **scalar_vectors(scalars),
            },
            inputs={name: (x.array, grid.spec(x)) for name, x in operands.items()},
            outputs={
                name: (like, grid.spec(Operand(like, letters, self.batch))) for name, (like, letters) in outputs.items()
            },
            scratch={**vectors, **scratch, **({} if attempt is None else {"has_failed": pltpu.SMEM((1,), jnp.int32)})},
            grid=grid.sizes,
            parallel=grid.parallel,
            interpret=self.interpret,
        )


def _try(
    attempt: Attempt,
    step: Step,
    has_failed: Any,
    is_first: Any,
    has_tiles: Any,
    visit: Callable[[Callable[[Step, At], None]], None],
) -> None:
    @pl.when(is_first)
    def _begin() -> None:
        has_failed[0] = jnp.int32(0)

    @pl.when((has_failed[0] == 0) & has_tiles)
    def _attempt() -> None:
        attempt.save(step)
        visit(attempt.tile)

        @pl.when(jnp.logical_not(attempt.holds(step)))
        def _undo() -> None:
            attempt.undo(step, is_first)
            has_failed[0] = jnp.int32(1)
