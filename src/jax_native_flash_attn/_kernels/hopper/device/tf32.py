"""Products of float32 in TensorFloat-32 whose left operand is in registers, which Pallas' `wgmma` does not take.

A thread holds columns 2 t and 2 t + 1 of every eight of a matrix in registers (`Layout.WGMMA`), t being its number
among the four that share a row. wgmma takes from it columns t and t + 4 of a left operand in TensorFloat-32 (PTX ISA,
the figure for .m64k8). The order of what is contracted does not matter to a product as long as both operands have the
same: so nothing is exchanged between threads, and the right operand comes in that order (`turn.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from ..host.tf32 import SWIZZLE, TILE
from ..pallas import plgpu

TILES = plgpu.RefType((plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(SWIZZLE)))
_STEP = 8  # what one wgmma contracts, 32 bytes of each row


def add_products(*products: tuple[Any, Any, Any]) -> tuple[jax.Array, ...]:
    """acc + a b^T of each (acc, a, b), done when it returns.

    `acc` is (64, n) and `a` (64, k), in registers. `b` is a reference to shared memory, (n, k), whose columns come in
    the order that `turn.py` gives them.
    """
    in_registers = plgpu.Layout.WGMMA
    results = tuple(plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, in_registers) for acc, _, _ in products)

    @plgpu.inline_mgpu(arg_types=((in_registers, in_registers, TILES),) * len(products), return_type=results)
    def emit(_: Any, *products: Any) -> Any:
        sums = [x for acc, _, _ in products for x in _elements(acc)]
        left = [x for _, a, _ in products for x in _elements(a)]
        descriptors, offsets = zip(*(_descriptor(b) for _, _, b in products), strict=True)
        widths = [acc.shape[1] for acc, _, _ in products]
        text = _program(widths, [a.shape[1] for _, a, _ in products], offsets)
        f32 = ir.F32Type.get()
        constraints = [*["=f"] * len(sums), *map(str, range(len(sums))), *["f"] * len(left), *["l"] * len(products)]
        both: Any = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * len(sums)),
            [*sums, *left, *descriptors],
            text,
            ",".join(constraints),
            has_side_effects=True,
            asm_dialect=0,
        )
        numbers = [llvm.extractvalue(f32, both, [i]) for i in range(len(sums))]
        results, start = [], 0
        for acc, _, _ in products:
            count = 2 * acc.registers.size
            results.append(_with_elements(acc, numbers[start : start + count]))
            start += count
        return tuple(results)

    return emit(*products)


def _program(widths: list[int], depths: list[int], offsets: tuple[Any, ...]) -> str:
    """Left operands rounded to the nearest, then all products.

    Operands: the results, again (as the compiler counts what they start from), left operands and descriptors.
    """
    # A thread has a half of the columns of two rows, in each matrix.
    num_sums, num_left = sum(widths) // 2, sum(depths) // 2
    lines = [f".reg .pred adds; .reg .b64 b; .reg .b32 a<{num_left}>;", "setp.ne.b32 adds, 1, 0;"]
    lines += [f"cvt.rna.tf32.f32 a{i}, ${2 * num_sums + i};" for i in range(num_left)]
    lines.append("wgmma.fence.sync.aligned;")
    first_sum = first_left = 0
    for number, (n, k, steps) in enumerate(zip(widths, depths, offsets, strict=True)):
        acc = ", ".join(f"${first_sum + i}" for i in range(n // 2))
        for step in range(k // _STEP):
            # Two columns of row r, then of row r + 8: wgmma wants both rows' first columns first.
            a = ", ".join(f"a{first_left + 4 * step + i}" for i in (0, 2, 1, 3))
            lines.append(f"add.s64 b, ${2 * num_sums + num_left + number}, {steps(step * _STEP)};")
            lines.append(
                f"wgmma.mma_async.sync.aligned.m64n{n}k{_STEP}.f32.tf32.tf32 {{{acc}}}, {{{a}}}, b, adds, 1, 1;"
            )
        first_sum, first_left = first_sum + n // 2, first_left + k // 2
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    return "{ " + " ".join(lines) + " }"


def _descriptor(b: Any) -> tuple[Any, Any]:
    """Of the first columns, and what to add to it for others."""
    rows = ir.MemRefType(b.type).shape[0] * 8
    transposed = mgpu.memref_transpose(b, (1, 0, 3, 2))
    description: Any = mma_utils.create_descriptor(
        transposed, swizzle=SWIZZLE, group_size=(TILE, rows), logical_k_major=True
    )
    (first, (_, (step_bytes,))), (_, tile_bytes), _ = description

    def offset(column: int) -> int:
        tile, within = divmod(column, TILE)
        return mma_utils.encode_addr(tile * tile_bytes + within // _STEP * step_bytes)

    return first, offset


def _elements(x: Any) -> list[Any]:
    """Of every eight columns, in this order: two of a row, and two of the row 8 below."""
    index = ir.IntegerType.get_signless(32)
    numbers = [llvm.ConstantOp(index, ir.IntegerAttr.get(index, i)).result for i in range(2)]
    return [llvm.extractelement(pair, number) for pair in x.registers.flat for number in numbers]


def _with_elements(like: Any, elements: list[Any]) -> Any:
    """The inverse of `_elements`."""
    index = ir.IntegerType.get_signless(32)
    registers = like.registers.copy()
    for i, place in enumerate(np.ndindex(registers.shape)):
        pair: Any = llvm.mlir_undef(ir.VectorType.get((2,), ir.F32Type.get()))
        for j in range(2):
            number = llvm.ConstantOp(index, ir.IntegerAttr.get(index, j)).result
            pair = llvm.insertelement(pair, elements[2 * i + j], number)
        registers[place] = pair
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)
