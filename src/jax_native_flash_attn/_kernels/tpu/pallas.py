"""Pallas' Mosaic TPU backend: the only import of it, a launch, and what all kernels do with registers.

A vector register holds 8 x 128 numbers of 32 bits: 8 sublanes of 128 lanes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas
import jax.experimental.pallas.tpu
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

# Untyped: their annotations differ from version to version.
pl: Any = jax.experimental.pallas
pltpu: Any = jax.experimental.pallas.tpu

LANES = 128

_CONTRACTED = {"nt": (((1,), (1,)), ((), ())), "nn": (((1,), (0,)), ((), ()))}


def launch(
    body: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], None],
    *,
    scalars: Mapping[str, jax.Array],
    inputs: Mapping[str, tuple[jax.Array, Any]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, Any]],
    scratch: Mapping[str, Any],
    grid: Sequence[int],
    parallel: int,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Results of a kernel over a grid, by name; its first `parallel` axes may run in any order, the others in order.

    Args:
      body: gets references: to scalars, to the blocks of inputs and outputs of this step, and to scratch memory.
      scalars: vectors, whole in scalar memory.
      inputs, outputs: arrays, or types, and the `BlockSpec` of each.
      scratch: buffers in vector memory that last from step to step.
      grid: sizes.
      parallel: how many axes of the grid.
      interpret: as of `pallas_call`.
    """
    names = [list(x) for x in (scalars, inputs, outputs, scratch)]

    def kernel(*refs: Any) -> None:
        remaining = iter(refs)
        body(*({name: next(remaining) for name in group} for group in names))

    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=tuple(grid),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            scratch_shapes=list(scratch.values()),
        ),
        # A kernel is of one device: its results have types without mesh axes, inside of a `shard_map` too.
        out_shape=[ShapedArray(like.shape, like.dtype) for like, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
        ),
        interpret=interpret,
    )(*scalars.values(), *(x for x, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))


def product(x: jax.Array, y: jax.Array, contracted: str, precision: Any) -> jax.Array:
    """x y^T ('nt') or x y ('nn'), in float32."""
    return lax.dot_general(x, y, _CONTRACTED[contracted], precision=precision, preferred_element_type=jnp.float32)


def spread(vector: jax.Array) -> jax.Array:
    """(1, rows) -> (rows, LANES): along sublanes, and the same in all lanes."""
    return jnp.broadcast_to(vector, (LANES, vector.shape[-1])).T


def gathered(x: jax.Array) -> jax.Array:
    """(rows, LANES), the same in all lanes -> (1, rows); the way back of `spread`."""
    return x.T[:1]


def repeated(x: jax.Array, columns: int) -> jax.Array:
    """(rows, LANES), the same in all lanes -> (rows, columns)."""
    times = -(-columns // LANES)
    x = x if times == 1 else jnp.concatenate([x] * times, -1)
    return x if x.shape[-1] == columns else x[:, :columns]


def lane_sums(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add) -> jax.Array:
    """(rows, columns) -> (rows, LANES): what lies LANES apart is combined, without a move between lanes."""
    total = x[:, :LANES]
    for start in range(LANES, x.shape[-1], LANES):
        total = combine(total, x[:, start : start + LANES])
    return total


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
