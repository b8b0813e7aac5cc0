"""The soft cap of logits: a hyperbolic tangent that is cheap beside the softmax, and as accurate as float32.

The GPU's own tangent has an error of 2^-11: for a cap of 50, 0.02 in a logit, more than rounding to 16 bits does to
weights. One made of an exponential and a reciprocal takes twice what the softmax takes of the unit for both. So it is
a polynomial, a short one if no element of a warp's share of a tile is beyond `_NEAR` of the cap, as is usual, a longer
one up to `_FAR`; only warps with an element further out take the exponential.
"""

import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, scf

from ...._semantics.numerics import LOG2E
from ..pallas import plgpu

# tanh(y) = y * polynomial(y^2) up to |y| = _NEAR, or _FAR, to a relative error of 1e-7 (minimax).
_NEAR, _FAR = 0.4, 1.0
_SHORT = 0.9999999019, -0.3333136244, 0.1327097650, -0.0475535930
_LONG = 0.9999999502, -0.3333283915, 0.1332520401, -0.0534570270, 0.0202899758, -0.0062033751, 0.0010410213
# Within these, powers of elements and of the factor in front of them stay in the range of float32.
_LARGEST_FACTOR, _LARGEST_ELEMENT = 1e4, 1e5


def soft_cap(x: jax.Array, factor: Any, size: float) -> jax.Array:
    """size * tanh(factor * x) of a float32 matrix in `Layout.WGMMA`; `factor` is a scalar."""
    factor = jnp.asarray(factor, jnp.float32)
    magnitude, square = jnp.abs(factor), factor * factor
    nearest = jnp.where(magnitude <= _LARGEST_FACTOR, jnp.minimum(_NEAR / magnitude, _LARGEST_ELEMENT), -1.0)
    # Of the polynomial in x itself, which saves a product for each element.
    powers = [factor]
    while len(powers) < len(_SHORT):
        powers.append(powers[-1] * square)
    scalars = nearest, factor, *(power * (c * size) for power, c in zip(powers, _SHORT, strict=True))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,) * (1 + len(scalars)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA),
    )
    def emit(_: Any, array: Any, *scalars: Any) -> Any:
        nearest, factor, *coefficients = (scalar.registers.flat[0] for scalar in scalars)
        pairs = list(array.registers.flat)
        elements = [llvm.extractelement(pair, _index(i)) for pair in pairs for i in range(2)]
        largest = _largest(elements)

        def beyond_near() -> list[Any]:
            text = f"mul.f32 x, $1, $2; abs.f32 x, x; setp.gt.f32 p, x, {_number(_FAR)};"
            is_beyond = _any(text, largest, factor)
            return _either(
                is_beyond,
                lambda: [_exact(x, factor, size) for x in elements],
                lambda: [_far(x, factor, size) for x in elements],
                len(elements),
            )

        is_beyond = _any("setp.gt.f32 p, $1, $2;", largest, nearest)
        capped = _either(is_beyond, beyond_near, lambda: [_near(x, coefficients) for x in elements], len(elements))
        registers = np.empty_like(array.registers)
        for i, place in enumerate(np.ndindex(*registers.shape)):
            pair = llvm.insertelement(llvm.mlir_undef(pairs[i].type), capped[2 * i], _index(0))
            registers[place] = llvm.insertelement(pair, capped[2 * i + 1], _index(1))
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return emit(x, *scalars)


def _largest(elements: list[Any]) -> Any:
    """The largest magnitude of those that a thread has; NaN are left out."""
    largest = [
        _asm("{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.f32 $0, a, b; }", *two)
        for two in zip(elements[::2], elements[1::2], strict=True)
    ]
    while len(largest) > 1:
        pairs = zip(largest[::2], largest[1::2], strict=False)
        largest = [_asm("max.f32 $0, $1, $2;", *two) for two in pairs] + largest[len(largest) // 2 * 2 :]
    return largest[0]


def _any(set_predicate: str, *operands: Any) -> Any:
    """Whether what sets p sets it in any thread of a warp."""
    text = "{ .reg .pred p; .reg .f32 x; " + set_predicate
    text += " vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
    i32 = ir.IntegerType.get_signless(32)
    vote: Any = llvm.inline_asm(i32, list(operands), text, "=r,f,f", has_side_effects=True, asm_dialect=0)
    return llvm.trunc(ir.IntegerType.get_signless(1), vote, overflow_flags=llvm.IntegerOverflowFlags.none)


def _either(condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]], count: int) -> list[Any]:
    branch: Any = scf.IfOp(condition, [ir.F32Type.get()] * count, has_else=True)
    for block, build in ((branch.then_block, then), (branch.else_block, otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_(build())
    return list(branch.results)


def _near(x: Any, coefficients: list[Any]) -> Any:
    text = "mul.f32 s, $1, $1; fma.rn.f32 p, s, $5, $4; fma.rn.f32 p, s, p, $3; fma.rn.f32 p, s, p, $2; "
    return _asm("{ .reg .f32 s, p; " + text + "mul.f32 $0, p, $1; }", x, *coefficients)


def _far(x: Any, factor: Any, size: float) -> Any:
    return _asm("{ .reg .f32 y, s, p; " + _far_text(size) + "mov.f32 $0, p; }", x, factor)


def _exact(x: Any, factor: Any, size: float) -> Any:
    """size - 2 * size / (1 + exp(2 y)), whose limits are right where the exponential overflows; `_far` of small y."""
    text = (
        f"mul.f32 e, y, {_number(2 * LOG2E)}; ex2.approx.ftz.f32 e, e; add.f32 e, e, {_number(1.0)}; "
        f"rcp.approx.ftz.f32 e, e; fma.rn.f32 e, e, {_number(-2 * size)}, {_number(size)}; "
        f"abs.f32 y, y; setp.lt.f32 far, y, {_number(_FAR)}; selp.f32 $0, p, e, far; }}"
    )
    return _asm("{ .reg .f32 y, s, p, e; .reg .pred far; " + _far_text(size) + text, x, factor)


def _far_text(size: float) -> str:
    """y = factor * x, and p its tangent."""
    first, second, *others = (_number(c * size) for c in _LONG[::-1])
    steps = "".join(f"fma.rn.f32 p, s, p, {c}; " for c in others)
    return f"mul.f32 y, $1, $2; mul.f32 s, y, y; fma.rn.f32 p, s, {first}, {second}; {steps}mul.f32 p, p, y; "


def _asm(text: str, *operands: Any) -> Any:
    constraints = ",".join(["=f", *"f" * len(operands)])
    return llvm.inline_asm(ir.F32Type.get(), list(operands), text, constraints, asm_dialect=0)


def _index(i: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, i)).result


def _number(x: float) -> str:
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"
