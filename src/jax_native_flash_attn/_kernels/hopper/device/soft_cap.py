"""The soft cap of logits: a hyperbolic tangent that is cheap beside the softmax, and as accurate as float32.

The GPU's own tangent has an error of 2^-11: for a cap of 50, 0.02 in a logit, more than rounding to 16 bits does to
weights. One made of an exponential and a reciprocal takes twice what the softmax takes of the unit for both. So it is
a polynomial, the shortest if no element of a warp's share of a tile is beyond `_NEAREST` of the cap, as is usual,
longer ones up to `_NEAR` and `_FAR`; only warps with an element further out take the exponential.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from ...._semantics.numerics import LOG2E
from ..pallas import plgpu

# tanh(y) = y * polynomial(y^2) up to |y| = _NEAREST, _NEAR or _FAR, to a relative error of 1e-7 (minimax).
_NEAREST, _NEAR, _FAR = 0.2, 0.4, 1.0
_SHORTEST = 0.9999998948, -0.3332859090, 0.1301540755
_SHORT = 0.9999999019, -0.3333136244, 0.1327097650, -0.0475535930
_LONG = 0.9999999502, -0.3333283915, 0.1332520401, -0.0534570270, 0.0202899758, -0.0062033751, 0.0010410213
# Within these, powers of elements and of the factor in front of them stay in the range of float32.
_LARGEST_FACTOR, _LARGEST_ELEMENT = 1e4, 1e5


def soft_cap(x: jax.Array, factor: Any, size: float) -> jax.Array:
    """size * tanh(factor * x) of a float32 matrix in `Layout.WGMMA`; `factor` is a scalar."""
    scalars = _scalars(factor, size)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * (1 + len(scalars)), return_type=_type_of(x))
    def emit(_: Any, array: Any, *scalars: Any) -> Any:
        nearest, factor, *coefficients = (scalar.registers.flat[0] for scalar in scalars)
        elements = _elements(array)
        largest, count = _largest(elements), len(elements)

        def all_of(tangent: Callable[[Any, Any, float], Any]) -> Callable[[], list[Any]]:
            return lambda: [tangent(x, factor, size) for x in elements]

        def is_beyond(part: float) -> Any:
            return _any(f"mul.f32 x, $1, $2; abs.f32 x, x; setp.gt.f32 p, x, {_number(part)};", largest, factor)

        def beyond_near() -> list[Any]:
            return _either(is_beyond(_FAR), all_of(_exact), all_of(_far), count)

        def beyond_nearest() -> list[Any]:
            return _either(is_beyond(_NEAR), beyond_near, all_of(_near), count)

        def near() -> list[Any]:
            return [_nearest(x, coefficients) for x in elements]

        capped = _either(_any("setp.gt.f32 p, $1, $2;", largest, nearest), beyond_nearest, near, count)
        return _like(array, capped)

    return emit(x, *scalars)


class Prepared(NamedTuple):
    """What the shortest polynomial, with these coefficients, makes the tangents of."""

    x: jax.Array
    coefficients: tuple[jax.Array, ...]


def prepare(x: jax.Array, factor: Any, size: float) -> Prepared:
    """The part of `soft_cap` that has branches, for kernels without registers for one beside their products.

    Where elements are too large for the shortest polynomial, they are replaced by their tangents, and its coefficients
    by those that multiply these by size.
    """
    scalars = _scalars(factor, size)
    scalar = plgpu.ShapeDtypeStruct((), jnp.float32, plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,) * (1 + len(scalars)), return_type=(_type_of(x), *(scalar,) * len(_SHORTEST))
    )
    def emit(_: Any, array: Any, *scalars: Any) -> Any:
        nearest, factor, *coefficients = (scalar.registers.flat[0] for scalar in scalars)
        elements = _elements(array)
        found, count = [*elements, *coefficients], len(elements) + len(coefficients)
        # One after the other: with one inside of another, products wait for each other, for want of registers.
        for is_right, tangent in zip(_which(_largest(elements), nearest, factor), (_near, _far, _exact), strict=True):

            def as_tangents(tangent: Callable[[Any, Any, float], Any] = tangent) -> list[Any]:
                return [*(tangent(x, factor, 1.0) for x in elements), *map(_constant, (size, 0.0, 0.0))]

            found = _either(is_right, as_tangents, lambda found=found: found, count)
        return _like(array, found), *(mgpu.FragmentedArray.splat(x, ()) for x in found[len(elements) :])

    x, *coefficients = emit(x, *scalars)
    return Prepared(x, tuple(coefficients))


def tangents(prepared: Prepared) -> jax.Array:
    """As `soft_cap` gives them."""
    x, coefficients = prepared

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,) * (1 + len(coefficients)), return_type=_type_of(x))
    def emit(_: Any, array: Any, *coefficients: Any) -> Any:
        of_thread = [x.registers.flat[0] for x in coefficients]
        return _like(array, [_nearest(x, of_thread) for x in _elements(array)])

    return emit(x, *coefficients)


def _scalars(factor: Any, size: float) -> tuple[jax.Array, ...]:
    """Up to where the shortest polynomial holds, the factor, and that polynomial's coefficients.

    They are those of the polynomial in x itself, which saves a product for each element.
    """
    factor = jnp.asarray(factor, jnp.float32)
    magnitude, square = jnp.abs(factor), factor * factor
    nearest = jnp.where(magnitude <= _LARGEST_FACTOR, jnp.minimum(_NEAREST / magnitude, _LARGEST_ELEMENT), -1.0)
    powers = factor, factor * square, factor * square * square
    return nearest, factor, *(power * (c * size) for power, c in zip(powers, _SHORTEST, strict=True))


def _type_of(x: jax.Array) -> Any:
    return plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA)


def _elements(array: Any) -> list[Any]:
    """Those that a thread has."""
    return [llvm.extractelement(pair, _index(i)) for pair in array.registers.flat for i in range(2)]


def _like(array: Any, elements: list[Any]) -> Any:
    """The matrix of the first of these elements."""
    registers = np.empty_like(array.registers)
    for i, place in enumerate(np.ndindex(*registers.shape)):
        pair = llvm.insertelement(llvm.mlir_undef(array.registers.flat[i].type), elements[2 * i], _index(0))
        registers[place] = llvm.insertelement(pair, elements[2 * i + 1], _index(1))
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)


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


def _which(largest: Any, nearest: Any, factor: Any) -> list[Any]:
    """Whether elements of a warp are beyond the nearest: all within `_NEAR`, or else within `_FAR`, or not."""
    i32, compare = ir.IntegerType.get_signless(32), arith.CmpFPredicate
    # Numbers that are not negative compare as their bits do.
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    bits: Any = llvm.inline_asm(i32, [llvm.bitcast(i32, largest)], text, "=r,r", has_side_effects=True, asm_dialect=0)
    largest = llvm.bitcast(ir.F32Type.get(), bits)
    y = _asm("{ .reg .f32 y; mul.f32 y, $1, $2; abs.f32 $0, y; }", largest, factor)
    beyond = [arith.cmpf(compare.OGT, *x) for x in ((largest, nearest), (y, _constant(_NEAR)), (y, _constant(_FAR)))]
    true = arith.constant(ir.IntegerType.get_signless(1), 1)
    within = [arith.xori(x, true) for x in beyond[1:]]
    return [arith.andi(beyond[0], within[0]), arith.andi(beyond[1], within[1]), beyond[2]]


def _either(condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]], count: int) -> list[Any]:
    """So many float32."""
    branch: Any = scf.IfOp(condition, [ir.F32Type.get()] * count, has_else=True)
    for block, build in ((branch.then_block, then), (branch.else_block, otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_(build())
    return list(branch.results)


def _nearest(x: Any, coefficients: Sequence[Any]) -> Any:
    text = "mul.f32 s, $1, $1; fma.rn.f32 p, s, $4, $3; fma.rn.f32 p, s, p, $2; mul.f32 $0, p, $1;"
    return _asm("{ .reg .f32 s, p; " + text + " }", x, *coefficients)


def _near(x: Any, factor: Any, size: float) -> Any:
    return _asm("{ .reg .f32 y, s, p; " + _tangent(_SHORT, size) + "mov.f32 $0, p; }", x, factor)


def _far(x: Any, factor: Any, size: float) -> Any:
    return _asm("{ .reg .f32 y, s, p; " + _tangent(_LONG, size) + "mov.f32 $0, p; }", x, factor)


def _exact(x: Any, factor: Any, size: float) -> Any:
    """size - 2 * size / (1 + exp(2 y)), whose limits are right where the exponential overflows; `_far` of small y."""
    text = (
        f"mul.f32 e, y, {_number(2 * LOG2E)}; ex2.approx.ftz.f32 e, e; add.f32 e, e, {_number(1.0)}; "
        f"rcp.approx.ftz.f32 e, e; fma.rn.f32 e, e, {_number(-2 * size)}, {_number(size)}; "
        f"abs.f32 y, y; setp.lt.f32 far, y, {_number(_FAR)}; selp.f32 $0, p, e, far; }}"
    )
    return _asm("{ .reg .f32 y, s, p, e; .reg .pred far; " + _tangent(_LONG, size) + text, x, factor)


def _tangent(coefficients: tuple[float, ...], size: float) -> str:
    """y = factor * x, and p its tangent times size."""
    first, second, *others = (_number(c * size) for c in reversed(coefficients))
    steps = "".join(f"fma.rn.f32 p, s, p, {c}; " for c in others)
    return f"mul.f32 y, $1, $2; mul.f32 s, y, y; fma.rn.f32 p, s, {first}, {second}; {steps}mul.f32 p, p, y; "


def _asm(text: str, *operands: Any) -> Any:
    constraints = ",".join(["=f", *"f" * len(operands)])
    return llvm.inline_asm(ir.F32Type.get(), list(operands), text, constraints, asm_dialect=0)


def _index(i: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, i)).result


def _constant(x: float) -> Any:
    return llvm.ConstantOp(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), x)).result


def _number(x: float) -> str:
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"
