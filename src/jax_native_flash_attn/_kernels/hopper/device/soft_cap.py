"""The soft cap of logits: a hyperbolic tangent that is cheap beside the softmax, and as accurate as products are.

The GPU's own tangent has an error of 2^-11: for a cap of 50, 0.02 in a logit, more than rounding to 16 bits does to
weights. One made of an exponential and a reciprocal takes twice what the softmax takes of the unit for both. So where
no element of a warp's share of a tile is beyond `_NEAR` of the cap, as is usual, it is a polynomial.
"""

import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, scf

from ...._semantics.numerics import LOG2E
from ..pallas import plgpu

# tanh(y) = y * polynomial(y^2) up to |y| = _NEAR, to a relative error of 1.1e-5 (minimax).
_NEAR = 0.75
_COEFFICIENTS = 0.9999889835, -0.3326967034, 0.1274269473, -0.0354527593
# Where factors in front of elements, and elements themselves, leave the powers of the polynomial in range.
_LARGEST_FACTOR, _LARGEST_ELEMENT = 1e4, 1e5
_COARSE = 512.0  # a size from which on the exponential's rounding, 1e-7 of the size, matters to small elements


def soft_cap(x: jax.Array, factor: Any, size: float) -> jax.Array:
    """size * tanh(factor * x) of a float32 matrix in `Layout.WGMMA`; `factor` is a scalar."""
    factor = jnp.asarray(factor, jnp.float32)
    magnitude, square = jnp.abs(factor), factor * factor
    nearest = jnp.where(magnitude <= _LARGEST_FACTOR, jnp.minimum(_NEAR / magnitude, _LARGEST_ELEMENT), -1.0)
    powers = [factor]
    while len(powers) < len(_COEFFICIENTS):
        powers.append(powers[-1] * square)
    coefficients = [power * (c * size) for power, c in zip(powers, _COEFFICIENTS, strict=True)]
    scalars = nearest, factor * (2 * LOG2E), *coefficients

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,) * (1 + len(scalars)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA),
    )
    def emit(_: Any, array: Any, *scalars: Any) -> Any:
        nearest, exponent_factor, *coefficients = (scalar.registers.flat[0] for scalar in scalars)
        pairs = list(array.registers.flat)
        elements = [llvm.extractelement(pair, _index(i)) for pair in pairs for i in range(2)]
        branch = scf.IfOp(_any_beyond(elements, nearest), [ir.F32Type.get()] * len(elements), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([_exact(element, exponent_factor, coefficients, size) for element in elements])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([_near(element, coefficients) for element in elements])
        registers = np.empty_like(array.registers)
        capped = list(branch.results)
        for i, place in enumerate(np.ndindex(*registers.shape)):
            pair = llvm.insertelement(llvm.mlir_undef(pairs[i].type), capped[2 * i], _index(0))
            registers[place] = llvm.insertelement(pair, capped[2 * i + 1], _index(1))
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return emit(x, *scalars)


def _any_beyond(elements: list[Any], nearest: Any) -> Any:
    """Whether the magnitude of any element of the warp is above `nearest`; NaN is not."""
    largest = [
        _asm("{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b; }", *two)
        for two in zip(elements[::2], elements[1::2], strict=True)
    ]
    while len(largest) > 1:
        pairs = zip(largest[::2], largest[1::2], strict=False)
        largest = [_asm("max.f32 $0, $1, $2;", *two) for two in pairs] + largest[len(largest) // 2 * 2 :]
    text = (
        "{ .reg .pred beyond; setp.gt.f32 beyond, $1, $2; vote.sync.any.pred beyond, beyond, 0xffffffff; "
        "selp.b32 $0, 1, 0, beyond; }"
    )
    i32 = ir.IntegerType.get_signless(32)
    operands = [largest[0], nearest]
    vote = llvm.inline_asm(i32, operands, text, "=r,f,f", has_side_effects=True, asm_dialect=0)
    return llvm.trunc(ir.IntegerType.get_signless(1), vote, overflow_flags=llvm.IntegerOverflowFlags.none)


_POLYNOMIAL = (
    "mul.f32 s, $1, $1; fma.rn.f32 p, s, $5, $4; fma.rn.f32 p, s, p, $3; fma.rn.f32 p, s, p, $2; mul.f32 p, p, $1; "
)


def _near(x: Any, coefficients: list[Any]) -> Any:
    return _asm("{ .reg .f32 s, p; " + _POLYNOMIAL + "mov.f32 $0, p; }", x, *coefficients)


def _exact(x: Any, exponent_factor: Any, coefficients: list[Any], size: float) -> Any:
    """size - 2 * size / (1 + exp(2 * factor * x)), whose limits are right where the exponential overflows."""
    is_coarse = size >= _COARSE
    exact = (
        f"mul.f32 y, $1, ${6 if is_coarse else 2}; ex2.approx.ftz.f32 e, y; add.f32 e, e, 0f3F800000; "
        f"rcp.approx.ftz.f32 e, e; fma.rn.f32 e, e, {_number(-2 * size)}, {_number(size)}; "
    )
    if not is_coarse:
        return _asm("{ .reg .f32 y, e; " + exact + "mov.f32 $0, e; }", x, exponent_factor)
    choice = f"abs.f32 y, y; setp.lt.f32 near, y, {_number(_NEAR * 2 * LOG2E)}; selp.f32 $0, p, e, near; "
    registers = "{ .reg .f32 s, p, y, e; .reg .pred near; "
    return _asm(registers + _POLYNOMIAL + exact + choice + "}", x, *coefficients, exponent_factor)


def _asm(text: str, *operands: Any) -> Any:
    constraints = ",".join(["=f", *"f" * len(operands)])
    return llvm.inline_asm(ir.F32Type.get(), list(operands), text, constraints, asm_dialect=0)


def _index(i: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, i)).result


def _number(x: float) -> str:
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"
