"""Pallas' Mosaic GPU backend: the only import of it, what differs between its versions, and pieces all kernels share.

Import this module only where `select.py` found the backend: JAX before 0.10 lacks it, and it needs `absl`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas
import jax.experimental.pallas.mosaic_gpu
import jax.numpy as jnp
import numpy as np
from jax import lax

# Untyped: their annotations differ from version to version.
pl: Any = jax.experimental.pallas
plgpu: Any = jax.experimental.pallas.mosaic_gpu

ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a matrix in registers
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def launch(
    body: Callable[[Any, Any, Any], None],
    inputs: Any,
    *,
    out_types: Any,
    scratch: Any,
    grid: dict[str, int],
    warpgroups: int,
    has_barriers: bool = True,
    interpret: Any = None,
) -> Any:
    """Results of a Pallas kernel over a grid of blocks of `warpgroups` threads named "wg", in the tree of `out_types`.

    `body(inputs, outs, scratch)` gets references, in the trees of the arguments of the same name. With `has_barriers`
    all threads of a warpgroup meet around each access to shared memory; without, only where `body` says so.
    `interpret`: parameters of Pallas' interpreter, which runs it without a GPU.
    """
    operands, input_tree = jax.tree.flatten(inputs)
    types, out_tree = jax.tree.flatten(out_types)
    buffers, scratch_tree = jax.tree.flatten(scratch)

    def kernel(*refs: Any) -> None:
        first_out, first_buffer = len(operands), len(operands) + len(types)
        body(
            jax.tree.unflatten(input_tree, refs[:first_out]),
            jax.tree.unflatten(out_tree, refs[first_out:first_buffer]),
            jax.tree.unflatten(scratch_tree, refs[first_buffer:]),
        )

    accepted = inspect.signature(plgpu.kernel).parameters
    out_name, scratch_name = (
        ("out_type", "scratch_types") if "out_type" in accepted else ("out_shape", "scratch_shapes")
    )
    results = plgpu.kernel(
        kernel,
        **{out_name: tuple(types), scratch_name: tuple(buffers)},
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=not has_barriers,
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)
    return jax.tree.unflatten(out_tree, results)


def warp_specialize(
    wg: Any, warpgroups: int, registers: tuple[int, int], load: Callable[[], None], compute: Callable[[], None]
) -> None:
    """`compute` in the first `warpgroups`, `load` in the one behind; each thread with its share of `registers`."""

    @pl.when(wg == warpgroups)
    def _load() -> None:
        plgpu.set_max_registers(registers[1], action="decrease")
        load()

    @pl.when(wg < warpgroups)
    def _compute() -> None:
        plgpu.set_max_registers(registers[0], action="increase")
        compute()


def load(ref: Any, *, layout: Any, optimized: bool = False) -> jax.Array:
    """All of a reference, in registers; `optimized` makes a slow way an error."""
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=optimized)


def store(ref: Any, x: jax.Array) -> None:
    """From registers into global or shared memory, whatever the length of a row."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)  # JAX 0.12, where the plain form wants whole cache lines
    else:
        ref[...] = x


# An index that means everything, where the installed version wants one.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_WHOLE = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()


def hide_from_compiler(x: jax.Array) -> jax.Array:
    """The same scalar; to the compiler another in each step of a loop, so that nothing made of it stays in registers.

    JAX before 0.11.2 may have no lowering of it: there, `x` itself.
    """
    return lax.optimization_barrier(x) if jax.__version_info__ >= (0, 11, 2) else x


def swizzle_bytes(columns: int, dtype: Any, block: int = 0) -> int | None:
    """The widest swizzle for rows of so many columns, in blocks of `block` of them; None if there is none."""
    row = math.gcd(columns, block) * np.dtype(dtype).itemsize
    return next((width for width in (128, 64, 32) if row % width == 0), None)


