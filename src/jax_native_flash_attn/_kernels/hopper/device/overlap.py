"""Keeping the tensor cores and the other units of a warpgroup busy at once: what the compiler needs to be told.

A step of a pipeline issues its products, computes with the scores as soon as those are there, and only then waits for
the last product. Nothing in its registers ties that wait to the computation, and ptxas moves it up in front of it, so
that nothing overlaps any more. `order_before_wgmma_wait` ties them: a fence that is executed only if a value that the
computation produces last is huge (and then does no harm) is an operation that the wait may not overtake.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ..pallas import plgpu

THREAD_COLUMNS = 8  # a thread holds two of every so many columns of a matrix (`Layout.WGMMA`)
_HUGE = "0f7F000000"  # 1.7e38; not a negative number, since ptxas knows that exponentials have none


def fold_columns(x: jax.Array, combine: Any) -> jax.Array:
    """(rows, columns) -> (rows, 8), within each thread: what is left of a reduction exchanges values."""
    parts = [x[:, c : c + THREAD_COLUMNS] for c in range(0, x.shape[1], THREAD_COLUMNS)]
    while len(parts) > 1:
        pairs = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def order_before_wgmma_wait(x: jax.Array) -> None:
    """Have `x`, float32 of (64, 8) in `Layout.WGMMA`, computed before any later wait for products."""
    assert x.dtype == jnp.float32, x
    assert x.shape[1] == THREAD_COLUMNS, x

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,))
    def emit(_: Any, array: Any) -> None:
        index = ir.IntegerType.get_signless(32)
        numbers = [
            llvm.extractelement(pair, llvm.ConstantOp(index, ir.IntegerAttr.get(index, i)).result)
            for pair in array.registers.flat
            for i in range(2)
        ]
        sums = "".join(f"add.f32 sum, sum, ${i}; " for i in range(1, len(numbers)))
        text = (
            "{ .reg .pred huge; .reg .f32 sum; mov.f32 sum, $0; "
            + sums
            + f"setp.gt.f32 huge, sum, {_HUGE}; @huge membar.cta; }}"
        )
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, numbers, text, ",".join("f" * len(numbers)), has_side_effects=True, asm_dialect=0)

    emit(x)


def widened(x: jax.Array) -> jax.Array:
    """bfloat16 to float32, in place of `astype`, for which the compiler takes three instructions for two elements."""

    def widen(two: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        number = lambda n: llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, n)).result  # noqa: E731
        bits = llvm.bitcast(i32, two)
        low = llvm.bitcast(f32, llvm.shl(bits, number(16), overflow_flags=llvm.IntegerOverflowFlags.none))
        high = llvm.bitcast(f32, llvm.and_(bits, number(-(1 << 16))))
        both = llvm.insertelement(llvm.mlir_undef(ir.VectorType.get((2,), f32)), low, number(0))
        return llvm.insertelement(both, high, number(1))

    return _to_float32(x, widen)


def rounded_to_tf32(x: jax.Array) -> jax.Array:
    """Float32 to the nearest TensorFloat-32; the tensor cores would cut off the other bits."""

    def convert(several: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        result = several
        for i in range(ir.VectorType(several.type).shape[0]):
            index = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, i)).result
            number = llvm.extractelement(several, index)
            bits: Any = llvm.inline_asm(i32, [number], "cvt.rna.tf32.f32 $0, $1;", "=r,f", asm_dialect=0)
            result = llvm.insertelement(result, llvm.bitcast(f32, bits), index)
        return result

    return _to_float32(x, convert)


def where_allowed(mask: jax.Array, x: jax.Array, other: float) -> jax.Array:
    """`x`, float32 in `Layout.WGMMA`, where a mask is not 0, or its bit is set, as `host/mask_bits.py` has them.

    `mask` has the shape of `x`, or is words of bits, (rows, 8).
    """
    if mask.shape == x.shape:
        return jnp.where(mask != 0, x, other)
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout))
    def emit(_: Any, words: Any, x: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        integer = lambda n: llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, n)).result  # noqa: E731
        number = llvm.ConstantOp(f32, ir.FloatAttr.get(f32, other)).result
        (axis,) = (a for a, (n, m) in enumerate(zip(x.registers.shape, words.registers.shape, strict=True)) if n != m)
        registers = np.empty_like(x.registers)
        for place, register in np.ndenumerate(x.registers):
            bit = 1 << place[axis]
            word = words.registers[(*place[:axis], 0, *place[axis + 1 :])]
            for c in range(2):  # elements of a register
                at = integer(c)
                masked = llvm.and_(llvm.extractelement(word, at), integer(bit - (1 << 32) if bit >> 31 else bit))
                is_set = arith.cmpi(arith.CmpIPredicate.ne, masked, integer(0))
                register = llvm.insertelement(
                    register, arith.select(is_set, llvm.extractelement(register, at), number), at
                )
            registers[place] = register
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(mask, x)


def _to_float32(x: jax.Array, convert: Callable[[Any], Any]) -> jax.Array:
    """A matrix in `Layout.WGMMA`, each of its registers (vectors of some elements) converted."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA),
    )
    def emit(_: Any, array: Any) -> Any:
        registers = np.empty_like(array.registers)
        for place, register in np.ndenumerate(array.registers):
            registers[place] = convert(register)
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return emit(x)