def matrix_buffer(*shape: int, dtype: Any, swizzle: int | None = None) -> Any:
    """Shared memory for matrices, tiled and swizzled as the tensor cores and TMA want it."""
    swizzle = swizzle or swizzle_bytes(shape[-1], dtype)
    assert swizzle is not None, shape
    tiling = plgpu.TilingTransform((8, swizzle // np.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


class Views(NamedTuple):
    """The same shared memory as products see it, and as TMA loads it."""

    tiles: Any
    loaded: Any


class TmaLoad(NamedTuple):
    """How matrices of so many columns come: a TMA of tiles needs a multiple of 8 rows in global memory.

    XLA pads others beforehand, unless a row is one row of a tile. Then tiles lie in shared memory as rows do, but for
    the swizzle, and TMA sees the same memory as those.
    """

    columns: int
    dtype: Any
    swizzle: int | None = None

    @property
    def is_by_row(self) -> bool:
        if jax.__version_info__ < (0, 11, 2):
            return False  # may have no swizzle of untiled memory
        width = self.swizzle or swizzle_bytes(self.columns, self.dtype)
        return width == self.columns * np.dtype(self.dtype).itemsize

    @property
    def multiple(self) -> int:
        """Of which the number of rows in global memory must be one."""
        return 1 if self.is_by_row else 8

    def buffers(self, *shape: int) -> tuple[Any, ...]:
        """The same memory as products see it, and as TMA sees it if that is another way."""
        tiled = matrix_buffer(*shape, self.columns, dtype=self.dtype, swizzle=self.swizzle)
        if not self.is_by_row:
            return (tiled,)
        width = self.columns * np.dtype(self.dtype).itemsize
        return tiled, plgpu.SMEM((*shape, self.columns), self.dtype, transforms=(plgpu.SwizzleTransform(width),))

    def buffer(self, *shape: int) -> Any:
        """`buffers` as one."""
        buffers = self.buffers(*shape)
        return plgpu.RefUnion(*buffers) if self.is_by_row else buffers[0]

    def views(self, ref: Any) -> "Views":
        """Of a `buffer` in a kernel."""
        return Views(*ref) if self.is_by_row else Views(ref, ref)


class TmaStore(NamedTuple):
    """How a result with rows of `heads` heads leaves: as `TmaLoad`, a TMA of tiles needs a multiple of 8 rows.

    Others would have to be copied behind the kernel. So rows then leave shared memory untiled; slower there, as they
    conflict for its banks. With one head, such a copy would not end with the rows of a batch.
    """

    rows: int
    heads: int

    @property
    def is_tiled(self) -> bool:
        return self.rows % 8 == 0 or self.heads == 1

    @property
    def length(self) -> int:
        """Rows in global memory."""
        return round_up(self.rows, 8) if self.is_tiled else self.rows

    def buffer(self, *shape: int, dtype: Any, swizzle: int | None = None) -> Any:
        """In shared memory."""
        return matrix_buffer(*shape, dtype=dtype, swizzle=swizzle) if self.is_tiled else plgpu.SMEM(shape, dtype)

    def at(self, row: Any) -> Any:
        """The same row. Mosaic tiles a buffer by itself if it sees that the copies begin at multiples of 8."""
        return row if self.is_tiled else jnp.minimum(row, 2**30 + 1)


def zeros(*shape: int) -> jax.Array:
    """A matrix in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along one axis of a matrix, broadcast along the other."""
    return lax.broadcast_in_dim(x, shape, [axis])


def columns_of(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value per row, for every column of a matrix."""
    return spread(x, shape, 0)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def unravel(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Multi-index of a flat one; 0 in axes of size 1."""
    result: list[Any] = []
    for size in reversed(shape):
        result.append(0 if size == 1 else lax.rem(index, jnp.int32(size)))
        index = index if size == 1 else lax.div(index, jnp.int32(size))
    return tuple(reversed(result))


def broadcast_index(index: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    """An index into an array that may have size 1, and then broadcasts, in any axis."""
    return tuple(0 if size == 1 else i for i, size in zip(index, shape, strict=True))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pad_axis(x: jax.Array, axis: int, length: int, value: Any = 0) -> jax.Array:
    """`x` itself if its axis has this length already."""
    missing, axis = length - x.shape[axis], axis % x.ndim
    if missing == 0:
        return x
    if value == 0 and _has_pairs(x) and (axis != x.ndim - 1 or missing % 2 == 0):
        pairs = _pairs_of(x)
        return _of_pairs(_padded(pairs, axis, missing // 2 if axis == x.ndim - 1 else missing), x.dtype)
    return _padded(x, axis, missing, value)


def cut_last_axis(x: jax.Array, length: int) -> jax.Array:
    """The first elements along the last axis."""
    if length != x.shape[-1] and length % 2 == 0 and _has_pairs(x):
        return _of_pairs(_pairs_of(x)[..., : length // 2], x.dtype)
    return x[..., :length]


def _padded(x: jax.Array, axis: int, missing: int, value: Any = 0) -> jax.Array:
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)], constant_values=value)


def _has_pairs(x: jax.Array) -> bool:
    """Whether to copy two numbers as one: of 16 bits, XLA:GPU then takes three quarters of the time."""
    return x.dtype.itemsize == 2 and x.ndim > 1 and x.shape[-1] % 2 == 0


def _pairs_of(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), jnp.uint32)


def _of_pairs(pairs: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(pairs, dtype).reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])
